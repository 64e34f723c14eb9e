//! Groups in the hierarchies of this host.

use kernel::cgroup::{Controller, CpuSet, Group, Hierarchies};
use kernel::channel;
use kernel::process::{CloneOptions, Fork, PidFd, fork};

use crate::Outcome;
use crate::child::{self, ensure, ensure_equal};

/// A group of a test, ended and removed with the value.
pub struct TestGroup(pub Group);

impl TestGroup {
    pub fn new(suffix: &str) -> Result<Self, Box<dyn std::error::Error>> {
        Self::with(&Hierarchies::detect()?, suffix)
    }

    /// In some of the host's hierarchies only.
    fn with(hierarchies: &Hierarchies, suffix: &str) -> Result<Self, Box<dyn std::error::Error>> {
        let group = Group::new(hierarchies, &format!("kernel-test-{}{suffix}", std::process::id()));
        group.create()?;
        Ok(TestGroup(group))
    }

    /// A child that is in every hierarchy of the group and sleeps until it is killed.
    pub fn sleeper(&self) -> Result<(i32, PidFd), Box<dyn std::error::Error>> {
        let (ours, theirs) = channel::pair()?;
        let options = CloneOptions { cgroup: self.0.open_unified()?, ..Default::default() };
        match fork(&options)? {
            Fork::Parent { pid, pidfd } => {
                drop(theirs);
                let (words, _) = ours.receive()?;
                if words == b"ready" { Ok((pid, pidfd)) } else { Err("the sleeper failed".into()) }
            }
            Fork::Child => {
                // Leaves with the test even when that fails halfway.
                let ready = kernel::process::set_parent_death_signal(libc::SIGKILL)
                    .and_then(|()| self.0.attach_self_v1())
                    .and_then(|()| theirs.send(b"ready", &[]));
                if ready.is_err() {
                    std::process::exit(1);
                }
                loop {
                    std::thread::park();
                }
            }
        }
    }
}

impl Drop for TestGroup {
    fn drop(&mut self) {
        // A group of zombies counts as empty, so nobody has to be reaped for this.
        let ended = self.0.kill().and_then(|()| self.0.wait_empty(10_000).map(drop)).and_then(|()| self.0.remove());
        if let Err(error) = ended {
            eprintln!("{}", crate::child::chain(&error));
        }
    }
}

pub fn is_made_in_every_hierarchy_or_none() -> Outcome {
    let group = TestGroup::new("")?;
    for controller in Controller::ALL {
        if let Some(directory) = group.0.directory(controller) {
            ensure(directory.is_dir(), format!("{} is missing", directory.display()))?;
        }
    }
    let again = group.0.create().expect_err("a second creation must fail");
    ensure_equal("second creation", again.kind(), std::io::ErrorKind::AlreadyExists)?;
    ensure(group.0.exists(), "the failed creation must not remove what was there")?;
    group.0.ensure()?;

    // Taken in the last hierarchy only: what was made in those before must go again.
    let other = Group::new(&Hierarchies::detect()?, &format!("kernel-test-{}-half", std::process::id()));
    let Some(last) = other.unified_directory() else {
        return Ok(());
    };
    std::fs::create_dir(&last)?;
    let refused = other.create().is_err();
    let left = Controller::ALL.into_iter().filter_map(|controller| other.directory(controller));
    let left: Vec<_> = left.filter(|directory| *directory != last && directory.exists()).collect();
    std::fs::remove_dir(&last)?;
    ensure(refused && left.is_empty(), format!("left over: {left:?}"))
}

