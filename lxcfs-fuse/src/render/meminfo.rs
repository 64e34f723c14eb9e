//! `/proc/meminfo`: the host's lines in the host's order, with the server's values.

use super::put_number;
use crate::snapshot::Memory;

/// The lines that are shown, in order. To find out what each of them means takes longer than to write it, and they do not
/// change while the kernel runs.
#[derive(Debug)]
pub struct Meminfo(Vec<Line>);

#[derive(Debug)]
struct Line {
    /// The name and its colon.
    start: String,
    shown: Shown,
}

impl Meminfo {
    /// What is shown of the host's lines, of which the names and a few constants of the machine are used.
    pub fn of(host: &[(String, String)]) -> Meminfo {
        let line = |(name, value): &(String, String)| {
            let start = format!("{name}:");
            match shown(name)? {
                Shown::Host => Some(Line { start: start + value + "\n", shown: Shown::Host }),
                shown => Some(Line { start, shown }),
            }
        };
        Meminfo(host.iter().filter_map(line).collect())
    }
}

/// Renders meminfo.
pub fn meminfo(out: &mut String, lines: &Meminfo, memory: &Memory) {
    lines.0.iter().for_each(|line| put(out, &line.start, &line.shown, memory));
}

/// Renders the line `name`, if it is one of the server's own.
pub(super) fn put_line(out: &mut String, name: &str, memory: &Memory) {
    if let Some(shown) = shown(name) {
        put(out, &format!("{name}:"), &shown, memory);
    }
}

fn put(out: &mut String, start: &str, shown: &Shown, memory: &Memory) {
    out.push_str(start);
    let (number, unit) = match shown {
        Shown::Bytes(bytes) => (bytes(memory) / 1024, " kB\n"),
        Shown::Zero => (0, "\n"),
        Shown::Host => return,
    };
    // The kernel pads the name and its colon to 16 columns, and the value to 8.
    put_number(out, number, 8 + 16usize.saturating_sub(start.len()));
    out.push_str(unit);
}

/// What becomes of a line.
#[derive(Debug)]
enum Shown {
    Bytes(fn(&Memory) -> u64),
    /// A count, not of bytes, of what servers are given none of.
    Zero,
    /// A constant of the machine, no use of it.
    Host,
}

