//! Readiness: the socket on which a service says `READY=1`, as sd_notify(3) has it.
//!
//! Every service with `notify = true` has a socket of its own, so who sent needs no guessing: the
//! sender may be a short-lived child that is gone before anybody could look it up. Other words
//! than `READY=1` are accepted and not used.

use std::fs::Permissions;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

/// Where the sockets are.
const DIRECTORY: &str = "/run/vsinit/notify";

/// The receiving end of one service.
pub struct Notify {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Notify {
    /// A new socket for the service's next process; what was sent to an older one is forgotten.
    pub fn open(service: &str) -> std::io::Result<Notify> {
        std::fs::create_dir_all(DIRECTORY)?;
        Notify::bind(Path::new(DIRECTORY).join(service))
    }

    fn bind(path: PathBuf) -> std::io::Result<Notify> {
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path)?;
        // Root's until the service's user gets it.
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        socket.set_nonblocking(true)?;
        Ok(Notify { socket, path })
    }

    /// `NOTIFY_SOCKET` in the service's environment.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes all messages that are there. `true`: one of them says that the service is ready.
    ///
    /// Descriptors that come along are closed by the kernel, which is what sd_notify_barrier(3)
    /// waits for.
    pub fn receive(&self) -> bool {
        let mut bytes = [0; 1024];
        let mut ready = false;
        while let Ok(length) = self.socket.recv(&mut bytes) {
            ready |= says_ready(bytes.get(..length).unwrap_or_default());
        }
        ready
    }
}

impl AsFd for Notify {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Notify {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn says_ready(message: &[u8]) -> bool {
    message.split(|byte| *byte == b'\n').any(|line| line == b"READY=1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_a_line_of_its_own() {
        assert!(says_ready(b"READY=1"));
        assert!(says_ready(b"STATUS=up\nREADY=1\nMAINPID=7\n"));
        for message in [&b"READY=0"[..], b"XREADY=1", b"READY=10", b""] {
            assert!(!says_ready(message));
        }
    }

    #[test]
    fn messages_are_heard_once() {
        let directory = tempfile::tempdir().unwrap();
        let notify = Notify::bind(directory.path().join("x")).unwrap();
        assert!(!notify.receive());
        let sender = UnixDatagram::unbound().unwrap();
        sender.send_to(b"STATUS=soon", notify.path()).unwrap();
        sender.send_to(b"READY=1\n", notify.path()).unwrap();
        assert!(notify.receive());
        assert!(!notify.receive());
        drop(notify);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
