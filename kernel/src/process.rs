//! Processes: making them with their namespaces, naming them for ever, watching them, and the state that exec keeps.
//!
//! Limit: nothing here looks a user up by name; a static program must not load the guest's NSS modules.

mod fork;
mod memory;
mod pidfd;
mod settings;

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::unistd::{Gid, Uid};
use rustix::process::{DumpableBehavior, Pid, Resource, WaitOptions};

pub use fork::{CloneOptions, Fork, fork, fork_plainly, wait_for_joined_thread, wait_for_joined_threads};
pub use memory::Memory;
pub use pidfd::PidFd;
pub use settings::{
    AFFINITY_WORDS, core_filter, io_priority, set_core_filter, set_io_priority, set_processors, set_timer_slack,
    timer_slack,
};

use crate::error::{During, Error};
use crate::{Result, sys};

/// What /proc/PID/stat says of a process (proc(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// It has ended and only waits to be reaped (states Z and X).
    pub has_ended: bool,
    /// Its parent; 0 when that is in no pid namespace of the caller's (field 4).
    pub parent: i32,
    /// Its session: the pid of who began it (field 6).
    pub session: i32,
    /// The process group in the foreground of its terminal; -1 without one (field 8).
    pub foreground: i32,
    /// When it started, in clock ticks since boot: with the pid it names a process for ever (field 22).
    pub start_ticks: u64,
    /// How it ended, once it has (field 52; 0 for who may not trace it).
    pub status: ExitStatus,
}

/// Looks at process `pid`. ENOENT or ESRCH: no such process.
pub fn stat(pid: i32) -> Result<Stat> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read(&path).during("read", &path)?;
    parse_stat(&text).ok_or_else(|| Error::refused("parse", &path, io::ErrorKind::InvalidData, "a field is missing"))
}

/// Looks at process `pid`; `None`: the kernel knows none. A /proc that only does not show it is an error: to take that for
/// the end of a process would be wrong.
pub fn find(pid: i32) -> Result<Option<Stat>> {
    let process = to_pid(pid, "look at")?;
    let mut seen = stat(pid);
    for is_last in [false, true] {
        match &seen {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
            _ => break,
        }
        match rustix::process::test_kill_process(process) {
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            // Born between the two looks; one that stays unseen is not.
            _ if !is_last => seen = stat(pid),
            _ => {}
        }
    }
    seen.map(Some)
}

/// The name of the program is in parentheses and may hold anything, so fields count from the last one.
fn parse_stat(stat: &[u8]) -> Option<Stat> {
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    // The field after the name is number 3.
    let fields: Vec<&str> = std::str::from_utf8(&stat[end + 1..]).ok()?.split_ascii_whitespace().collect();
    Some(Stat {
        has_ended: matches!(*fields.first()?, "Z" | "X"),
        parent: fields.get(4 - 3)?.parse().ok()?,
        session: fields.get(6 - 3)?.parse().ok()?,
        foreground: fields.get(8 - 3)?.parse().ok()?,
        start_ticks: fields.get(22 - 3)?.parse().ok()?,
        status: ExitStatus::from_raw(fields.get(52 - 3)?.parse().ok()?),
    })
}

/// System calls in which a thread may wait for its child to execute a program or end.
#[cfg(target_arch = "x86_64")]
const SPAWNING: &[libc::c_long] = &[libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3];
#[cfg(not(target_arch = "x86_64"))]
const SPAWNING: &[libc::c_long] = &[libc::SYS_clone, libc::SYS_clone3];

/// A thread of process `pid` that waits in vfork(2), or in what is like it, for its child. Until that goes on nothing but SIGKILL gets through to it,
/// so no debugger can stop it (kernel/fork.c, `wait_for_vfork_done`). `None`: there is none, or no such process.
pub fn in_vfork(pid: i32) -> Option<i32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let waits = |thread: &std::fs::DirEntry| {
        let read = |file| std::fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        let is_deaf = read("stat").rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'));
        // proc_pid_syscall(5): the number, and what it was called with.
        let number = || read("syscall").split(' ').next().and_then(|number| number.parse().ok());
        is_deaf && number().is_some_and(|number| SPAWNING.contains(&number))
    };
    threads.flatten().find(waits)?.file_name().to_string_lossy().parse().ok()
}

