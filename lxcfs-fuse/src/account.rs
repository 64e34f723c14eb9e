//! CPU time as `/proc/stat` counts it: per visible CPU, monotonic, and adding up to the time that passed.
//!
//! The kernel gives the server's busy time since its start. What it does not give is idle time, and, on
//! cgroup v2 or under a quota, which of the *visible* CPUs was busy. Both are computed here from the change
//! since the last answer, so a change of the number of CPUs never makes a counter jump.
//!
//! Limits: pure, and in memory only. After the worker was replaced, the first answer is computed as if the
//! number of CPUs had been the present one all the time; with an unchanged number that is the same figure.

use crate::snapshot::{Busy, CpuTimes, Cpus};

/// Throttled time is counted by the kernel when a throttling ends, so it arrives in lumps as long as a quota
/// period (100 ms by default). More than two of them are not carried over: the kernel adds up the throttled
/// time of all the host's CPUs, which may be more than the visible ones can have lost.
const STEAL_CARRIED_NS: u64 = 200_000_000;

/// The counters of one visible CPU, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuAccount {
    /// In user mode, niced time not included.
    pub user_ns: u64,
    /// In user mode at a low priority (0 where the kernel does not tell it apart).
    pub nice_ns: u64,
    /// In the kernel.
    pub system_ns: u64,
    /// Runnable, but held back by the server's quota.
    pub steal_ns: u64,
    /// Neither.
    pub idle_ns: u64,
    /// Time passed minus all of the above but idle. `idle_ns` is its highest value so far: busy time is
    /// counted in ticks and may run ahead of the clock for a moment, and idle must not step back then.
    slack_ns: i64,
    steal_pending_ns: u64,
}

impl CpuAccount {
    /// Adds busy time, and answers how much that is together.
    fn charge(&mut self, user: u64, nice: u64, system: u64) -> u64 {
        self.user_ns = self.user_ns.saturating_add(user);
        self.nice_ns = self.nice_ns.saturating_add(nice);
        self.system_ns = self.system_ns.saturating_add(system);
        user.saturating_add(nice).saturating_add(system)
    }

    /// Moves on by `passed_ns`, of which `throttled_ns` may be counted as steal; the busy time is in already.
    fn pass(&mut self, passed_ns: u64, busy_ns: u64, throttled_ns: u64) {
        let slack = i128::from(self.slack_ns) + i128::from(passed_ns) - i128::from(busy_ns);
        let unclaimed = u64::try_from(slack - i128::from(self.idle_ns)).unwrap_or(0);
        let pending = self.steal_pending_ns.saturating_add(throttled_ns);
        let steal = pending.min(unclaimed);
        self.steal_pending_ns = (pending - steal).min(STEAL_CARRIED_NS);
        self.steal_ns += steal;
        self.slack_ns = (slack - i128::from(steal)).clamp(i64::MIN.into(), i64::MAX.into()) as i64;
        self.idle_ns = self.idle_ns.max(u64::try_from(self.slack_ns).unwrap_or(0));
    }
}

/// The counters of one server.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    /// Time since the server's start at the last answer.
    wall_ns: u64,
    last: CpuTimes,
    /// Used before the kernel began to count, and not charged yet: user and system time in nanoseconds.
    before_ns: (u64, u64),
    /// Of CPUs that a server had where it was before, and has not here.
    elsewhere: CpuAccount,
    /// Never shrinks: as after a hot unplug, a CPU that is no longer visible keeps what it had.
    cpus: Vec<CpuAccount>,
    visible: usize,
}

impl Accounts {
    /// Of a server that had used processors for so long, in user mode and in the kernel, when the kernel began to count.
    pub fn after(user_ns: u64, system_ns: u64) -> Self {
        Self { before_ns: (user_ns, system_ns), ..Self::default() }
    }

