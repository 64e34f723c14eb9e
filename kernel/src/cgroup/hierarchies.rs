//! Which hierarchies a host has mounted, and which controller is where.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::error::During;
use crate::mount::{MountInfo, parse_mountinfo};

/// A controller that we use. `Cpuacct`, `Devices`, `Freezer` and `Blkio` are names of v1, `Io` is one of v2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Controller {
    /// Processor time; on v2 also its accounting.
    Cpu,
    /// Accounting of processor time (v1).
    Cpuacct,
    /// Which processors and memory nodes.
    Cpuset,
    /// Memory and swap.
    Memory,
    /// Device access (v1; v2 has BPF programs).
    Devices,
    /// Freezing (v1; v2 has it in every group).
    Freezer,
    /// Block i/o (v1).
    Blkio,
    /// Block i/o (v2).
    Io,
    /// Number of tasks.
    Pids,
}

impl Controller {
    /// All of them.
    pub const ALL: [Controller; 9] = [
        Controller::Cpu,
        Controller::Cpuacct,
        Controller::Cpuset,
        Controller::Memory,
        Controller::Devices,
        Controller::Freezer,
        Controller::Blkio,
        Controller::Io,
        Controller::Pids,
    ];

    /// Those that a unified hierarchy must be told to enable.
    pub(super) const UNIFIED: [Controller; 5] =
        [Controller::Cpu, Controller::Cpuset, Controller::Io, Controller::Memory, Controller::Pids];

    /// The kernel's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Controller::Cpu => "cpu",
            Controller::Cpuacct => "cpuacct",
            Controller::Cpuset => "cpuset",
            Controller::Memory => "memory",
            Controller::Devices => "devices",
            Controller::Freezer => "freezer",
            Controller::Blkio => "blkio",
            Controller::Io => "io",
            Controller::Pids => "pids",
        }
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The mounted hierarchies of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies {
    unified: Option<PathBuf>,
    v1: BTreeMap<Controller, PathBuf>,
}

impl Hierarchies {
    /// Those the caller sees (/proc/self/mountinfo).
    pub fn detect() -> Result<Self> {
        let path = "/proc/self/mountinfo";
        Ok(Self::from_mountinfo(&std::fs::read_to_string(path).during("read", path)?))
    }

    /// Those that a mountinfo text names. Where one is mounted twice the whole one, and of those the first, counts.
    pub fn from_mountinfo(text: &str) -> Self {
        let mut mounts = parse_mountinfo(text);
        // Stable: mounts of a whole hierarchy before those that show a part of one.
        mounts.sort_by_key(|mount| mount.root != Path::new("/"));
        let mut found = Self::default();
        for mount in &mounts {
            match mount.kind.as_str() {
                "cgroup2" => {
                    found.unified.get_or_insert_with(|| mount.mount_point.clone());
                }
                "cgroup" => found.add_v1(mount),
                _ => {}
            }
        }
        found
    }

    /// Hierarchies at given places: for a test on a plain directory.
    pub fn at(unified: Option<PathBuf>, v1: BTreeMap<Controller, PathBuf>) -> Self {
        Self { unified, v1 }
    }

    fn add_v1(&mut self, mount: &MountInfo) {
        for option in mount.super_options.split(',') {
            if let Some(controller) = Controller::ALL.into_iter().find(|controller| controller.as_str() == option) {
                self.v1.entry(controller).or_insert_with(|| mount.mount_point.clone());
            }
        }
    }

    /// Where cgroup2 is mounted.
    pub fn unified(&self) -> Option<&Path> {
        self.unified.as_deref()
    }

    /// Where the v1 hierarchy of `controller` is mounted.
    pub fn v1(&self, controller: Controller) -> Option<&Path> {
        self.v1.get(&controller).map(PathBuf::as_path)
    }

    /// Whether there is cgroup2 and no v1 controller.
    pub fn is_pure_v2(&self) -> bool {
        self.unified.is_some() && self.v1.is_empty()
    }

    /// The v1 hierarchies, each once, though several controllers may share one.
    pub(super) fn v1_roots(&self) -> Vec<&Path> {
        let mut roots: Vec<&Path> = self.v1.values().map(PathBuf::as_path).collect();
        roots.sort_unstable();
        roots.dedup();
        roots
    }

    /// The hierarchy that holds the files of `controller`: its v1 one, that of its older or newer name, else the unified one.
    pub(super) fn root_of(&self, controller: Controller) -> Option<&Path> {
        let other_name = match controller {
            Controller::Io => Some(Controller::Blkio),
            _ => None,
        };
        self.v1(controller).or_else(|| other_name.and_then(|name| self.v1(name))).or_else(|| self.unified())
    }

    /// Whether `controller` is driven by v1 files.
    pub(super) fn is_v1(&self, controller: Controller) -> bool {
        self.root_of(controller).is_some_and(|root| Some(root) != self.unified())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PURE: &str = "\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
27 22 0:24 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
";
    const HYBRID: &str = "\
30 22 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,relatime shared:10 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw,relatime shared:11 - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:12 - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/memory rw,relatime shared:13 - cgroup cgroup rw,memory
35 30 0:31 / /sys/fs/cgroup/blkio rw,relatime shared:14 - cgroup cgroup rw,blkio
36 99 0:30 /docker/1 /srv/memory rw,relatime - cgroup cgroup rw,memory
";

    #[test]
    fn a_pure_v2_host() {
        let found = Hierarchies::from_mountinfo(PURE);
        assert!(found.is_pure_v2());
        assert_eq!(found.unified(), Some(Path::new("/sys/fs/cgroup")));
        assert_eq!(found.root_of(Controller::Cpuacct), found.unified());
        assert!(!found.is_v1(Controller::Memory));
    }

    #[test]
    fn a_hybrid_host_has_shared_hierarchies_once_and_named_ones_never() {
        let found = Hierarchies::from_mountinfo(HYBRID);
        assert!(!found.is_pure_v2());
        assert_eq!(found.v1(Controller::Cpu), found.v1(Controller::Cpuacct));
        assert_eq!(found.v1_roots().len(), 3);
        assert!(!found.v1_roots().contains(&Path::new("/sys/fs/cgroup/systemd")));
        assert_eq!(found.root_of(Controller::Io), Some(Path::new("/sys/fs/cgroup/blkio")));
        assert_eq!(found.root_of(Controller::Pids), Some(Path::new("/sys/fs/cgroup/unified")));
        assert!(found.is_v1(Controller::Memory) && !found.is_v1(Controller::Pids));
    }

    #[test]
    fn a_part_of_a_hierarchy_does_not_hide_the_whole() {
        let turned: String = HYBRID.lines().rev().map(|line| format!("{line}\n")).collect();
        let found = Hierarchies::from_mountinfo(&turned);
        assert_eq!(found.v1(Controller::Memory), Some(Path::new("/sys/fs/cgroup/memory")));
    }
}