/// When process `pid` started, in clock ticks since boot; see [`Stat::start_ticks`].
pub fn start_time(pid: i32) -> Result<u64> {
    Ok(stat(pid)?.start_ticks)
}

/// Waits until the child `pid` has ended and takes its status. ECHILD: not a child of the caller.
pub fn status_of(pid: i32) -> Result<ExitStatus> {
    let child = to_pid(pid, "wait for")?;
    loop {
        match rustix::process::waitpid(Some(child), WaitOptions::empty()) {
            Ok(Some((_, status))) => return Ok(ExitStatus::from_raw(status.as_raw())),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).during("wait for", format_args!("pid {pid}")),
        }
    }
}

/// Takes the status of any child that has ended, without waiting. `None`: no child has, or there is none.
pub fn reap_any() -> Result<Option<(i32, ExitStatus)>> {
    match rustix::process::wait(WaitOptions::NOHANG) {
        Ok(Some((pid, status))) => Ok(Some((pid.as_raw_pid(), ExitStatus::from_raw(status.as_raw())))),
        Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(None),
        Err(errno) => Err(errno).during("wait for", "any child"),
    }
}

/// Whether the process may be looked into by those of its own user and dumps core (prctl(2) `PR_SET_DUMPABLE`).
///
/// A process that changed its ids is not dumpable: its files in /proc then belong to the host's root, and the root of
/// a user namespace cannot write its own `timens_offsets`.
pub fn set_dumpable(dumpable: bool) -> Result<()> {
    let behavior = if dumpable { DumpableBehavior::Dumpable } else { DumpableBehavior::NotDumpable };
    rustix::process::set_dumpable_behavior(behavior).during("set dumpable", dumpable)
}

/// The caller gets `signal` when the thread that made it ends; 0 takes it back. A change of ids clears it too.
pub fn set_parent_death_signal(signal: i32) -> Result<()> {
    let named = nix::sys::signal::Signal::try_from(signal).ok();
    nix::sys::prctl::set_pdeathsig(named).during("set parent death signal", signal)
}

/// The CPUs that a thread may run on, as the kernel's mask: how many bytes of `mask` it filled, which is the length of its own
/// masks or of `mask`, whichever is less (sched_getaffinity(2)). EINVAL: `mask` is too short. ESRCH: no such thread.
pub fn affinity(thread: i32, mask: &mut [u64]) -> Result<usize> {
    sys::sched_getaffinity(thread, mask).during("read affinity of", format_args!("thread {thread}"))
}

/// Sends a process any signal (kill(2)). `pid` must be a child that was not waited for, whose number is nobody else's; for
/// others there is [`PidFd`].
pub fn signal_child(pid: i32, signal: i32) -> Result<()> {
    sys::kill(pid, signal).during("send signal", format_args!("{signal} to pid {pid}"))
}

/// Orphans below the caller become its children instead of init's.
pub fn become_subreaper() -> Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).during("become", "subreaper")
}

/// From here on no exec gives the process more privileges (prctl(2) `PR_SET_NO_NEW_PRIVS`).
pub fn no_new_privileges() -> Result<()> {
    rustix::thread::set_no_new_privs(true).during("set", "no_new_privs")
}

/// Makes the caller the given user for ever: groups first, user last, for after that it may no longer.
///
/// ENOSYS or EINVAL: an id has no place in the caller's user namespace.
pub fn set_user(uid: u32, gid: u32, groups: &[u32]) -> Result<()> {
    let groups: Vec<Gid> = groups.iter().copied().map(Gid::from_raw).collect();
    nix::unistd::setgroups(&groups).during("set groups", format_args!("{groups:?}"))?;
    let id = Gid::from_raw(gid);
    nix::unistd::setresgid(id, id, id).during("set group", gid)?;
    let id = Uid::from_raw(uid);
    nix::unistd::setresuid(id, id, id).during("set user", uid)
}

