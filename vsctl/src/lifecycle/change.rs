//! Steps that change a server that exists: freezing, other limits, another spec, other reservations, another name.
//!
//! Unlike the steps of a start, each knows what was before, so that its undo brings that back.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::files::FilesStep;
use super::group::Limits;
use super::state;
use super::step::Step;
use super::world::World;
use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::site::Site;
use crate::spec::VolumeKind;
use crate::store::Server;
use crate::template::Templates;
use crate::template::family::Family;
use crate::template::personalise::{self, Identity};
use crate::template::root::Root;
use crate::volume;

/// A change to a server that exists.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeStep {
    /// All processes are held; the mark says so to a list.
    Freeze {
        /// Cgroup below the hierarchies' roots.
        group: String,
        /// The mark.
        mark: PathBuf,
    },
    /// Other limits for a running server.
    Limit {
        /// Cgroup below the hierarchies' roots.
        group: String,
        /// The limits until now.
        from: Limits,
        /// The new ones.
        to: Limits,
    },
    /// A file with another text.
    Rewrite {
        /// The file.
        path: PathBuf,
        /// Its text until now.
        from: String,
        /// The new text.
        to: String,
    },
    /// A reservation that passes to another name.
    Reown {
        /// The file.
        path: PathBuf,
        /// Who had it.
        from: String,
        /// Who gets it.
        to: String,
    },
    /// A reservation that is given back.
    Release {
        /// The file.
        path: PathBuf,
        /// Who had it.
        owner: String,
    },
    /// Another host name in the root's files.
    Hostname {
        /// The layer below an overlay's; none for a full copy.
        lower: Option<PathBuf>,
        /// Where changed files go.
        writable: PathBuf,
        /// The template's distribution family.
        family: String,
        /// The name until now.
        from: String,
        /// The new one.
        to: String,
    },
    /// A server's directory under another name.
    Move {
        /// The name until now.
        from: Name,
        /// The new one.
        to: Name,
    },
}

/// The step that writes host name `to` into a server's root, or none when its template is gone: then nobody knows how.
pub fn plan_hostname(site: &Site, server: &Server, from: &str, to: &str) -> Option<Step> {
    let template = Templates::below(&site.state()).open(&server.spec.template).ok()?;
    let kind = server.spec.volume;
    let step = ChangeStep::Hostname {
        lower: (kind == VolumeKind::Overlay).then(|| template.root()),
        writable: volume::writable(site, &server.name, kind),
        family: template.definition.family.clone(),
        from: from.to_owned(),
        to: to.to_owned(),
    };
    Some(Step::Change(step))
}

impl ChangeStep {
    /// Makes the change.
    ///
    /// # Errors
    /// When the kernel refuses; then all is as before.
    pub fn apply(&self, world: &mut World) -> Result<()> {
        match self {
            Self::Freeze { group, mark } => {
                // First the mark: a server that is marked and runs can be thawed, an unmarked frozen one looks alive.
                fs::write(mark, "").with_context(|| format!("write {}", mark.display()))?;
                let frozen = world.group(group).and_then(|group| Ok(group.freeze()?));
                if frozen.is_err() {
                    remove(mark)?;
                }
                frozen
            }
            Self::Limit { group, from, to } => {
                let group = world.group(group)?;
                let applied = to.apply(&group);
                if applied.is_err() {
                    from.apply(&group).context("put the old limits back")?;
                }
                applied
            }
            Self::Rewrite { path, to, .. } => Ok(kernel::file::write_atomic(path, to.as_bytes())?),
            Self::Reown { path, from, to } => reown(path, from, to),
            Self::Release { path, owner } => FilesStep::Reserve { path: path.clone(), owner: owner.clone() }.undo(),
            Self::Hostname { lower, writable, family, to, .. } => hostname(lower.as_deref(), writable, family, to),
            Self::Move { from, to } => move_directory(world.site, from, to),
        }
    }

    /// Brings back what was before.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn undo(&self, world: &mut World) -> Result<()> {
        match self {
            Self::Freeze { group, mark } => {
                let group = world.group(group)?;
                if group.exists() {
                    group.thaw()?;
                }
                remove(mark)
            }
            Self::Limit { group, from, .. } => {
                let group = world.group(group)?;
                if group.exists() { from.apply(&group) } else { Ok(()) }
            }
            // Another text is that of somebody who came later.
            Self::Rewrite { path, from, to } => match fs::read_to_string(path) {
                Ok(text) if text == *to => Ok(kernel::file::write_atomic(path, from.as_bytes())?),
                Ok(_) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error.into()),
            },
            Self::Reown { path, from, to } => reown(path, to, from),
            Self::Release { path, owner } => match fs::read_to_string(path) {
                Ok(text) if text == *owner => Ok(()),
                Ok(text) => {
                    log::warn!("{} went to '{text}' and does not come back to '{owner}'", path.display());
                    Ok(())
                }
                Err(_) => FilesStep::Reserve { path: path.clone(), owner: owner.clone() }.apply(),
            },
            Self::Hostname { lower, writable, family, from, .. } => {
                if writable.exists() {
                    hostname(lower.as_deref(), writable, family, from)
                } else {
                    Ok(())
                }
            }
            Self::Move { from, to } => {
                if world.site.server(from).exists() || !world.site.server(to).exists() {
                    return Ok(());
                }
                if state::of(world.site, to)?.is_up() {
                    return Err(Failure::new(Exit::AlreadyRunning, format!("'{to}' is running"))
                        .hint("stop it, then `vsctl doctor --fix`")
                        .into());
                }
                move_directory(world.site, to, from)
            }
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Only the owner's reservation is passed on.
fn reown(path: &Path, from: &str, to: &str) -> Result<()> {
    match fs::read_to_string(path) {
        Ok(text) if text == from => Ok(kernel::file::write_atomic(path, to.as_bytes())?),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn hostname(lower: Option<&Path>, writable: &Path, family: &str, name: &str) -> Result<()> {
    let root = match lower {
        Some(lower) => Root::overlay(writable, lower)?,
        None => Root::directory(writable)?,
    };
    let identity = Identity { hostname: Some(name.to_owned()), ..Identity::default() };
    root.apply(&personalise::plan(&root, Family::named(family), &identity)?)
}

fn move_directory(site: &Site, from: &Name, to: &Name) -> Result<()> {
    let (source, target) = (site.server(from), site.server(to));
    // rename(2) would replace an empty directory.
    let flags = rustix::fs::RenameFlags::NOREPLACE;
    rustix::fs::renameat_with(rustix::fs::CWD, &source, rustix::fs::CWD, &target, flags).map_err(io::Error::from)?;
    Ok(kernel::file::sync_entry(&target)?)
}

impl fmt::Display for ChangeStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Freeze { group, .. } => write!(out, "freeze cgroup {group}"),
            Self::Limit { group, to, .. } if *to == Limits::default() => {
                write!(out, "lift the limits of cgroup {group}")
            }
            Self::Limit { group, to, .. } => write!(out, "limit cgroup {group}: {to}"),
            Self::Rewrite { path, .. } => write!(out, "write {}", path.display()),
            Self::Reown { path, to, .. } => write!(out, "reserve {} for {to}", path.display()),
            Self::Release { path, .. } => write!(out, "give back {}", path.display()),
            Self::Hostname { writable, to, .. } => write!(out, "write host name {to} below {}", writable.display()),
            Self::Move { from, to } => write!(out, "move the files of {from} to {to}"),
        }
    }
}
