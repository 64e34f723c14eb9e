//! A process by descriptor: the name that cannot pass to another process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, WaitId, WaitIdOptions};

use super::to_pid;
use crate::error::During;
use crate::poll::Deadline;
use crate::{Result, sys};

/// A descriptor of a process (pidfd_open(2)).
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens process `pid`. ESRCH: there is none. Compare `start_time` after opening when the pid was read from a file.
    pub fn open(pid: i32) -> Result<PidFd> {
        let process = to_pid(pid, "open")?;
        rustix::process::pidfd_open(process, PidfdFlags::empty()).map(PidFd).during("open", format_args!("pid {pid}"))
    }

    /// A copy of the process's descriptor `number` (pidfd_getfd(2)): the same open file. EBADF: it has none; ENOSYS: Linux before 5.6.
    pub fn descriptor(&self, number: RawFd) -> Result<OwnedFd> {
        rustix::process::pidfd_getfd(&self.0, number, PidfdGetfdFlags::empty())
            .during("copy", format_args!("descriptor {number} of a process"))
    }

    /// Sends a signal, real-time ones included. ESRCH: the process has ended.
    pub fn signal(&self, signal: i32) -> Result<()> {
        sys::pidfd_send_signal(self.0.as_fd(), signal).during("send signal", signal)
    }

    /// Whether the process has not ended; one that has and was not reaped counts as ended.
    pub fn is_alive(&self) -> bool {
        !self.wait_exit(Some(0)).unwrap_or(false)
    }

    /// Waits until the process has ended, at most `timeout_ms`; `None` waits for ever. `false`: it still runs.
    pub fn wait_exit(&self, timeout_ms: Option<u64>) -> Result<bool> {
        let deadline = Deadline::after(timeout_ms);
        loop {
            let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
            match rustix::event::poll(&mut polled, deadline.left().as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).during("wait for", "process"),
            }
        }
    }

    /// Waits for the end of a child of the caller and takes its status; after it the pid is free. ECHILD: no child of ours.
    pub fn reap(&self) -> Result<ExitStatus> {
        loop {
            match rustix::process::waitid(WaitId::PidFd(self.0.as_fd()), WaitIdOptions::EXITED) {
                Ok(Some(status)) => {
                    let code = status.exit_status().map(|code| (code & 0xff) << 8);
                    let core = if status.dumped() { 0x80 } else { 0 };
                    let signal = status.terminating_signal().map(|signal| signal | core);
                    return Ok(ExitStatus::from_raw(code.or(signal).unwrap_or(0)));
                }
                Ok(None) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).during("reap", "child"),
            }
        }
    }

    /// The status of a process that has ended and been reaped by its parent, for anybody who holds the descriptor
    /// (`PIDFD_GET_INFO` with exit information: Linux ≥ 6.15). `None`: not ended, not reaped, or an older kernel.
    pub fn exit_status(&self) -> Result<Option<ExitStatus>> {
        match sys::pidfd_exit_code(self.0.as_fd()) {
            Ok(code) => Ok(code.map(ExitStatus::from_raw)),
            // ENOTTY and EINVAL: the kernel is too old. ESRCH: it is old enough to forget those who were reaped.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL | libc::ESRCH)) => Ok(None),
            Err(error) => Err(error).during("read status of", "process"),
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for PidFd {
    fn from(fd: OwnedFd) -> Self {
        PidFd(fd)
    }
}

impl From<PidFd> for OwnedFd {
    fn from(pidfd: PidFd) -> Self {
        pidfd.0
    }
}
