//! The tree that is served, and inode numbers that need no memory: `(server id, index)` packed into one number.
//!
//! A new worker inherits inodes that its predecessor gave out, perhaps an older version of this program.
//! So an index, once published, keeps its meaning for ever: add at the end, never renumber.

use std::ffi::OsStr;

/// The root's inode number (`FUSE_ROOT_ID`).
pub const ROOT: u64 = 1;

/// Bits of an inode number that hold the index.
const INDEX_BITS: u32 = 8;

/// Ids above this do not fit an inode number.
pub const ID_MAX: u64 = u64::MAX >> INDEX_BITS;

/// A file that is served.
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
    PressureCpu,
    PressureMemory,
    PressureIo,
    /// `online`, `possible` and `present` alike.
    Cpus,
}

/// A place in a server's directory.
#[derive(Debug)]
pub struct Place {
    /// The last component of its path; empty for the server's directory itself.
    pub name: &'static str,
    /// The index of the directory it is in; its own for the server's directory.
    pub parent: u8,
    /// `None` for a directory.
    pub kind: Option<Kind>,
}

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
    file("cpu", 3, Kind::PressureCpu),
    file("memory", 3, Kind::PressureMemory),
    file("io", 3, Kind::PressureIo),
    file("online", 6, Kind::Cpus),
    file("possible", 6, Kind::Cpus),
    file("present", 6, Kind::Cpus),
];

const fn directory(name: &'static str, parent: u8) -> Place {
    Place { name, parent, kind: None }
}

const fn file(name: &'static str, parent: u8, kind: Kind) -> Place {
    Place { name, parent, kind: Some(kind) }
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
        /// The index into [`PLACES`].
        index: u8,
    },
}

impl Node {
    /// Decodes an inode number; `None` if this program never gave it out.
    pub fn of(inode: u64) -> Option<Node> {
        if inode == ROOT {
            return Some(Node::Root);
        }
        let (id, index) = (inode >> INDEX_BITS, (inode & ((1 << INDEX_BITS) - 1)) as u8);
        (id > 0 && usize::from(index) < PLACES.len()).then_some(Node::Place { id, index })
    }

    /// The inode number.
    pub fn inode(self) -> u64 {
        match self {
            Node::Root => ROOT,
            Node::Place { id, index } => id << INDEX_BITS | u64::from(index),
        }
    }
}

/// The id that a directory name of the root stands for: decimal, at least 1, without leading zeros.
pub fn id_of(name: &OsStr) -> Option<u64> {
    let name = name.to_str()?;
    let canonical = name.bytes().all(|byte| byte.is_ascii_digit()) && !name.starts_with('0');
    name.parse().ok().filter(|&id| canonical && id <= ID_MAX)
}

/// The place called `name` in the directory `parent`.
pub fn child(parent: u8, name: &OsStr) -> Option<u8> {
    let found = |place: &Place| place.parent == parent && !place.name.is_empty() && OsStr::new(place.name) == name;
    PLACES.iter().position(found).map(|index| index as u8)
}

/// The paths of all files, relative to a server's directory: what the manager binds.
pub fn paths() -> impl Iterator<Item = String> {
    PLACES.iter().filter(|place| place.kind.is_some()).map(path)
}

fn path(place: &Place) -> String {
    let parent = &PLACES[usize::from(place.parent)];
    if parent.name.is_empty() { place.name.to_owned() } else { format!("{}/{}", path(parent), place.name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_nodes_are_one_to_one() {
        for id in [1, 2, 77, ID_MAX] {
            for index in 0..PLACES.len() as u8 {
                let node = Node::Place { id, index };
                assert_eq!(Node::of(node.inode()), Some(node));
            }
        }
        assert_eq!(Node::of(ROOT), Some(Node::Root));
        assert_eq!(Node::of(0), None);
        assert_eq!(Node::of(255), None);
        assert_eq!(Node::of(1 << 8 | 255), None);
    }

    #[test]
    fn an_index_keeps_its_meaning() {
        // Adopted inodes: this list only ever grows at its end.
        let known = [
            "proc/meminfo",
            "proc/stat",
            "proc/cpuinfo",
            "proc/uptime",
            "proc/loadavg",
            "proc/swaps",
            "proc/diskstats",
            "proc/vmstat",
            "proc/pressure/cpu",
            "proc/pressure/memory",
            "proc/pressure/io",
            "sys/devices/system/cpu/online",
            "sys/devices/system/cpu/possible",
            "sys/devices/system/cpu/present",
        ];
        assert_eq!(paths().collect::<Vec<_>>()[..known.len()], known);
        assert_eq!(child(1, OsStr::new("meminfo")), Some(7));
        assert_eq!(child(6, OsStr::new("present")), Some(20));
        assert_eq!(child(0, OsStr::new("")), None);
    }

    #[test]
    fn only_canonical_ids_are_names() {
        for (name, id) in [("1", Some(1)), ("0", None), ("01", None), ("+1", None), ("", None), ("1a", None)] {
            assert_eq!(id_of(OsStr::new(name)), id, "{name}");
        }
        assert_eq!(id_of(OsStr::new("99999999999999999999")), None);
    }
}
