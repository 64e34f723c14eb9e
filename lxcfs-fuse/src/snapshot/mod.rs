//! The only reader: what the host and one server's cgroups say at this moment, as plain values.
//!
//! A [`Snapshot`] is taken for one answer and reads only what that answer needs. Roots are parameters (the
//! host's `/`, the registration's directories), so a captured tree does as well as a kernel.

mod cgroup;
mod host;
mod memory;
pub mod parse;

use std::io;
use std::path::Path;
use std::sync::Arc;

pub use cgroup::Files;
pub use host::{DiskSizes, Host, HostMemory};
pub use memory::{Memory, MemoryEvents, MemoryStat};
pub use parse::CpuBlock;

use crate::clock::Now;
use crate::load::Tasks;

/// How many subgroups of a server are searched for tasks; more than any init system makes.
const GROUPS_MAX: usize = 4096;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// The server's cgroup was removed.
    #[error("the server is gone")]
    Gone,
    /// A file cannot be read; what the kernel said.
    #[error("read the kernel's statistics")]
    Io(#[source] io::Error),
}

impl From<io::Error> for Unreadable {
    fn from(error: io::Error) -> Unreadable {
        // ENODEV: kernfs's answer for an open file of a removed cgroup.
        if error.raw_os_error() == Some(libc::ENODEV) { Unreadable::Gone } else { Unreadable::Io(error) }
    }
}

/// The CPUs of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpus {
    /// Numbers of the host's CPUs it may run on, ascending.
    pub set: Vec<u32>,
    /// How many it sees, numbered from 0: the size of the set, or its quota rounded up if that is less.
    pub visible: usize,
}

impl Cpus {
    /// The host's numbers of the CPUs that are shown: the first ones of the set, in the order of the server's numbers.
    pub fn visible(&self) -> &[u32] {
        &self.set[..self.visible.min(self.set.len())]
    }
}

/// The CPU time of one of the host's CPUs, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhysicalCpu {
    /// The host's number of it.
    pub number: u32,
    /// Time in user mode.
    pub user_ns: u64,
    /// Time in the kernel.
    pub system_ns: u64,
}

impl PhysicalCpu {
    /// Divides the time that it `ran` as user and system time are now divided.
    ///
    /// v1's `cpuacct.usage_all` counts a whole tick of the clock for whoever runs when it comes. A quota ends turns
    /// with ticks, so that more than a third too much was seen; `cpuacct.usage_percpu` is exact (cpuacct.c).
    fn divide(&mut self, ran_ns: u64) {
        let sampled = u128::from(self.user_ns) + u128::from(self.system_ns);
        let system = (u128::from(ran_ns) * u128::from(self.system_ns)).checked_div(sampled).unwrap_or(0);
        self.system_ns = u64::try_from(system).unwrap_or(ran_ns);
        self.user_ns = ran_ns - self.system_ns;
    }

    /// Raises both to those of `later`, and their sum to no more than its sum while neither steps back.
    ///
    /// How the time is divided is an estimate that changes either way, and the sum is not (as cputime_adjust()).
    fn raise_to(&mut self, later: &PhysicalCpu) {
        let ran_ns = later.user_ns.saturating_add(later.system_ns);
        let system_ns = self.system_ns.max(later.system_ns);
        self.user_ns = self.user_ns.max(ran_ns.saturating_sub(system_ns));
        self.system_ns = self.system_ns.max(ran_ns.saturating_sub(self.user_ns));
    }
}

/// Busy time since the cgroup was made, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Busy {
    /// By CPU (cgroup v1).
    PerCpu(Vec<PhysicalCpu>),
    /// Only a sum (cgroup v2).
    Total {
        /// In user mode, without niced time.
        user_ns: u64,
        /// In user mode at a low priority.
        nice_ns: u64,
        /// In the kernel.
        system_ns: u64,
    },
}

impl Default for Busy {
    fn default() -> Busy {
        Busy::Total { user_ns: 0, nice_ns: 0, system_ns: 0 }
    }
}

impl Busy {
    /// User, nice and system time of all CPUs.
    pub fn total(&self) -> (u64, u64, u64) {
        match self {
            Busy::Total { user_ns, nice_ns, system_ns } => (*user_ns, *nice_ns, *system_ns),
            Busy::PerCpu(cpus) => cpus.iter().fold((0, 0, 0), |(user, nice, system), cpu| {
                (cpu.user_ns.saturating_add(user), nice, cpu.system_ns.saturating_add(system))
            }),
        }
    }

