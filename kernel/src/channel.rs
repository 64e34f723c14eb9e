//! A pair of sockets that carries packets, descriptors and the sender's identity (unix(7), `SOCK_SEQPACKET`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::Result;
use crate::error::{During, Error};
use crate::poll::Deadline;

/// The most descriptors one packet carries (`SCM_MAX_FD`).
pub const DESCRIPTORS_MAX: usize = 253;

/// The longest packet that is received, in bytes.
pub const PACKET_BYTES_MAX: usize = 64 * 1024;

/// Who holds the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process, as the caller sees it; 0 when it has no number in the caller's pid namespace.
    pub pid: i32,
    /// User id, as the caller sees it.
    pub uid: u32,
    /// Group id, as the caller sees it.
    pub gid: u32,
}

/// One end of a packet channel.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// Two connected ends, both close-on-exec.
pub fn pair() -> Result<(Channel, Channel)> {
    let (one, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .during("make", "channel")?;
    Ok((Channel(one), Channel(other)))
}

impl Channel {
    /// Sends one packet, with copies of `descriptors`. EPIPE: the other end is gone (no signal is raised).
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        send(self.0.as_fd(), bytes, descriptors)
    }

    /// Waits for one packet and takes its descriptors, close-on-exec set. No bytes: the other end is closed.
    pub fn receive(&self) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
        // Asked first: room for the longest would be 16 pages to clear for a word.
        let mut bytes = vec![0_u8; self.next_length()?];
        let (length, descriptors) = receive(self.0.as_fd(), &mut bytes)?;
        bytes.truncate(length);
        Ok((bytes, descriptors))
    }

    /// Waits for the next packet and tells its length in bytes, at most [`PACKET_BYTES_MAX`]; 0: the other end is closed.
    fn next_length(&self) -> Result<usize> {
        loop {
            match rustix::net::recv(&self.0, &mut [0_u8; 1], RecvFlags::PEEK | RecvFlags::TRUNC) {
                // As in `receive`: what the other end had said before it closed comes after this.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                other => return other.map(|(_, length)| length.min(PACKET_BYTES_MAX)).during("receive", "packet"),
            }
        }
    }

    /// Like [`receive`](Self::receive), at most `timeout_ms`; `None`: nothing came.
    pub fn receive_within(&self, timeout_ms: u64) -> Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        let deadline = Deadline::after(Some(timeout_ms));
        loop {
            let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
            match rustix::event::poll(&mut polled, deadline.left().as_ref()) {
                Ok(0) => return Ok(None),
                Ok(_) => return self.receive().map(Some),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).during("wait for", "packet"),
            }
        }
    }

    /// Who made the other end (`SO_PEERCRED`).
    pub fn credentials(&self) -> Result<Credentials> {
        credentials(self.0.as_fd())
    }
}

/// Receives from any unix socket into `bytes`, as [`Channel::receive`] does: how many, and the descriptors that came along.
/// InvalidData: a packet was longer than `bytes`.
pub fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<(usize, Vec<OwnedFd>)> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut buffers = [IoSliceMut::new(bytes)];
        match rustix::net::recvmsg(socket, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
            // The other end closed with packets of ours unread. That is said once, and before what it had sent itself,
            // which may be why it closed (sock_error comes first in net/unix/af_unix.c).
            Err(Errno::INTR | Errno::CONNRESET) => {}
            other => break other.during("receive", "packet")?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    // Checked after the descriptors are owned, so that an error closes them.
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Error::refused("receive", "packet", io::ErrorKind::InvalidData, "the packet was cut short"));
    }
    Ok((received.bytes, descriptors))
}

/// Sends bytes and copies of `descriptors` on any unix socket. EPIPE: the other end is gone (no signal is raised).
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    if descriptors.len() > DESCRIPTORS_MAX || bytes.len() > PACKET_BYTES_MAX || bytes.is_empty() {
        let why = "a packet has 1 to 65536 bytes and at most 253 descriptors";
        return Err(Error::refused("send", "packet", io::ErrorKind::InvalidInput, why));
    }
    let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(descriptors).size()];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        let pushed = control.push(SendAncillaryMessage::ScmRights(descriptors));
        debug_assert!(pushed, "the space was made for this message");
    }
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            other => return other.map(drop).during("send", "packet"),
        }
    }
}

