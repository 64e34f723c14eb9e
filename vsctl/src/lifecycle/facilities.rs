//! What all servers of a site share: runtime directories, the parent cgroup, the bridge, the firewall, forwarding and
//! the FUSE overlay. Set up at the first start, taken back with the last server, or by `vsctl host down`.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use net::firewall::Ruleset;
use net::sysctl::{Change, Family, Sysctl};
use serde::{Deserialize, Serialize};

use super::execute;
use super::journal::{Journal, Lasting};
use super::step::Step;
use super::world::World;
use crate::failure::{Exit, Failure};
use crate::network::{Networks, mac};
use crate::site::Site;

/// A change to what all servers share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FacilityStep {
    /// A directory below the site's runtime directory.
    Directory {
        /// Where.
        path: PathBuf,
    },
    /// The runtime directory as a mount of its own, so that roots mounted below reach no other mount namespace.
    PrivateMount {
        /// Where.
        path: PathBuf,
    },
    /// The cgroup that holds all servers.
    Group {
        /// Its path below the hierarchies' roots.
        group: String,
    },
    /// The bridge.
    Bridge {
        /// Its name.
        name: String,
        /// Its MAC address.
        mac: String,
        /// Its addresses: the servers' gateways.
        addresses: Vec<IpNet>,
    },
    /// The nft tables.
    Firewall {
        /// Their name.
        table: String,
    },
    /// Routing between interfaces.
    Forwarding {
        /// What it was before, written by the manager when it is about to change.
        before: Vec<Change>,
    },
    /// The FUSE overlay.
    View {
        /// Its directory.
        directory: PathBuf,
    },
}

/// The facilities of one site.
#[derive(Debug, Clone, Copy)]
pub struct Facilities<'a>(pub &'a Site);

impl Facilities<'_> {
    fn journal(&self) -> PathBuf {
        self.0.run().join("host").join("journal")
    }

    fn mark(&self) -> PathBuf {
        self.0.run().join("host").join("up")
    }

    /// Whether they have been set up since the host booted.
    pub fn are_up(&self) -> bool {
        self.mark().exists()
    }

    /// Sets them up unless they are.
    ///
    /// # Errors
    /// The facility that the host lacks.
    pub fn ensure(&self) -> Result<()> {
        if self.are_up() {
            return Ok(());
        }
        let _lock = self.lock()?;
        if self.are_up() {
            return Ok(());
        }
        self.make_run()?;
        let mut world = World::new(self.0);
        let mut journal = Journal::open(&self.journal(), Lasting::Boot)?;
        // Left by one that was killed half way.
        execute::take_back("host", &mut world, &mut journal)?;
        let steps = self.plan()?;
        execute::run("host", 1, &steps, &mut world, &mut journal).context("cannot set up what servers share")?;
        fs::write(self.mark(), "").with_context(|| format!("write {}", self.mark().display()))
    }

    /// Takes them back.
    ///
    /// # Errors
    /// What could not be taken back.
    pub fn remove(&self) -> Result<()> {
        if !self.0.run().join("host").exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        match fs::remove_file(self.mark()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).context("remove the mark"),
            _ => {}
        }
        let mut journal = Journal::open(&self.journal(), Lasting::Boot)?;
        execute::take_back("host", &mut World::new(self.0), &mut journal)
            .context("cannot take back what servers share")?;
        journal.remove()
    }

    /// The steps that set them up.
    ///
    /// # Errors
    /// When the site's networks cannot be chosen.
    pub fn plan(&self) -> Result<Vec<Step>> {
        let site = self.0;
        let networks = Networks::of(site)?;
        let lxcfs = site.lxcfs();
        let steps = [
            FacilityStep::PrivateMount { path: site.run().join("servers") },
            FacilityStep::Directory { path: lxcfs.clone() },
            FacilityStep::PrivateMount { path: lxcfs.clone() },
            FacilityStep::Directory { path: lxcfs.join("servers") },
            FacilityStep::View { directory: lxcfs },
            FacilityStep::Group { group: site.cgroup() },
            FacilityStep::Bridge {
                name: site.bridge(),
                mac: mac(site, None).to_string(),
                addresses: networks.gateways(),
            },
            FacilityStep::Firewall { table: site.table() },
            FacilityStep::Forwarding { before: forwarding_changes()? },
        ];
        Ok(steps.into_iter().map(Step::Facility).collect())
    }

    fn lock(&self) -> Result<kernel::lock::Flock> {
        let directory = self.0.run().join("host");
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        Ok(kernel::lock::Flock::exclusive(&directory.join("lock"))?)
    }

    /// The runtime directory and its fixed parts; they stay, as /run/lock stays.
    fn make_run(&self) -> Result<()> {
        let run = self.0.run();
        for directory in [run.clone(), run.join("servers")] {
            fs::create_dir_all(&directory)
                .and_then(|()| fs::set_permissions(&directory, fs::Permissions::from_mode(0o711)))
                .with_context(|| format!("make {}", directory.display()))?;
        }
        Ok(())
    }
}