/// Begins a session of the caller's own, without a terminal (setsid(2)).
pub fn new_session() -> Result<()> {
    rustix::process::setsid().during("begin", "session")?;
    Ok(())
}

/// Makes `terminal` the controlling terminal of the session the caller leads.
pub fn set_controlling_terminal(terminal: impl AsFd) -> Result<()> {
    rustix::process::ioctl_tiocsctty(terminal).during("take", "controlling terminal")
}

/// Gives every signal its default meaning and blocks none: for the moment before exec.
///
/// Exec keeps ignored signals ignored and blocked ones blocked, and Rust's start-up ignores SIGPIPE.
pub fn reset_signals() -> Result<()> {
    sys::default_dispositions();
    unblock_signals()
}

/// Lets all signals through again that the caller's parent had held back when it forked.
pub fn unblock_signals() -> Result<()> {
    nix::sys::signal::SigSet::empty().thread_set_mask().during("unblock", "signals")
}

/// Descriptors that a program of ours may want at once; what Linux gives by default.
const DESCRIPTORS_WANTED: u64 = 1024;

/// Makes the caller independent of what its parent left to it: for the first moment of a program.
///
/// A parent that ignores SIGCHLD would have our children reaped before we ask how they ended, blocked signals would keep
/// us from being ended, an odd umask would close what others must read, and few descriptors would end half way. Other
/// ignored signals stay so: that is what nohup(1) is for. Standard input, output and error are open already: Rust's
/// start-up sees to it.
pub fn shed_inherited() -> Result<()> {
    sys::default_disposition(libc::SIGCHLD).during("stop ignoring", "SIGCHLD")?;
    unblock_signals()?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    let possible = limit.maximum.map_or(DESCRIPTORS_WANTED, |most| most.min(DESCRIPTORS_WANTED));
    if limit.current.is_some_and(|now| now < possible) {
        limit.current = Some(possible);
        rustix::process::setrlimit(Resource::Nofile, limit).during("raise limit of", "open files")?;
    }
    Ok(())
}

/// Closes every descriptor from `first` up but those in `except`.
///
/// For the moment before exec or in a fresh child: a value that still owns one of them must never be used again
/// (nor dropped: leave by exec or exit).
pub fn close_from(first: RawFd, except: &[RawFd]) -> Result<()> {
    for (from, to) in gaps(first, except) {
        sys::close_range(from, to, 0).during("close descriptors", format_args!("{from}-{to}"))?;
    }
    Ok(())
}

/// The ranges from `first` up that hold none of `except`; both ends included.
fn gaps(first: RawFd, except: &[RawFd]) -> Vec<(RawFd, RawFd)> {
    let mut kept: Vec<RawFd> = except.iter().copied().filter(|&fd| fd >= first).collect();
    kept.sort_unstable();
    kept.dedup();
    let mut ranges = Vec::with_capacity(kept.len() + 1);
    let mut from = first;
    for fd in kept {
        if fd > from {
            ranges.push((from, fd - 1));
        }
        from = fd.saturating_add(1);
    }
    ranges.push((from, RawFd::MAX));
    ranges
}

/// A variable for the environment of a program of ours that stays for long: the C library's allocator then keeps no freed
/// pieces of each size at hand, which would hold whole pages that [`give_memory_back`] could give back otherwise.
pub const SPARING: &CStr = c"GLIBC_TUNABLES=glibc.malloc.tcache_count=0";

/// Gives memory that is not in use back to the kernel: whole pages that the allocator keeps for later, and those that deep
/// calls have left below the stack. For a process that has parsed what it had to and now waits for long, and for one that
/// is about to be forked often. Takes some microseconds.
pub fn give_memory_back() {
    sys::trim_heap();
    sys::trim_stack();
}

/// Takes ownership of a descriptor that came by its number through exec, and sets close-on-exec. EBADF: it is not open.
///
/// Call it once per number, at the start of the program, before anything else is opened: the number must have no
/// other owner.
pub fn adopt_descriptor(number: RawFd) -> Result<OwnedFd> {
    let fd = sys::adopt(number).during("adopt descriptor", number)?;
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).during("set close-on-exec of descriptor", number)?;
    Ok(fd)
}

