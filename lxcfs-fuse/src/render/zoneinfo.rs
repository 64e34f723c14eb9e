//! `/proc/zoneinfo`: the server's memory as one node with one zone.

use super::{PAGE_BYTES, put, vmstat};
use crate::snapshot::Memory;

/// What the kernel counts by node (`enum node_stat_item`) and cgroup counts too.
const OF_NODE: [&str; 16] = [
    "nr_inactive_anon",
    "nr_active_anon",
    "nr_inactive_file",
    "nr_active_file",
    "nr_unevictable",
    "nr_slab_reclaimable",
    "nr_slab_unreclaimable",
    "nr_anon_pages",
    "nr_mapped",
    "nr_file_pages",
    "nr_dirty",
    "nr_writeback",
    "nr_shmem",
    "nr_kernel_stack",
    "nr_page_table_pages",
    "nr_swapcached",
];

/// What it counts by zone (`enum zone_stat_item`).
const OF_ZONE: [&str; 6] = [
    "nr_free_pages",
    "nr_zone_inactive_anon",
    "nr_zone_active_anon",
    "nr_zone_inactive_file",
    "nr_zone_active_file",
    "nr_zone_unevictable",
];

/// Renders zoneinfo. Watermarks are 0: the kernel reclaims by the group's limit, not by them.
pub fn zoneinfo(out: &mut String, memory: &Memory, visible: usize) {
    out.push_str("Node 0, zone   Normal\n  per-node stats\n");
    for name in OF_NODE {
        put!(out, "      {name:<12} {}\n", vmstat::pages(name, memory).unwrap_or(0));
    }
    let (free, total) = (memory.free() / PAGE_BYTES, memory.total / PAGE_BYTES);
    put!(out, "  pages free     {free}\n");
    for name in ["boost", "min", "low", "high"] {
        put!(out, "        {name:<8} 0\n");
    }
    for name in ["spanned", "present", "managed"] {
        put!(out, "        {name:<8} {total}\n");
    }
    out.push_str("        cma      0\n        protection: (0)\n");
    for name in OF_ZONE {
        put!(out, "      {name:<12} {}\n", vmstat::pages(name, memory).unwrap_or(0));
    }
    out.push_str("  pagesets\n");
    for cpu in 0..visible {
        put!(out, "    cpu: {cpu}\n              count: 0\n              high:  0\n              batch: 0\n");
        out.push_str("  vm stats threshold: 0\n");
    }
    out.push_str("  node_unreclaimable:  0\n  start_pfn:           0\n");
}
