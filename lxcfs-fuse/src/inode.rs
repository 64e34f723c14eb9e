//! The tree that is served, and inode numbers that need no memory: `(server id, index, numbers)` packed into one number.
//!
//! A new worker inherits inodes that its predecessor gave out, perhaps an older version of this program.
//! So an index, once published, keeps its meaning for ever: add at the end, never renumber.

use std::ffi::OsStr;

/// The root's inode number (`FUSE_ROOT_ID`).
pub const ROOT: u64 = 1;

/// Bits of an inode number that hold the index; above them the id, the CPU's number and the cache's.
const INDEX_BITS: u32 = 8;
const CPU_SHIFT: u32 = INDEX_BITS + 32;
const CACHE_SHIFT: u32 = CPU_SHIFT + 16;

/// Ids above this do not fit an inode number.
pub const ID_MAX: u64 = u32::MAX as u64;

/// A file or link that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is the file of that name")]
pub enum Kind {
    Meminfo,
    Stat,
    Cpuinfo,
    Uptime,
    Loadavg,
    Swaps,
    Diskstats,
    Vmstat,
    /// `online`, `possible`, `present` and all lists of all the server's CPUs.
    Cpus,
    /// The same as a mask.
    CpusMask,
    /// A list of the one CPU in whose directory it is, and the same as a mask.
    Itself,
    ItselfMask,
    /// The number of that CPU.
    Number,
    /// The CPUs that share a cache, as list and mask.
    SharedCpus,
    SharedCpusMask,
    Partitions,
    Interrupts,
    Softirqs,
    Schedstat,
    Zoneinfo,
    Cgroups,
    NodeMeminfo,
    NodeVmstat,
    /// A link from the node to one of its CPUs.
    NodeCpu,
    /// The host's file, word by word: a constant of the machine. Is there if the host has it.
    Host,
    /// A text that does not depend on anything.
    Fixed(&'static str),
}

/// What a place is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A directory.
    Directory,
    /// A directory that is there if the host has it.
    HostDirectory,
    /// A file.
    File(Kind),
    /// A symbolic link; its target is the text.
    Link(Kind),
}

/// A place in a server's directory.
#[derive(Debug)]
pub struct Place {
    /// The last component of its path, `#` for a number at its end; empty for the server's directory itself.
    pub name: &'static str,
    /// The index of the directory it is in; its own for the server's directory.
    pub parent: u8,
    /// What is there.
    pub what: What,
}

/// The directories that have numbered ones: of CPUs, and of a CPU's caches.
const CPUS: u8 = 6;
const CACHE: u8 = 62;

/// The head of `/proc/slabinfo`, and no cache: cgroup counts kernel memory by its use, not by cache (it is in meminfo), and the
/// names tell which modules and file systems the host uses.
const SLABINFO: &str = "slabinfo - version: 2.1\n# name            <active_objs> <num_objs> <objsize> <objperslab> \
                        <pagesperslab> : tunables <limit> <batchcount> <sharedfactor> : slabdata <active_slabs> <num_slabs> \
                        <sharedavail>\n";

/// Where pages were allocated is not counted by cgroup; with one node no choice was missed.
const NUMASTAT: &str = "numa_hit 0\nnuma_miss 0\nnuma_foreign 0\ninterleave_hit 0\nlocal_node 0\nother_node 0\n";

