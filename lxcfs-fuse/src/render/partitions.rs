//! `/proc/partitions`: the devices of diskstats, with their sizes.

use super::put;
use crate::snapshot::Disk;

/// Renders partitions. `sizes` has the host's devices by number, in blocks of 1 KiB.
pub fn partitions(out: &mut String, disks: &[Disk], sizes: &[(u32, u32, u64)]) {
    out.push_str("major minor  #blocks  name\n\n");
    for disk in disks {
        let size = sizes.iter().find(|(major, minor, _)| (*major, *minor) == (disk.major, disk.minor));
        let blocks = size.map_or(0, |(_, _, blocks)| *blocks);
        put!(out, "{:4}  {:7} {blocks:10} {}\n", disk.major, disk.minor, disk.name);
    }
}
