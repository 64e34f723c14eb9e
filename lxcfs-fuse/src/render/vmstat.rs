//! `/proc/vmstat`: every name the host's kernel has, with the server's count where cgroup counts it, else 0.

use super::{PAGE_BYTES, put_number};
use crate::snapshot::{Disk, Memory, MemoryEvents};

/// Renders vmstat.
pub fn vmstat(out: &mut String, names: &[String], memory: &Memory, events: &MemoryEvents, disks: &[Disk]) {
    for name in names {
        out.extend([name, " "]);
        put_number(out, value(name, memory, events, disks), 0);
        out.push('\n');
    }
}

/// The value of one name; 0 for what cgroup does not count.
pub(super) fn value(name: &str, memory: &Memory, events: &MemoryEvents, disks: &[Disk]) -> u64 {
    pages(name, memory).or_else(|| event(name, events, disks)).unwrap_or(0)
}

/// Huge pages are counted in units of themselves; 2 MiB with pages of 4 KiB.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Counters of pages in use, from the byte counters that meminfo uses too.
pub(super) fn pages(name: &str, memory: &Memory) -> Option<u64> {
    let stat = &memory.stat;
    let bytes = match name {
        "nr_free_pages" => memory.total.saturating_sub(memory.used),
        "nr_inactive_anon" | "nr_zone_inactive_anon" => stat.inactive_anon,
        "nr_active_anon" | "nr_zone_active_anon" => stat.active_anon,
        "nr_inactive_file" | "nr_zone_inactive_file" => stat.inactive_file,
        "nr_active_file" | "nr_zone_active_file" => stat.active_file,
        "nr_unevictable" | "nr_zone_unevictable" => stat.unevictable,
        "nr_anon_pages" => stat.anon,
        "nr_mapped" => stat.file_mapped,
        "nr_file_pages" => stat.file,
        "nr_dirty" => stat.file_dirty,
        "nr_writeback" => stat.file_writeback,
        "nr_shmem" => stat.shmem,
        "nr_slab_reclaimable" => stat.slab_reclaimable,
        "nr_slab_unreclaimable" => stat.slab_unreclaimable,
        "nr_page_table_pages" => stat.pagetables,
        "nr_sec_page_table_pages" => stat.sec_pagetables,
        "nr_swapcached" => stat.swapcached,
        "nr_anon_transparent_hugepages" => return Some(stat.anon_thp / HUGE_PAGE_BYTES),
        "nr_shmem_hugepages" => return Some(stat.shmem_thp / HUGE_PAGE_BYTES),
        "nr_file_hugepages" => return Some(stat.file_thp / HUGE_PAGE_BYTES),
        // This one is in KiB (mm/vmstat.c).
        "nr_kernel_stack" => return Some(stat.kernel_stack / 1024),
        _ => return None,
    };
    Some(bytes / PAGE_BYTES)
}

/// Counters of events.
fn event(name: &str, events: &MemoryEvents, disks: &[Disk]) -> Option<u64> {
    // In KiB, as the kernel counts what is submitted to block devices.
    let kilobytes =
        |of: fn(&Disk) -> u64| Some(disks.iter().fold(0, |sum: u64, disk| sum.saturating_add(of(disk))) / 1024);
    match name {
        "pgpgin" => kilobytes(|disk| disk.read_bytes),
        "pgpgout" => kilobytes(|disk| disk.written_bytes),
        "oom_kill" => Some(events.oom_kills),
        // memory.stat and vmstat name the same events alike.
        _ => events.counts.iter().find_map(|(found, count)| (found == name).then_some(*count)),
    }
}
