//! System-call filters installed in a child.

use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;

use kernel::bpf::DeviceProgram;
use kernel::namespace::{Kinds, unshare};
use kernel::process::{CloneOptions, Fork, PidFd, fork, fork_plainly, signal_child, status_of};
use kernel::seccomp::{Answer, Call, Filter, Listener, Profile, Slot};
use rustix::time::{ClockId, Timespec};

use crate::Outcome;
use crate::child::{ensure_equal, errno};

/// Errno of setting the clock to a moment that does not exist: the kernel says EINVAL, only a filter says EPERM.
fn set_clock() -> i32 {
    let nonsense = Timespec { tv_sec: 0, tv_nsec: 2_000_000_000 };
    rustix::time::clock_settime(ClockId::Realtime, nonsense).err().map_or(0, |errno| errno.raw_os_error())
}

pub fn answers_as_the_profile_says() -> Outcome {
    ensure_equal("clock before", set_clock(), libc::EINVAL)?;
    Filter::compile(&Profile::default()).install()?;
    ensure_equal("clock", set_clock(), libc::EPERM)?;
    ensure_equal("keyring", errno(kernel::keyring::join_new_session()), libc::ENOSYS)?;
    ensure_equal("nested namespaces", errno(unshare(Kinds::UTS | Kinds::NET)), 0)?;
    // Still a whole system: files, memory, threads, processes.
    let thread = std::thread::spawn(|| std::fs::read("/proc/self/status").map(|text| text.len()));
    let length = thread.join().map_err(|_| "the thread panicked")??;
    ensure_equal("status read", length > 0, true)?;
    ensure_equal("sh", std::process::Command::new("/bin/sh").args(["-c", "exit 7"]).status()?.code(), Some(7))
}

pub fn migratable_nests_no_namespaces() -> Outcome {
    Filter::compile(&Profile { migratable: true, privileged: true, listened: false }).install()?;
    for kind in [Kinds::UTS, Kinds::IPC, Kinds::PID, Kinds::USER, Kinds::CGROUP, Kinds::TIME] {
        ensure_equal("nested", errno(unshare(kind)), libc::EPERM)?;
    }
    ensure_equal("mount and net", errno(unshare(Kinds::MOUNT | Kinds::NET)), 0)?;
    // clone3 is refused, whose flags a filter cannot see; by the oldest call a child comes, but no pidfd.
    for options in [CloneOptions { namespaces: Kinds::UTS, ..CloneOptions::default() }, CloneOptions::default()] {
        ensure_equal("clone3", errno(fork(&options)), libc::ENOSYS)?;
    }
    match fork_plainly()? {
        None => std::thread::park(),
        Some(pid) => {
            ensure_equal("a pidfd", errno(PidFd::open(pid)), libc::ENOSYS)?;
            signal_child(pid, libc::SIGKILL)?;
            ensure_equal("killed", status_of(pid)?.signal(), Some(libc::SIGKILL))?;
        }
    }
    ensure_equal("keyring of a privileged server", errno(kernel::keyring::join_new_session()), 0)?;
    let directory = std::path::Path::new("/");
    ensure_equal("bpf", errno(DeviceProgram::compile(&[]).attach(directory)), libc::EPERM)?;
    ensure_equal("true", std::process::Command::new("/bin/true").status()?.success(), true)
}

pub fn calls_are_answered_by_who_finds_them_in_the_slot() -> Outcome {
    let (ours, theirs) = kernel::channel::pair()?;
    let Fork::Parent { pid, .. } = fork(&CloneOptions::default())? else {
        std::process::exit(ask_three_times(&theirs).map_or(9, |()| 0));
    };
    let (_, descriptors) = ours.receive()?;
    let listener = Listener::from(descriptors.into_iter().next().ok_or("no listener came")?);
    let memory = Slot::memory()?;
    let slot = Slot::map(memory.as_fd())?;
    let first = listener.receive(&slot)?.ok_or("the caller is gone")?;
    ensure_equal("who asks", first.thread, pid)?;
    ensure_equal("is it a call", matches!(first.call, Some(Call::Affinity { thread: 0, .. })), true)?;
    // Whoever received it is gone; the memory stays.
    drop(slot);
    let slot = Slot::map(memory.as_fd())?;
    let found = slot.received().ok_or("the slot is empty")?;
    ensure_equal("the same call that waits", (found.id, listener.is_waiting(found.id)), (first.id, true))?;
    listener.answer(found.id, Answer::Failure(libc::EDOM))?;
    ensure_equal("waits", listener.is_waiting(found.id), false)?;
    let second = listener.receive(&slot)?.ok_or("the caller is gone")?;
    listener.answer(second.id, Answer::AsKernel)?;
    drop(listener);
    ensure_equal("the caller was content", status_of(pid)?.code(), Some(0))
}

/// Told EDOM, then what the kernel says, then that there is no such call, since nobody listens.
fn ask_three_times(channel: &kernel::channel::Channel) -> Outcome {
    let listener = Filter::compile(&Profile { listened: true, ..Profile::default() }).install()?;
    let listener = listener.ok_or("no listener")?;
    channel.send(b"listener", &[listener.as_fd()])?;
    drop(listener);
    let mut mask = [0; 128];
    let mut ask = || errno(kernel::process::affinity(0, &mut mask));
    ensure_equal("first", ask(), libc::EDOM)?;
    ensure_equal("second", ask(), 0)?;
    ensure_equal("third", ask(), libc::ENOSYS)
}
