//! What can be seen of servers now: state, limits, use, addresses. Changes nothing.
//!
//! Each fact is read when it is asked for and kept: a list of a thousand servers reads only what its columns show.

use std::cell::OnceCell;
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Result, anyhow};
use ipnet::IpNet;
use kernel::cgroup::{CpuSet, Usage};
use net::Netlink;
use serde::Serialize;

use crate::lifecycle::journal;
use crate::lifecycle::network::NetworkStep;
use crate::lifecycle::state::{self, State};
use crate::lifecycle::step::Step;
use crate::lifecycle::view::age_ns;
use crate::lifecycle::world::World;
use crate::monitor;
use crate::name::Name;
use crate::site::Site;
use crate::store::{self, Server};

/// One server, looked at piece by piece.
#[derive(Debug)]
pub struct Seen<'a> {
    world: &'a World<'a>,
    /// Its name.
    pub name: Name,
    /// Its state when it was first looked at.
    pub state: State,
    status: OnceCell<Option<state::Status>>,
    server: OnceCell<Result<Server>>,
    usage: OnceCell<Option<Usage>>,
    addresses: OnceCell<Vec<IpNet>>,
}

impl<'a> Seen<'a> {
    /// Looks at a server's state, and gives a running one that has lost its monitor another.
    ///
    /// # Errors
    /// When the state cannot be known.
    pub fn look(world: &'a World<'a>, name: Name) -> Result<Self> {
        let state = state::of(world.site, &name)?;
        if matches!(state, State::Running | State::Frozen) {
            tend(world.site, &name);
        }
        Ok(Self::in_state(world, name, state))
    }

    /// Looks at a server that has nothing in the runtime directory, as a listing of that has shown.
    pub fn look_down(world: &'a World<'a>, name: Name) -> Self {
        let state = match store::record_file(world.site, &name).exists() {
            false => State::Incomplete,
            true => match store::migration(world.site, &name) {
                Ok(Some(migration)) => State::of_side(migration.side),
                // Nothing starts it, and who looks closer is told why.
                Err(_) => State::Incomplete,
                Ok(None) if state::suspended_directory(world.site, &name).exists() => State::Suspended,
                Ok(None) => State::Stopped,
            },
        };
        Self::in_state(world, name, state)
    }

    fn in_state(world: &'a World<'a>, name: Name, state: State) -> Self {
        Self {
            world,
            name,
            state,
            status: OnceCell::new(),
            server: OnceCell::new(),
            usage: OnceCell::new(),
            addresses: OnceCell::new(),
        }
    }

    /// Its running init.
    pub fn status(&self) -> Option<&state::Status> {
        // What cannot be read is a column without a value: nothing is done because of it.
        let read = || self.state.is_up().then(|| state::status(self.world.site, &self.name).ok()?).flatten();
        self.status.get_or_init(read).as_ref()
    }

    /// Its spec and record.
    ///
    /// # Errors
    /// Why they cannot be used.
    pub fn server(&self) -> Result<&Server, &anyhow::Error> {
        self.server.get_or_init(|| store::load(self.world.site, &self.name)).as_ref()
    }

    /// What went wrong when its spec or record was read, if they were.
    pub fn problem(&self) -> Option<&anyhow::Error> {
        self.server.get()?.as_ref().err()
    }

    /// Its spec and record; what is wrong with them is told by [`Seen::problem`].
    pub fn defined(&self) -> Option<&Server> {
        self.server().ok()
    }

    /// What it uses, while it is up.
    pub fn usage(&self) -> Option<&Usage> {
        let read = || {
            let group = self.world.group(&self.world.site.server_cgroup(&self.name)).ok()?;
            self.state.is_up().then(|| group.usage().ok()).flatten()
        };
        self.usage.get_or_init(read).as_ref()
    }

