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
pub use host::{Host, HostMemory};
pub use memory::{Memory, MemoryEvents, MemoryStat};

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
                        Some(mine) => {
                            mine.user_ns = mine.user_ns.max(cpu.user_ns);
                            mine.system_ns = mine.system_ns.max(cpu.system_ns);
                        }
                        None => mine.push(*cpu),
                    }
                }
            }
            (mine, theirs) => *mine = theirs.clone(),
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

/// A resource whose pressure is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is what its name says")]
pub enum Resource {
    Cpu,
    Memory,
    Io,
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

    /// The host's cpuinfo.
    pub fn host_cpuinfo(&self) -> Result<Arc<String>, Unreadable> {
        Ok(self.host.cpuinfo(self.now)?)
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
            cgroup::CpuTime::V1 { usage_all, stat, throttling, .. } => {
                let busy = match usage_all.read(parse::usage_all)? {
                    Some(per_cpu) => Busy::PerCpu(per_cpu),
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

    /// The text of a `*.pressure` file; `None` where there is no cgroup v2, or the kernel counts no pressure.
    pub fn pressure(&self, resource: Resource) -> Result<Option<String>, Unreadable> {
        let Some(sources) = &self.files.pressure else {
            return Ok(None);
        };
        match sources[resource as usize].read(str::to_owned) {
            // Opened or read with `psi=0`.
            Err(Unreadable::Io(error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
            other => other,
        }
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
