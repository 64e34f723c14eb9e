//! The step that gives a server its own `/proc`: its registration with the FUSE overlay.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

use anyhow::{Context, Result};
use kernel::cgroup::Controller;
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
