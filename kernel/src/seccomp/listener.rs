//! Answers the system calls that a filter leaves to a process outside (seccomp_unotify(2)).
//!
//! ```text
//! caller: sysinfo(…) ── filter: ask ──> listener ── receive ──> slot ── answer ──> caller goes on
//! ```
//!
//! A call that was received and not answered keeps its caller waiting for ever, and the kernel gives it out only once. So it is
//! received straight into a [`Slot`]: memory that outlives the process that answers, where the next one finds it.
//!
//! Limit: one call at a time through one slot.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::assemble::{I386, X32_BIT, X86_64};
use super::profile::{Numbers, SCHED_GETAFFINITY, SYSINFO};
use crate::error::{During, Error};
use crate::{Result, memfd, sys};

/// The descriptor on which the calls of a filter arrive. It is readable when one does, and hung up when no task is left
/// behind the filter.
#[derive(Debug)]
pub struct Listener(OwnedFd);

/// How long ints are, and how `struct sysinfo` is laid out, for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    /// x86_64, and x32, which has the same numbers and layouts for these calls.
    Native,
    /// i386.
    I386,
}

/// A call that was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// sysinfo(2).
    Sysinfo {
        /// Where the answer goes.
        buffer: u64,
    },
    /// sched_getaffinity(2).
    Affinity {
        /// Which thread is asked about, as the caller numbers them; 0 is itself.
        thread: i32,
        /// The length of its mask in bytes.
        length: u32,
        /// Where the mask goes.
        mask: u64,
    },
}

/// A caller that waits.
#[derive(Clone, Copy, Debug)]
pub struct Notification {
    /// Names this one call of this listener, never another.
    pub id: u64,
    /// The thread that calls, as the receiver numbers it; 0 when it cannot see it.
    pub thread: i32,
    /// How the caller's memory is laid out.
    pub abi: Abi,
    /// What it asks; `None` for a call that no filter of this crate asks about.
    pub call: Option<Call>,
}

/// What a caller gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The call returns this.
    Value(i64),
    /// The call fails with this errno.
    Failure(i32),
    /// The kernel carries it out as if nobody had asked. Only for calls that harm nobody: the caller may have changed
    /// what its arguments point to.
    AsKernel,
}

/// Where a received call stands until it is answered.
#[derive(Debug)]
pub struct Slot(sys::SharedPage);

impl Slot {
    /// Makes the memory of a slot, to be mapped by this process and others.
    pub fn memory() -> Result<OwnedFd> {
        memfd::shared("seccomp-slot", sys::SHARED_PAGE_BYTES as u64)
    }

    /// Maps the memory of a slot. EINVAL: it is too short for one.
    pub fn map(memory: BorrowedFd<'_>) -> Result<Slot> {
        let length = rustix::fs::fstat(memory).during("stat", "seccomp slot")?.st_size;
        if usize::try_from(length).unwrap_or(0) < sys::SHARED_PAGE_BYTES {
            return Err(Error::new("map", "seccomp slot", io::Error::from_raw_os_error(libc::EINVAL)));
        }
        sys::SharedPage::map(memory).map(Slot).during("map", "seccomp slot")
    }

    /// What was received and perhaps not answered; [`Listener::is_waiting`] tells.
    pub fn received(&self) -> Option<Notification> {
        let raw = self.0.read();
        (raw.id != 0).then(|| Notification::of(&raw))
    }

    /// Empties the slot: what stood in it has been answered.
    pub fn clear(&self) {
        self.0.clear();
    }
}

impl Notification {
    fn of(raw: &sys::SeccompNotification) -> Notification {
        let abi = if raw.architecture == I386 { Abi::I386 } else { Abi::Native };
        Notification { id: raw.id, thread: raw.thread as i32, abi, call: call(raw) }
    }
}

fn call(raw: &sys::SeccompNotification) -> Option<Call> {
    let number = raw.number as u32;
    let is = |(native, foreign): Numbers| match raw.architecture {
        X86_64 => Some(number & !X32_BIT) == native,
        I386 => Some(number) == foreign,
        _ => false,
    };
    let [first, second, third, ..] = raw.arguments;
    if is(SYSINFO) {
        Some(Call::Sysinfo { buffer: first })
    } else if is(SCHED_GETAFFINITY) {
        // The kernel takes an int and an unsigned int: the low halves.
        Some(Call::Affinity { thread: first as i32, length: second as u32, mask: third })
    } else {
        None
    }
}