/// What routing changes on this host, with the values of now: the undo must know them before the change.
fn forwarding_changes() -> Result<Vec<Change>> {
    let sysctl = Sysctl::default();
    let mut before = Vec::new();
    for family in [Family::V4, Family::V6] {
        match sysctl.forwarding_changes(family) {
            Ok(changes) => before.extend(changes),
            // A host without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(before)
}

impl FacilityStep {
    /// Makes the change.
    ///
    /// # Errors
    /// What the host lacks, with a hint.
    pub fn apply(&self, world: &mut World) -> Result<()> {
        match self {
            Self::Directory { path } => {
                Ok(fs::create_dir(path).and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o711)))?)
            }
            Self::PrivateMount { path } => Ok(kernel::mount::bind_private(path)?),
            Self::Group { group } => Ok(world.group(group)?.create()?),
            Self::Bridge { name, mac, addresses } => {
                let made = bridge(world, name, mac, addresses);
                if made.is_err() {
                    world.netlink()?.delete_link(name)?;
                }
                made
            }
            Self::Firewall { .. } => install(&world.ruleset()?),
            Self::Forwarding { before } => {
                let sysctl = Sysctl::default();
                for family in [Family::V4, Family::V6] {
                    let wanted = before.iter().any(|change| change.key.starts_with(prefix(family)));
                    if wanted {
                        sysctl.enable_forwarding(family)?;
                    }
                }
                Ok(())
            }
            Self::View { directory } => serve(world.site, directory),
        }
    }

    /// Takes the change back.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn undo(&self, world: &mut World) -> Result<()> {
        match self {
            Self::Directory { path } => crate::template::remove_tree(path),
            Self::PrivateMount { path } => Ok(kernel::mount::detach(path)?),
            Self::Group { group } => Ok(world.group(group)?.remove()?),
            Self::Bridge { name, .. } => Ok(world.netlink()?.delete_link(name)?),
            Self::Firewall { .. } => Ok(world.firewall()?.remove()?),
            Self::Forwarding { before } => {
                let sysctl = Sysctl::default();
                // Last first: an interface listens to routers again only when the host has stopped to route.
                before.iter().rev().try_for_each(|change| Ok(sysctl.take_back(change)?))
            }
            Self::View { directory } => {
                let is_mounted = match kernel::mount::is_mount_point(&directory.join("mount")) {
                    Ok(is_mounted) => is_mounted,
                    // Killed before it had made its directory; any other error is that of a dead mount.
                    Err(error) => error.kind() != io::ErrorKind::NotFound,
                };
                if is_mounted || directory.join("pid").exists() { run(world.site, "stop", directory) } else { Ok(()) }
            }
        }
    }
}

fn prefix(family: Family) -> &'static str {
    match family {
        Family::V4 => "net/ipv4/",
        Family::V6 => "net/ipv6/",
    }
}

fn bridge(world: &World, name: &str, mac: &str, addresses: &[IpNet]) -> Result<()> {
    let netlink = world.netlink()?;
    netlink.create_bridge(name, Some(mac.parse().context("the bridge's MAC address")?))?;
    for address in addresses {
        netlink.add_address(name, *address)?;
    }
    Ok(netlink.set_up(name)?)
}

fn install(ruleset: &Ruleset) -> Result<()> {
    ruleset.install().map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            return Failure::new(Exit::Unsupported, "the program nft is not installed")
                .hint("apt install nftables")
                .into();
        }
        error.into()
    })
}

/// Starts the FUSE overlay; also one that died is replaced.
///
/// # Errors
/// When the host has no FUSE, or the program fails.
pub fn serve(site: &Site, directory: &Path) -> Result<()> {
    if !Path::new("/dev/fuse").exists() {
        return Err(Failure::new(Exit::Unsupported, "this host has no /dev/fuse").hint("modprobe fuse").into());
    }
    run(site, "serve", directory)
}

fn run(site: &Site, verb: &str, directory: &Path) -> Result<()> {
    let program = site.program("lxcfs-fuse")?;
    let output = Command::new(&program)
        .arg(verb)
        .arg("--run")
        .arg(directory)
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("run {}", program.display()))?;
    if !output.status.success() {
        bail!("lxcfs-fuse {verb}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

impl fmt::Display for FacilityStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory { path } => write!(out, "make directory {}", path.display()),
            Self::PrivateMount { path } => write!(out, "make {} a private mount", path.display()),
            Self::Group { group } => write!(out, "make cgroup {group} for all servers"),
            Self::Bridge { name, addresses, .. } => {
                let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
                write!(out, "create bridge {name} with {}", addresses.join(", "))
            }
            Self::Firewall { table } => write!(out, "install nft tables {table}"),
            Self::Forwarding { before } if before.is_empty() => write!(out, "forward packets (the host does already)"),
            Self::Forwarding { .. } => write!(out, "forward packets between interfaces"),
            Self::View { directory } => write!(out, "serve the servers' /proc from {}", directory.display()),
        }
    }
}
