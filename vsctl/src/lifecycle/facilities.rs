//! What all servers of a site share: runtime directories, the parent cgroup, the bridge, the firewall, forwarding and
//! the FUSE overlay. Set up at the first start, taken back with the last server, or by `vsctl host down`.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use kernel::cgroup::{Group, Hierarchies};
use kernel::process::{self, CloneOptions, Fork};
use net::firewall::Ruleset;
use net::sysctl::{Change, Family, Sysctl};
use serde::{Deserialize, Serialize};

use super::journal::{Journal, Lasting};
use super::step::Step;
use super::world::World;
use super::{calls, execute};
use crate::failure::{Exit, Failure};
use crate::network::{Networks, bridge_mac};
use crate::site::Site;
use crate::store;

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
    /// The cgroup2 group of what runs beside the servers. A monitor outlives the session of the command that made it:
    /// in the session's own group (systemd's `session-N.scope`) it would be ended, limited and accounted with it.
    OwnGroup {
        /// Its path below the unified hierarchy's root.
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
    ///
    /// # Errors
    /// When that cannot be known: setting them up anew would begin with taking them from running servers.
    pub fn are_up(&self) -> Result<bool> {
        let mark = self.mark();
        mark.try_exists().with_context(|| format!("look for {}", mark.display()))
    }

    /// Sets them up unless they are.
    ///
    /// # Errors
    /// The facility that the host lacks.
    pub fn ensure(&self) -> Result<()> {
        if self.are_up()? {
            return Ok(());
        }
        let _lock = self.lock()?;
        if self.are_up()? {
            return Ok(());
        }
        self.make_run()?;
        let mut world = World::new(self.0);
        let mut journal = Journal::open(&self.journal(), Lasting::Boot)?;
        // Left by one that was killed half way.
        execute::take_back("host", &mut world, &mut journal)?;
        let steps = self.plan()?;
        execute::run("host", 1, &steps, &mut world, &mut journal).context("cannot set up what servers share")?;
        self.put_mark()
    }

    /// Sees to it that `lxcfs-fuse` serves: one that died is replaced. Of many who ask at once one starts it.
    ///
    /// # Errors
    /// When the facilities are not up, or it cannot be started.
    pub fn ensure_view(&self) -> Result<()> {
        if calls::supervisor(self.0).is_ok() {
            return Ok(());
        }
        let _lock = self.lock()?;
        // Being taken back with the last server, it is not to be started again.
        if !self.are_up()? {
            bail!("what servers share is not set up");
        }
        match calls::supervisor(self.0) {
            Ok(_) => Ok(()),
            Err(_) => serve(self.0, &self.0.lxcfs()),
        }
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
        self.unmark()?;
        self.take_back()
    }

    /// Takes them back if the site has no server.
    ///
    /// # Errors
    /// What could not be taken back.
    pub fn remove_unused(&self) -> Result<()> {
        if !store::names(self.0)?.is_empty() || !self.0.run().join("host").exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        let were_up = self.are_up()?;
        // In this order: a server that is created now is either seen here, or sees that they are not up and waits for the lock.
        self.unmark()?;
        match store::names(self.0)?.is_empty() {
            true => self.take_back(),
            false if were_up => self.put_mark(),
            false => Ok(()),
        }
    }

    fn put_mark(&self) -> Result<()> {
        fs::write(self.mark(), "").with_context(|| format!("write {}", self.mark().display()))
    }

    fn unmark(&self) -> Result<()> {
        match fs::remove_file(self.mark()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("remove the mark"),
            _ => Ok(()),
        }
    }

    fn take_back(&self) -> Result<()> {
        let mut journal = Journal::open(&self.journal(), Lasting::Boot)?;
        execute::take_back("host", &mut World::new(self.0), &mut journal)
            .context("cannot take back what servers share")?;
        journal.remove()
    }

    /// The steps that a start would take to set them up: none when they are up.
    ///
    /// # Errors
    /// As [`Facilities::plan`].
    pub fn missing(&self) -> Result<Vec<Step>> {
        if self.are_up()? { Ok(Vec::new()) } else { self.plan() }
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
            FacilityStep::Group { group: site.cgroup() },
            FacilityStep::OwnGroup { group: site.own_cgroup() },
            FacilityStep::PrivateMount { path: site.run().join("servers") },
            FacilityStep::Directory { path: lxcfs.clone() },
            FacilityStep::PrivateMount { path: lxcfs.clone() },
            FacilityStep::Directory { path: lxcfs.join("servers") },
            FacilityStep::View { directory: lxcfs },
            FacilityStep::Bridge {
                name: site.bridge(),
                mac: bridge_mac(site).to_string(),
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
            Self::OwnGroup { group } => match world.group(group)?.unified_directory() {
                Some(directory) => fs::create_dir(&directory).with_context(|| format!("make {}", directory.display())),
                // No cgroup2: then systemd has none to keep sessions in either.
                None => Ok(()),
            },
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
            Self::Group { group } | Self::OwnGroup { group } => Ok(world.group(group)?.remove()?),
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
    // Born where it belongs: moving a process into a group of cgroup2 waits for a grace period of the kernel.
    let (report, told) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("make a pipe")?;
    match process::fork(&beside(site, &Hierarchies::detect()?)?)? {
        Fork::Parent { pid, .. } => {
            drop(told);
            let mut why = String::new();
            let said = File::from(report).read_to_string(&mut why).context("listen to what starts lxcfs-fuse");
            let status = process::status_of(pid)?;
            said?;
            if status.success() { Ok(()) } else { bail!("{why}") }
        }
        Fork::Child => {
            drop(report);
            let served = run(site, "serve", directory);
            if let Err(error) = &served {
                // Somebody who does not listen any more needs no reason.
                let _ = write!(File::from(told), "{error:#}");
            }
            std::process::exit(i32::from(served.is_err()))
        }
    }
}

/// How a process is made that runs beside the servers: in the group of those.
///
/// # Errors
/// When the group cannot be opened.
pub fn beside(site: &Site, hierarchies: &Hierarchies) -> Result<CloneOptions> {
    let group = Group::new(hierarchies, &site.own_cgroup());
    let cgroup = match group.open_unified() {
        // Set up by a version that had no such group: as it did then.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        opened => opened?,
    };
    Ok(CloneOptions { cgroup, ..CloneOptions::default() })
}

/// Lets the installed `lxcfs-fuse` go on in the place of the one that serves, and this build's rules in the place of those that hold.
///
/// # Errors
/// When none serves, or it does not give its place.
pub fn reload(site: &Site) -> Result<()> {
    let mut world = World::new(site);
    if world.firewall()?.exists()? {
        // In one transaction, and servers keep what is bound to them.
        install(&world.ruleset()?)?;
    }
    run(site, "reload", &site.lxcfs())
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
            Self::OwnGroup { group } => write!(out, "make cgroup {group} for monitors and the FUSE overlay"),
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