    /// Takes in what passed since the last answer. `wall_ns` is the time since the server's start.
    pub fn advance(&mut self, wall_ns: u64, cpus: &Cpus, times: &CpuTimes) {
        self.visible = cpus.visible.max(1);
        if self.cpus.len() < self.visible {
            self.cpus.resize(self.visible, CpuAccount::default());
        }
        let passed_ns = wall_ns.saturating_sub(self.wall_ns);
        let before = self.last.clone();
        self.last.raise_to(times);
        let throttled_ns = self.last.throttled_ns.saturating_sub(before.throttled_ns);
        let mut busy_ns = vec![0; self.visible];
        self.add_busy(cpus, &before.busy, &mut busy_ns);
        self.add_before(passed_ns, &mut busy_ns);
        for (index, account) in self.cpus[..self.visible].iter_mut().enumerate() {
            account.pass(passed_ns, busy_ns[index], share(throttled_ns, index, self.visible));
        }
        self.wall_ns = self.wall_ns.max(wall_ns);
    }

    /// The visible CPUs, in order.
    pub fn visible(&self) -> &[CpuAccount] {
        &self.cpus[..self.visible]
    }

    /// All CPUs that were ever visible: the sum line counts them, as the kernel's does.
    pub fn all(&self) -> impl Iterator<Item = &CpuAccount> {
        self.cpus.iter().chain([&self.elsewhere])
    }

    /// Idle time of all CPUs, in nanoseconds.
    pub fn idle_ns(&self) -> u64 {
        self.cpus.iter().fold(0, |sum: u64, cpu| sum.saturating_add(cpu.idle_ns))
    }

    /// Adds what was used before the kernel began to count, evenly; once. More than there was time for on the visible CPUs was used on
    /// others, and would keep these from being idle for as long.
    fn add_before(&mut self, passed_ns: u64, busy_ns: &mut [u64]) {
        let (user, system) = std::mem::take(&mut self.before_ns);
        let used = user.saturating_add(system);
        let room = passed_ns.saturating_mul(self.visible as u64).saturating_sub(busy_ns.iter().sum());
        let fits = u128::from(used.min(room));
        let user_fits = (u128::from(user) * fits).checked_div(u128::from(used)).unwrap_or(0);
        let [user_here, system_here] = [user_fits, fits - user_fits].map(|part| part as u64);
        for (index, busy_ns) in busy_ns.iter_mut().enumerate() {
            let [user, system] = [user_here, system_here].map(|part| share(part, index, self.visible));
            *busy_ns = busy_ns.saturating_add(self.cpus[index].charge(user, 0, system));
        }
        self.elsewhere.charge(user - user_here, 0, system.saturating_sub(system_here));
    }

    /// Adds the busy time since the last answer, exactly where the kernel says which CPU it was and that CPU
    /// is visible, evenly over the visible ones otherwise.
    fn add_busy(&mut self, cpus: &Cpus, before: &Busy, busy_ns: &mut [u64]) {
        let (mut user, mut nice, mut system) = (0u64, 0u64, 0u64);
        let mut charge = |index: usize, user, nice, system| {
            busy_ns[index] = busy_ns[index].saturating_add(self.cpus[index].charge(user, nice, system));
        };
        match &self.last.busy {
            Busy::Total { user_ns, nice_ns, system_ns } => {
                let (user_before, nice_before, system_before) = before.total();
                user = user_ns.saturating_sub(user_before);
                nice = nice_ns.saturating_sub(nice_before);
                system = system_ns.saturating_sub(system_before);
            }
            Busy::PerCpu(physical) => {
                // Under a quota the visible CPUs are not particular ones of the host.
                let exact = cpus.set.len() == self.visible;
                for now in physical {
                    let (user_before, system_before) = before.of_cpu(now.number);
                    let user_delta = now.user_ns.saturating_sub(user_before);
                    let system_delta = now.system_ns.saturating_sub(system_before);
                    match cpus.set.binary_search(&now.number) {
                        Ok(index) if exact => charge(index, user_delta, 0, system_delta),
                        _ => {
                            user = user.saturating_add(user_delta);
                            system = system.saturating_add(system_delta);
                        }
                    }
                }
            }
        }
        for index in 0..self.visible {
            let parts = [user, nice, system].map(|part| share(part, index, self.visible));
            charge(index, parts[0], parts[1], parts[2]);
        }
    }
}