/// Who is at the other end of any connected unix socket (`SO_PEERCRED`).
pub fn credentials(socket: BorrowedFd<'_>) -> Result<Credentials> {
    let found = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials)
        .during("read", "peer credentials")?;
    Ok(Credentials { pid: found.pid(), uid: found.uid(), gid: found.gid() })
}

/// A name in the file system at which channels to this process are opened.
#[derive(Debug)]
pub struct Door(OwnedFd);

impl Door {
    /// Makes the socket file `path`, which only its owner may use, in the place of a dead one's.
    pub fn open(path: &Path) -> Result<Door> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let opened = || -> rustix::io::Result<OwnedFd> {
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            match rustix::fs::unlink(path) {
                Err(Errno::NOENT) => {}
                other => other?,
            }
            rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
            rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(0o600))?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        opened().map(Door).during("listen at", path.display())
    }

    /// The next channel, if somebody has come. It does not block.
    pub fn accept(&self) -> Result<Option<Channel>> {
        loop {
            match rustix::net::accept_with(&self.0, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => return Ok(Some(Channel(socket))),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => return Err(errno).during("accept", "channel"),
            }
        }
    }
}

/// How many may wait at a door; the kernel takes less if net.core.somaxconn says so.
const BACKLOG: i32 = 4096;

/// Opens a channel at a door. It does not block, and waits for nothing: EAGAIN, too many wait there; ECONNREFUSED, nobody
/// is behind it; ENOENT, there is none.
pub fn knock(path: &Path) -> Result<Channel> {
    let connected = || -> rustix::io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    connected().map(Channel).during("connect to", path.display())
}

impl From<OwnedFd> for Door {
    /// A door that another program has opened.
    fn from(fd: OwnedFd) -> Self {
        Door(fd)
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Channel(fd)
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    #[test]
    fn packets_keep_their_borders_and_carry_descriptors() {
        let (one, other) = pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"shared").unwrap();
        one.send(b"first", &[file.as_fd(), file.as_fd()]).unwrap();
        one.send(b"second", &[]).unwrap();
        let (bytes, descriptors) = other.receive().unwrap();
        assert_eq!((bytes.as_slice(), descriptors.len()), (b"first".as_slice(), 2));
        let mut copy = File::from(descriptors.into_iter().next().unwrap());
        assert!(rustix::io::fcntl_getfd(&copy).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        copy.rewind().unwrap();
        let mut text = String::new();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "shared");
        assert_eq!(other.receive().unwrap().0, b"second");
        assert!(other.receive_within(0).unwrap().is_none());
    }

    #[test]
    fn the_most_descriptors_fit_and_one_more_is_refused() {
        let (one, other) = pair().unwrap();
        let fds = vec![one.as_fd(); DESCRIPTORS_MAX];
        one.send(b"x", &fds).unwrap();
        assert_eq!(other.receive().unwrap().1.len(), DESCRIPTORS_MAX);
        let fds = vec![one.as_fd(); DESCRIPTORS_MAX + 1];
        assert_eq!(one.send(b"x", &fds).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_closed_end_is_an_empty_packet_and_a_broken_pipe() {
        let (one, other) = pair().unwrap();
        drop(other);
        assert_eq!(one.receive().unwrap().0, b"");
        assert_eq!(one.send(b"x", &[]).unwrap_err().raw_os_error(), Some(libc::EPIPE));
    }

    #[test]
    fn last_words_arrive_though_ours_were_not_read() {
        let (one, other) = pair().unwrap();
        one.send(b"unread", &[]).unwrap();
        other.send(b"last words", &[]).unwrap();
        drop(other);
        assert_eq!(one.receive().unwrap().0, b"last words");
        assert_eq!(one.receive().unwrap().0, b"");
    }

    #[test]
    fn a_door_is_opened_in_the_place_of_a_dead_ones() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("door");
        assert_eq!(knock(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(Door::open(&path).unwrap());
        assert_eq!(knock(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let door = Door::open(&path).unwrap();
        assert!(door.accept().unwrap().is_none());
        knock(&path).unwrap().send(b"here", &[door.as_fd()]).unwrap();
        let channel = door.accept().unwrap().unwrap();
        let (bytes, descriptors) = channel.receive().unwrap();
        assert_eq!((bytes.as_slice(), descriptors.len()), (b"here".as_slice(), 1));
        assert_eq!(channel.receive().unwrap().0, b"");
    }

    #[test]
    fn the_peer_is_ourselves() {
        let (one, _other) = pair().unwrap();
        assert_eq!(one.credentials().unwrap().pid, std::process::id() as i32);
    }
}
