//! A FUSE file system of another program's, for the bench: in a mount namespace of its own, so that nothing is mounted on
//! the host, and gone with its process however the bench ends.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, bail};
use system_tests::command::{Background, FOREVER, Invocation, eventually};
use tempfile::TempDir;

/// The first program in the namespace: `/run` is empty there, as lxcfs makes directories in it.
const INSIDE: &str = "mount -t tmpfs none /run && exec \"$@\"";

/// A process with a file system, and the directory that it is mounted on. Dropped, both are gone.
pub struct Mounted {
    process: Background,
    directory: TempDir,
}

impl Mounted {
    /// Runs a program with the place to mount at for its last word, and waits until the file system has `file`.
    pub fn by(program: &str, words: &[&str], file: &str) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("vsosbench-").tempdir_in("/var/tmp")?;
        let call = Invocation::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"])
            .args(["sh", "-c", INSIDE, "sh", program])
            .args(words)
            .args([directory.path()])
            .limit(FOREVER);
        let mut mounted = Self { process: call.spawn()?, directory };
        let there = mounted.place().join(file);
        let waited = eventually(&format!("{file} of {program}"), Duration::from_secs(10), || {
            (there.exists() || !mounted.process.is_running()).then_some(())
        });
        if !mounted.process.is_running() {
            mounted.process.wait()?.success()?;
            bail!("{program} ended and did not serve");
        }
        waited.map(|()| mounted)
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Its root, as the host reaches it.
    pub fn place(&self) -> PathBuf {
        // The whole path, without its slash, from the root that the process sees.
        let path = self.directory.path().strip_prefix("/").unwrap_or(self.directory.path());
        PathBuf::from(format!("/proc/{}/root", self.process.pid())).join(path)
    }
}
