//! The consoles of a server whose init keeps none: the supervisor of `lxcfs-fuse` has copies, so that the next monitor gets them when
//! one was killed. vsinit keeps its own (`init::control`), and asks nobody.

use std::os::fd::{BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail};

use super::calls;
use crate::site::Site;

/// How long the supervisor may take to give them.
const PATIENCE_MS: u64 = 5_000;

/// Gives the supervisor the consoles of server `id`, in the place of those it may have. `init_start` (in ticks since boot) names this
/// life of the server. Waits for nothing.
///
/// # Errors
/// When there is no supervisor.
pub fn keep(site: &Site, id: u32, init_start: u64, consoles: &[BorrowedFd<'_>]) -> Result<()> {
    let (channel, _) = calls::knock(site)?;
    Ok(channel.send(format!("keep {id} {init_start}").as_bytes(), consoles)?)
}

/// Asks the supervisor for them; none when it keeps none of this life.
///
/// # Errors
/// When there is no supervisor, or it says nonsense.
pub fn fetch(site: &Site, id: u32, init_start: u64) -> Result<Vec<OwnedFd>> {
    let (channel, _) = calls::knock(site)?;
    channel.send(format!("give {id} {init_start}").as_bytes(), &[])?;
    let answer = channel.receive_within(PATIENCE_MS)?;
    match answer.context("lxcfs-fuse does not say which consoles it has")? {
        (words, consoles) if words == b"kept" => Ok(consoles),
        (words, _) => bail!("lxcfs-fuse says '{}'", String::from_utf8_lossy(&words)),
    }
}

/// Has the supervisor let go of them.
///
/// # Errors
/// When there is no supervisor, which then keeps none.
pub fn forget(site: &Site, id: u32) -> Result<()> {
    let (channel, _) = calls::knock(site)?;
    Ok(channel.send(format!("drop {id}").as_bytes(), &[])?)
}
