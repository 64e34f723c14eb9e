//! Memory of one server, from `memory.*` of either cgroup version.
//!
//! Limit: what is charged to the server, as the kernel charges it: a page that two servers use belongs to the one that
//! touched it first.

use super::{Snapshot, Unreadable, cgroup, parse};

/// Memory of a server, in bytes. A counter that this cgroup version does not have is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The tightest limit up the tree, or the host's memory if that is less.
    pub total: u64,
    /// All that is charged to the server: pages, page cache, kernel memory.
    pub used: u64,
    /// The tightest swap limit up the tree, or the host's swap if that is less.
    pub swap_total: u64,
    /// Swap in use.
    pub swap_used: u64,
    /// The counters of `memory.stat`.
    pub stat: MemoryStat,
}

impl Memory {
    /// What nothing is charged for, in bytes.
    pub fn free(&self) -> u64 {
        self.total.saturating_sub(self.used)
    }

    /// Swap that is not in use, in bytes.
    pub fn swap_free(&self) -> u64 {
        self.swap_total.saturating_sub(self.swap_used)
    }
}

/// Counters of `memory.stat` of both versions, in bytes, by the names of v2.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the kernel's documentation of cgroup v2")]
pub struct MemoryStat {
    pub anon: u64,
    pub file: u64,
    pub shmem: u64,
    pub file_mapped: u64,
    pub file_dirty: u64,
    pub file_writeback: u64,
    pub swapcached: u64,
    pub anon_thp: u64,
    pub file_thp: u64,
    pub shmem_thp: u64,
    pub inactive_anon: u64,
    pub active_anon: u64,
    pub inactive_file: u64,
    pub active_file: u64,
    pub unevictable: u64,
    pub slab_reclaimable: u64,
    pub slab_unreclaimable: u64,
    pub kernel_stack: u64,
    pub pagetables: u64,
    pub sec_pagetables: u64,
    pub percpu: u64,
    pub vmalloc: u64,
    pub zswap: u64,
    pub zswapped: u64,
    /// v1 only: swap in use and the tightest limits up the tree, which v2 has in files of their own.
    pub swap: u64,
    pub hierarchical_memory_limit: Option<u64>,
    pub hierarchical_memsw_limit: Option<u64>,
}

/// Counters of `memory.stat` that are events, by the names that `/proc/vmstat` uses too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryEvents {
    /// Name and count, as found.
    pub counts: Vec<(String, u64)>,
    /// Processes of the server that the kernel killed for want of memory.
    pub oom_kills: u64,
}

impl Snapshot<'_> {
    /// The server's memory.
    pub fn memory(&self) -> Result<Memory, Unreadable> {
        self.memory_and(|_| ())
    }

    /// The server's memory, and events of it: one reading of `memory.stat`, which is the dearest of all files.
    pub fn memory_and_events(&self) -> Result<(Memory, MemoryEvents), Unreadable> {
        let mut counts = Vec::new();
        let memory = self.memory_and(|text| match &self.files.memory {
            cgroup::Memory::V1 { .. } => counts = memory_events_v1(text),
            _ => counts = parse::pairs(text).map(|(name, count)| (name.to_owned(), count)).collect(),
        })?;
        let kills = match &self.files.memory {
            cgroup::Memory::V1 { oom: source, .. } | cgroup::Memory::V2 { events: source, .. } => {
                source.read(|text| parse::value(text, "oom_kill"))?.flatten()
            }
            cgroup::Memory::Uncounted => None,
        };
        Ok((memory, MemoryEvents { counts, oom_kills: kills.unwrap_or(0) }))
    }

    /// The server's memory; `memory.stat` is shown to `also`.
    fn memory_and(&self, mut also: impl FnMut(&str)) -> Result<Memory, Unreadable> {
        let host = self.host.memory(self.now)?;
        let mut memory = Memory { total: host.total_bytes, swap_total: host.swap_total_bytes, ..Memory::default() };
        let mut both = |parse: fn(&str) -> MemoryStat, text: &str| {
            also(text);
            parse(text)
        };
        match &self.files.memory {
            cgroup::Memory::V1 { usage, stat, .. } => {
                memory.used = usage.read(parse::number)?.flatten().unwrap_or(0);
                memory.stat = stat.read(|text| both(memory_stat_v1, text))?.unwrap_or_default();
                memory.swap_used = memory.stat.swap;
                let limit = memory.stat.hierarchical_memory_limit;
                memory.total = memory.total.min(limit.unwrap_or(u64::MAX));
                // v1 limits the sum of memory and swap.
                if let Some(sum) = memory.stat.hierarchical_memsw_limit {
                    memory.swap_total = memory.swap_total.min(sum.saturating_sub(memory.total));
                }
            }
            cgroup::Memory::V2 { current, stat, swap, limits, swap_limits, .. } => {
                memory.used = current.read(parse::number)?.flatten().unwrap_or(0);
                memory.stat = stat.read(|text| both(memory_stat_v2, text))?.unwrap_or_default();
                memory.total = tightest(limits, memory.total)?;
                // A host without swap has none to give, and none is used.
                if memory.swap_total > 0 {
                    memory.swap_used = swap.read(parse::number)?.flatten().unwrap_or(0);
                    memory.swap_total = tightest(swap_limits, memory.swap_total)?;
                }
            }
            cgroup::Memory::Uncounted => {}
        }
        Ok(memory)
    }
}