    /// Processor time that it has used since its start, in microseconds: also what it used elsewhere, or before it was suspended.
    pub fn cpu_usec(&self) -> Option<u64> {
        Some(self.usage()?.cpu_usec.saturating_add(self.status()?.cpu_before.sum_usec()))
    }

    /// Init's pid on the host.
    pub fn pid(&self) -> Option<i32> {
        Some(self.status()?.pid)
    }

    /// Seconds since its init started.
    pub fn uptime_s(&self) -> Option<u64> {
        Some(age_ns(self.status()?.started_boottime_ns) / 1_000_000_000)
    }

    /// Its addresses: those that it was started with, else those that it would be.
    pub fn addresses(&self) -> &[IpNet] {
        self.addresses.get_or_init(|| {
            let started = self.state.is_up().then(|| started_with(self.world.site, &self.name)).flatten();
            started.or_else(|| Some(self.defined()?.addresses().to_vec())).unwrap_or_default()
        })
    }

    /// Its limit of memory: the kernel's while it is up, else the spec's.
    pub fn memory_limit_bytes(&self) -> Option<u64> {
        match self.usage() {
            Some(usage) => usage.memory_limit_bytes,
            None => Some(self.defined()?.spec.memory?.0),
        }
    }

    /// How many CPUs it may use: its quota, else its set, else all.
    pub fn cpus(&self) -> Option<f64> {
        let spec = &self.defined()?.spec;
        let set = || spec.cpuset.as_ref().map(CpuSet::len).or_else(online_cpus);
        spec.cpus.map(|cpus| cpus.0).or_else(|| Some(set()? as f64))
    }

    /// What scripts want to know of it.
    ///
    /// # Errors
    /// When its spec or record cannot be used.
    pub fn report(&self) -> Result<Report> {
        let Ok(server) = self.server() else {
            // Read once more, for an error that can be given away.
            let error = store::load(self.world.site, &self.name).err();
            return Err(error.unwrap_or_else(|| anyhow!("'{}' was changed while it was read", self.name)));
        };
        let usage = self.usage();
        Ok(Report {
            name: self.name.clone(),
            id: server.record.id,
            state: self.state,
            pid: self.pid(),
            uptime_s: self.uptime_s(),
            hostname: server.spec.hostname_or(&self.name),
            template: server.spec.template.clone(),
            addresses: self.addresses().to_vec(),
            memory: MemoryReport {
                usage_bytes: usage.map(|usage| usage.memory_bytes),
                limit_bytes: self.memory_limit_bytes(),
                swap_usage_bytes: usage.map(|usage| usage.swap_bytes),
                swap_limit_bytes: match usage {
                    Some(usage) => usage.swap_limit_bytes,
                    None => server.spec.swap.map(|swap| swap.0),
                },
            },
            cpus: self.cpus(),
            cpu_usage_usec: self.cpu_usec(),
            tasks: usage.map(|usage| usage.tasks),
            tasks_limit: usage.map_or(server.spec.pids.map(|pids| pids.0), |usage| usage.pids_limit),
            autostart: server.spec.autostart,
        })
    }
}

/// Fewer servers than this are read faster by one thread.
const WORTH_THREADS: usize = 128;