/// `None` for a line that is left out.
fn shown(name: &str) -> Option<Shown> {
    let bytes: fn(&Memory) -> u64 = match name {
        "MemTotal" => |memory| memory.total,
        "MemFree" => Memory::free,
        // Of a node only, as FilePages.
        "MemUsed" => |memory| memory.total.saturating_sub(memory.free()),
        // Page cache of files and reclaimable slab can be dropped, so programs may count on it; shared memory
        // and tmpfs, which `file` includes, cannot.
        "MemAvailable" => |memory| {
            let stat = &memory.stat;
            let dropped = [stat.active_file, stat.inactive_file, stat.slab_reclaimable];
            dropped.into_iter().fold(memory.free(), u64::saturating_add).min(memory.total)
        },
        "Cached" | "FilePages" => |memory| memory.stat.file,
        "SwapCached" => |memory| memory.stat.swapcached,
        "Active" => |memory| memory.stat.active_anon.saturating_add(memory.stat.active_file),
        "Inactive" => |memory| memory.stat.inactive_anon.saturating_add(memory.stat.inactive_file),
        "Active(anon)" => |memory| memory.stat.active_anon,
        "Inactive(anon)" => |memory| memory.stat.inactive_anon,
        "Active(file)" => |memory| memory.stat.active_file,
        "Inactive(file)" => |memory| memory.stat.inactive_file,
        "Unevictable" => |memory| memory.stat.unevictable,
        "SwapTotal" => |memory| memory.swap_total,
        "SwapFree" => Memory::swap_free,
        "Zswap" => |memory| memory.stat.zswap,
        "Zswapped" => |memory| memory.stat.zswapped,
        "Dirty" => |memory| memory.stat.file_dirty,
        "Writeback" => |memory| memory.stat.file_writeback,
        "AnonPages" => |memory| memory.stat.anon,
        "Mapped" => |memory| memory.stat.file_mapped,
        "Shmem" => |memory| memory.stat.shmem,
        // v1 does not tell slab from other kernel memory: 0 there, and the memory is in MemTotal - MemFree.
        "KReclaimable" | "SReclaimable" => |memory| memory.stat.slab_reclaimable,
        "Slab" => |memory| memory.stat.slab_reclaimable.saturating_add(memory.stat.slab_unreclaimable),
        "SUnreclaim" => |memory| memory.stat.slab_unreclaimable,
        "KernelStack" => |memory| memory.stat.kernel_stack,
        "PageTables" => |memory| memory.stat.pagetables,
        "SecPageTables" => |memory| memory.stat.sec_pagetables,
        "VmallocUsed" => |memory| memory.stat.vmalloc,
        "Percpu" => |memory| memory.stat.percpu,
        "AnonHugePages" => |memory| memory.stat.anon_thp,
        "ShmemHugePages" => |memory| memory.stat.shmem_thp,
        "FileHugePages" => |memory| memory.stat.file_thp,
        // What the kernel's default policy (vm.overcommit_ratio 50) allows a machine of this size. The host's
        // policy is for the host's memory.
        "CommitLimit" => |memory| (memory.total / 2).saturating_add(memory.swap_total),
        // Address space that was promised is not counted by cgroup; at least what is in use was.
        "Committed_AS" => |memory| memory.used.saturating_add(memory.swap_used),
        // Not counted by cgroup: block-device pages (they are in Cached), locked pages (they are in
        // Unevictable), and states that no current kernel counts any more.
        "Buffers" | "Mlocked" | "NFS_Unstable" | "Bounce" | "WritebackTmp" | "VmallocChunk" | "ShmemPmdMapped"
        | "FilePmdMapped" | "HardwareCorrupted" | "LazyFree" | "CmaTotal" | "CmaFree" | "Unaccepted" | "Balloon"
        | "GPUActive" | "GPUReclaim" | "Quicklists" => |_| 0,
        // Huge pages have a controller of their own, which registrations do not name: none are given.
        "Hugetlb" => |_| 0,
        "HugePages_Total" | "HugePages_Free" | "HugePages_Rsvd" | "HugePages_Surp" => return Some(Shown::Zero),
        // Constants of the architecture, the same on an empty machine.
        "VmallocTotal" | "Hugepagesize" => return Some(Shown::Host),
        // How the host maps its physical memory (DirectMap*), and whatever a newer kernel adds: the host's.
        _ => return None,
    };
    Some(Shown::Bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{MemoryStat, parse};

    #[test]
    fn a_line_looks_as_the_kernel_writes_it() {
        let host = "MemTotal:       24684092 kB\nVmallocTotal:   34359738367 kB\nHugePages_Total:       7\n\
                    DirectMap4k:       28672 kB\nNewThing:            5 kB\n";
        let mut out = String::new();
        meminfo(
            &mut out,
            &Meminfo::of(&parse::meminfo(host)),
            &Memory { total: 24_684_092 * 1024, ..Memory::default() },
        );
        assert_eq!(out, "MemTotal:       24684092 kB\nVmallocTotal:   34359738367 kB\nHugePages_Total:       0\n");
    }

    #[test]
    fn available_is_never_more_than_there_is() {
        let stat = MemoryStat { active_file: u64::MAX, slab_reclaimable: 5, ..MemoryStat::default() };
        let memory = Memory { total: 4096 * 1024, used: 1 << 60, stat, ..Memory::default() };
        let mut out = String::new();
        meminfo(&mut out, &Meminfo::of(&parse::meminfo("MemFree: 1 kB\nMemAvailable: 1 kB\n")), &memory);
        assert_eq!(out, "MemFree:               0 kB\nMemAvailable:       4096 kB\n");
    }
}
