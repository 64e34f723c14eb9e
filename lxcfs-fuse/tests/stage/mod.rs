//! A stage for tests and the bench: a run directory, a cgroup of its own, a registration that points to it, the
//! real program. All of it goes when the stage is dropped.

// Each user takes what it needs.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use kernel::cgroup::{Controller, Group, Hierarchies};
use lxcfs_fuse::clock::Now;

/// A service with one registered server, number 1.
pub struct Stage {
    program: PathBuf,
    directory: tempfile::TempDir,
    pub group: Group,
}

impl Stage {
    /// Makes the cgroup and the registration; starts nothing.
    pub fn new(program: &Path) -> Stage {
        let group = new_group();
        let directory = tempfile::tempdir().expect("make a temporary directory");
        std::fs::create_dir(directory.path().join("servers")).expect("make the directory of registrations");
        let stage = Stage { program: program.to_owned(), directory, group };
        stage.register(1);
        stage
    }

    /// The run directory.
    pub fn run(&self) -> PathBuf {
        self.directory.path().canonicalize().expect("the run directory exists")
    }

    /// A served file of server 1.
    pub fn file(&self, path: &str) -> PathBuf {
        self.run().join("mount/1").join(path)
    }

    /// The registration file of a server.
    pub fn registration(&self, id: u64) -> PathBuf {
        self.run().join(format!("servers/{id}.toml"))
    }

    /// Registers the stage's cgroup as server `id`, started 100 s ago.
    pub fn register(&self, id: u64) {
        self.register_group(id, &self.group);
    }

    /// Registers a cgroup as server `id`, started 100 s ago.
    pub fn register_group(&self, id: u64, group: &Group) {
        let started = Now::read().boottime_ns.saturating_sub(100_000_000_000);
        let mut text = format!("name = \"stage\"\nstarted_boottime_ns = {started}\n\n[cgroup]\n");
        if let Some(directory) = group.unified_directory() {
            text += &format!("unified = {directory:?}\n");
        }
        for controller in [
            Controller::Cpu,
            Controller::Cpuacct,
            Controller::Cpuset,
            Controller::Memory,
            Controller::Blkio,
            Controller::Pids,
        ] {
            // On pure v2 only the unified directory is registered.
            let directory = group.directory(controller);
            if let Some(directory) = directory.filter(|found| Some(found) != group.unified_directory().as_ref()) {
                text += &format!("{} = {directory:?}\n", controller.as_str());
            }
        }
        kernel::file::replace(&self.registration(id), text.as_bytes(), 0o644).expect("write a registration");
    }

    /// Runs `lxcfs-fuse VERB --run DIR`; its exit code and its output.
    pub fn command(&self, verb: &str) -> (Option<i32>, String) {
        let output =
            Command::new(&self.program).arg(verb).arg("--run").arg(self.run()).output().expect("run the program");
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    /// Starts the service.
    pub fn serve(&self) {
        let (code, text) = self.command("serve");
        assert_eq!(code, Some(0), "serve: {text}{}", self.log());
    }

    /// The supervisor's pid.
    pub fn supervisor(&self) -> i32 {
        let text = std::fs::read_to_string(self.run().join("pid")).expect("there is a pid file");
        text.trim().parse().expect("the pid file holds a pid")
    }

    /// The worker's pid; `None` between two.
    pub fn worker(&self) -> Option<i32> {
        children(self.supervisor()).into_iter().next()
    }

    /// What supervisor and workers have said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.run().join("log")).unwrap_or_default()
    }

    /// Whether anything is mounted at or below the run directory.
    pub fn has_mounts(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
        let run = self.run();
        kernel::mount::parse_mountinfo(&mounts).iter().any(|mount| mount.mount_point.starts_with(&run))
    }
}

/// A cgroup that nobody else has.
pub fn new_group() -> Group {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("lxcfs-fuse-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let group = Group::new(&Hierarchies::detect().expect("find the cgroup hierarchies"), &name);
    group.create().expect("create a cgroup");
    group
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.command("stop");
        let _ = self.group.kill();
        let _ = self.group.remove();
    }
}

/// The living children of a process. Linux may answer incompletely while they change; a test asks again.
pub fn children(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(|&pid| is_alive(pid)).collect()
}

/// Whether a process exists and has not ended.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}