/// Reads the specs and records of many servers at once, on all CPUs, for columns that need them.
pub fn load_all(seen: &[Seen<'_>]) {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    let Some(site) = seen.first().map(|first| first.world.site) else { return };
    if seen.len() < WORTH_THREADS || workers < 2 {
        return;
    }
    let parts = seen.chunks(seen.len().div_ceil(workers));
    let names: Vec<Vec<&Name>> = parts.clone().map(|part| part.iter().map(|seen| &seen.name).collect()).collect();
    std::thread::scope(|scope| {
        let load = |names: Vec<&Name>| names.into_iter().map(|name| store::load(site, name)).collect::<Vec<_>>();
        let threads: Vec<_> = names.into_iter().map(|names| scope.spawn(move || load(names))).collect();
        for (part, thread) in parts.zip(threads) {
            // What a thread could not read is read when it is asked for.
            for (seen, server) in part.iter().zip(thread.join().unwrap_or_default()) {
                let _ = seen.server.set(server);
            }
        }
    });
}

/// How many CPUs the host has; read once.
fn online_cpus() -> Option<usize> {
    static COUNT: OnceLock<Option<usize>> = OnceLock::new();
    *COUNT.get_or_init(|| Some(CpuSet::online().ok()?.len()))
}

/// Puts a monitor beside a running server whose own one died.
pub fn tend(site: &Site, name: &Name) {
    let adopted = match monitor::is_alive(site, name) {
        Ok(true) => return,
        Ok(false) => monitor::adopt(site, name),
        Err(error) => Err(error),
    };
    if let Err(error) = adopted {
        log::warn!("'{name}' has no monitor, and none can be made: {error:#}");
    }
}

/// The addresses that a running server's link is bound to: its spec may have been changed since.
fn started_with(site: &Site, name: &Name) -> Option<Vec<IpNet>> {
    let steps = journal::standing(&state::journal_file(site, name)).ok()?;
    steps.into_iter().find_map(|step| match step {
        Step::Network(NetworkStep::Configure { addresses, .. }) => Some(addresses),
        _ => None,
    })
}

/// One server for scripts: the keys of `vsctl status --json`.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Its name.
    pub name: Name,
    /// Its number.
    pub id: u32,
    /// Its state.
    pub state: State,
    /// Init's pid on the host.
    pub pid: Option<i32>,
    /// Seconds since its start.
    pub uptime_s: Option<u64>,
    /// Host name inside.
    pub hostname: String,
    /// The template it was made from.
    pub template: Name,
    /// Addresses of eth0.
    pub addresses: Vec<IpNet>,
    /// Memory.
    pub memory: MemoryReport,
    /// CPUs that it may use.
    pub cpus: Option<f64>,
    /// Processor time used since its start.
    pub cpu_usage_usec: Option<u64>,
    /// Processes and threads.
    pub tasks: Option<u64>,
    /// Their limit.
    pub tasks_limit: Option<u64>,
    /// Whether it starts with the host.
    pub autostart: bool,
}

/// Memory of one server, for scripts.
#[derive(Debug, Clone, Serialize)]
pub struct MemoryReport {
    /// In use.
    pub usage_bytes: Option<u64>,
    /// Limit.
    pub limit_bytes: Option<u64>,
    /// Swap in use.
    pub swap_usage_bytes: Option<u64>,
    /// Limit of swap.
    pub swap_limit_bytes: Option<u64>,
}

/// Counters of all servers that are up, at one moment.
#[derive(Debug)]
pub struct Sample {
    taken: Instant,
    servers: Vec<Measured>,
}

#[derive(Debug, Clone)]
struct Measured {
    name: Name,
    state: State,
    started_ns: i64,
    uptime_s: u64,
    usage: Usage,
    /// Seen from inside: what the server received and sent.
    received_bytes: u64,
    sent_bytes: u64,
}

/// What one server does: counters as rates.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Load {
    /// Its name.
    pub name: Name,
    /// Its state.
    pub state: State,
    /// CPU time per time, in hundredths of one CPU.
    pub cpu_percent: f64,
    /// Memory in use.
    pub memory_bytes: u64,
    /// Its limit.
    pub memory_limit_bytes: Option<u64>,
    /// Processes and threads.
    pub tasks: u64,
    /// Read from disks, per second.
    pub read_bytes_s: f64,
    /// Written to disks, per second.
    pub write_bytes_s: f64,
    /// Received, per second.
    pub received_bytes_s: f64,
    /// Sent, per second.
    pub sent_bytes_s: f64,
    /// Seconds since its start.
    pub uptime_s: u64,
}

