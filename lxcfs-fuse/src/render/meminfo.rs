//! `/proc/meminfo`: the host's lines in the host's order, with the server's values.

use super::put_number;
use crate::snapshot::Memory;

/// Renders meminfo. Of `host`, the host's text, the names and a few constants of the machine are used.
pub fn meminfo(out: &mut String, host: &str, memory: &Memory) {
    for line in host.lines() {
        let Some((name, host_value)) = line.split_once(':') else {
            continue;
        };
        let (number, unit) = match shown(name, memory) {
            Shown::Bytes(bytes) => (bytes / 1024, " kB\n"),
            Shown::Count(count) => (count, "\n"),
            Shown::Host => {
                out.extend([name, ":", host_value, "\n"]);
                continue;
            }
            Shown::Omitted => continue,
        };
        // The kernel pads the name and its colon to 16 columns, and the value to 8.
        out.extend([name, ":"]);
        put_number(out, number, 8 + 15usize.saturating_sub(name.len()));
        out.push_str(unit);
    }
}

/// What becomes of a line.
enum Shown {
    Bytes(u64),
    Count(u64),
    /// A constant of the machine, no use of it.
    Host,
    Omitted,
}

fn shown(name: &str, memory: &Memory) -> Shown {
    let stat = &memory.stat;
    let free = memory.total.saturating_sub(memory.used);
    let shmem_kept_out = stat.active_file.saturating_add(stat.inactive_file);
    let bytes = match name {
        "MemTotal" => memory.total,
        "MemFree" => free,
        // Page cache of files and reclaimable slab can be dropped, so programs may count on it; shared memory
        // and tmpfs, which `file` includes, cannot.
        "MemAvailable" => free.saturating_add(shmem_kept_out).saturating_add(stat.slab_reclaimable).min(memory.total),
        "Cached" => stat.file,
        "SwapCached" => stat.swapcached,
        "Active" => stat.active_anon.saturating_add(stat.active_file),
        "Inactive" => stat.inactive_anon.saturating_add(stat.inactive_file),
        "Active(anon)" => stat.active_anon,
        "Inactive(anon)" => stat.inactive_anon,
        "Active(file)" => stat.active_file,
        "Inactive(file)" => stat.inactive_file,
        "Unevictable" => stat.unevictable,
        "SwapTotal" => memory.swap_total,
        "SwapFree" => memory.swap_total.saturating_sub(memory.swap_used),
        "Zswap" => stat.zswap,
        "Zswapped" => stat.zswapped,
        "Dirty" => stat.file_dirty,
        "Writeback" => stat.file_writeback,
        "AnonPages" => stat.anon,
        "Mapped" => stat.file_mapped,
        "Shmem" => stat.shmem,
        // v1 does not tell slab from other kernel memory: 0 there, and the memory is in MemTotal - MemFree.
        "KReclaimable" | "SReclaimable" => stat.slab_reclaimable,
        "Slab" => stat.slab_reclaimable.saturating_add(stat.slab_unreclaimable),
        "SUnreclaim" => stat.slab_unreclaimable,
        "KernelStack" => stat.kernel_stack,
        "PageTables" => stat.pagetables,
        "SecPageTables" => stat.sec_pagetables,
        "VmallocUsed" => stat.vmalloc,
        "Percpu" => stat.percpu,
        "AnonHugePages" => stat.anon_thp,
        "ShmemHugePages" => stat.shmem_thp,
        "FileHugePages" => stat.file_thp,
        // What the kernel's default policy (vm.overcommit_ratio 50) allows a machine of this size. The host's
        // policy is for the host's memory.
        "CommitLimit" => (memory.total / 2).saturating_add(memory.swap_total),
        // Address space that was promised is not counted by cgroup; at least what is in use was.
        "Committed_AS" => memory.used.saturating_add(memory.swap_used),
        // Not counted by cgroup: block-device pages (they are in Cached), locked pages (they are in
        // Unevictable), and states that no current kernel counts any more.
        "Buffers" | "Mlocked" | "NFS_Unstable" | "Bounce" | "WritebackTmp" | "VmallocChunk" | "ShmemPmdMapped"
        | "FilePmdMapped" | "HardwareCorrupted" | "LazyFree" | "CmaTotal" | "CmaFree" | "Unaccepted" | "Balloon"
        | "GPUActive" | "GPUReclaim" | "Quicklists" => 0,
        // Huge pages have a controller of their own, which registrations do not name: none are given.
        "Hugetlb" => 0,
        "HugePages_Total" | "HugePages_Free" | "HugePages_Rsvd" | "HugePages_Surp" => {
            return Shown::Count(0);
        }
        // Constants of the architecture, the same on an empty machine.
        "VmallocTotal" | "Hugepagesize" => return Shown::Host,
        // How the host maps its physical memory (DirectMap*), and whatever a newer kernel adds: the host's.
        _ => return Shown::Omitted,
    };
    Shown::Bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::MemoryStat;

    #[test]
    fn a_line_looks_as_the_kernel_writes_it() {
        let host = "MemTotal:       24684092 kB\nVmallocTotal:   34359738367 kB\nHugePages_Total:       7\n\
                    DirectMap4k:       28672 kB\nNewThing:            5 kB\n";
        let mut out = String::new();
        meminfo(&mut out, host, &Memory { total: 24_684_092 * 1024, ..Memory::default() });
        assert_eq!(out, "MemTotal:       24684092 kB\nVmallocTotal:   34359738367 kB\nHugePages_Total:       0\n");
    }

    #[test]
    fn available_is_never_more_than_there_is() {
        let stat = MemoryStat { active_file: u64::MAX, slab_reclaimable: 5, ..MemoryStat::default() };
        let memory = Memory { total: 4096 * 1024, used: 1 << 60, stat, ..Memory::default() };
        let mut out = String::new();
        meminfo(&mut out, "MemFree: 1 kB\nMemAvailable: 1 kB\n", &memory);
        assert_eq!(out, "MemFree:               0 kB\nMemAvailable:       4096 kB\n");
    }
}
