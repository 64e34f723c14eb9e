//! Namespaces: which kinds, making, entering, and the clocks of a time namespace (namespaces(7)).
//!
//! Limit: making a namespace together with a process is `process::fork`.

use std::os::fd::{BorrowedFd, OwnedFd};

use bitflags::bitflags;
use nix::sched::CloneFlags;
use rustix::fs::{Mode, OFlags};
use rustix::thread::ThreadNameSpaceType;

use crate::Result;
use crate::error::During;

bitflags! {
    /// Kinds of namespaces; the bits are the kernel's `CLONE_NEW*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Kinds: u32 {
        /// `CLONE_NEWTIME`
        const TIME = 0x0000_0080;
        /// `CLONE_NEWNS`
        const MOUNT = 0x0002_0000;
        /// `CLONE_NEWCGROUP`
        const CGROUP = 0x0200_0000;
        /// `CLONE_NEWUTS`
        const UTS = 0x0400_0000;
        /// `CLONE_NEWIPC`
        const IPC = 0x0800_0000;
        /// `CLONE_NEWUSER`
        const USER = 0x1000_0000;
        /// `CLONE_NEWPID`
        const PID = 0x2000_0000;
        /// `CLONE_NEWNET`
        const NET = 0x4000_0000;
    }
}

/// Moves the caller into the namespaces that `fd` names (setns(2)): with a pidfd all the `kinds` of that process at once,
/// with a namespace descriptor that one (`kinds` then says its kind, or is empty).
///
/// `PID` and, for other than the first kernels, `TIME` count for children only. `USER` and `MOUNT` ask for a process with one thread.
pub fn enter(fd: BorrowedFd<'_>, kinds: Kinds) -> Result<()> {
    let flags = ThreadNameSpaceType::from_bits_retain(kinds.bits());
    rustix::thread::move_into_thread_name_spaces(fd, flags).during("enter namespaces", format_args!("{kinds:?}"))
}

/// Gives the caller new namespaces (unshare(2)). `PID` and `TIME` count for children only.
#[expect(clippy::disallowed_methods, reason = "this is the function that all others are told to use")]
pub fn unshare(kinds: Kinds) -> Result<()> {
    let flags = CloneFlags::from_bits_retain(kinds.bits() as i32);
    nix::sched::unshare(flags).during("unshare namespaces", format_args!("{kinds:?}"))
}

/// Opens a namespace of process `pid`; `kind` is a name of /proc/PID/ns: `user`, `mnt`, `pid_for_children`, …
pub fn open(pid: i32, kind: &str) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/ns/{kind}");
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).during("open namespace", &path)
}

/// Opens a namespace of the caller.
pub fn open_own(kind: &str) -> Result<OwnedFd> {
    let path = format!("/proc/self/ns/{kind}");
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).during("open namespace", &path)
}

/// Whether two descriptors name the same namespace: same device and inode (ioctl_ns(2), namespaces(7)).
pub fn is_same(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> Result<bool> {
    let one = rustix::fs::fstat(one).during("stat", "namespace")?;
    let other = rustix::fs::fstat(other).during("stat", "namespace")?;
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

/// The number in the caller's pid namespace of the thread that is `thread` in another. ESRCH: there is none, or it cannot be
/// seen from here. ENOTTY: the kernel cannot tell (Linux before 6.11).
pub fn thread_from(pid_namespace: BorrowedFd<'_>, thread: i32) -> Result<i32> {
    crate::sys::pid_from_namespace(pid_namespace, thread).during("find thread of another pid namespace", thread)
}

/// Sets the clocks of the new time namespace of the caller, in nanoseconds added to the parent's clocks.
///
/// Only after `unshare(TIME)` and before the first process is in it (time_namespaces(7)); later EACCES.
pub fn set_clock_offsets(monotonic_ns: i64, boottime_ns: i64) -> Result<()> {
    let path = "/proc/self/timens_offsets";
    std::fs::write(path, render_offsets(monotonic_ns, boottime_ns)).during("write clock offsets", path)
}

/// `clock seconds nanoseconds` a line; the nanoseconds are never negative, so seconds round down.
fn render_offsets(monotonic_ns: i64, boottime_ns: i64) -> String {
    let line =
        |clock: &str, ns: i64| format!("{clock} {} {}\n", ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    line("monotonic", monotonic_ns) + &line("boottime", boottime_ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn negative_offsets_have_positive_nanoseconds() {
        assert_eq!(render_offsets(-1_500_000_000, 2_000_000_001), "monotonic -2 500000000\nboottime 2 1\n");
    }

    #[test]
    fn kinds_are_the_kernels_bits() {
        assert_eq!(
            Kinds::all().bits() as i32,
            libc::CLONE_NEWTIME
                | libc::CLONE_NEWNS
                | libc::CLONE_NEWCGROUP
                | libc::CLONE_NEWUTS
                | libc::CLONE_NEWIPC
                | libc::CLONE_NEWUSER
                | libc::CLONE_NEWPID
                | libc::CLONE_NEWNET
        );
    }

    #[test]
    fn own_namespace_is_the_same_as_itself() {
        let (one, other) = (open_own("net").unwrap(), open(std::process::id() as i32, "net").unwrap());
        assert!(is_same(one.as_fd(), other.as_fd()).unwrap());
        let uts = open_own("uts").unwrap();
        assert!(!is_same(one.as_fd(), uts.as_fd()).unwrap());
    }
}