impl Listener {
    /// Receives the next call into `slot`, whose former one must have been answered. `None`: its caller is gone.
    ///
    /// Waits for a call when there is none, so poll first; a caller that goes away between the two is no call to wait for.
    pub fn receive(&self, slot: &Slot) -> Result<Option<Notification>> {
        slot.clear();
        match sys::seccomp_receive(self.0.as_fd(), &slot.0) {
            Ok(()) => Ok(slot.received()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => Ok(None),
            Err(error) => Err(error).during("receive from", "seccomp listener"),
        }
    }

    /// Whether that caller still waits: until then its numbers are its own.
    pub fn is_waiting(&self, id: u64) -> bool {
        sys::seccomp_is_waiting(self.0.as_fd(), id).is_ok()
    }

    /// Lets a caller go on. One that is gone needs no answer.
    pub fn answer(&self, id: u64, answer: Answer) -> Result<()> {
        const CONTINUE: u32 = 1;
        let nothing = sys::SeccompAnswer { id, value: 0, error: 0, flags: 0 };
        let answer = match answer {
            Answer::Value(value) => sys::SeccompAnswer { value, ..nothing },
            Answer::Failure(errno) => sys::SeccompAnswer { error: -errno, ..nothing },
            Answer::AsKernel => sys::SeccompAnswer { flags: CONTINUE, ..nothing },
        };
        match sys::seccomp_answer(self.0.as_fd(), &answer) {
            // EINPROGRESS: it has an answer already.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINPROGRESS)) => Ok(()),
            other => other.during("answer on", "seccomp listener"),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Listener {
    fn from(fd: OwnedFd) -> Self {
        Listener(fd)
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        listener.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn the_structures_are_the_kernels() {
        assert_eq!((size_of::<sys::SeccompNotification>(), size_of::<sys::SeccompAnswer>()), (80, 24));
    }

    fn raw(architecture: u32, number: u32) -> sys::SeccompNotification {
        let arguments = [0xffff_ffff_0000_0007, 0xffff_ffff_0000_0008, 0x7fff_0000_1000, 0, 0, 0];
        sys::SeccompNotification {
            id: 5,
            thread: 9,
            number: number as i32,
            architecture,
            arguments,
            ..Default::default()
        }
    }

    #[test]
    fn calls_are_told_by_number_and_abi() {
        let affinity = Some(Call::Affinity { thread: 7, length: 8, mask: 0x7fff_0000_1000 });
        let sysinfo = Some(Call::Sysinfo { buffer: 0xffff_ffff_0000_0007 });
        for (architecture, number, wanted) in [
            (X86_64, 204, affinity),
            (X86_64, 204 | X32_BIT, affinity),
            (I386, 242, affinity),
            (X86_64, 99, sysinfo),
            (I386, 116, sysinfo),
            (I386, 99, None),
            (X86_64, 242, None),
            (0xc000_00b7, 99, None),
        ] {
            assert_eq!(call(&raw(architecture, number)), wanted, "{number}");
        }
        assert_eq!(Notification::of(&raw(I386, 116)).abi, Abi::I386);
        assert_eq!(Notification::of(&raw(X86_64, 99 | X32_BIT)).abi, Abi::Native);
    }

    #[test]
    fn a_slot_is_seen_by_all_who_map_it() {
        let memory = Slot::memory().unwrap();
        let (one, other) = (Slot::map(memory.as_fd()).unwrap(), Slot::map(memory.as_fd()).unwrap());
        assert!(one.received().is_none());
        File::from(memory).write_all_at(&77_u64.to_ne_bytes(), 0).unwrap();
        assert_eq!((one.received().unwrap().id, other.received().unwrap().id), (77, 77));
        other.clear();
        assert!(one.received().is_none());
    }

    #[test]
    fn memory_that_is_too_short_is_refused() {
        let short = memfd::shared("short", 8).unwrap();
        assert_eq!(Slot::map(short.as_fd()).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