    /// User and system time of one of the host's CPUs; 0 where only the sum is known.
    pub fn of_cpu(&self, number: u32) -> (u64, u64) {
        let Busy::PerCpu(cpus) = self else {
            return (0, 0);
        };
        let found = cpus.iter().find(|cpu| cpu.number == number);
        found.map_or((0, 0), |cpu| (cpu.user_ns, cpu.system_ns))
    }
}

/// CPU time of a server since its cgroup was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuTimes {
    /// Time on a CPU.
    pub busy: Busy,
    /// Time that a quota kept its tasks from running, summed over the host's CPUs.
    pub throttled_ns: u64,
}

impl CpuTimes {
    /// Raises every counter to that of `later`, where that is higher.
    pub fn raise_to(&mut self, later: &CpuTimes) {
        self.throttled_ns = self.throttled_ns.max(later.throttled_ns);
        match (&mut self.busy, &later.busy) {
            (
                Busy::Total { user_ns, nice_ns, system_ns },
                Busy::Total { user_ns: user, nice_ns: nice, system_ns: system },
            ) => {
                *user_ns = (*user_ns).max(*user);
                *nice_ns = (*nice_ns).max(*nice);
                *system_ns = (*system_ns).max(*system);
            }
            (Busy::PerCpu(mine), Busy::PerCpu(theirs)) => {
                for cpu in theirs {
                    match mine.iter_mut().find(|mine| mine.number == cpu.number) {
                        Some(mine) => mine.raise_to(cpu),
                        None => mine.push(*cpu),
                    }
                }
            }
            (mine, theirs) => *mine = theirs.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(user_ns: u64, system_ns: u64) -> PhysicalCpu {
        PhysicalCpu { number: 0, user_ns, system_ns }
    }

    #[test]
    fn samples_only_divide_what_ran() {
        for (sampled, ran_ns, divided) in [
            (cpu(400, 0), 300, cpu(300, 0)),
            (cpu(300, 100), 200, cpu(150, 50)),
            (cpu(0, 0), 7, cpu(7, 0)),
            (cpu(u64::MAX, u64::MAX), u64::MAX, cpu(u64::MAX / 2 + 1, u64::MAX / 2)),
        ] {
            let mut shown = sampled;
            shown.divide(ran_ns);
            assert_eq!(shown, divided, "{sampled:?} of {ran_ns}");
        }
    }

    #[test]
    fn a_division_that_changes_moves_no_counter_back_and_keeps_the_sum() {
        let mut shown = cpu(100, 50);
        for (later, raised) in [
            (cpu(90, 70), cpu(100, 60)),
            (cpu(130, 40), cpu(110, 60)),
            (cpu(110, 60), cpu(110, 60)),
            (cpu(10, 20), cpu(110, 60)),
            (cpu(110, 90), cpu(110, 90)),
        ] {
            shown.raise_to(&later);
            assert_eq!(shown, raised, "{later:?}");
        }
    }
}

/// I/O of a server on one block device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each field is what its name says")]
pub struct Disk {
    pub major: u32,
    pub minor: u32,
    pub name: String,
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub discards: u64,
    pub discarded_bytes: u64,
}

/// The host and one server's cgroup files at one instant.
#[derive(Debug)]
pub struct Snapshot<'a> {
    host: &'a Host,
    files: &'a Files,
    now: Now,
}

impl<'a> Snapshot<'a> {
    /// A snapshot for one answer; reads nothing yet.
    pub fn new(host: &'a Host, files: &'a Files, now: Now) -> Snapshot<'a> {
        Snapshot { host, files, now }
    }

    /// The instant it stands for.
    pub fn now(&self) -> Now {
        self.now
    }

    /// Names and totals of the host's meminfo.
    pub fn host_memory(&self) -> Result<Arc<HostMemory>, Unreadable> {
        Ok(self.host.memory(self.now)?)
    }

    /// The blocks of the host's cpuinfo.
    pub fn host_cpuinfo(&self) -> Result<Arc<Vec<CpuBlock>>, Unreadable> {
        Ok(self.host.cpuinfo(self.now)?)
    }

