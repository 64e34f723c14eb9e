//! The step that gives a server its own `/proc`: its registration with the FUSE overlay.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use init::handover::MountKind;
use kernel::cgroup::Controller;
use kernel::lock::Flock;
use kernel::mount::{MountInfo, Tree, parse_mountinfo};
use kernel::namespace::{self, Kinds};
use kernel::process;
use serde::{Deserialize, Serialize};

use super::state::{CpuTime, Status};
use super::step::Step;
use super::world::World;
use crate::aside::{self, Found};
use crate::name::Name;
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
    started_boottime_ns: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpus: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_before: Option<CpuTime>,
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
        let age_ns = world.image.as_ref().map_or(0, |image| image.age_ns);
        let cpu_before = world.image.as_ref().map(|image| image.cpu);
        let started_boottime_ns = started_ns(age_ns);
        let text = toml::to_string(&Registration { name, started_boottime_ns, cpus: *cpus, cpu_before, cgroup })
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

/// How long a guest can keep somebody waiting who puts files into it.
const REATTACH_LIMIT: Duration = Duration::from_secs(10);

/// A mount of something that the FUSE overlay serves.
#[derive(Debug)]
pub struct View {
    /// The mount.
    pub tree: Tree,
    /// Its path inside.
    pub target: PathBuf,
    /// What it is.
    pub kind: MountKind,
}

/// All that the overlay serves for server `id`: where the host sees it, where the server does, and what it is.
///
/// # Errors
/// When the overlay has not been started.
pub fn sources(site: &Site, id: u32) -> Result<Vec<(PathBuf, PathBuf, MountKind)>> {
    let list = site.lxcfs().join("files");
    let text = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
    let view = site.lxcfs().join(format!("mount/{id}"));
    let source = |line: &str| {
        let (path, kind) = match line.strip_suffix('/') {
            Some(path) => (path, MountKind::Directory),
            None => (line, MountKind::File),
        };
        (view.join(path), Path::new("/").join(path), kind)
    };
    Ok(text.lines().filter(|line| !line.is_empty()).map(source).collect())
}

/// The mounts of all that the overlay serves, for server `id`.
///
/// # Errors
/// When it has not been started, or does not serve the server.
pub fn mounts(site: &Site, id: u32) -> Result<Vec<View>> {
    let mount = |(source, target, kind): (PathBuf, _, _)| Ok(View { tree: Tree::clone_of(&source)?, target, kind });
    sources(site, id)?.into_iter().map(mount).collect()
}

/// Puts the files of a new overlay in the place of a dead one's, in a running server that has others. Nothing is done to files that
/// are the new one's already.
///
/// # Errors
/// When the new overlay does not serve server `id`, its mount namespace cannot be entered, or the guest keeps us waiting.
pub fn reattach(site: &Site, name: &Name, id: u32, status: &Status) -> Result<()> {
    // Two who see the same stack of mounts would both put one on it.
    let _lock = Flock::exclusive(&site.server_run(name).join("view.lock"))?;
    // The guest may have a file system of its own on the way.
    aside::fetch(REATTACH_LIMIT, &[], || {
        let mounts = mounts(site, id)?;
        let inside = namespace::open(status.pid, "mnt")?;
        let table = format!("/proc/{}/mountinfo", status.pid);
        let there = fs::read_to_string(&table).with_context(|| format!("read {table}"))?;
        // After all was opened that goes by the pid.
        if process::start_time(status.pid)? != status.start_ticks {
            bail!("the server has ended");
        }
        let there = parse_mountinfo(&there);
        namespace::enter(inside.as_fd(), Kinds::MOUNT)?;
        replace(&mounts, &there)?;
        Ok(Found::default())
    })
    .map(drop)
}

/// In the server's mount namespace, where `there` is mounted: what a guest may have put at these places is its own affair, and
/// stays inside. One that cannot be reached holds up none of the others; the first such error is told.
fn replace(mounts: &[View], there: &[MountInfo]) -> Result<()> {
    let replaced: Vec<Result<()>> = mounts.iter().map(|view| replace_one(view, there)).collect();
    replaced.into_iter().collect()
}

fn replace_one(View { tree, target, .. }: &View, there: &[MountInfo]) -> Result<()> {
    let stack: Vec<_> = there.iter().filter(|mount| mount.is_fuse() && mount.mount_point == *target).collect();
    let top = stack.iter().find(|mount| stack.iter().all(|above| above.parent_id != mount.id));
    let device = rustix::fs::fstat(tree).with_context(|| format!("look at the new {}", target.display()))?.st_dev;
    if top.is_some_and(|top| (top.major, top.minor) == (rustix::fs::major(device), rustix::fs::minor(device))) {
        return Ok(());
    }
    // As at the start, the kernel does not have all of them (schedstat, nodes).
    if stack.is_empty() && target.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    // The first dead one stays as a lid on the host's file, so that the guest gets an error for a moment, and never the
    // host's numbers. Those on top of it go.
    if stack.len() > 1 {
        kernel::mount::detach(target)?;
    }
    Ok(tree.attach(target)?)
}

/// When a server started that has run for `age_ns`, on the clock that counts from boot: before 0 when that was before the boot.
pub fn started_ns(age_ns: u64) -> i64 {
    signed(boottime_ns()).saturating_sub(signed(age_ns))
}

/// For how long a server has run, in nanoseconds.
pub fn age_ns(started_boottime_ns: i64) -> u64 {
    u64::try_from(signed(boottime_ns()).saturating_sub(started_boottime_ns)).unwrap_or_default()
}

/// Nanoseconds; the largest stands for 292 years.
fn signed(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(i64::MAX)
}

/// The host's clock since boot, suspended time included (clock_gettime(2), `CLOCK_BOOTTIME`).
fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl fmt::Display for ViewStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Register { file, .. } = self;
        write!(out, "register its view of /proc in {}", file.display())
    }
}
