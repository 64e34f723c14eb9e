//! Work in another network namespace, without staying there.
//!
//! Only for what netlink cannot reach from outside: making a socket there, and the files of /proc/sys/net, which
//! always show the namespace of the thread that opens them.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        linux::fs::MetadataExt,
    },
    thread,
};

use nix::sched::{CloneFlags, setns};

use crate::{Error, Result};

const ENTER: &str = "enter network namespace";

/// Runs `work` in the network namespace `netns` and comes back.
///
/// In a process with one thread the thread itself goes there and returns, which is cheaper than a thread, and leaves
/// no moment in which the process has two threads (one that was joined is still counted by the kernel for some
/// microseconds, and then a fork that must not happen in a threaded process would be refused). Otherwise a
/// short-lived thread does it. If the way back is barred, the process ends: to go on in the wrong
/// namespace would turn each later change into a change of somebody else's network.
pub fn within<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T> {
    if is_single_threaded() { there_and_back(netns, work) } else { in_thread(netns, work) }
}

fn there_and_back<T>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T) -> Result<T> {
    const HOME: &str = "/proc/thread-self/ns/net";
    let home = File::open(HOME).map_err(|e| Error::new("open", HOME, e))?;
    go(netns)?;
    let _back = Return(&home);
    Ok(work())
}

/// Goes home on drop, so also when the work panics.
struct Return<'a>(&'a File);

impl Drop for Return<'_> {
    fn drop(&mut self) {
        if go(self.0.as_fd()).is_err() {
            std::process::abort();
        }
    }
}

fn in_thread<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T> {
    let body = || go(netns).map(|()| work());
    let outcome = thread::scope(|scope| {
        let thread = thread::Builder::new()
            .stack_size(256 * 1024)
            .spawn_scoped(scope, body)
            .map_err(|e| Error::new("start thread", "for a network namespace", e))?;
        Ok(thread.join())
    })?;
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[expect(
    clippy::disallowed_methods,
    reason = "this crate uses nothing of ours, so it cannot call kernel::namespace::enter; the error here names what failed too"
)]
fn go(netns: BorrowedFd<'_>) -> Result<()> {
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(|errno| Error::new(ENTER, "by descriptor", io::Error::from(errno)))
}

/// /proc/self/task has a link for itself, one for its parent, and one for each thread (proc(5)).
fn is_single_threaded() -> bool {
    fs::metadata("/proc/self/task").is_ok_and(|task| task.st_nlink() == 3)
}