    /// Sizes of the host's block devices by number, in blocks of 1 KiB.
    pub fn disk_sizes(&self) -> Result<Arc<DiskSizes>, Unreadable> {
        Ok(self.host.disk_sizes(self.now)?)
    }

    /// The version of the kernel's schedstat.
    pub fn schedstat_version(&self) -> u64 {
        self.host.schedstat_version()
    }

    /// A file of the host as it is now, by its path without a leading slash.
    pub fn host_text(&self, path: &str) -> Result<String, Unreadable> {
        self.host.text(path).map_err(Unreadable::Io)
    }

    /// Whether the host has something at a path.
    pub fn host_has(&self, path: &str) -> Result<bool, Unreadable> {
        Ok(self.host.has(path)?)
    }

    /// The names of the lines of the host's vmstat.
    pub fn vmstat_names(&self) -> Result<&'a [String], Unreadable> {
        Ok(self.host.vmstat_names()?)
    }

    /// The server's CPUs.
    pub fn cpus(&self) -> Result<Cpus, Unreadable> {
        let set = match &self.files.cpuset {
            Some(source) => source.read(parse::cpu_list)?.unwrap_or_default(),
            None => Vec::new(),
        };
        // A set with no CPU in it cannot run anything: no information rather than a machine without CPUs.
        let set = if set.is_empty() { self.host.online(self.now)?.to_vec() } else { set };
        let set = if set.is_empty() { vec![0] } else { set };
        let quota = self.quota_cpus()?.unwrap_or(u64::MAX);
        let visible = set.len().min(usize::try_from(quota).unwrap_or(usize::MAX)).max(1);
        Ok(Cpus { set, visible })
    }

    /// The tightest quota up the tree, in whole CPUs.
    fn quota_cpus(&self) -> Result<Option<u64>, Unreadable> {
        let mut tightest: Option<u64> = None;
        let mut tighten = |found: Option<u64>| {
            if let Some(found) = found {
                tightest = Some(tightest.map_or(found, |known| known.min(found)));
            }
        };
        match &self.files.quota {
            cgroup::Quota::V1(levels) => {
                for (quota, period) in levels {
                    // -1, which is no number here, means that there is none.
                    let Some(quota) = quota.read(parse::number)?.flatten() else {
                        continue;
                    };
                    let period = period.read(parse::number)?.flatten().unwrap_or(100_000);
                    tighten(parse::cpus_of(quota, period));
                }
            }
            cgroup::Quota::V2(levels) => {
                for level in levels {
                    tighten(level.read(parse::quota_cpus)?.flatten());
                }
            }
        }
        Ok(tightest)
    }

    /// The server's CPU time.
    pub fn cpu_times(&self) -> Result<CpuTimes, Unreadable> {
        match &self.files.cpu_time {
            cgroup::CpuTime::V1 { usage_percpu, usage_all, stat, throttling, .. } => {
                let busy = match usage_all.read(parse::usage_all)? {
                    Some(mut cpus) => {
                        usage_percpu.read(|text| {
                            cpus.iter_mut().zip(parse::usage_percpu(text)).for_each(|(cpu, ran_ns)| cpu.divide(ran_ns));
                        })?;
                        Busy::PerCpu(cpus)
                    }
                    None => stat.read(busy_of_cpuacct_stat)?.unwrap_or_default(),
                };
                let throttled_ns = match throttling {
                    Some(source) => source.read(|text| parse::value(text, "throttled_time"))?.flatten(),
                    None => None,
                };
                Ok(CpuTimes { busy, throttled_ns: throttled_ns.unwrap_or(0) })
            }
            cgroup::CpuTime::V2 { stat } => Ok(stat.read(times_of_cpu_stat)?.unwrap_or_default()),
            cgroup::CpuTime::Uncounted => Ok(CpuTimes::default()),
        }
    }

    /// The server's precise CPU time, for telling whether anything ran: cheaper than [`Snapshot::cpu_times`].
    pub fn busy_ns(&self) -> Result<Option<u64>, Unreadable> {
        match &self.files.cpu_time {
            cgroup::CpuTime::V1 { usage, .. } => Ok(usage.read(parse::number)?.flatten()),
            cgroup::CpuTime::V2 { stat } => {
                let usec = stat.read(|text| parse::value(text, "usage_usec"))?.flatten();
                Ok(usec.map(|usec| usec.saturating_mul(1000)))
            }
            cgroup::CpuTime::Uncounted => Ok(None),
        }
    }

    /// The server's I/O, by device, in the host's order of devices; a device without a name now is left out.
    pub fn disks(&self) -> Result<Vec<Disk>, Unreadable> {
        let mut used = match &self.files.io {
            cgroup::Io::V1 { bytes, operations } => {
                let bytes = bytes.read(str::to_owned)?.unwrap_or_default();
                operations.read(|operations| parse::blkio(&bytes, operations))?.unwrap_or_default()
            }
            cgroup::Io::V2 { stat } => stat.read(parse::io_stat)?.unwrap_or_default(),
            cgroup::Io::Uncounted => Vec::new(),
        };
        if used.is_empty() {
            return Ok(used);
        }
        let mut disks = Vec::with_capacity(used.len());
        for (major, minor, name) in self.host.disks(self.now)?.iter() {
            if let Some(index) = used.iter().position(|disk| (disk.major, disk.minor) == (*major, *minor)) {
                disks.push(Disk { name: name.clone(), ..used.swap_remove(index) });
            }
        }
        Ok(disks)
    }

    /// How many control groups the server has, its own root included.
    pub fn group_count(&self) -> Result<u64, Unreadable> {
        let below = match &self.files.groups {
            Some(source) => source.read(|text| parse::value(text, "nr_descendants"))?.flatten(),
            None => None,
        };
        Ok(below.unwrap_or(0).saturating_add(1))
    }

    /// How many tasks the server has; 0 if that is not counted.
    pub fn task_count(&self) -> Result<u64, Unreadable> {
        match &self.files.pids {
            Some(source) => Ok(source.read(parse::number)?.flatten().unwrap_or(0)),
            None => Ok(0),
        }
    }

    /// The states of the server's tasks, without `reader`: it waits for our answer, but is running to itself.
    ///
    /// Opens one file per thread: not for every answer (see `load`).
    pub fn tasks(&self, reader: Option<u32>) -> Tasks {
        let mut tasks = Tasks::default();
        let Some((directory, list)) = &self.files.tasks else {
            return tasks;
        };
        for_each_thread(directory, list, &mut |thread| {
            if Some(thread) == reader {
                return;
            }
            match self.host.task_state(thread) {
                Some('R') => tasks.running += 1,
                Some('D') => tasks.blocked += 1,
                _ => {}
            }
        });
        tasks
    }
}