/// The part of `total` that goes to CPU `index` of `count`; the parts add up to `total`.
fn share(total: u64, index: usize, count: usize) -> u64 {
    let (count, index) = (count as u64, index as u64);
    total / count + u64::from(index < total % count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::PhysicalCpu;

    const S: u64 = 1_000_000_000;

    fn cpus(set: &[u32], visible: usize) -> Cpus {
        Cpus { set: set.to_vec(), visible }
    }

    fn total(user: u64, system: u64, throttled: u64) -> CpuTimes {
        CpuTimes { busy: Busy::Total { user_ns: user, nice_ns: 0, system_ns: system }, throttled_ns: throttled }
    }

    #[test]
    fn a_total_is_divided_evenly_and_adds_up() {
        let mut accounts = Accounts::default();
        accounts.advance(10 * S, &cpus(&[0, 1], 2), &total(5 * S + 1, 3 * S, 0));
        let sum: u64 = accounts.visible().iter().map(|cpu| cpu.user_ns).sum();
        assert_eq!(sum, 5 * S + 1);
        assert_eq!(accounts.idle_ns(), 20 * S - 8 * S - 1);
    }

    #[test]
    fn a_cpu_of_the_set_keeps_its_own_time() {
        let times = CpuTimes {
            busy: Busy::PerCpu(vec![
                PhysicalCpu { number: 0, user_ns: 0, system_ns: 0 },
                PhysicalCpu { number: 3, user_ns: 4 * S, system_ns: S },
            ]),
            throttled_ns: 0,
        };
        let mut accounts = Accounts::default();
        accounts.advance(10 * S, &cpus(&[1, 3], 2), &times);
        assert_eq!(accounts.visible()[0].idle_ns, 10 * S);
        assert_eq!(accounts.visible()[1].user_ns, 4 * S);
        assert_eq!(accounts.visible()[1].idle_ns, 5 * S);
    }

    #[test]
    fn what_was_used_before_the_kernel_counted_is_counted_once() {
        let mut accounts = Accounts::after(3 * S + 1, S);
        accounts.advance(10 * S, &cpus(&[0, 1], 2), &total(S, 0, 0));
        accounts.advance(11 * S, &cpus(&[0, 1], 2), &total(S, 0, 0));
        let sum = |part: fn(&CpuAccount) -> u64| accounts.visible().iter().map(part).sum::<u64>();
        assert_eq!((sum(|cpu| cpu.user_ns), sum(|cpu| cpu.system_ns)), (4 * S + 1, S));
        assert_eq!(accounts.idle_ns(), 22 * S - 5 * S - 1);
    }

    #[test]
    fn what_was_used_on_more_cpus_leaves_the_visible_ones_idle() {
        let mut accounts = Accounts::after(30 * S, 10 * S);
        accounts.advance(10 * S, &cpus(&[0, 1], 2), &total(S, 0, 0));
        let sum = |accounts: &Accounts| accounts.all().map(|cpu| cpu.user_ns + cpu.system_ns).sum::<u64>();
        assert_eq!((sum(&accounts), accounts.idle_ns()), (41 * S, 0));
        accounts.advance(12 * S, &cpus(&[0, 1], 2), &total(2 * S, 0, 0));
        assert_eq!((sum(&accounts), accounts.idle_ns()), (42 * S, 3 * S));
    }

    #[test]
    fn throttled_time_is_steal_but_never_more_than_passed() {
        let mut accounts = Accounts::default();
        accounts.advance(10 * S, &cpus(&[0, 1], 1), &total(6 * S, 0, 10 * S));
        assert_eq!(accounts.visible()[0].steal_ns, 4 * S);
        assert_eq!(accounts.visible()[0].idle_ns, 0);
    }

    #[test]
    fn fewer_and_more_cpus_never_turn_a_counter_back() {
        let mut accounts = Accounts::default();
        accounts.advance(10 * S, &cpus(&[0, 1], 2), &total(10 * S, 0, 0));
        let before: Vec<_> = accounts.all().cloned().collect();
        accounts.advance(11 * S, &cpus(&[0, 1], 1), &total(10 * S, 0, 0));
        assert_eq!(accounts.visible().len(), 1);
        assert_eq!(accounts.visible()[0].idle_ns, before[0].idle_ns + S);
        accounts.advance(12 * S, &cpus(&[0, 1], 2), &total(11 * S, 0, 0));
        for (now, then) in accounts.all().zip(&before) {
            assert!(now.user_ns >= then.user_ns && now.idle_ns >= then.idle_ns);
        }
    }
}
