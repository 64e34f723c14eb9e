//! Values in, the text of one file out: one file here per file served. Pure, and never panics.
//!
//! Each writes to the end of `out`, a buffer that the caller uses again.

mod cgroups;
mod cpuinfo;
mod cpus;
mod diskstats;
mod interrupts;
mod loadavg;
mod meminfo;
mod node;
mod partitions;
mod schedstat;
mod stat;
mod swaps;
mod uptime;
mod vmstat;
mod zoneinfo;

pub use cgroups::cgroups;
pub use cpuinfo::cpuinfo;
pub use cpus::{cpu_list, cpu_mask};
pub use diskstats::diskstats;
pub use interrupts::{interrupts, softirqs};
pub use loadavg::loadavg;
pub use meminfo::{Meminfo, meminfo};
pub use node::{node_meminfo, node_vmstat};
pub use partitions::partitions;
pub use schedstat::schedstat;
pub use stat::{Stat, stat};
pub use swaps::swaps;
pub use uptime::uptime;
pub use vmstat::vmstat;
pub use zoneinfo::zoneinfo;

/// Writes formatted text to a `String`, which cannot fail.
macro_rules! put {
    ($out:expr, $($argument:tt)*) => {{
        use std::fmt::Write as _;
        let _ = write!($out, $($argument)*);
    }};
}
use put;

/// Bytes of a page as the counters of `/proc/vmstat` mean it; 4 KiB on every architecture served.
const PAGE_BYTES: u64 = 4096;

/// Appends a number, right-aligned in `width` columns. Files of many numbers are read often, and `write!` takes
/// three times as long.
fn put_number(out: &mut String, number: u64, width: usize) {
    // The longest u64 has 20 digits.
    let mut digits = [b' '; 20];
    let mut at = digits.len();
    let mut rest = number;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let from = at.min(digits.len().saturating_sub(width));
    // They are ASCII, so there is no other case.
    out.push_str(std::str::from_utf8(&digits[from..]).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_are_aligned_as_by_the_standard_library() {
        for number in [0, 7, 10, 999, 1_000_000, u64::MAX] {
            for width in [0, 1, 8, 20] {
                let mut out = String::new();
                super::put_number(&mut out, number, width);
                assert_eq!(out, format!("{number:>width$}"));
            }
        }
    }
}