/// All places of a server's directory; the position is the index.
pub const PLACES: &[Place] = &[
    directory("", 0),
    directory("proc", 0),
    directory("sys", 0),
    directory("pressure", 1),
    directory("devices", 2),
    directory("system", 4),
    directory("cpu", 5),
    file("meminfo", 1, Kind::Meminfo),
    file("stat", 1, Kind::Stat),
    file("cpuinfo", 1, Kind::Cpuinfo),
    file("uptime", 1, Kind::Uptime),
    file("loadavg", 1, Kind::Loadavg),
    file("swaps", 1, Kind::Swaps),
    file("diskstats", 1, Kind::Diskstats),
    file("vmstat", 1, Kind::Vmstat),
    // The kernel's own files, which also wake who waits for pressure: no answer of a file system could.
    link("cpu", 3, Kind::Fixed("/sys/fs/cgroup/cpu.pressure")),
    link("memory", 3, Kind::Fixed("/sys/fs/cgroup/memory.pressure")),
    link("io", 3, Kind::Fixed("/sys/fs/cgroup/io.pressure")),
    file("online", 6, Kind::Cpus),
    file("possible", 6, Kind::Cpus),
    // 20
    file("present", 6, Kind::Cpus),
    file("offline", 6, Kind::Fixed("\n")),
    file("isolated", 6, Kind::Fixed("\n")),
    file("kernel_max", 6, Kind::Host),
    directory("smt", 6),
    file("active", 24, Kind::Fixed("0\n")),
    file("control", 24, Kind::Fixed("notsupported\n")),
    host_directory("vulnerabilities", 6),
    file("gather_data_sampling", 27, Kind::Host),
    file("ghostwrite", 27, Kind::Host),
    // 30
    file("indirect_target_selection", 27, Kind::Host),
    file("itlb_multihit", 27, Kind::Host),
    file("l1tf", 27, Kind::Host),
    file("mds", 27, Kind::Host),
    file("meltdown", 27, Kind::Host),
    file("mmio_stale_data", 27, Kind::Host),
    file("old_microcode", 27, Kind::Host),
    file("reg_file_data_sampling", 27, Kind::Host),
    file("retbleed", 27, Kind::Host),
    file("spec_rstack_overflow", 27, Kind::Host),
    // 40
    file("spec_store_bypass", 27, Kind::Host),
    file("spectre_v1", 27, Kind::Host),
    file("spectre_v2", 27, Kind::Host),
    file("srbds", 27, Kind::Host),
    file("tsa", 27, Kind::Host),
    file("tsx_async_abort", 27, Kind::Host),
    file("vmscape", 27, Kind::Host),
    directory("cpu#", 6),
    directory("topology", 47),
    file("core_id", 48, Kind::Number),
    // 50
    file("physical_package_id", 48, Kind::Fixed("0\n")),
    file("die_id", 48, Kind::Fixed("0\n")),
    file("core_cpus", 48, Kind::ItselfMask),
    file("core_cpus_list", 48, Kind::Itself),
    file("thread_siblings", 48, Kind::ItselfMask),
    file("thread_siblings_list", 48, Kind::Itself),
    file("core_siblings", 48, Kind::CpusMask),
    file("core_siblings_list", 48, Kind::Cpus),
    file("package_cpus", 48, Kind::CpusMask),
    file("package_cpus_list", 48, Kind::Cpus),
    // 60
    file("die_cpus", 48, Kind::CpusMask),
    file("die_cpus_list", 48, Kind::Cpus),
    host_directory("cache", 47),
    host_directory("index#", CACHE),
    file("coherency_line_size", 63, Kind::Host),
    file("level", 63, Kind::Host),
    file("number_of_sets", 63, Kind::Host),
    file("physical_line_partition", 63, Kind::Host),
    file("size", 63, Kind::Host),
    file("type", 63, Kind::Host),
    // 70
    file("ways_of_associativity", 63, Kind::Host),
    file("shared_cpu_map", 63, Kind::SharedCpusMask),
    file("shared_cpu_list", 63, Kind::SharedCpus),
    host_directory("cpufreq", 47),
    file("base_frequency", 73, Kind::Host),
    file("cpuinfo_max_freq", 73, Kind::Host),
    file("cpuinfo_min_freq", 73, Kind::Host),
    file("cpuinfo_transition_latency", 73, Kind::Host),
    file("scaling_driver", 73, Kind::Host),
    file("scaling_governor", 73, Kind::Host),
    // 80
    file("scaling_max_freq", 73, Kind::Host),
    file("scaling_min_freq", 73, Kind::Host),
    file("cpu_capacity", 47, Kind::Host),
    file("slabinfo", 1, Kind::Fixed(SLABINFO)),
    file("partitions", 1, Kind::Partitions),
    file("interrupts", 1, Kind::Interrupts),
    file("softirqs", 1, Kind::Softirqs),
    file("schedstat", 1, Kind::Schedstat),
    file("zoneinfo", 1, Kind::Zoneinfo),
    directory("node", 5),
    // 90
    file("online", 89, Kind::Fixed("0\n")),
    file("possible", 89, Kind::Fixed("0\n")),
    file("has_cpu", 89, Kind::Fixed("0\n")),
    file("has_memory", 89, Kind::Fixed("0\n")),
    file("has_normal_memory", 89, Kind::Fixed("0\n")),
    directory("node0", 89),
    file("cpulist", 95, Kind::Cpus),
    file("cpumap", 95, Kind::CpusMask),
    file("distance", 95, Kind::Fixed("10\n")),
    file("meminfo", 95, Kind::NodeMeminfo),
    // 100
    file("numastat", 95, Kind::Fixed(NUMASTAT)),
    file("vmstat", 95, Kind::NodeVmstat),
    link("cpu#", 95, Kind::NodeCpu),
    link("node0", 47, Kind::Fixed("../../node/node0")),
    file("cgroups", 1, Kind::Cgroups),
];

