//! `/sys/devices/system/node/node0`: all the server's memory and CPUs as one node.

use super::{meminfo, put_number, vmstat};
use crate::snapshot::{Memory, MemoryEvents};

/// The lines of Linux 6.18, in its order (drivers/base/node.c).
const LINES: [&str; 36] = [
    "MemTotal",
    "MemFree",
    "MemUsed",
    "SwapCached",
    "Active",
    "Inactive",
    "Active(anon)",
    "Inactive(anon)",
    "Active(file)",
    "Inactive(file)",
    "Unevictable",
    "Mlocked",
    "Dirty",
    "Writeback",
    "FilePages",
    "Mapped",
    "AnonPages",
    "Shmem",
    "KernelStack",
    "PageTables",
    "SecPageTables",
    "NFS_Unstable",
    "Bounce",
    "WritebackTmp",
    "KReclaimable",
    "Slab",
    "SReclaimable",
    "SUnreclaim",
    "AnonHugePages",
    "ShmemHugePages",
    "ShmemPmdMapped",
    "FileHugePages",
    "FilePmdMapped",
    "HugePages_Total",
    "HugePages_Free",
    "HugePages_Surp",
];

/// Renders the node's meminfo: the values of `/proc/meminfo`.
pub fn node_meminfo(out: &mut String, memory: &Memory) {
    for name in LINES {
        out.push_str("Node 0 ");
        meminfo::put_line(out, name, memory);
    }
}

/// Renders the node's vmstat: those names of `/proc/vmstat` that are counted by node, and their values.
pub fn node_vmstat(out: &mut String, names: &[String], memory: &Memory, events: &MemoryEvents) {
    let of_nodes = ["nr_", "numa_", "workingset_"];
    for name in names.iter().filter(|name| of_nodes.iter().any(|start| name.starts_with(start))) {
        out.extend([name, " "]);
        put_number(out, vmstat::value(name, memory, events, &[]), 0);
        out.push('\n');
    }
}
