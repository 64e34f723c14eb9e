//! Our side of the bench: an installation of its own, driven through the command line.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
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

    /// Creates a server that may use all CPUs of the host: its limit is told and does not slow who reads.
    pub fn create_unslowed(&self, name: &str) -> Result<Duration> {
        let cpus = std::thread::available_parallelism()?.to_string();
        self.call(&["create", name, "--template", "busybox", "--memory", MEMORY, "--cpus", &cpus, "--pids", "200"])
    }

    /// The path of a server's control group below each hierarchy's root.
    pub fn group(&self, name: &str) -> String {
        format!("{}/{name}", self.0.cgroup())
    }

    /// The process id of a server's init.
    pub fn init(&self, name: &str) -> Result<i32> {
        let status = self.0.vsctl(["status", name, "--json"]).succeed()?.json()?;
        let pid = status.get(0).unwrap_or(&status)["pid"].as_i64();
        Ok(i32::try_from(pid.with_context(|| format!("no pid in {status}"))?)?)
    }

    /// Where the FUSE file system of all servers is mounted.
    pub fn views(&self) -> PathBuf {
        self.0.path("run/vsos/lxcfs/mount")
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