/// What is put over the guest's own file systems, relative to a server's directory: files, and whole directories.
const BINDS: &[u8] = &[7, 8, 9, 10, 11, 12, 13, 14, 3, 6, 83, 84, 85, 86, 87, 88, 89, 104];

const fn directory(name: &'static str, parent: u8) -> Place {
    Place { name, parent, what: What::Directory }
}

const fn host_directory(name: &'static str, parent: u8) -> Place {
    Place { name, parent, what: What::HostDirectory }
}

const fn file(name: &'static str, parent: u8, kind: Kind) -> Place {
    Place { name, parent, what: What::File(kind) }
}

const fn link(name: &'static str, parent: u8, kind: Kind) -> Place {
    Place { name, parent, what: What::Link(kind) }
}

/// A place, with the numbers of the CPU and the cache in whose directories it is; 0 where it is in none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct At {
    /// The index into [`PLACES`].
    pub index: u8,
    /// The server's number of the CPU.
    pub cpu: u16,
    /// The number of the CPU's cache.
    pub cache: u8,
}

impl At {
    /// The place's description.
    pub fn place(self) -> &'static Place {
        &PLACES[usize::from(self.index)]
    }

    /// What is read there; `None` for a directory.
    pub fn kind(self) -> Option<Kind> {
        match self.place().what {
            What::File(kind) | What::Link(kind) => Some(kind),
            What::Directory | What::HostDirectory => None,
        }
    }

    /// Whether it is one of several whose names end in a number.
    pub fn is_numbered(self) -> bool {
        self.place().name.ends_with('#')
    }

    /// Whether the number in its name is that of a cache.
    pub fn is_cache(self) -> bool {
        self.is_numbered() && self.place().parent == CACHE
    }

    /// Whether it is in the directory of a CPU, or is that.
    pub fn has_cpu(self) -> bool {
        self.is_below_number(CPUS)
    }

    /// Whether the server's CPUs or the host's files say if it is there; all else is there always.
    pub fn may_be_missing(self) -> bool {
        self.has_cpu() || self.is_numbered() || self.is_of_the_host()
    }

    /// Whether it is there if the host has it.
    pub fn is_of_the_host(self) -> bool {
        match self.place().what {
            What::HostDirectory => true,
            What::File(kind) => matches!(kind, Kind::Host | Kind::SharedCpus | Kind::SharedCpusMask),
            What::Directory | What::Link(_) => false,
        }
    }

    /// Whether it is a symbolic link.
    pub fn is_link(self) -> bool {
        matches!(self.place().what, What::Link(_))
    }

    /// Its name.
    pub fn name(self) -> String {
        match self.place().name.strip_suffix('#') {
            Some(name) if self.is_cache() => format!("{name}{}", self.cache),
            Some(name) => format!("{name}{}", self.cpu),
            None => self.place().name.to_owned(),
        }
    }

    /// The directory it is in; itself for the server's directory. One that has no number, and no directory above it with one,
    /// has number 0.
    pub fn parent(self) -> At {
        let above = At { index: self.place().parent, ..self };
        let cache = if above.is_below_number(CACHE) { above.cache } else { 0 };
        let cpu = if above.has_cpu() { above.cpu } else { 0 };
        At { cpu, cache, ..above }
    }

    /// Whether it, or a directory above it, is a numbered one of the directory `of`.
    fn is_below_number(self, of: u8) -> bool {
        let mut index = self.index;
        while index != 0 {
            let place = &PLACES[usize::from(index)];
            if place.parent == of && place.name.ends_with('#') {
                return true;
            }
            index = place.parent;
        }
        false
    }

    /// Its path from the server's directory, with `cpu` for the CPU's number.
    pub fn path(self, cpu: u16) -> String {
        let name = At { cpu, ..self }.name();
        match self.parent() {
            above if above.index == 0 => name,
            above => format!("{}/{name}", above.path(cpu)),
        }
    }

    /// The place called `name` in this directory, if it has one. Whether a numbered one is there, or one of the host's, is
    /// another matter.
    pub fn child(self, name: &OsStr) -> Option<At> {
        let name = name.to_str()?;
        let mut inside = self.children();
        inside.find_map(|at| match at.place().name.strip_suffix('#') {
            Some(stem) => at.numbered(number(name.strip_prefix(stem)?)?),
            None => (at.place().name == name).then_some(at),
        })
    }

    /// All that may be in this directory; numbered ones once, with number 0.
    pub fn children(self) -> impl Iterator<Item = At> {
        let places = PLACES.iter().enumerate().skip(1);
        let inside = places.filter(move |(_, place)| place.parent == self.index);
        inside.map(move |(index, _)| At { index: index as u8, ..self })
    }

    /// A numbered place with its number.
    pub fn numbered(self, number: u16) -> Option<At> {
        match self.is_cache() {
            true => Some(At { cache: u8::try_from(number).ok()?, ..self }),
            false => Some(At { cpu: number, ..self }),
        }
    }
}

