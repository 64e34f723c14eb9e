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

use crate::serving::Serving;

/// `FUSE_NOTIFY_RESEND` (linux/fuse.h, Linux ≥ 6.9): give all unanswered requests out again.
const NOTIFY_RESEND: u32 = 7;

/// Its flag in INIT, the 40th (`FUSE_HAS_RESEND`), which is in the second word of flags if the first has `FUSE_INIT_EXT`.
const HAS_RESEND: u32 = 1 << (39 - 32);
const INIT_EXT: u32 = 1 << 30;

/// Where the two words of flags are in INIT: after `fuse_in_header` (40 bytes), major, minor and max_readahead.
const FLAGS: usize = 52;
const MORE_FLAGS: usize = 56;

/// Whether the kernel that sent `init` can give out again what a dead worker left unanswered.
pub fn can_resend(init: &[u8]) -> bool {
    let word = |at: usize| init.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let has = |at, flag| word(at).is_some_and(|flags| flags & flag != 0);
    has(FLAGS, INIT_EXT) && has(MORE_FLAGS, HAS_RESEND)
}

/// A session that has been shaken hands with and is not yet connected.
pub struct Greeted {
    session: Session<Serving>,
    reply: Vec<u8>,
}

/// Lets fuser answer the kernel's INIT message `init` for `serving`, with `threads` threads to come.
pub fn greet(serving: Serving, init: &[u8], threads: usize) -> io::Result<Greeted> {
    let (inner, outer) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    send(&outer, init, SendFlags::empty())?;
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    let session = Session::from_fd(serving, inner, SessionACL::All, config)?;
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
    pub fn connect(self, connection: BorrowedFd<'_>) -> Result<Session<Serving>, kernel::Error> {
        let number = self.session.as_fd().as_raw_fd();
        kernel::process::place_descriptor(connection, number)?;
        Ok(self.session)
    }
}

/// Tells the kernel to give out again what the last worker left unanswered. EINVAL when it cannot: see [`can_resend`].
pub fn resend(connection: BorrowedFd<'_>) -> io::Result<()> {
    let mut message = [0_u8; 16];
    message[..4].copy_from_slice(&16_u32.to_ne_bytes());
    message[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    rustix::io::write(connection, &message)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_can_is_in_its_init() {
        let init = |flags: u32, more: u32| {
            let mut init = vec![0; 104];
            init[52..56].copy_from_slice(&flags.to_ne_bytes());
            init[56..60].copy_from_slice(&more.to_ne_bytes());
            init
        };
        // As Linux 6.12 and 6.1 send it.
        assert!(can_resend(&init(0x73ff_fffb, 0x00ff)));
        assert!(!can_resend(&init(0x73ff_fffb, 0x0001)));
        // Without the flag that says so there is no second word.
        assert!(!can_resend(&init(0x33ff_fffb, 0x00ff)));
        assert!(!can_resend(&init(u32::MAX, u32::MAX)[..56]) && !can_resend(&[]));
    }
}