/// Calls `each` for every thread of a group and the groups below it. What ends meanwhile is passed over.
fn for_each_thread(directory: &Path, list: &str, each: &mut dyn FnMut(u32)) {
    let mut groups = vec![directory.to_owned()];
    let mut seen = 0;
    while let Some(group) = groups.pop() {
        seen += 1;
        if let Ok(text) = std::fs::read_to_string(group.join(list)) {
            text.lines().filter_map(|line| line.parse().ok()).for_each(&mut *each);
        }
        if seen + groups.len() >= GROUPS_MAX {
            continue;
        }
        let Ok(entries) = std::fs::read_dir(&group) else {
            continue;
        };
        let children = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        groups.extend(children.map(|entry| entry.path()));
    }
}

/// `cpuacct.stat`: user and system time in ticks of 10 ms (`USER_HZ` is 100 on every architecture served).
fn busy_of_cpuacct_stat(text: &str) -> Busy {
    let ticks = |key| parse::value(text, key).unwrap_or(0).saturating_mul(10_000_000);
    Busy::Total { user_ns: ticks("user"), nice_ns: 0, system_ns: ticks("system") }
}

/// `cpu.stat` of v2, in microseconds. Its user time includes niced time, as the kernel's `utime` does.
fn times_of_cpu_stat(text: &str) -> CpuTimes {
    let (mut user, mut nice, mut system, mut throttled) = (0u64, 0u64, 0u64, 0u64);
    for (key, usec) in parse::pairs(text) {
        match key {
            "user_usec" => user = usec,
            "nice_usec" => nice = usec,
            "system_usec" => system = usec,
            "throttled_usec" => throttled = usec,
            _ => {}
        }
    }
    let ns = |usec: u64| usec.saturating_mul(1000);
    let busy =
        Busy::Total { user_ns: ns(user.saturating_sub(nice)), nice_ns: ns(nice.min(user)), system_ns: ns(system) };
    CpuTimes { busy, throttled_ns: ns(throttled) }
}