/// A number as the kernel writes it in names.
fn number(text: &str) -> Option<u16> {
    let canonical = text == "0" || !text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| canonical)
}

/// What an inode number stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// The root, which has a directory per server.
    Root,
    /// A place in the directory of server `id`.
    Place {
        /// The server's id.
        id: u64,
        /// The place.
        at: At,
    },
}

impl Node {
    /// Decodes an inode number; `None` if this program never gave it out.
    pub fn of(inode: u64) -> Option<Node> {
        if inode == ROOT {
            return Some(Node::Root);
        }
        let (id, index) = (inode >> INDEX_BITS & ID_MAX, (inode & ((1 << INDEX_BITS) - 1)) as u8);
        let at = At { index, cpu: (inode >> CPU_SHIFT) as u16, cache: (inode >> CACHE_SHIFT) as u8 };
        (id > 0 && usize::from(index) < PLACES.len()).then_some(Node::Place { id, at })
    }

    /// The inode number.
    pub fn inode(self) -> u64 {
        match self {
            Node::Root => ROOT,
            Node::Place { id, at } => {
                u64::from(at.cache) << CACHE_SHIFT
                    | u64::from(at.cpu) << CPU_SHIFT
                    | id << INDEX_BITS
                    | u64::from(at.index)
            }
        }
    }
}

/// The id that a directory name of the root stands for: decimal, at least 1, without leading zeros.
pub fn id_of(name: &OsStr) -> Option<u64> {
    let name = name.to_str()?;
    let canonical = name.bytes().all(|byte| byte.is_ascii_digit()) && !name.starts_with('0');
    name.parse().ok().filter(|&id| canonical && id <= ID_MAX)
}

/// What the manager binds, relative to a server's directory; a directory's path ends in `/`.
pub fn binds() -> impl Iterator<Item = String> {
    BINDS.iter().map(|&index| {
        let at = At { index, ..At::default() };
        at.path(0) + if at.kind().is_some() { "" } else { "/" }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_nodes_are_one_to_one() {
        for id in [1, 2, 77, ID_MAX] {
            for index in 0..PLACES.len() as u8 {
                for (cpu, cache) in [(0, 0), (1, 0), (8191, 3), (u16::MAX, u8::MAX)] {
                    let node = Node::Place { id, at: At { index, cpu, cache } };
                    assert_eq!(Node::of(node.inode()), Some(node));
                }
            }
        }
        assert_eq!(Node::of(ROOT), Some(Node::Root));
        assert_eq!(Node::of(0), None);
        assert_eq!(Node::of(255), None);
        assert_eq!(Node::of(1 << 8 | 255), None);
    }

    #[test]
    fn an_index_keeps_its_meaning() {
        // Adopted inodes: these numbers were given out. A line for each index, and only ever more of them.
        let known: Vec<&str> = include_str!("inodes.txt").lines().collect();
        let paths: Vec<String> = (0..PLACES.len() as u8).map(|index| At { index, cpu: 5, cache: 2 }.path(5)).collect();
        assert_eq!(paths, known);
        for (index, path) in (1..).zip(&paths[1..]) {
            let mut at = At::default();
            for name in path.split('/') {
                let child = at.child(OsStr::new(name)).unwrap();
                assert_eq!(child.parent(), at, "{name} of {path}");
                at = child;
            }
            assert_eq!((at.index, &at.path(at.cpu)), (index, path));
        }
        assert_eq!(Node::Place { id: 3, at: At { index: 20, ..At::default() } }.inode(), 3 << 8 | 20);
        assert_eq!(At::default().child(OsStr::new("")), None);
    }

    #[test]
    fn a_number_has_one_name() {
        let cpu = At { index: CPUS, ..At::default() };
        assert_eq!(cpu.child(OsStr::new("cpu0")), cpu.child(OsStr::new("cpu0")).filter(|at| at.cpu == 0));
        for name in ["cpu", "cpu00", "cpu01", "cpu+1", "cpu-1", "cpu65536", "cpu1a", "index1"] {
            assert_eq!(cpu.child(OsStr::new(name)), None, "{name}");
        }
    }

    #[test]
    fn only_canonical_ids_are_names() {
        for (name, id) in [("1", Some(1)), ("0", None), ("01", None), ("+1", None), ("", None), ("1a", None)] {
            assert_eq!(id_of(OsStr::new(name)), id, "{name}");
        }
        assert_eq!(id_of(OsStr::new("99999999999999999999")), None);
        assert_eq!(id_of(OsStr::new("4294967296")), None);
    }
}