/// The tightest of some limits and `bound`.
fn tightest(limits: &[cgroup::Source], bound: u64) -> Result<u64, Unreadable> {
    limits
        .iter()
        .try_fold(bound, |known, source| Ok(known.min(source.read(parse::limit)?.flatten().unwrap_or(u64::MAX))))
}

/// `memory.stat` of v1: the `total_` counters, which include the groups below.
fn memory_stat_v1(text: &str) -> MemoryStat {
    let mut stat = MemoryStat::default();
    for (key, bytes) in parse::pairs(text) {
        let field = match key {
            "total_cache" => &mut stat.file,
            "total_rss" => &mut stat.anon,
            "total_rss_huge" => &mut stat.anon_thp,
            "total_shmem" => &mut stat.shmem,
            "total_mapped_file" => &mut stat.file_mapped,
            "total_dirty" => &mut stat.file_dirty,
            "total_writeback" => &mut stat.file_writeback,
            "total_swap" => &mut stat.swap,
            "total_swapcached" => &mut stat.swapcached,
            "total_inactive_anon" => &mut stat.inactive_anon,
            "total_active_anon" => &mut stat.active_anon,
            "total_inactive_file" => &mut stat.inactive_file,
            "total_active_file" => &mut stat.active_file,
            "total_unevictable" => &mut stat.unevictable,
            "hierarchical_memory_limit" => {
                stat.hierarchical_memory_limit = Some(bytes);
                continue;
            }
            "hierarchical_memsw_limit" => {
                stat.hierarchical_memsw_limit = Some(bytes);
                continue;
            }
            _ => continue,
        };
        *field = bytes;
    }
    stat
}

/// The `total_` events of v1's `memory.stat`, by vmstat's names. Its `pgpgin` and `pgpgout` count charged pages, which
/// is not what vmstat means by them.
fn memory_events_v1(text: &str) -> Vec<(String, u64)> {
    let named = parse::pairs(text).filter_map(|(key, count)| Some((key.strip_prefix("total_")?, count)));
    let events = named.filter(|(key, _)| matches!(*key, "pgfault" | "pgmajfault") || key.starts_with("workingset_"));
    events.map(|(key, count)| (key.to_owned(), count)).collect()
}

/// `memory.stat` of v2.
fn memory_stat_v2(text: &str) -> MemoryStat {
    let mut stat = MemoryStat::default();
    for (key, bytes) in parse::pairs(text) {
        let field = match key {
            "anon" => &mut stat.anon,
            "file" => &mut stat.file,
            "shmem" => &mut stat.shmem,
            "file_mapped" => &mut stat.file_mapped,
            "file_dirty" => &mut stat.file_dirty,
            "file_writeback" => &mut stat.file_writeback,
            "swapcached" => &mut stat.swapcached,
            "anon_thp" => &mut stat.anon_thp,
            "file_thp" => &mut stat.file_thp,
            "shmem_thp" => &mut stat.shmem_thp,
            "inactive_anon" => &mut stat.inactive_anon,
            "active_anon" => &mut stat.active_anon,
            "inactive_file" => &mut stat.inactive_file,
            "active_file" => &mut stat.active_file,
            "unevictable" => &mut stat.unevictable,
            "slab_reclaimable" => &mut stat.slab_reclaimable,
            "slab_unreclaimable" => &mut stat.slab_unreclaimable,
            "kernel_stack" => &mut stat.kernel_stack,
            "pagetables" => &mut stat.pagetables,
            "sec_pagetables" => &mut stat.sec_pagetables,
            "percpu" => &mut stat.percpu,
            "vmalloc" => &mut stat.vmalloc,
            "zswap" => &mut stat.zswap,
            "zswapped" => &mut stat.zswapped,
            _ => continue,
        };
        *field = bytes;
    }
    stat
}
