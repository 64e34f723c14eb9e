//! One installation on this host: where its files are, and what its global names are.
//!
//! `VSOS_ROOT` moves everything below another directory and gives the names that are global to the host
//! (cgroup, bridge, links, nft tables) a suffix of their own, so installations live side by side.
//!
//! ```text
//! /etc/vsos/vsos.toml                 settings of the host
//! /var/lib/vsos/servers/NAME/         server.toml, record.toml, volume/, console.log; migration.toml
//!                                     while it is between two hosts
//! /var/lib/vsos/templates/NAME/       template.toml, record.toml, root/
//! /var/lib/vsos/trees/LABEL/          a checkpoint of processes that are no server's
//! /var/lib/vsos/ids/ID                who has the number (the file's text is the name)
//! /var/lib/vsos/addresses/ADDRESS     who has the address
//! /var/lib/vsos/journal/NAME          steps of an unfinished create or destroy
//! /var/lib/vsos/network.toml          subnets, chosen once
//! /run/vsos/servers/NAME/             status.toml, monitor.sock, monitor.lock, root/; while it runs
//! /run/vsos/journal/NAME              steps of its start, to be taken back
//! /run/vsos/lock/NAME                 held by the command that changes NAME
//! /run/vsos/trees/LABEL/              lock and logs of a checkpoint of processes that are no server's
//! /run/vsos/lxcfs/                    the FUSE overlay's own directory
//! ```

use std::env;
use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ipnet::{Ipv4Net, Ipv6Net};
use serde::Deserialize;

use crate::failure::{Exit, Failure};
use crate::name::Name;

/// User and group ids in one server.
pub const IDS_PER_SERVER: u32 = 65_536;

/// `vsos.toml`: settings of the host. Every key has a default.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// First user id that servers may have on the host.
    pub first_id: u32,
    /// How many servers may have ids of their own.
    pub max_servers: u32,
    /// The servers' IPv4 network; chosen at first use when absent.
    pub ipv4: Option<Ipv4Net>,
    /// The servers' IPv6 network; a random unique local one when absent.
    pub ipv6: Option<Ipv6Net>,
    /// Where `vsinit` and `lxcfs-fuse` are, when not beside `vsctl` or in `../libexec/vsos`.
    pub programs: Option<PathBuf>,
    /// What becomes of running servers when the host is shut down.
    pub stop_mode: StopMode,
    /// How servers are put on the disk.
    pub checkpoint: Checkpoint,
    /// How servers get to other hosts.
    pub migrate: Migrate,
}

/// What `vsctl autostop` does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopMode {
    /// Stops all servers.
    #[default]
    Stop,
    /// Suspends those that can be, and stops the others.
    Suspend,
}

/// `[checkpoint]` of `vsos.toml`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// The CRIU to use; that of `PATH` when absent.
    pub criu: Option<PathBuf>,
}

/// `[migrate]` of `vsos.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Migrate {
    /// The program, with arguments, that runs a command on another host: `ssh HOST vsctl …`.
    pub shell: Vec<String>,
    /// For how many seconds the other host may say nothing before it is taken for lost. The shorter of both hosts' counts.
    pub silence: NonZeroU64,
}

/// [`Migrate::silence`] when nothing is said.
const SILENCE_S: NonZeroU64 = NonZeroU64::new(120).unwrap();

impl Default for Migrate {
    fn default() -> Self {
        // A host that is gone is noticed: otherwise TCP waits for hours.
        Self {
            shell: ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15"].map(Into::into).into(),
            silence: SILENCE_S,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // 0x7000_0000..0x8000_0000: above what systemd and useradd hand out, below the sign bit.
            first_id: 0x7000_0000,
            max_servers: 4096,
            ipv4: None,
            ipv6: None,
            programs: None,
            stop_mode: StopMode::default(),
            checkpoint: Checkpoint::default(),
            migrate: Migrate::default(),
        }
    }
}

/// Paths and names of one installation.
#[derive(Debug, Clone)]
pub struct Site {
    root: PathBuf,
    suffix: Option<String>,
    /// Settings of the host.
    pub settings: Settings,
}

impl Site {
    /// The installation that the environment names: `VSOS_ROOT`, else the host's own.
    ///
    /// # Errors
    /// When `vsos.toml` cannot be read or has a bad value.
    pub fn from_environment() -> Result<Self> {
        match env::var_os("VSOS_ROOT") {
            Some(root) if root != "/" && !root.is_empty() => Self::at(Path::new(&root)),
            _ => Self::at(Path::new("/")),
        }
    }

