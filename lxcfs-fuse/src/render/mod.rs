//! Values in, the text of one file out: one file here per file served. Pure, and never panics.
//!
//! Each writes to the end of `out`, a buffer that the caller uses again.

mod cpuinfo;
mod cpus;
mod diskstats;
mod loadavg;
mod meminfo;
mod pressure;
mod stat;
mod swaps;
mod uptime;
mod vmstat;

pub use cpuinfo::cpuinfo;
pub use cpus::cpus;
pub use diskstats::diskstats;
pub use loadavg::loadavg;
pub use meminfo::meminfo;
pub use pressure::pressure;
pub use stat::{Stat, stat};
pub use swaps::swaps;
pub use uptime::uptime;
pub use vmstat::vmstat;

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
    out.extend(digits[from..].iter().map(|&digit| char::from(digit)));
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