pub fn limits_are_read_back() -> Outcome {
    const MIB: u64 = 1 << 20;
    let group = TestGroup::new("")?;
    // Up, down, to none and back, each with and without swap: every order of the two writes of v1.
    for (memory, swap) in [
        (Some(64 * MIB), Some(32 * MIB)),
        (Some(256 * MIB), Some(0)),
        (Some(32 * MIB), Some(512 * MIB)),
        (None, None),
        (Some(64 * MIB), None),
        (Some(64 * MIB), Some(0)),
    ] {
        group.0.set_memory(memory, swap)?;
        let usage = group.0.usage()?;
        ensure_equal("memory limit", usage.memory_limit_bytes, memory)?;
        ensure_equal("swap limit", usage.swap_limit_bytes, swap)?;
    }
    group.0.set_pids(Some(77))?;
    ensure_equal("tasks", group.0.usage()?.pids_limit, Some(77))?;
    group.0.set_pids(None)?;
    ensure_equal("tasks", group.0.usage()?.pids_limit, None)?;
    for cpus in [Some(0.5), Some(2.0), Some(0.001), None] {
        group.0.set_cpus(cpus)?;
    }
    let first: CpuSet = CpuSet::online()?.iter().take(1).collect();
    group.0.set_cpuset(Some(&first))?;
    group.0.set_cpuset(None)?;
    Ok(())
}

pub fn takes_processes_both_ways() -> Outcome {
    let (own, other) = (TestGroup::new("-a")?, TestGroup::new("-b")?);
    let (pid, process) = own.sleeper()?;
    other.0.attach(pid)?;
    ensure_equal("members after moving", other.0.processes()?, vec![pid])?;
    ensure_equal("members left behind", own.0.processes()?, vec![])?;
    let listed = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let ours = listed.lines().filter(|line| !line.contains("name="));
    for line in ours {
        ensure(line.ends_with("-b"), format!("{line} is not the group the process was moved to"))?;
    }
    other.0.kill()?;
    process.reap()?;
    ensure(other.0.wait_empty(10_000)?, "the killed group must become empty")?;

    // Moving itself is the cheap way; it must reach every hierarchy as well.
    let (pid, _process) = own.sleeper()?;
    let listed = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    for line in listed.lines().filter(|line| !line.contains("name=")) {
        ensure(line.ends_with("-a"), format!("{line} is not the group the process moved itself to"))?;
    }
    ensure_equal("tasks", own.0.usage()?.tasks, 1)
}

pub fn freezes_thaws_and_kills() -> Outcome {
    freeze_thaw_and_kill(&TestGroup::new("")?)
}

/// What a host without cgroup2 would do, on the v1 hierarchies of one that has both.
pub fn freezes_thaws_and_kills_without_cgroup2() -> Outcome {
    let all = Hierarchies::detect()?;
    let v1 = Controller::ALL.into_iter().filter_map(|controller| Some((controller, all.v1(controller)?.to_owned())));
    let v1 = Hierarchies::at(None, v1.collect());
    if v1.v1(Controller::Freezer).is_none() {
        return child::skip("no v1 freezer is mounted");
    }
    freeze_thaw_and_kill(&TestGroup::with(&v1, "-v1")?)
}

fn freeze_thaw_and_kill(group: &TestGroup) -> Outcome {
    let (_, process) = group.sleeper()?;
    group.0.freeze()?;
    ensure(group.0.is_frozen()?, "frozen")?;
    group.0.thaw()?;
    ensure(!group.0.is_frozen()?, "thawed")?;
    group.0.freeze()?;
    group.0.kill()?;
    ensure(process.wait_exit(Some(10_000))?, "a frozen process must be killable")?;
    let status = process.reap()?;
    ensure_equal("signal", std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL))
}

pub fn is_removed_with_those_below() -> Outcome {
    let group = TestGroup::new("")?;
    let directory = group.0.unified_directory().or_else(|| group.0.directory(Controller::Pids));
    let directory = directory.ok_or("no hierarchy")?;
    std::fs::create_dir_all(directory.join("system.slice/cron.service"))?;
    group.0.delegate(1_000_000_000, 1_000_000_000)?;
    group.0.remove()?;
    ensure(!group.0.exists(), "the group must be gone")?;
    group.0.remove()?;
    Ok(())
}
