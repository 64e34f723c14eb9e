//! What is left of a bounded wait, so that a signal in between does not make it longer.

use std::time::{Duration, Instant};

use rustix::event::Timespec;

/// The end of a wait, or none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    /// The moment `timeout_ms` from now; `None` is never.
    pub(crate) fn after(timeout_ms: Option<u64>) -> Self {
        Self(timeout_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms))))
    }

    /// What is left, zero when it is over; `None` waits for ever.
    pub(crate) fn left(&self) -> Option<Timespec> {
        let left = self.0?.saturating_duration_since(Instant::now());
        Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) })
    }

    /// Whether the moment has come.
    pub(crate) fn is_over(&self) -> bool {
        self.0.is_some_and(|end| Instant::now() >= end)
    }
}
