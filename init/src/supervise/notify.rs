//! Readiness: the socket on which services say `READY=1`, as sd_notify(3) has it.
//!
//! The kernel tells who sent; a message counts for the service whose process that is or descends
//! from. Other words than `READY=1` are accepted and not used.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, setsockopt, sockopt};
use std::os::fd::AsRawFd;

/// Where services send, `NOTIFY_SOCKET` in their environment.
pub const SOCKET: &str = "/run/vsinit/notify";

/// How far a sender may be below a service's main process.
const MAX_DEPTH: usize = 16;

/// The receiving end.
pub struct Notify(UnixDatagram);

/// One message.
pub struct Message {
    /// The sender, as the guest numbers it.
    pub pid: i32,
    /// Whether it says that the service is ready.
    pub ready: bool,
}

impl Notify {
    /// Binds the socket; services of any user may send to it.
    pub fn bind(path: &Path) -> std::io::Result<Notify> {
        let _ = std::fs::remove_file(path);
        let socket = UnixDatagram::bind(path)?;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o666))?;
        socket.set_nonblocking(true)?;
        setsockopt(&socket, sockopt::PassCred, &true)?;
        Ok(Notify(socket))
    }

    /// The next message, if one is there.
    pub fn receive(&self) -> Option<Message> {
        let mut bytes = [0; 1024];
        let mut slices = [IoSliceMut::new(&mut bytes)];
        // Room for credentials only: descriptors that somebody attaches are dropped by the kernel.
        let mut space = nix::cmsg_space!(nix::sys::socket::UnixCredentials);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let received =
            recvmsg::<UnixAddr>(self.0.as_raw_fd(), &mut slices, Some(&mut space), flags).ok()?;
        let length = received.bytes;
        let pid = received.cmsgs().ok()?.find_map(|message| match message {
            ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid()),
            _ => None,
        });
        let ready = says_ready(bytes.get(..length)?);
        Some(Message {
            pid: pid.unwrap_or(0),
            ready,
        })
    }
}

impl AsFd for Notify {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn says_ready(message: &[u8]) -> bool {
    message
        .split(|byte| *byte == b'\n')
        .any(|line| line == b"READY=1")
}

/// The first of `pid` and its ancestors for which `is_main` holds.
pub fn main_process(pid: i32, is_main: impl Fn(i32) -> bool) -> Option<i32> {
    let mut pid = pid;
    for _ in 0..MAX_DEPTH {
        if is_main(pid) {
            return Some(pid);
        }
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        pid = parent(&stat).filter(|parent| *parent > 1)?;
    }
    None
}

/// The parent in the text of `/proc/PID/stat`. The command in brackets may hold anything.
fn parent(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
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
    fn parents() {
        assert_eq!(parent("7 (a) S 1 7 7 0"), Some(1));
        assert_eq!(parent("7 (evil) S 99 (x) R 3 7"), Some(3));
        assert_eq!(parent("7 (a"), None);
    }

    #[test]
    fn the_kernel_says_who_sent() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let notify = Notify::bind(&path).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        sender.send_to(b"READY=1\n", &path).unwrap();
        let message = notify.receive().unwrap();
        let me = std::process::id() as i32;
        assert!(message.ready && message.pid == me);
        assert!(notify.receive().is_none());
        assert_eq!(main_process(me, |pid| pid == me), Some(me));
        assert_eq!(main_process(me, |_| false), None);
    }
}
