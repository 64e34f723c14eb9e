//! Copies files into a server and out of it, as cp(1) does.
//!
//! One process stands on the host, the other inside the server's root as its root; one walks the source and the other
//! writes. Between them go names, modes and bytes, so that neither ever follows a path of the other's side:
//!
//! ```text
//! sender                                receiver
//!    │ source: directory or file, its name ──►│ finds out where it goes
//!    │◄──────────────────────────── "at PATH" │
//!    │ directory a ──────────────────────────►│ makes it
//!    │ file a/b, with a pipe ────────────────►│ takes its bytes
//!    │ end ──────────────────────────────────►│ gives the directories their modes
//!    │◄──────────────────────────────── "done" │
//! ```
//!
//! A guest may change its tree all the while; what resolves its links has no more rights than its root. It may also answer
//! nothing, where a file system is its own (FUSE): then the process inside hangs, and the host's does not wait longer than
//! for a standstill.
//! Limits: owners become root's, hard links become copies; attributes, ACLs and holes are not kept; devices and sockets
//! are left out.

mod destination;
mod inside;
mod link;
mod packet;
mod receive;
mod send;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use kernel::channel;
use kernel::process::{self, Fork};

use crate::aside;
use crate::failure::{Exit, Failure, exit_of};
use crate::name::Name;
use crate::site::Site;
use inside::Place;
use link::Link;
use packet::Packet;
use send::Extent;

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// A path: on the host, or as the guest sees it.
    Path(PathBuf),
    /// Standard input or output.
    Standard,
}

impl From<PathBuf> for End {
    /// `-` is standard input or output, as everywhere.
    fn from(path: PathBuf) -> Self {
        if path == Path::new("-") { Self::Standard } else { Self::Path(path) }
    }
}

/// Copies `source` of the host to `target` in the server. With `plan` nothing is changed; returns what was or would be
/// copied, a sentence each.
///
/// # Errors
/// Exit 20 when the source or the target's directory is missing, 46 when the server's disk is full.
pub fn push(site: &Site, name: &Name, source: &End, target: &Path, plan: bool) -> Result<Vec<String>> {
    let place = Place::of(site, name)?;
    let target = End::Path(inside_path(target)?);
    let (link, other) = beside(&place, |link| receive::receive(link, &target, receive::Owner::Root).map(drop))?;
    let shown = |path: &Path| format!("{name}:{}", path.display());
    let outcome = send::send(&link, source, if plan { Extent::Plan(&shown) } else { Extent::Whole });
    aside::end(&other);
    outcome.with_context(|| format!("cannot copy into '{name}'"))
}

/// Copies `source` of the server to `target` on the host; see [`push`].
///
/// # Errors
/// Exit 20 when the source or the target's directory is missing, 46 when the host's disk is full.
pub fn pull(site: &Site, name: &Name, source: &Path, target: &End, plan: bool) -> Result<Vec<String>> {
    let place = Place::of(site, name)?;
    let source = End::Path(inside_path(source)?);
    let (owner, extent) =
        if plan { (receive::Owner::Nobody, Extent::Names) } else { (receive::Owner::Caller, Extent::Whole) };
    let (link, other) = beside(&place, |link| send::send(link, &source, extent).map(drop))?;
    let outcome = receive::receive(&link, target, owner);
    aside::end(&other);
    outcome.with_context(|| format!("cannot copy out of '{name}'"))
}

/// Paths inside begin at the server's root.
fn inside_path(path: &Path) -> Result<PathBuf> {
    if path == Path::new("-") || path.as_os_str().is_empty() {
        let message = format!("'{}' is no path in a server", path.display());
        return Err(Failure::new(Exit::BadParameter, message).into());
    }
    if path.is_absolute() {
        return Ok(path.into());
    }
    let mut whole = std::ffi::OsString::from("/");
    whole.push(path);
    Ok(whole.into())
}

/// Runs `work` in another process that stands inside `place`; what it fails of is told on the channel.
fn beside(place: &Place, work: impl FnOnce(&Link) -> Result<()>) -> Result<(Link, process::PidFd)> {
    let (ours, theirs) = channel::pair()?;
    process::set_dumpable(false)?;
    match process::fork(&place.fork_options())? {
        Fork::Parent { pidfd, .. } => {
            drop(theirs);
            Ok((Link::of_host(ours), pidfd))
        }
        Fork::Child => {
            drop(ours);
            let link = Link::of_guest(theirs);
            let outcome = place.enter(link.channel()).and_then(|()| work(&link));
            if let Err(error) = &outcome {
                // The other may have gone: then nobody wants to know.
                let _ = link.send(&Packet::failure(error));
            }
            std::process::exit(i32::from(outcome.is_err()))
        }
    }
}

/// The failure that the other process told: its code and its words.
fn told(code: u8, why: &str) -> anyhow::Error {
    Failure::new(Exit::from_code(code), why).into()
}

/// The other process ended without a word.
fn vanished() -> anyhow::Error {
    anyhow!("the process on the other side was killed")
}

/// What is told of `error`.
fn telling(error: &anyhow::Error) -> (u8, String) {
    (exit_of(error) as u8, format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_inside_begin_at_the_root_and_keep_their_last_slash() {
        for (path, expected) in [("etc/x", "/etc/x"), ("/etc/x/", "/etc/x/"), ("tmp/", "/tmp/")] {
            assert_eq!(inside_path(Path::new(path)).unwrap().as_os_str(), expected);
        }
        assert!(inside_path(Path::new("-")).is_err() && inside_path(Path::new("")).is_err());
        assert_eq!(End::from(PathBuf::from("-")), End::Standard);
        assert_eq!(End::from(PathBuf::from("./-")), End::Path("./-".into()));
    }
}
