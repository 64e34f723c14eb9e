//! Our side of the bench: an installation of its own, driven through the command line.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use system_tests::{
    command::Invocation,
    site::{self, Site},
};

/// The limits that every measured server has, ours and theirs.
pub const MEMORY: &str = "128M";
/// How long a mass start may take.
const LIMIT: Duration = Duration::from_secs(900);

/// An installation with the busybox template. Dropped, it leaves nothing.
pub struct Ours(Site);

impl Ours {
    /// Makes it.
    pub fn new() -> Result<Self> {
        site::sweep();
        let ours = Self(Site::new()?);
        ours.call(&["template", "build", "busybox"])?;
        Ok(ours)
    }

    /// Its `VSOS_ROOT`.
    pub fn root(&self) -> &Path {
        self.0.root()
    }

    /// The template's root: the guest of all.
    pub fn guest(&self) -> PathBuf {
        self.0.path("var/lib/vsos/templates/busybox/root")
    }

    /// Creates a server with limits.
    pub fn create(&self, name: &str) -> Result<Duration> {
        self.call(&["create", name, "--template", "busybox", "--memory", MEMORY, "--cpus", "1", "--pids", "200"])
    }

    /// Creates and starts one.
    pub fn create_and_start(&self, name: &str) -> Result<Duration> {
        let limits = ["--memory", MEMORY, "--cpus", "1", "--pids", "200", "--start"];
        self.call(&[&["create", name, "--template", "busybox"], &limits[..]].concat())
    }

    /// Starts all by one command.
    pub fn start(&self, names: &[&str]) -> Result<Duration> {
        self.call(&[&["start"], names].concat())
    }

    /// Runs the shortest command there is.
    pub fn exec_true(&self, name: &str) -> Result<Duration> {
        self.call(&["exec", name, "--", "/bin/true"])
    }

    /// Kills all by one command.
    pub fn kill(&self, names: &[&str]) -> Result<Duration> {
        self.call(&[&["stop", "--kill"], names].concat())
    }

    /// Destroys all by one command.
    pub fn destroy(&self, names: &[&str]) -> Result<Duration> {
        self.call(&[&["destroy", "--force"], names].concat())
    }

    /// Lists all that are defined.
    pub fn list(&self) -> Result<Duration> {
        self.call(&["list", "-a"])
    }

    fn call(&self, words: &[&str]) -> Result<Duration> {
        let call: Invocation = self.0.vsctl(words).limit(LIMIT);
        Ok(call.succeed()?.took)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.0.scrub();
    }
}