    /// The installation below `root`.
    ///
    /// # Errors
    /// When `root` is relative, or `vsos.toml` cannot be used.
    pub fn at(root: &Path) -> Result<Self> {
        if !root.is_absolute() {
            return Err(
                Failure::new(Exit::BadParameter, format!("VSOS_ROOT={} must be absolute", root.display())).into()
            );
        }
        let suffix = (root != Path::new("/")).then(|| suffix_of(root));
        let mut site = Self { root: root.to_owned(), suffix, settings: Settings::default() };
        let file = site.below("etc/vsos/vsos.toml");
        match fs::read_to_string(&file) {
            Ok(text) => {
                site.settings = toml::from_str(&text).map_err(|error| {
                    Failure::new(
                        Exit::BadConfiguration,
                        format!("{}: {}", file.display(), error.to_string().trim_end()),
                    )
                })?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        }
        Ok(site)
    }

    fn below(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Lasting state: `/var/lib/vsos`.
    pub fn state(&self) -> PathBuf {
        self.below("var/lib/vsos")
    }

    /// Runtime state, empty after a boot: `/run/vsos`.
    pub fn run(&self) -> PathBuf {
        self.below("run/vsos")
    }

    /// The directory of all servers' lasting files.
    pub fn servers(&self) -> PathBuf {
        self.state().join("servers")
    }

    /// Lasting files of one server.
    pub fn server(&self, name: &Name) -> PathBuf {
        self.servers().join(name.as_str())
    }

    /// Runtime files of one server; exists while it runs.
    pub fn server_run(&self, name: &Name) -> PathBuf {
        self.run().join("servers").join(name.as_str())
    }

    /// The directory of all checkpoints of processes that are no server's.
    pub fn trees(&self) -> PathBuf {
        self.state().join("trees")
    }

    /// Runtime files of one of them.
    pub fn tree_run(&self, label: &Name) -> PathBuf {
        self.run().join("trees").join(label.as_str())
    }

    /// The FUSE overlay's directory.
    pub fn lxcfs(&self) -> PathBuf {
        self.run().join("lxcfs")
    }

    /// The cgroup that holds all servers, relative to the hierarchies' roots.
    pub fn cgroup(&self) -> String {
        self.suffixed("vsos", "-")
    }

    /// The cgroup2 group of what runs beside the servers: monitors and the FUSE overlay. No server has such a name.
    pub fn own_cgroup(&self) -> String {
        format!("{}/.host", self.cgroup())
    }

    /// The cgroup of one server.
    pub fn server_cgroup(&self, name: &Name) -> String {
        format!("{}/{name}", self.cgroup())
    }

    /// The bridge that servers are connected to.
    pub fn bridge(&self) -> String {
        match &self.suffix {
            Some(suffix) => format!("vsbr{suffix}"),
            None => "vsbr0".into(),
        }
    }

    /// The host's end of the server's link (at most 15 bytes: `IFNAMSIZ`).
    pub fn link(&self, id: u32) -> String {
        format!("{}{id}", self.link_prefix())
    }

    /// How the names of the host's ends begin.
    pub fn link_prefix(&self) -> String {
        format!("vs{}-", self.suffix.as_deref().unwrap_or_default())
    }

    /// The nft tables' name.
    pub fn table(&self) -> String {
        self.suffixed("vsos", "_")
    }

    fn suffixed(&self, word: &str, between: &str) -> String {
        match &self.suffix {
            Some(suffix) => format!("{word}{between}{suffix}"),
            None => word.into(),
        }
    }

    /// What makes ids and bridges of two installations on one host differ.
    pub fn seed(&self) -> u32 {
        self.suffix.as_deref().map_or(0, |suffix| u32::from_str_radix(suffix, 16).unwrap_or_default())
    }

    /// The first host id of server `id` (≥ 1).
    ///
    /// An installation with a suffix begins elsewhere in the range: two side by side rarely share ids.
    pub fn first_id(&self, id: u32) -> u32 {
        let slots = self.settings.max_servers.max(1);
        let slot = (id - 1 + self.seed() % slots) % slots;
        self.settings.first_id + slot * IDS_PER_SERVER
    }

    /// The path of one of our programs (`vsinit`, `lxcfs-fuse`).
    ///
    /// # Errors
    /// When it is at none of the places.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let own = env::current_exe().context("find the own program")?;
        let beside = own.parent().unwrap_or(Path::new("/"));
        let places = [self.settings.programs.clone(), Some(beside.to_owned()), Some(beside.join("../libexec/vsos"))];
        places.iter().flatten().map(|place| place.join(name)).find(|path| path.is_file()).ok_or_else(|| {
            Failure::new(Exit::Unsupported, format!("the program {name} is not installed"))
                .hint(format!("it belongs beside {} or in ../libexec/vsos; `make programs` builds it", own.display()))
                .into()
        })
    }
}

/// Four hexadecimal digits that depend on `root` alone (FNV-1a, folded; std's hashers promise no lasting result).
fn suffix_of(root: &Path) -> String {
    let bytes = root.as_os_str().as_bytes();
    let hash = bytes.iter().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    format!("{:04x}", (hash >> 16) ^ (hash & 0xffff))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_names_are_plain() {
        let site = Site { root: "/".into(), suffix: None, settings: Settings::default() };
        let name: Name = "web1".parse().unwrap();
        assert_eq!(site.server(&name), Path::new("/var/lib/vsos/servers/web1"));
        assert_eq!(site.server_cgroup(&name), "vsos/web1");
        assert_eq!((site.bridge().as_str(), site.link(7).as_str(), site.table().as_str()), ("vsbr0", "vs-7", "vsos"));
    }

    #[test]
    fn another_root_has_names_of_its_own_that_fit() {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        let suffix = suffix_of(root.path());
        assert_eq!(site.cgroup(), format!("vsos-{suffix}"));
        assert!(site.link(4096).len() <= 15 && site.bridge().len() <= 15);
        assert_eq!(Site::at(root.path()).unwrap().bridge(), site.bridge());
    }

    #[test]
    fn no_two_servers_share_an_id() {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        let mut starts: Vec<u32> = (1..=site.settings.max_servers).map(|id| site.first_id(id)).collect();
        starts.sort_unstable();
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= IDS_PER_SERVER));
        assert!(starts[0] >= site.settings.first_id && starts.last().unwrap().checked_add(IDS_PER_SERVER).is_some());
    }

    #[test]
    fn a_bad_setting_names_its_file() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc/vsos")).unwrap();
        fs::write(root.path().join("etc/vsos/vsos.toml"), "frist_id = 3\n").unwrap();
        let error = Site::at(root.path()).unwrap_err().to_string();
        assert!(error.contains("vsos.toml") && error.contains("frist_id"), "{error}");
    }
}
