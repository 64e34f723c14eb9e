//! A new process with its namespaces and its cgroup, in one call (clone3(2)).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

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
    Ok(
        match made.during(
            "fork",
            format_args!("child with new namespaces {:?}", options.namespaces),
        )? {
            Some((pid, pidfd)) => Fork::Parent {
                pid,
                pidfd: PidFd::from(pidfd),
            },
            None => Fork::Child,
        },
    )
}

/// The link count of a `task` directory is 2 plus the number of threads: one stat(2) instead of a listing.
fn refuse_threads() -> Result<()> {
    let path = "/proc/self/task";
    let links = std::fs::metadata(path).during("stat", path)?.nlink();
    if links == 3 {
        return Ok(());
    }
    let why = format!("the process has {} threads", links.saturating_sub(2));
    Err(Error::refused(
        "fork",
        "process with threads",
        io::ErrorKind::Unsupported,
        &why,
    ))
}
