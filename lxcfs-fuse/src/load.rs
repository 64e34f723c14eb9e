//! Load averages: the kernel's formula over the server's own tasks.
//!
//! Limit: pure. Who counts the tasks, and when, is `watch`'s and `snapshot`'s business.

/// The kernel takes a sample every 5 s and one tick more (`LOAD_FREQ` of linux/sched/loadavg.h).
pub const INTERVAL_MS: u64 = 5_000;

/// Fixed-point one and the factors of 1, 5 and 15 minutes (linux/sched/loadavg.h: `FIXED_1`, `EXP_n`).
const ONE: u64 = 1 << 11;
const FACTORS: [u64; 3] = [1884, 2014, 2037];

/// How many of the server's tasks run or wait for a CPU, and how many sleep uninterruptibly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tasks {
    /// State R.
    pub running: u64,
    /// State D.
    pub blocked: u64,
}

/// The load of one server.
#[derive(Clone, Debug, Default)]
pub struct Load {
    averages: [u64; 3],
    tasks: Tasks,
    /// When the averages were last brought up to date; `None` before the first sample.
    updated_ms: Option<u64>,
    /// The server's CPU time at the last sample.
    busy_ns: Option<u64>,
}

impl Load {
    /// The sample that was taken last.
    pub fn tasks(&self) -> Tasks {
        self.tasks
    }

    /// Whether a new sample is due.
    pub fn is_due(&self, now_ms: u64) -> bool {
        self.updated_ms.is_none_or(|then| now_ms.saturating_sub(then) >= INTERVAL_MS)
    }

    /// Whether the last sample still holds because the server has used no CPU since: a task that does not run
    /// cannot change its state. So an idle server costs one read, however many threads it has.
    pub fn still_holds(&self, busy_ns: Option<u64>) -> bool {
        self.updated_ms.is_some() && busy_ns.is_some() && busy_ns == self.busy_ns
    }

    /// Takes in a sample. Before the first one the server is taken to have been so since its start: nobody
    /// counted, and zero would be a worse guess for one that has been busy for hours.
    pub fn sample(&mut self, now_ms: u64, started_ms: u64, tasks: Tasks, busy_ns: Option<u64>) {
        let since_ms = self.updated_ms.unwrap_or(started_ms);
        let intervals = now_ms.saturating_sub(since_ms) / INTERVAL_MS;
        let active = tasks.running.saturating_add(tasks.blocked).min(u64::from(u32::MAX)) * ONE;
        for (average, factor) in self.averages.iter_mut().zip(FACTORS) {
            *average = decay(*average, power(factor, intervals), active);
        }
        // The rest of an interval counts for the next one.
        self.updated_ms = Some(since_ms + intervals * INTERVAL_MS);
        self.tasks = tasks;
        self.busy_ns = busy_ns;
    }

    /// The three averages times 65536, as sysinfo(2) has them (`SI_LOAD_SHIFT`).
    pub fn fixed_point_16(&self) -> [u64; 3] {
        self.averages.map(|average| average << 5)
    }

    /// The three averages in hundredths, rounded as the kernel prints them.
    pub fn hundredths(&self) -> [u64; 3] {
        self.averages.map(|average| {
            let rounded = average + ONE / 200;
            (rounded >> 11) * 100 + (((rounded & (ONE - 1)) * 100) >> 11)
        })
    }
}

/// One step of the kernel's `calc_load()`: rounds up while the load rises.
fn decay(average: u64, factor: u64, active: u64) -> u64 {
    if factor == ONE {
        return average;
    }
    let next = average * factor + active * (ONE - factor);
    (if active >= average { next + ONE - 1 } else { next }) / ONE
}

/// `factor` to the power of `exponent` in fixed point, as `fixed_power_int()`.
fn power(mut factor: u64, mut exponent: u64) -> u64 {
    let mut result = ONE;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result = (result * factor + ONE / 2) >> 11;
        }
        exponent >>= 1;
        if exponent > 0 {
            factor = (factor * factor + ONE / 2) >> 11;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(count: u64) -> Tasks {
        Tasks { running: count, blocked: 0 }
    }

    #[test]
    fn one_task_raises_the_first_average_to_its_known_values() {
        let mut load = Load::default();
        load.sample(0, 0, running(1), Some(0));
        let mut seen = Vec::new();
        for step in 1..=12 {
            load.sample(step * INTERVAL_MS, 0, running(1), Some(0));
            seen.push(load.hundredths()[0]);
        }
        // 1 - exp(-t/60 s) in hundredths, within the fixed point's rounding.
        assert_eq!(seen[0], 8);
        assert!((63..=64).contains(&seen[11]), "{seen:?}");
    }

    #[test]
    fn both_forms_tell_the_same_load() {
        let mut load = Load::default();
        load.sample(600_000, 0, running(3), Some(0));
        let hundredths = load.fixed_point_16().map(|average| (average * 100 + (1 << 15)) >> 16);
        assert_eq!(hundredths, load.hundredths());
    }

    #[test]
    fn missed_intervals_decay_as_if_they_had_been_sampled() {
        let (mut often, mut seldom) = (Load::default(), Load::default());
        for load in [&mut often, &mut seldom] {
            load.sample(600_000, 0, running(4), Some(1));
        }
        for step in 1..=24 {
            often.sample(600_000 + step * INTERVAL_MS, 0, running(0), Some(1));
        }
        seldom.sample(600_000 + 24 * INTERVAL_MS, 0, running(0), Some(1));
        for (a, b) in often.hundredths().into_iter().zip(seldom.hundredths()) {
            assert!(a.abs_diff(b) <= 3, "{a} {b}");
        }
    }

    #[test]
    fn a_busy_server_that_was_never_read_does_not_start_at_zero() {
        let mut load = Load::default();
        load.sample(3_600_000, 0, running(2), None);
        assert_eq!(load.hundredths()[0], 200);
        assert!(load.hundredths()[2] > 190);
    }

    #[test]
    fn a_sample_holds_while_no_cpu_time_was_used() {
        let mut load = Load::default();
        assert!(!load.still_holds(Some(0)));
        load.sample(0, 0, running(0), Some(7));
        assert!(load.still_holds(Some(7)) && !load.still_holds(Some(8)) && !load.still_holds(None));
        assert!(!load.is_due(4_999) && load.is_due(5_000));
    }
}
