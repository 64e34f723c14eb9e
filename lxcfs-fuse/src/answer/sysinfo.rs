//! What sysinfo(2) says in a server: the figures of its `/proc/meminfo`, `loadavg` and `uptime`, laid out as the kernel does.

use kernel::seccomp::Abi;

use crate::snapshot::{Snapshot, Unreadable};
use crate::watch::Server;

/// `struct sysinfo` of x86_64 and of i386, in bytes (linux/sysinfo.h, kernel/sys.c: `compat_sysinfo`).
const NATIVE_BYTES: usize = 112;
const I386_BYTES: usize = 64;

/// Below this a 32-bit caller's unit of memory is raised, until all fits.
const PAGE_BYTES: u32 = 4096;

/// The values of one answer; memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sysinfo {
    /// Seconds since the server's start, begun ones counted, as the kernel counts them here and not in `/proc/uptime`.
    pub uptime_s: u64,
    /// Load averages, times 65536.
    pub loads: [u64; 3],
    /// MemTotal.
    pub total: u64,
    /// MemFree.
    pub free: u64,
    /// Shmem.
    pub shared: u64,
    /// SwapTotal.
    pub swap_total: u64,
    /// SwapFree.
    pub swap_free: u64,
    /// Processes and threads; the field has 16 bits, and more is told as the most.
    pub tasks: u16,
}

impl Sysinfo {
    /// Collects the values; `reader` is the thread that asks.
    pub fn of(server: &Server, snapshot: &Snapshot<'_>, reader: u32) -> Result<Sysinfo, Unreadable> {
        let memory = snapshot.memory()?;
        let (loads, running) = {
            let load = server.load(snapshot, reader)?;
            (load.fixed_point_16(), load.tasks().running.max(1))
        };
        let up_ns = snapshot.now().since_ns(server.registration.started_boottime_ns);
        Ok(Sysinfo {
            uptime_s: up_ns.div_ceil(1_000_000_000),
            loads,
            total: memory.total,
            free: memory.free(),
            shared: memory.stat.shmem,
            swap_total: memory.swap_total,
            swap_free: memory.swap_free(),
            tasks: snapshot.task_count()?.max(running).try_into().unwrap_or(u16::MAX),
        })
    }

    /// The structure as a caller of `abi` has it.
    pub fn laid_out(&self, abi: Abi) -> Vec<u8> {
        match abi {
            Abi::Native => self.native(),
            Abi::I386 => self.i386(),
        }
    }

    /// Total, free, shared, buffers (never counted: see meminfo), swap and free swap, in the order of the structure.
    fn memory(&self) -> [u64; 6] {
        [self.total, self.free, self.shared, 0, self.swap_total, self.swap_free]
    }

    fn native(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(NATIVE_BYTES);
        for word in [self.uptime_s].iter().chain(&self.loads).chain(&self.memory()) {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(self.tasks.to_ne_bytes());
        // Padding, then high memory, of which 64-bit machines have none.
        bytes.resize(bytes.len() + 6 + 2 * 8, 0);
        bytes.extend(1_u32.to_ne_bytes());
        bytes.resize(NATIVE_BYTES, 0);
        bytes
    }

    fn i386(&self) -> Vec<u8> {
        let mut unit = 1_u32;
        // By these two alone, as the kernel: what is not more than they fits where they do.
        if self.total >> 32 != 0 || self.swap_total >> 32 != 0 {
            unit = PAGE_BYTES;
        }
        let mut bytes = Vec::with_capacity(I386_BYTES);
        let scaled = self.memory().map(|value| value / u64::from(unit));
        for word in [self.uptime_s].iter().chain(&self.loads).chain(&scaled) {
            bytes.extend((*word as u32).to_ne_bytes());
        }
        bytes.extend(self.tasks.to_ne_bytes());
        bytes.resize(bytes.len() + 2 + 2 * 4, 0);
        bytes.extend(unit.to_ne_bytes());
        bytes.resize(I386_BYTES, 0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    const SAMPLE: Sysinfo = Sysinfo {
        uptime_s: 11,
        loads: [12, 13, 14],
        total: 15 << 20,
        free: 16 << 12,
        shared: 17 << 12,
        swap_total: 18 << 12,
        swap_free: 19 << 12,
        tasks: 20,
    };

    fn long(bytes: &[u8], at: usize) -> u64 {
        u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn int(bytes: &[u8], at: usize) -> u32 {
        u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_native_structure_is_that_of_the_c_library() {
        type Theirs = libc::sysinfo;
        let bytes = SAMPLE.laid_out(Abi::Native);
        assert_eq!(bytes.len(), size_of::<Theirs>());
        let found = [
            offset_of!(Theirs, uptime),
            offset_of!(Theirs, loads),
            offset_of!(Theirs, loads) + 8,
            offset_of!(Theirs, loads) + 16,
            offset_of!(Theirs, totalram),
            offset_of!(Theirs, freeram),
            offset_of!(Theirs, sharedram),
            offset_of!(Theirs, bufferram),
            offset_of!(Theirs, totalswap),
            offset_of!(Theirs, freeswap),
            offset_of!(Theirs, totalhigh),
            offset_of!(Theirs, freehigh),
        ]
        .map(|at| long(&bytes, at));
        assert_eq!(found, [11, 12, 13, 14, 15 << 20, 16 << 12, 17 << 12, 0, 18 << 12, 19 << 12, 0, 0]);
        let procs = offset_of!(Theirs, procs);
        assert_eq!(bytes[procs..procs + 2], 20_u16.to_ne_bytes());
        assert_eq!(int(&bytes, offset_of!(Theirs, mem_unit)), 1);
    }

    #[test]
    fn the_i386_structure_has_a_larger_unit_only_when_it_must() {
        let bytes = SAMPLE.laid_out(Abi::I386);
        // uptime, loads, memory, procs and padding, high memory, unit: linux/sysinfo.h with longs of 4 bytes.
        let words: Vec<u32> = (0..I386_BYTES / 4).map(|index| int(&bytes, 4 * index)).collect();
        assert_eq!(words, [11, 12, 13, 14, 15 << 20, 16 << 12, 17 << 12, 0, 18 << 12, 19 << 12, 20, 0, 0, 1, 0, 0]);
        let large = Sysinfo { total: 5 << 32, ..SAMPLE }.laid_out(Abi::I386);
        assert_eq!((int(&large, 16), int(&large, 20), int(&large, 52)), (5 << 20, 16, 4096));
        let swap = Sysinfo { swap_total: 1 << 32, ..SAMPLE }.laid_out(Abi::I386);
        assert_eq!((int(&swap, 16), int(&swap, 32), int(&swap, 52)), (15 << 8, 1 << 20, 4096));
    }
}
