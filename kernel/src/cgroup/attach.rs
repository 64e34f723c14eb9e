//! Moving processes into a group, and listing them.

use std::path::Path;

use super::group::{Group, children, no_hierarchy};
use super::hierarchies::Controller;
use super::interface::{is_missing, read, write};
use crate::Result;

impl Group {
    /// Moves process `pid` with all its threads into the group, in every hierarchy.
    ///
    /// The first write waits for an RCU grace period of the whole host: see [`attach_self_v1`](Self::attach_self_v1).
    pub fn attach(&self, pid: i32) -> Result<()> {
        // Back to back, because the kernel stays in the mode that the first write waited for.
        for directory in self.directories() {
            write(&directory.join("cgroup.procs"), pid.to_string())?;
        }
        Ok(())
    }

    /// Like [`attach`](Self::attach) for a process that was born in the cgroup2 group (`CLONE_INTO_CGROUP`): v1 only.
    pub fn attach_v1(&self, pid: i32) -> Result<()> {
        for root in self.hierarchies.v1_roots() {
            write(&root.join(self.path()).join("cgroup.procs"), pid.to_string())?;
        }
        Ok(())
    }

    /// Moves the calling thread, of a process with no other, into the group of every v1 hierarchy. Nothing to do on pure v2.
    ///
    /// The cheap way in: moving another process takes `cgroup_threadgroup_rwsem` for writing, and the first of a series
    /// of such writes took 7.8 ms (16 ms at worst) on a quiet host with eight v1 hierarchies, the next ones 0.03 ms each.
    /// A thread that moves itself, by `0` written to `tasks`, takes no such lock (`cgroup_procs_write_start` in
    /// kernel/cgroup/cgroup.c): all eight took 0.15 ms. So a child is born in the cgroup2 group and then calls this,
    /// before it changes its ids or sees other mounts.
    pub fn attach_self_v1(&self) -> Result<()> {
        for root in self.hierarchies.v1_roots() {
            write(&root.join(self.path()).join("tasks"), "0")?;
        }
        Ok(())
    }

    /// The processes of the group and of all groups below it, as the caller sees their pids; in no order.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let directory = self.unified_directory().or_else(|| self.directory(Controller::Pids));
        let directory = directory.or_else(|| self.directories().into_iter().next());
        let directory = directory.ok_or_else(|| no_hierarchy("list processes of", self))?;
        let mut found = Vec::new();
        collect(&directory, &mut found)?;
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }
}

fn collect(directory: &Path, found: &mut Vec<i32>) -> Result<()> {
    match read(&directory.join("cgroup.procs")) {
        // 0 stands for a process outside the reader's pid namespace.
        Ok(text) => found.extend(text.lines().filter_map(|line| line.parse().ok()).filter(|&pid: &i32| pid > 0)),
        // A threaded group lists no processes; its domain above does.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        // A group below may go at any time.
        Err(error) if is_missing(&error) => return Ok(()),
        Err(error) => return Err(error),
    }
    for child in children(directory)? {
        collect(&child, found)?;
    }
    Ok(())
}
