//! The system calls that a server's filter leaves to `lxcfs-fuse`: the listener on which they arrive, and who keeps it.
//!
//! The last copy of a listener must not be closed while its server runs: then those calls would not exist inside. The monitor
//! keeps it, and the supervisor of `lxcfs-fuse` does; each can have it again from the other (`lxcfs-fuse/src/parking.rs` has
//! the words).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use kernel::channel::{self, Channel};
use kernel::process::PidFd;
use kernel::seccomp::Slot;

use crate::site::Site;

/// How long the supervisor may take to say what it keeps.
const PATIENCE_MS: u64 = 5_000;

/// A listener, and the memory in which a received call stands until it is answered: with it a call outlives whoever
/// received it.
#[derive(Debug)]
pub struct Calls {
    /// Where calls arrive.
    pub listener: OwnedFd,
    /// The memory of its slot.
    pub slot: OwnedFd,
}

impl Calls {
    /// The calls of a new listener.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn of(listener: OwnedFd) -> Result<Self> {
        Ok(Self { listener, slot: Slot::memory()? })
    }

    /// Both descriptors, in the order in which they travel.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.listener.as_fd(), self.slot.as_fd()]
    }
}

impl TryFrom<Vec<OwnedFd>> for Calls {
    type Error = anyhow::Error;

    fn try_from(descriptors: Vec<OwnedFd>) -> Result<Self> {
        match <[OwnedFd; 2]>::try_from(descriptors) {
            Ok([listener, slot]) => Ok(Self { listener, slot }),
            Err(others) => bail!("{} descriptors instead of a listener and its slot", others.len()),
        }
    }
}

fn door(site: &Site) -> PathBuf {
    site.lxcfs().join("listeners")
}

/// Gives calls of server `id` to the supervisor, which has them answered. Waits for nothing. Returns the supervisor: when it
/// ends, somebody must park them with the next one.
///
/// # Errors
/// When there is no supervisor.
pub fn park(site: &Site, id: u32, calls: &Calls) -> Result<PidFd> {
    let (channel, keeper) = knock(site)?;
    channel.send(format!("park {id}").as_bytes(), &calls.descriptors())?;
    Ok(keeper)
}

/// Asks the supervisor for all calls of server `id` that it keeps.
///
/// # Errors
/// When there is no supervisor, or it says nonsense.
pub fn fetch(site: &Site, id: u32) -> Result<(Vec<Calls>, PidFd)> {
    let (channel, keeper) = knock(site)?;
    channel.send(format!("fetch {id}").as_bytes(), &[])?;
    let mut all = Vec::new();
    loop {
        let answer = channel.receive_within(PATIENCE_MS)?;
        let (words, descriptors) = answer.context("lxcfs-fuse does not say which listeners it has")?;
        match words.as_slice() {
            b"parked" => all.push(Calls::try_from(descriptors)?),
            b"" => return Ok((all, keeper)),
            other => bail!("lxcfs-fuse says '{}'", String::from_utf8_lossy(other)),
        }
    }
}

/// The supervisor of `lxcfs-fuse` that serves now: its pidfd tells of its end.
///
/// # Errors
/// When there is none, or it does not serve yet.
pub fn supervisor(site: &Site) -> Result<PidFd> {
    // The door is opened before the first answer can be given; the pid is written down after that, and removed first.
    let pid_file = site.lxcfs().join("pid");
    if !pid_file.try_exists().with_context(|| format!("look for {}", pid_file.display()))? {
        bail!("lxcfs-fuse does not serve {}", site.lxcfs().display());
    }
    Ok(knock(site)?.1)
}

/// Comes to the supervisor's door; with what is said there, and a pidfd that tells of its end.
pub(super) fn knock(site: &Site) -> Result<(Channel, PidFd)> {
    let channel = channel::knock(&door(site))?;
    // Before anything is given: if it ends later, the pidfd tells, whatever became of what was sent.
    let keeper = PidFd::open(channel.credentials()?.pid)?;
    Ok((channel, keeper))
}
