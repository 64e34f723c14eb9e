//! Figures of one measure: their median, and how far they lie apart.

use std::time::Duration;

/// Measured values, in the unit of their measure: milliseconds, unless it says otherwise.
#[derive(Clone, Default)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// Adds a time.
    pub fn add(&mut self, took: Duration) {
        self.0.push(took.as_secs_f64() * 1e3);
    }

    /// Adds the share of one of `count`.
    pub fn add_share(&mut self, took: Duration, count: usize) {
        self.0.push(took.as_secs_f64() * 1e3 / count as f64);
    }

    /// Adds an amount of memory, shared by `count`.
    pub fn add_kib(&mut self, kib: u64, count: usize) {
        self.0.push(kib as f64 / count as f64);
    }

    /// Adds a time in microseconds.
    pub fn add_us(&mut self, took: Duration) {
        self.0.push(took.as_secs_f64() * 1e6);
    }

    /// Adds how many there were in a second.
    pub fn add_rate(&mut self, count: u64, took: Duration) {
        self.0.push(count as f64 / took.as_secs_f64());
    }

    /// Adds all values of another one.
    pub fn extend(&mut self, other: &Sample) {
        self.0.extend_from_slice(&other.0);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The value in the middle, if there is any.
    pub fn median(&self) -> Option<f64> {
        self.at(0.5)
    }

    /// The value below which nine of ten lie.
    pub fn ninth_decile(&self) -> Option<f64> {
        self.at(0.9)
    }

    /// The value below which 99 of 100 lie.
    pub fn ninety_ninth(&self) -> Option<f64> {
        self.at(0.99)
    }

    fn at(&self, share: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        sorted.get((last as f64 * share).round() as usize).copied()
    }
}
