//! `/proc/diskstats`: the devices that the server has read or written, with its own counts.

use super::put;
use crate::snapshot::Disk;

/// Renders diskstats. Merges, queue lengths and times are 0: they belong to the device's queue, which all
/// servers share, and cgroup does not count them.
pub fn diskstats(out: &mut String, disks: &[Disk]) {
    for disk in disks {
        let sectors = |bytes: u64| bytes / 512;
        put!(out, "{:4} {:7} {}", disk.major, disk.minor, disk.name);
        // reads merged sectors ms · writes merged sectors ms · in flight, ms, weighted ms
        put!(out, " {} 0 {} 0", disk.reads, sectors(disk.read_bytes));
        put!(out, " {} 0 {} 0 0 0 0", disk.writes, sectors(disk.written_bytes));
        // discards merged sectors ms · flushes ms
        put!(out, " {} 0 {} 0 0 0\n", disk.discards, sectors(disk.discarded_bytes));
    }
}
