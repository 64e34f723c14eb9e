//! Steps on a server's processes: its namespaces, its root, its init.

use std::fmt;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use kernel::mount::Tree;
use serde::{Deserialize, Serialize};

use super::boot::{self, OWN_INIT};
use super::consoles;
use super::guest_groups;
use super::inside::Inside;
use super::restore::Restore;
use super::stage::Stage;
use super::step::Step;
use super::world::World;
use crate::site::Site;
use crate::spec::VolumeKind;
use crate::store::Server;
use crate::volume;

/// A change to the server's processes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProcessStep {
    /// A process in the server's new namespaces.
    Enter {
        /// Its cgroup below the hierarchies' roots.
        group: String,
        /// First of its ids on the host; none when it is privileged.
        first_id: Option<u32>,
    },
    /// Its root, seen by the host at `target`.
    MountRoot {
        /// Where the host sees it.
        target: PathBuf,
        /// How it is kept.
        kind: Layers,
    },
    /// Its init.
    Boot {
        /// Its cgroup below the hierarchies' roots.
        group: String,
        /// The init, as the template names it.
        init: String,
        /// The server's number; none in a journal of a version that did not know it.
        #[serde(default)]
        server: Option<u32>,
    },
}

/// What a root is mounted from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layers {
    /// The server's changes over a template.
    Overlay {
        /// The template's root.
        lower: PathBuf,
        /// The directory with `upper/` and `work/`.
        volume: PathBuf,
    },
    /// A directory of its own.
    Directory {
        /// That directory.
        root: PathBuf,
    },
}

impl Layers {
    /// The layers of a server's root.
    pub fn of(site: &Site, server: &Server) -> Self {
        let volume = volume::directory(site, &server.name);
        match server.spec.volume {
            VolumeKind::Overlay => Self::Overlay { lower: volume::template_root(site, &server.spec.template), volume },
            VolumeKind::Dir => Self::Directory { root: volume.join("root") },
        }
    }
}

/// The steps that put a process into new namespaces.
pub fn plan_enter(site: &Site, server: &Server) -> Step {
    Step::Process(ProcessStep::Enter { group: site.server_cgroup(&server.name), first_id: server.first_id(site) })
}

/// The step that mounts the server's root.
pub fn plan_root(site: &Site, server: &Server) -> Step {
    let target = site.server_run(&server.name).join("root");
    Step::Process(ProcessStep::MountRoot { target, kind: Layers::of(site, server) })
}

/// The step that starts init.
pub fn plan_boot(site: &Site, server: &Server, init: &str) -> Step {
    let (group, server) = (site.server_cgroup(&server.name), Some(server.record.id));
    Step::Process(ProcessStep::Boot { group, init: init.into(), server })
}

impl ProcessStep {
    /// Makes the change.
    ///
    /// # Errors
    /// When the kernel refuses, or vsinit reports a failure.
    pub fn apply(&self, world: &mut World) -> Result<()> {
        match self {
            Self::Enter { group, first_id } => {
                let inside = match &world.image {
                    None => Inside::Stage(Stage::enter(&world.group(group)?, *first_id)?),
                    Some(image) => {
                        if let Some(directory) = world.group(group)?.unified_directory() {
                            guest_groups::make(&directory, &image.groups)?;
                        }
                        let boot = world.boot.as_ref().context("nothing to restore")?;
                        image.place_program(world.site, &boot.server.name)?;
                        Inside::Restore(Restore::enter(image, first_id.is_some())?)
                    }
                };
                world.inside = Some(inside);
                Ok(())
            }
            Self::MountRoot { target, kind } => {
                let inside = world.inside()?;
                mount_root(inside, kind)?.attach(target)?;
                if let Err(error) = inside.show_root(target) {
                    // A step that failed leaves nothing.
                    kernel::mount::detach(target)?;
                    return Err(error);
                }
                world.root = Some(target.clone());
                Ok(())
            }
            Self::Boot { group, .. } => {
                let inside = world.inside.take().ok_or_else(|| anyhow!("the server's namespaces are not there yet"))?;
                let booted = match inside {
                    Inside::Stage(stage) => boot::boot(world, stage),
                    Inside::Restore(restore) => boot::go_on(world, restore),
                };
                if booted.is_err() {
                    end_all(world, group);
                }
                world.running = Some(booted?);
                Ok(())
            }
        }
    }

    /// Takes the change back.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn undo(&self, world: &mut World) -> Result<()> {
        match self {
            Self::Enter { group, .. } => {
                if let Some(inside) = world.inside.take() {
                    inside.end();
                }
                kill(world, group)
            }
            Self::MountRoot { target, .. } => Ok(kernel::mount::detach(target)?),
            Self::Boot { group, init, server } => {
                kill(world, group)?;
                if let Some(server) = server.filter(|_| init != OWN_INIT) {
                    // Without a supervisor nobody keeps them.
                    let _ = consoles::forget(world.site, server);
                }
                Ok(())
            }
        }
    }
}

/// A step that failed leaves nothing: also not an init that came half way.
fn end_all(world: &World, group: &str) {
    if let Err(error) = kill(world, group) {
        log::warn!("end what runs in cgroup {group}: {error:#}");
    }
}

fn kill(world: &World, group: &str) -> Result<()> {
    let group = world.group(group)?;
    if group.exists() { Ok(group.kill()?) } else { Ok(()) }
}

fn mount_root(inside: &Inside, kind: &Layers) -> Result<Tree> {
    let mapped = |path: &Path| -> Result<Tree> {
        let tree = Tree::clone_of(path).with_context(|| format!("the volume needs {}", path.display()))?;
        if inside.has_ids() {
            tree.set_idmap(inside.user_namespace()?.as_fd())?;
        }
        Ok(tree)
    };
    match kind {
        Layers::Overlay { lower, volume } => inside.mount_overlay(&mapped(lower)?, &mapped(volume)?),
        Layers::Directory { root } => mapped(root),
    }
}

impl fmt::Display for ProcessStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enter { first_id: Some(first), .. } => write!(out, "enter new namespaces with ids from {first}"),
            Self::Enter { first_id: None, .. } => write!(out, "enter new namespaces with the host's ids"),
            Self::MountRoot { target, kind: Layers::Overlay { lower, .. } } => {
                write!(out, "mount root at {} over {}", target.display(), lower.display())
            }
            Self::MountRoot { target, kind: Layers::Directory { root } } => {
                write!(out, "mount root at {} from {}", target.display(), root.display())
            }
            Self::Boot { init, .. } => write!(out, "boot {init}"),
        }
    }
}
