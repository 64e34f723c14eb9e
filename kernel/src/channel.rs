//! A pair of sockets that carries packets, descriptors and the sender's identity (unix(7), `SOCK_SEQPACKET`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
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
            match rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => return other.map(drop).during("send", "packet"),
            }
        }
    }

    /// Waits for one packet and takes its descriptors, close-on-exec set. No bytes: the other end is closed.
    pub fn receive(&self) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
        let mut bytes = vec![0_u8; PACKET_BYTES_MAX];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match rustix::net::recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(Errno::INTR) => {}
                // The other end died with packets of ours unread.
                Err(Errno::CONNRESET) => return Ok((Vec::new(), Vec::new())),
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
        bytes.truncate(received.bytes);
        bytes.shrink_to_fit();
        Ok((bytes, descriptors))
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

/// Who is at the other end of any connected unix socket (`SO_PEERCRED`).
pub fn credentials(socket: BorrowedFd<'_>) -> Result<Credentials> {
    let found = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials)
        .during("read", "peer credentials")?;
    Ok(Credentials { pid: found.pid(), uid: found.uid(), gid: found.gid() })
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
    fn the_peer_is_ourselves() {
        let (one, _other) = pair().unwrap();
        assert_eq!(one.credentials().unwrap().pid, std::process::id() as i32);
    }
}
