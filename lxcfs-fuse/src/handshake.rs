//! How a worker gets a FUSE connection that another process has begun, or that is long in use.
//!
//! fuser wants to see the kernel's first message, INIT, and to answer it. The supervisor has read it and kept
//! it. So fuser is given one end of a socket pair, INIT is put into the other end, and the answer is taken out
//! there; then the descriptor number fuser holds is made the connection itself (dup3). The first answer goes
//! to the kernel; every later one must be equal to it, because what was agreed then cannot change.
//!
//! Limits: relies on fuser 0.18 using one descriptor number with plain read and write, which the pinned version
//! does; one descriptor for all threads (`clone_fd` off), else a request read through a clone dies with it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use fuser::{Config, Session, SessionACL};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use crate::filesystem::Filesystem;

/// `FUSE_NOTIFY_RESEND` (linux/fuse.h, Linux ≥ 6.9): give all unanswered requests out again.
const NOTIFY_RESEND: u32 = 7;

/// A session that has been shaken hands with and is not yet connected.
pub struct Greeted {
    session: Session<Filesystem>,
    reply: Vec<u8>,
}

/// Lets fuser answer the kernel's INIT message `init` for `filesystem`, with `threads` threads to come.
pub fn greet(filesystem: Filesystem, init: &[u8], threads: usize) -> io::Result<Greeted> {
    let (inner, outer) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    send(&outer, init, SendFlags::empty())?;
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    let session = Session::from_fd(filesystem, inner, SessionACL::All, config)?;
    let mut reply = vec![0; 4096];
    let (length, _) = recv(&outer, &mut reply, RecvFlags::DONTWAIT)?;
    reply.truncate(length);
    Ok(Greeted { session, reply })
}

impl Greeted {
    /// The answer to INIT.
    pub fn reply(&self) -> &[u8] {
        &self.reply
    }

    /// Puts the live connection in the place of the socket. The session may run then.
    pub fn connect(self, connection: BorrowedFd<'_>) -> Result<Session<Filesystem>, kernel::Error> {
        let number = self.session.as_fd().as_raw_fd();
        kernel::process::place_descriptor(connection, number)?;
        Ok(self.session)
    }
}

/// Tells the kernel to give out again what the last worker left unanswered. EINVAL before Linux 6.9.
pub fn resend(connection: BorrowedFd<'_>) -> io::Result<()> {
    let mut message = [0_u8; 16];
    message[..4].copy_from_slice(&16_u32.to_ne_bytes());
    message[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    rustix::io::write(connection, &message)?;
    Ok(())
}