impl Sample {
    /// Reads the counters now.
    ///
    /// # Errors
    /// When servers or links cannot be listed.
    pub fn take(world: &World<'_>) -> Result<Self> {
        let links = links(world.netlink()?, world.site)?;
        let mut servers = Vec::new();
        for name in store::entries(&world.site.run().join("servers"))? {
            let seen = Seen::look(world, name)?;
            let (Some(status), Some(usage)) = (seen.status(), seen.usage()) else { continue };
            let link =
                seen.defined().map(|server| server.record.id).and_then(|id| links.iter().find(|link| link.0 == id));
            let (_, received_bytes, sent_bytes) = link.copied().unwrap_or_default();
            servers.push(Measured {
                state: seen.state,
                started_ns: status.started_boottime_ns,
                uptime_s: seen.uptime_s().unwrap_or_default(),
                usage: usage.clone(),
                received_bytes,
                sent_bytes,
                name: seen.name,
            });
        }
        Ok(Self { taken: Instant::now(), servers })
    }

    /// What the servers did since `before`; one that was started in between has done everything since its start.
    pub fn since(&self, before: &Sample) -> Vec<Load> {
        let seconds = self.taken.duration_since(before.taken).as_secs_f64().max(0.001);
        let load = |now: &Measured| {
            let same = |then: &&Measured| then.name == now.name && then.started_ns == now.started_ns;
            now.since(before.servers.iter().find(same), seconds)
        };
        self.servers.iter().map(load).collect()
    }
}

impl Measured {
    fn since(&self, before: Option<&Measured>, seconds: f64) -> Load {
        let rate =
            |counter: fn(&Measured) -> u64| counter(self).saturating_sub(before.map_or(0, counter)) as f64 / seconds;
        Load {
            name: self.name.clone(),
            state: self.state,
            cpu_percent: rate(|measured| measured.usage.cpu_usec) / 1e4,
            memory_bytes: self.usage.memory_bytes,
            memory_limit_bytes: self.usage.memory_limit_bytes,
            tasks: self.usage.tasks,
            read_bytes_s: rate(|measured| measured.usage.io_read_bytes),
            write_bytes_s: rate(|measured| measured.usage.io_write_bytes),
            received_bytes_s: rate(|measured| measured.received_bytes),
            sent_bytes_s: rate(|measured| measured.sent_bytes),
            uptime_s: self.uptime_s,
        }
    }
}

/// Number of the server, received and sent bytes of each of our links. What the host's end sends, the server receives.
fn links(netlink: &Netlink, site: &Site) -> Result<Vec<(u32, u64, u64)>> {
    let prefix = site.link_prefix();
    let ours = netlink.links()?.into_iter().filter_map(|link| {
        let id: u32 = link.name.strip_prefix(&prefix)?.parse().ok()?;
        Some((id, link.tx_bytes, link.rx_bytes))
    });
    Ok(ours.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn measured(name: &str, started_ns: i64, cpu_usec: u64) -> Measured {
        Measured {
            name: name.parse().unwrap(),
            state: State::Running,
            started_ns,
            uptime_s: 5,
            usage: Usage { cpu_usec, io_read_bytes: 4096, ..Usage::default() },
            received_bytes: 100,
            sent_bytes: 0,
        }
    }

    #[test]
    fn counters_become_rates_and_a_restarted_server_begins_anew() {
        let taken = Instant::now();
        let before = Sample { taken, servers: vec![measured("a", 1, 1_000_000), measured("b", 1, 9_000_000)] };
        let mut a = measured("a", 1, 4_000_000);
        a.received_bytes = 300;
        let after = Sample { taken: taken + Duration::from_secs(2), servers: vec![a, measured("b", 2, 1_000_000)] };
        let loads = after.since(&before);
        assert_eq!((loads[0].cpu_percent, loads[0].received_bytes_s, loads[0].read_bytes_s), (150.0, 100.0, 0.0));
        assert_eq!((loads[1].cpu_percent, loads[1].read_bytes_s), (50.0, 2048.0));
    }
}
