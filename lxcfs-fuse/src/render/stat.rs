//! `/proc/stat`: the CPU lines of the visible CPUs, and the rest as far as it is the server's own.

use super::put;
use crate::account::{Accounts, CpuAccount};
use crate::load::Tasks;

/// Nanoseconds of a tick of `/proc/stat` (`USER_HZ`, 100 on every architecture served).
const TICK_NS: u64 = 10_000_000;

/// What `/proc/stat` is made of.
#[derive(Debug)]
pub struct Stat<'a> {
    /// CPU time.
    pub accounts: &'a Accounts,
    /// When the server started, in seconds since 1970.
    pub started_s: u64,
    /// The states of its tasks.
    pub tasks: Tasks,
}

/// Renders stat.
pub fn stat(out: &mut String, stat: &Stat<'_>) {
    let mut sum = Ticks::default();
    for account in stat.accounts.all() {
        sum.add(&Ticks::of(account));
    }
    sum.put(out, "cpu ");
    for (number, account) in stat.accounts.visible().iter().enumerate() {
        put!(out, "cpu{number}");
        Ticks::of(account).put(out, "");
    }
    // Interrupts, context switches, forks and softirqs are not counted by cgroup; the host's are not the server's.
    out.push_str("intr 0\nctxt 0\n");
    put!(out, "btime {}\nprocesses 0\n", stat.started_s);
    // Whoever reads this runs.
    put!(out, "procs_running {}\nprocs_blocked {}\n", stat.tasks.running.max(1), stat.tasks.blocked);
    out.push_str("softirq 0 0 0 0 0 0 0 0 0 0 0\n");
}

/// One CPU line. The sum line is the sum of rounded lines, so that they add up for who checks.
#[derive(Default)]
struct Ticks {
    user: u64,
    nice: u64,
    system: u64,
    idle: u64,
    steal: u64,
}

impl Ticks {
    fn of(account: &CpuAccount) -> Ticks {
        Ticks {
            user: account.user_ns / TICK_NS,
            nice: account.nice_ns / TICK_NS,
            system: account.system_ns / TICK_NS,
            idle: account.idle_ns / TICK_NS,
            steal: account.steal_ns / TICK_NS,
        }
    }

    fn add(&mut self, other: &Ticks) {
        self.user += other.user;
        self.nice += other.nice;
        self.system += other.system;
        self.idle += other.idle;
        self.steal += other.steal;
    }

    /// user nice system idle iowait irq softirq steal guest guest_nice. No waiting for I/O is told apart from
    /// idle, interrupts belong to the host, and a server is not known to run guests of its own.
    fn put(&self, out: &mut String, name: &str) {
        put!(out, "{name} {} {} {} {} 0 0 0 {} 0 0\n", self.user, self.nice, self.system, self.idle, self.steal);
    }
}