/// Makes `number` a copy of `fd` that stays open across exec, closing what was there.
///
/// For the moment before exec: a value that owns `number` must never be used again. Copy first to numbers above all
/// that are still wanted when the sets overlap.
pub fn place_descriptor(fd: impl AsFd, number: RawFd) -> Result<()> {
    use std::os::fd::AsRawFd;
    let fd = fd.as_fd();
    if fd.as_raw_fd() == number {
        // dup3 refuses to copy onto itself; only the flag has to go.
        return keep_across_exec(fd);
    }
    sys::duplicate_to(fd, number, 0).during("place descriptor", number)
}

/// Takes close-on-exec off.
pub fn keep_across_exec(fd: impl AsFd) -> Result<()> {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).during("keep across exec", "descriptor")
}

/// Executes the program that `program` is open on, whatever path it has by now (execveat(2) `AT_EMPTY_PATH`).
///
/// Returns only on failure. A script needs its descriptor to stay open across exec; else ENOENT.
pub fn exec_descriptor(program: BorrowedFd<'_>, argv: &[CString], environment: &[CString]) -> Error {
    let result = nix::unistd::execveat(program, c"", argv, environment, nix::fcntl::AtFlags::AT_EMPTY_PATH);
    exec_failed(result, "open descriptor")
}

/// Executes the program at `path`. Returns only on failure.
pub fn exec_path(path: &CStr, argv: &[CString], environment: &[CString]) -> Error {
    exec_failed(nix::unistd::execve(path, argv, environment), &path.to_string_lossy())
}

fn exec_failed(result: nix::Result<Infallible>, object: &str) -> Error {
    let Err(errno) = result;
    Error::new("execute", object, errno)
}

/// A pid as rustix has it: positive.
fn to_pid(pid: i32, operation: &'static str) -> Result<Pid> {
    // Pid::from_raw asserts in debug builds that the number is not negative.
    let pid = if pid > 0 { Pid::from_raw(pid) } else { None };
    pid.ok_or_else(|| Error::refused(operation, "process", io::ErrorKind::InvalidInput, "a pid is positive"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_behind_a_hostile_name() {
        let line = |state: &str, code: &str| {
            let middle = "1 16 17 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 4242 1000 10 18446744073709551615 1 1 1 1 1 \
                          0 0 0 0 0 0 0 17 1 0 0 0 0 0 1 1 1 1 1 1 1";
            format!("17 (a) b) (c) {state} {middle} {code}\n")
        };
        let living = parse_stat(line("S", "0").as_bytes()).unwrap();
        assert!(!living.has_ended && living.start_ticks == 4242);
        assert_eq!((living.parent, living.session, living.foreground), (1, 17, -1));
        let ended = parse_stat(line("Z", "1").as_bytes()).unwrap();
        assert!(ended.has_ended && ended.status.signal() == Some(1));
        assert_eq!(parse_stat(b"17 (short) S 1"), None);
        assert!(start_time(std::process::id() as i32).unwrap() > 0);
    }

    #[test]
    fn a_process_is_found_until_it_has_been_reaped() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        // A zombie in the end, which is still somebody.
        while !find(pid).unwrap().unwrap().has_ended {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert_eq!(find(pid).unwrap(), None);
        assert!(find(std::process::id() as i32).unwrap().is_some());
        assert!(find(0).is_err());
    }

    #[test]
    fn gaps_leave_out_what_is_kept() {
        assert_eq!(gaps(3, &[]), [(3, RawFd::MAX)]);
        assert_eq!(gaps(3, &[5, 3, 5, 1]), [(4, 4), (6, RawFd::MAX)]);
        assert_eq!(gaps(3, &[3, 4]), [(5, RawFd::MAX)]);
    }

    #[test]
    fn a_pid_that_is_none_is_refused() {
        assert_eq!(status_of(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(PidFd::open(-5).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
