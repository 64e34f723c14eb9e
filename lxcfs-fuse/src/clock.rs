//! The two clocks everything is computed from, read once per answer.
//!
//! Limit: the host's clocks. The offset of a server's time namespace does not matter here, because a
//! registration gives the start of the server on the host's own boot-time clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// One instant on both clocks, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// `CLOCK_BOOTTIME`: since the host booted, sleep included.
    pub boottime_ns: u64,
    /// `CLOCK_REALTIME`: since 1970.
    pub realtime_ns: u64,
}

impl Now {
    /// Reads both clocks.
    pub fn read() -> Now {
        Now { boottime_ns: nanoseconds(ClockId::Boottime), realtime_ns: nanoseconds(ClockId::Realtime) }
    }

    /// The boot-time clock in milliseconds.
    pub fn boottime_ms(&self) -> u64 {
        self.boottime_ns / 1_000_000
    }

    /// How long ago `started_boottime_ns` was; 0 if it is still to come.
    pub fn since_ns(&self, started_boottime_ns: i64) -> u64 {
        let since = i128::from(self.boottime_ns) - i128::from(started_boottime_ns);
        u64::try_from(since).unwrap_or_default()
    }

    /// The wall-clock time of an instant of the boot-time clock, in nanoseconds since 1970.
    pub fn realtime_of_ns(&self, boottime_ns: i64) -> u64 {
        let booted_ns = self.realtime_ns.saturating_sub(self.boottime_ns);
        booted_ns.saturating_add_signed(boottime_ns)
    }

    /// [`Now::realtime_of_ns`] as a time stamp for a file.
    pub fn system_time_of(&self, boottime_ns: i64) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.realtime_of_ns(boottime_ns))
    }
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
