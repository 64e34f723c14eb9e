//! The step that gives a server its own `/proc`: its registration with the FUSE overlay.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use kernel::cgroup::Controller;
use kernel::mount::Tree;
use kernel::namespace::{self, Kinds};
use kernel::process::{self, CloneOptions, Fork};
use serde::{Deserialize, Serialize};

use super::step::Step;
use super::world::World;
use crate::site::Site;
use crate::store::Server;

/// A change to what `lxcfs-fuse` shows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ViewStep {
    /// The server's registration file.
    Register {
        /// The file.
        file: PathBuf,
        /// The server's name.
        name: String,
        /// Its cgroup below the hierarchies' roots.
        group: String,
        /// Its quota.
        cpus: Option<f64>,
    },
}

/// The registration as `lxcfs-fuse` reads it.
#[derive(Serialize)]
struct Registration<'a> {
    name: &'a str,
    started_boottime_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpus: Option<f64>,
    cgroup: BTreeMap<&'static str, PathBuf>,
}

/// The step that registers a server.
pub fn plan(site: &Site, server: &Server) -> Step {
    Step::View(ViewStep::Register {
        file: site.lxcfs().join(format!("servers/{}.toml", server.record.id)),
        name: server.name.to_string(),
        group: site.server_cgroup(&server.name),
        cpus: server.spec.cpus.map(|cpus| cpus.0),
    })
}

const CONTROLLERS: &[Controller] = &[
    Controller::Cpu,
    Controller::Cpuacct,
    Controller::Cpuset,
    Controller::Memory,
    Controller::Blkio,
    Controller::Pids,
];

impl ViewStep {
    /// Makes the change.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn apply(&self, world: &mut World) -> Result<()> {
        let Self::Register { file, name, group, cpus } = self;
        let group = world.group(group)?;
        let unified = group.unified_directory();
        // Under its own name a controller is one of v1; those of cgroup2 are all in the unified directory.
        let v1 = CONTROLLERS.iter().filter_map(|controller| Some((controller.as_str(), group.directory(*controller)?)));
        let mut cgroup: BTreeMap<_, _> = v1.filter(|(_, directory)| Some(directory) != unified.as_ref()).collect();
        cgroup.extend(unified.map(|directory| ("unified", directory)));
        let started_boottime_ns = boottime_ns();
        let text = toml::to_string(&Registration { name, started_boottime_ns, cpus: *cpus, cgroup })
            .context("write a registration as TOML")?;
        // No sync: it is gone with the next boot anyway. The rename keeps readers from half a file.
        let temporary = file.with_extension("new");
        fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, file)).inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })?;
        Ok(())
    }

    /// Takes the change back.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn undo(&self, _: &mut World) -> Result<()> {
        let Self::Register { file, .. } = self;
        match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// The files that the FUSE overlay serves, relative to the root.
///
/// # Errors
/// When it has not been started.
pub fn files(site: &Site) -> Result<Vec<PathBuf>> {
    let list = site.lxcfs().join("files");
    let text = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
    Ok(text.lines().filter(|line| !line.is_empty()).map(PathBuf::from).collect())
}

/// A mount of each file for server `id`, with its path inside.
///
/// # Errors
/// When the overlay does not serve it.
pub fn mounts(site: &Site, id: u32) -> Result<Vec<(Tree, PathBuf)>> {
    let view = site.lxcfs().join(format!("mount/{id}"));
    let mount = |file: PathBuf| Ok((Tree::clone_of(&view.join(&file))?, Path::new("/").join(&file)));
    files(site)?.into_iter().map(mount).collect()
}

/// Puts the files of a new overlay in the place of a dead one's, in the running server whose init is `pid`.
///
/// # Errors
/// When the new overlay does not serve the server, or its mount namespace cannot be entered.
pub fn reattach(site: &Site, id: u32, pid: i32) -> Result<()> {
    let mounts = mounts(site, id)?;
    let inside = namespace::open(pid, "mnt")?;
    match process::fork(&CloneOptions::default())? {
        Fork::Parent { pid, .. } => {
            let status = process::status_of(pid)?;
            if status.success() { Ok(()) } else { Err(anyhow!("the mounts inside could not be replaced: {status}")) }
        }
        Fork::Child => {
            let replaced = namespace::enter(inside.as_fd(), Kinds::MOUNT).and_then(|()| replace(mounts));
            if let Err(error) = &replaced {
                log::error!("{:#}", anyhow!("{error}"));
            }
            std::process::exit(i32::from(replaced.is_err()))
        }
    }
}

/// In the server's mount namespace: what a guest may have put at these places is its own affair, and stays inside.
fn replace(mounts: Vec<(Tree, PathBuf)>) -> kernel::Result<()> {
    for (tree, target) in mounts {
        // What lies there is dead; without one it is the file of procfs, and nothing is detached.
        kernel::mount::detach(&target)?;
        tree.attach(&target)?;
    }
    Ok(())
}

/// The host's clock since boot, suspended time included (clock_gettime(2), `CLOCK_BOOTTIME`).
pub fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl fmt::Display for ViewStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Register { file, .. } = self;
        write!(out, "register its view of /proc in {}", file.display())
    }
}
