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
