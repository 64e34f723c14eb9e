//! A pseudo-terminal of the server's own devpts instance, whatever the guest has put in the way.

use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result, bail};
use kernel::pty::Master;
use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid};

use super::account::Account;
use super::target::Target;

/// `DEVPTS_SUPER_MAGIC` of linux/magic.h.
const DEVPTS_MAGIC: u64 = 0x1cd1;
/// Group `tty`, everywhere that matters; the instance is mounted with it.
const TTY_GROUP: u32 = 5;

/// A new pty: its master, which does not block, and the side for the guest, owned by `account`.
///
/// # Errors
/// When the guest's /dev/pts is no devpts.
pub fn open(target: &Target, account: &Account) -> Result<(Master, OwnedFd)> {
    let master = master(target).context("open a terminal of the server")?;
    let peer = master.peer()?;
    // Made by the host's root, who is nobody inside.
    let owner = target.ids.to_outside(account.uid).context("the user has no id on the host")?;
    let group = target.ids.to_outside(TTY_GROUP).map(Gid::from_raw);
    rustix::fs::fchown(&peer, Some(Uid::from_raw(owner)), group).context("give the terminal to the user")?;
    rustix::fs::fchmod(&peer, Mode::from_raw_mode(0o620)).context("protect the terminal")?;
    Ok((master, peer))
}

fn master(target: &Target) -> Result<Master> {
    let directory = OFlags::PATH | OFlags::DIRECTORY;
    let devpts = kernel::file::open_beneath_with(target.root(), Path::new("dev/pts"), directory, 0)?;
    let kind = rustix::fs::fstatfs(&devpts).context("look at /dev/pts")?.f_type;
    if kind as u64 != DEVPTS_MAGIC {
        bail!("the server's /dev/pts is no devpts");
    }
    // By name in this very file system: neither a link nor a mount over ptmx leads elsewhere.
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV | ResolveFlags::BENEATH;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let ptmx = rustix::fs::openat2(&devpts, "ptmx", flags, Mode::empty(), resolve).context("open /dev/pts/ptmx")?;
    rustix::pty::unlockpt(&ptmx).context("unlock the terminal")?;
    Ok(Master::from(ptmx))
}
