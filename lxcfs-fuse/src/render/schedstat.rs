//! `/proc/schedstat`: how long each visible CPU ran the server's tasks, and had them wait for their quota.

use super::put;
use crate::account::Accounts;

/// Renders schedstat; `version` is the number of the kernel's format, `up_ns` the time since the server's start.
///
/// Calls of the scheduler are not counted by cgroup: 0. Domains, which follow each CPU, tell how the host balances its own
/// CPUs: none, as on a machine with one CPU.
pub fn schedstat(out: &mut String, version: u64, accounts: &Accounts, up_ns: u64) {
    // The kernel's jiffies have no fixed length; ticks are what user space knows.
    put!(out, "version {version}\ntimestamp {}\n", up_ns / 10_000_000);
    for (number, cpu) in accounts.visible().iter().enumerate() {
        let ran_ns = cpu.user_ns.saturating_add(cpu.nice_ns).saturating_add(cpu.system_ns);
        put!(out, "cpu{number} 0 0 0 0 0 0 {ran_ns} {} 0\n", cpu.steal_ns);
    }
}
