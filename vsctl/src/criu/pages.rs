//! Memory that comes page by page: one program of CRIU's reads it from images (`criu page-server`), the other puts it where it was asked
//! for (`criu lazy-pages`, userfaultfd(2)). Each has one end of a socket; what lies between the other ends is the caller's.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use kernel::process::{self, PidFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_send_buffer_size_force;

use super::{Criu, end, why};

/// The log of either, in the directory for logs.
const LOG: &str = "criu-pages.log";

/// The socket by which restored processes reach who brings their memory, in the directory for logs (criu: `criu/uffd.c`).
const MEETING: &str = "lazy-pages.socket";

/// How long it may take until it is ready, in seconds: emulated machines are slow.
const READY_S: i64 = 60;

/// What either of us may have said that the other has not heard: the kernel counts a word of 24 bytes as some hundred, and each process
/// may ask for a page at the same time.
const BUFFER_BYTES: usize = 16 << 20;

/// A program that sends memory or takes it.
#[derive(Debug)]
pub struct Pages {
    child: Child,
    pidfd: PidFd,
    socket: UnixStream,
    logs: PathBuf,
    may_end: bool,
}

impl Criu {
    /// Begins to send memory of the images in `images`.
    ///
    /// # Errors
    /// When the program cannot be run.
    pub fn send_pages(&self, images: &Path, logs: &Path) -> Result<Pages> {
        self.pages(&["page-server", "--lazy-pages"], images, logs, None)
    }

    /// Begins to wait for processes that are restored from `images` and to bring them their memory; a restore must have the same `logs`.
    ///
    /// # Errors
    /// When the program cannot be run, or does not get as far as that.
    pub fn take_pages(&self, images: &Path, logs: &Path) -> Result<Pages> {
        clear(logs)?;
        let (told, ready) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("make a pipe")?;
        let pages = self.pages(&["lazy-pages", "--page-server"], images, logs, Some(&ready))?;
        drop(ready);
        // Whoever else makes room in the host's memory: without this one, a server has none.
        let spared = format!("/proc/{}/oom_score_adj", pages.child.id());
        if let Err(error) = std::fs::write(&spared, "-1000") {
            log::debug!("write {spared}: {error}");
        }
        let limit = Timespec { tv_sec: READY_S, tv_nsec: 0 };
        let is_told = poll(&mut [PollFd::new(&told, PollFlags::IN)], Some(&limit)).context("wait for criu")? > 0;
        // It says so, or ends.
        match is_told.then(|| File::from(told).read(&mut [0])).transpose().context("listen to criu")? {
            Some(1..) => Ok(pages),
            _ => bail!("criu cannot bring memory: {}", why(&logs.join(LOG))),
        }
    }

    fn pages(&self, verb: &[&str], images: &Path, logs: &Path, ready: Option<&OwnedFd>) -> Result<Pages> {
        let (ours, theirs) = UnixStream::pair().context("make a socket")?;
        for end in [&ours, &theirs] {
            // Neither of us looks whether the other listens before it says something.
            set_socket_send_buffer_size_force(end, BUFFER_BYTES).context("make a socket's buffer larger")?;
        }
        process::keep_across_exec(&theirs)?;
        let mut command = Command::new(&self.program);
        // As for a dump: ^C is for who has started this.
        command.process_group(0).args(verb).arg("--images-dir").arg(images).arg("--work-dir").arg(logs);
        command.args(["--log-file", LOG, "-v2", "--ps-socket", &theirs.as_raw_fd().to_string()]);
        if let Some(ready) = ready {
            process::keep_across_exec(ready)?;
            command.args(["--status-fd", &ready.as_raw_fd().to_string()]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().with_context(|| format!("run {}", self.program.display()))?;
        let pidfd = PidFd::open(child.id() as i32)?;
        Ok(Pages { child, pidfd, socket: ours, logs: logs.to_owned(), may_end: true })
    }
}

/// Whether somebody has been told in `logs` that processes would be restored, or has left word of it.
pub fn is_left(logs: &Path) -> bool {
    logs.join(MEETING).exists()
}

/// Removes what one leaves in `logs` that was killed with whom it worked for. One that still waits for processes ends: somebody comes, and
/// brings none.
///
/// # Errors
/// When that is not possible.
pub fn clear(logs: &Path) -> Result<()> {
    let meeting = logs.join(MEETING);
    if !is_left(logs) {
        return Ok(());
    }
    // Its path may be longer than a socket's may be.
    let directory = File::open(logs).with_context(|| format!("open {}", logs.display()))?;
    match UnixStream::connect(format!("/proc/self/fd/{}/{MEETING}", directory.as_raw_fd())) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        // Somebody else has cleared it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("connect to {}", meeting.display())),
    }
    match std::fs::remove_file(&meeting) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", meeting.display()))
        }
        _ => Ok(()),
    }
}

impl Pages {
    /// Our end.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Can be read when it has ended.
    pub fn ending(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// From now on programs run whose memory it brings: what it has not brought would be zeros to them if it were ended. It ends by
    /// itself when all ends of its socket are closed.
    pub fn leave(&mut self) {
        self.may_end = false;
    }

    /// Takes the status of one that has ended.
    ///
    /// # Errors
    /// When it has not done all of its work.
    pub fn finish(&mut self) -> Result<()> {
        let status = self.child.wait().context("wait for criu")?;
        match status.success() {
            true => Ok(()),
            false => bail!("criu did not bring all memory ({status}): {}", why(&self.logs.join(LOG))),
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.may_end {
            end(&mut self.child);
        }
        // Nobody meets there any more.
        if let Err(error) = clear(&self.logs) {
            log::warn!("{error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn who_still_waits_is_told_that_nobody_comes() {
        let directory = tempfile::tempdir().unwrap();
        // Longer than a socket's path may be.
        let logs = directory.path().join("x".repeat(120));
        std::fs::create_dir(&logs).unwrap();
        clear(&logs).unwrap();
        let opened = File::open(&logs).unwrap();
        let listener = UnixListener::bind(format!("/proc/self/fd/{}/{MEETING}", opened.as_raw_fd())).unwrap();
        assert!(is_left(&logs));
        clear(&logs).unwrap();
        assert!(!is_left(&logs));
        let (mut met, _) = listener.accept().unwrap();
        assert_eq!(met.read(&mut [0]).unwrap(), 0);
        drop(listener);
        // Left by one that was killed: nobody listens.
        drop(UnixListener::bind(format!("/proc/self/fd/{}/{MEETING}", opened.as_raw_fd())).unwrap());
        assert!(is_left(&logs));
        clear(&logs).unwrap();
        assert!(!is_left(&logs));
    }
}
