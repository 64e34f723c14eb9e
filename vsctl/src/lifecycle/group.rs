//! Steps on a server's cgroup: limits, delegation, devices.

use std::fmt;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context, Result};
use kernel::bpf::{DeviceKind, DeviceProgram, DeviceRule};
use kernel::cgroup::{CpuSet, Group};
use serde::{Deserialize, Serialize};

use super::step::Step;
use super::world::World;
use crate::failure::{Exit, Failure};
use crate::site::Site;
use crate::size::show_bytes;
use crate::spec::{Device, Spec};
use crate::store::Server;

/// A change to the server's cgroup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupStep {
    /// The group itself; its undo ends every process in it.
    Make {
        /// Path below the hierarchies' roots.
        group: String,
    },
    /// What its processes may use. Goes with the group.
    Limit {
        /// Path below the hierarchies' roots.
        group: String,
        /// The limits.
        limits: Limits,
    },
    /// The guest's root may make groups below. Goes with the group.
    Delegate {
        /// Path below the hierarchies' roots.
        group: String,
        /// The guest's root on the host.
        owner: u32,
    },
    /// The devices that may be opened. Goes with the group.
    AllowDevices {
        /// Path below the hierarchies' roots.
        group: String,
        /// Nodes of the host that are allowed beside the harmless ones, as `PATH:rwm`.
        devices: Vec<String>,
    },
}

/// What a server may use; none is no limit.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory.
    pub memory_bytes: Option<u64>,
    /// Bytes of swap.
    pub swap_bytes: Option<u64>,
    /// CPU time per time.
    pub cpus: Option<f64>,
    /// CPUs, as a list.
    pub cpuset: Option<String>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

impl Limits {
    /// The limits that a spec asks for.
    pub fn of(spec: &Spec) -> Self {
        Self {
            memory_bytes: spec.memory.map(|memory| memory.0),
            swap_bytes: spec.swap.map(|swap| swap.0),
            cpus: spec.cpus.map(|cpus| cpus.0),
            cpuset: spec.cpuset.as_ref().map(ToString::to_string),
            pids: spec.pids.map(|pids| pids.0),
        }
    }

    /// Writes the limits to a group; also on a running server.
    ///
    /// # Errors
    /// The limit that the kernel refused.
    pub fn apply(&self, group: &Group) -> Result<()> {
        let cpuset: Option<CpuSet> = self.cpuset.as_deref().map(str::parse).transpose()?;
        group.set_memory(self.memory_bytes, self.swap_bytes)?;
        group.set_cpus(self.cpus)?;
        group.set_cpuset(cpuset.as_ref())?;
        Ok(group.set_pids(self.pids)?)
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limits = [
            self.memory_bytes.map(|bytes| format!("memory {}", show_bytes(bytes))),
            self.swap_bytes.map(|bytes| format!("swap {}", show_bytes(bytes))),
            self.cpus.map(|cpus| format!("cpus {cpus}")),
            self.cpuset.as_ref().map(|set| format!("cpuset {set}")),
            self.pids.map(|pids| format!("pids {pids}")),
        ];
        out.write_str(&limits.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

/// The steps that make a server's group as its spec asks.
pub fn plan(site: &Site, server: &Server) -> Vec<Step> {
    let group = site.server_cgroup(&server.name);
    let limits = Limits::of(&server.spec);
    let owner = server.first_id(site).unwrap_or(0);
    let devices = server.spec.device.iter().map(ToString::to_string).collect();
    let mut steps = vec![GroupStep::Make { group: group.clone() }];
    if limits != Limits::default() {
        steps.push(GroupStep::Limit { group: group.clone(), limits });
    }
    steps.push(GroupStep::Delegate { group: group.clone(), owner });
    steps.push(GroupStep::AllowDevices { group, devices });
    steps.into_iter().map(Step::Group).collect()
}

impl GroupStep {
    /// Makes the change.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn apply(&self, world: &mut World) -> Result<()> {
        match self {
            Self::Make { group } => Ok(world.group(group)?.create()?),
            Self::Limit { group, limits } => limits.apply(&world.group(group)?),
            Self::Delegate { group, owner } => Ok(world.group(group)?.delegate(*owner, *owner)?),
            Self::AllowDevices { group, devices } => {
                let directory = world
                    .group(group)?
                    .unified_directory()
                    .ok_or_else(|| Failure::new(Exit::Unsupported, "no cgroup2 hierarchy is mounted"))?;
                world.batch.with_device_program(devices, |program| Ok(program.attach(&directory)?))
            }
        }
    }

    /// Takes the change back.
    ///
    /// # Errors
    /// When processes do not end, or the kernel refuses.
    pub fn undo(&self, world: &mut World) -> Result<()> {
        match self {
            Self::Make { group } => {
                let group = world.group(group)?;
                if !group.exists() {
                    return Ok(());
                }
                // A frozen group is killed as well, but its processes end only when they run.
                group.kill()?;
                Ok(group.remove()?)
            }
            _ => Ok(()),
        }
    }
}

/// The devices of every server, as `devices.txt` of the kernel numbers them: null, zero, full, random, urandom,
/// tty, console, ptmx, the ptys, tun and fuse.
const HARMLESS: &[(u32, Option<u32>)] = &[
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
    (10, Some(200)),
    (10, Some(229)),
];

/// The program that allows the harmless devices, and `devices`.
///
/// # Errors
/// When one of them is none.
pub fn device_program(devices: &[String]) -> Result<DeviceProgram> {
    Ok(DeviceProgram::compile(&rules(devices)?))
}

fn rules(devices: &[String]) -> Result<Vec<DeviceRule>> {
    let harmless = HARMLESS.iter().map(|(major, minor)| DeviceRule {
        kind: DeviceKind::Char,
        major: Some(*major),
        minor: *minor,
        read: true,
        write: true,
        mknod: false,
    });
    let mut rules: Vec<DeviceRule> = harmless.collect();
    for text in devices {
        let device: Device = text.parse()?;
        rules.push(rule(&device)?);
    }
    Ok(rules)
}

fn rule(device: &Device) -> Result<DeviceRule> {
    let (kind, number) = node(&device.path)?;
    Ok(DeviceRule {
        kind,
        major: Some(nix::libc::major(number)),
        minor: Some(nix::libc::minor(number)),
        read: device.read,
        write: device.write,
        mknod: device.mknod,
    })
}

/// Kind and number of a device node.
///
/// # Errors
/// When there is none at `path`.
pub fn node(path: &Path) -> Result<(DeviceKind, u64)> {
    let found = std::fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    let kind = match found.file_type() {
        kind if kind.is_char_device() => DeviceKind::Char,
        kind if kind.is_block_device() => DeviceKind::Block,
        _ => {
            let message = format!("{} is no device", path.display());
            return Err(Failure::new(Exit::BadParameter, message).into());
        }
    };
    Ok((kind, found.st_rdev()))
}

impl fmt::Display for GroupStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Make { group } => write!(out, "make cgroup {group}"),
            Self::Limit { group, limits } => write!(out, "limit cgroup {group}: {limits}"),
            Self::Delegate { group, owner } => write!(out, "delegate cgroup {group} to id {owner}"),
            Self::AllowDevices { group, devices } if devices.is_empty() => {
                write!(out, "allow cgroup {group} the harmless devices")
            }
            Self::AllowDevices { group, devices } => {
                write!(out, "allow cgroup {group} the harmless devices and {}", devices.join(", "))
            }
        }
    }
}
