//! A new process with its namespaces and its cgroup, in one call (clone3(2)).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::PidFd;
use crate::error::{During, Error};
use crate::namespace::Kinds;
use crate::{Result, sys};

/// Who returns from [`fork`].
#[derive(Debug)]
pub enum Fork {
    /// The caller.
    Parent {
        /// The child's pid as the caller sees it.
        pid: i32,
        /// The child by descriptor.
        pidfd: PidFd,
    },
    /// The new process.
    Child,
}

/// How the child is made; the default is fork(2).
#[derive(Debug, Default)]
pub struct CloneOptions {
    /// Namespaces the child gets new.
    pub namespaces: Kinds,
    /// An open cgroup2 directory in which the child is born (`CLONE_INTO_CGROUP`): no moving, no lock over all processes.
    pub cgroup: Option<OwnedFd>,
    /// The child is a child of the caller's parent (`CLONE_PARENT`), and signals its end as the caller would.
    pub sibling: bool,
}

/// Forks. In the child only the calling thread exists, with copies of all memory and descriptors.
///
/// Refused in a process with more than one thread: a lock another thread held would stay locked in the child for ever.
/// The child must leave by exec or `std::process::exit`; buffered output of the caller is duplicated, so flush first.
pub fn fork(options: &CloneOptions) -> Result<Fork> {
    refuse_threads()?;
    let mut flags = u64::from(options.namespaces.bits());
    let mut exit_signal = libc::SIGCHLD;
    if options.sibling {
        flags |= libc::CLONE_PARENT as u64;
        // The kernel takes the caller's own signal and wants none here (clone(2)).
        exit_signal = 0;
    }
    let made = sys::clone3(flags, exit_signal, options.cgroup.as_ref().map(AsFd::as_fd));
    Ok(match made.during("fork", format_args!("child with new namespaces {:?}", options.namespaces))? {
        Some((pid, pidfd)) => Fork::Parent { pid, pidfd: PidFd::from(pidfd) },
        None => Fork::Child,
    })
}

/// Forks as [`fork`] does, by fork(2): under our filter for servers that shall be migrated, which knows neither clone3(2) nor
/// pidfds. The child's pid in the caller, `None` in the child.
pub fn fork_plainly() -> Result<Option<i32>> {
    refuse_threads()?;
    sys::fork().during("fork", "child")
}

/// Waits until threads that have been joined are gone, which is a moment later: [`fork`] is refused until then.
pub fn wait_for_joined_threads() {
    let count = || std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    while count() > 1 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// The same for one of several threads, by its id (gettid(2)).
pub fn wait_for_joined_thread(thread: i32) {
    let task = format!("/proc/self/task/{thread}");
    while std::path::Path::new(&task).exists() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// `CLONE_THREAD` alone changes nothing and is refused in a process with threads (unshare(2)). Works where /proc is
/// another pid namespace's or is not mounted, as for a process that has joined others.
#[expect(clippy::disallowed_methods, reason = "changes no namespace; only asks")]
fn refuse_threads() -> Result<()> {
    match nix::sched::unshare(nix::sched::CloneFlags::CLONE_THREAD) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::EINVAL) => {
            let why = "the process has more than one thread";
            Err(Error::refused("fork", "process with threads", io::ErrorKind::Unsupported, why))
        }
        Err(errno) => Err(errno).during("count", "threads of the process"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_process_with_threads_is_refused() {
        let (release, held) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || held.recv());
        match fork(&CloneOptions::default()) {
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported),
            // A second harness must not run on.
            Ok(Fork::Child) => std::process::exit(1),
            Ok(Fork::Parent { .. }) => panic!("forked with two threads"),
        }
        drop(release);
        assert!(thread.join().unwrap().is_err());
    }
}
