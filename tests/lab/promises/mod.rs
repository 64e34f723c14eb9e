//! Promises that one machine cannot keep by itself: they need its power, its shutdown, or a second machine.

mod boot;
mod connection;
mod faults;
mod pair;
mod phases;
mod postcopy;
mod power;
mod survivors;
mod workload;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use system_tests::{
    lab::{Definition, Host, Image, Payload, Workshop, definition::Init, serial},
    promise::Skip,
};

pub use pair::{NETWORKS, SEND_TEMPLATE};
pub use postcopy::ALLOW;

use crate::outcome::{Outcome, Outcomes};

/// The column of the table that these promises have.
const COLUMN: &str = "lab";

/// How many threads keep promises at once: two emulated hosts fill two processors.
const AT_ONCE: usize = 2;

/// How many lines of each serial log are shown when a promise is broken.
const SERIAL_LINES: usize = 15;

/// What a promise of the lab works with.
pub struct Lab<'a> {
    /// Of this promise alone: its hosts are there.
    workshop: Workshop,
    payload: &'a Payload,
    hosts: Vec<(&'a Definition, &'a Image)>,
    /// How much more often than usual a promise does again what may leave something behind.
    repeats: u32,
    /// Whether it was asked for by a part of its name.
    is_asked_for: bool,
    /// How many hosts it has booted: each has a directory of its own.
    booted: AtomicU32,
}

/// What all of them work with.
struct Ground<'a> {
    workshop: &'a Workshop,
    payload: &'a Payload,
    hosts: Vec<(&'a Definition, &'a Image)>,
    repeats: u32,
    is_asked_for: bool,
}

/// A promise of the lab.
type Keep = fn(&Lab<'_>) -> Result<()>;

const PROMISES: [(&str, Keep); 18] = [
    ("power::what_a_command_confirmed_outlives_a_power_cut", power::what_a_command_confirmed_outlives_a_power_cut),
    ("power::cut_at_any_step_doctor_mends_it", power::cut_at_any_step_doctor_mends_it),
    ("power::a_server_with_autostart_runs_again_after_a_power_cut", power::a_server_with_autostart_runs_again),
    ("boot::servers_come_up_and_go_down_with_the_host", boot::servers_come_up_and_go_down_with_the_host),
    ("boot::systemd_and_servers_leave_each_other_alone", boot::systemd_and_servers_leave_each_other_alone),
    ("boot::another_kernel_boots_the_same_servers", boot::another_kernel_boots_the_same_servers),
    ("boot::a_suspended_server_outlives_the_boot_of_its_host", boot::a_suspended_server_outlives_the_boot_of_its_host),
    ("boot::a_suspended_server_goes_on_under_another_kernel", boot::a_suspended_server_goes_on_under_another_kernel),
    ("pair::two_hosts_reach_each_other_by_name", pair::two_hosts_reach_each_other_by_name),
    ("pair::a_server_moves_between_two_hosts", pair::a_server_moves_between_two_hosts),
    ("pair::a_running_server_goes_on_at_another_host", pair::a_running_server_goes_on_at_another_host),
    ("pair::servers_of_other_kinds_go_on_at_another_host", pair::servers_of_other_kinds_go_on_at_another_host),
    ("pair::faults_of_the_other_host_leave_it_at_one", faults::faults_of_the_other_host_leave_it_at_one),
    (
        "pair::killed_in_each_phase_of_a_live_migration_it_goes_on_at_one_host",
        phases::killed_in_each_phase_of_a_live_migration_it_goes_on_at_one_host,
    ),
    ("pair::memory_comes_when_it_runs_already", postcopy::memory_comes_when_it_runs_already),
    ("pair::a_connection_goes_along_and_nothing_is_lost", connection::a_connection_goes_along_and_nothing_is_lost),
    ("pair::a_database_and_a_web_server_go_on", workload::a_database_and_a_web_server_go_on),
    ("survivors::every_kind_survives_a_migration", survivors::every_kind_survives_a_migration),
];

impl<'a> Ground<'a> {
    /// What one promise works with, in `place`.
    fn lab(&self, place: &str) -> Result<Lab<'a>> {
        let workshop = self.workshop.part(place)?;
        let (payload, hosts) = (self.payload, self.hosts.clone());
        let (repeats, is_asked_for) = (self.repeats, self.is_asked_for);
        Ok(Lab { workshop, payload, hosts, repeats, is_asked_for, booted: AtomicU32::new(0) })
    }
}

impl<'a> Lab<'a> {
    /// The first host with `init` as its PID 1, booted.
    fn host(&self, init: Init) -> Result<Host> {
        let (definition, image) = self.found(|definition, _| definition.init == init)?;
        let number = self.booted.fetch_add(1, Ordering::Relaxed);
        Host::boot(&self.workshop, definition, image, self.payload, &format!("{}-{number}", definition.name))
    }

    /// Whether it is to take its time: with `LAB=all`.
    fn is_thorough(&self) -> bool {
        self.repeats > 1
    }

    /// For a promise that takes long beside what it tells more than others: only with `LAB=all`, or asked for by its name.
    fn only_when_there_is_time(&self) -> Result<()> {
        match self.is_thorough() || self.is_asked_for {
            true => Ok(()),
            false => Err(Skip("it takes long; LAB=all has it, and its name".into()).into()),
        }
    }

    fn found(&self, wanted: impl Fn(&Definition, &Image) -> bool) -> Result<(&'a Definition, &'a Image)> {
        let found = self.hosts.iter().find(|(definition, image)| wanted(definition, image)).copied();
        found.ok_or_else(|| Skip("no host of this run is fit for it; LAB=all has more".into()).into())
    }
}

/// Promises that wait for a thread that keeps them, and what came of those that were kept.
pub struct Queue<'a> {
    ground: Ground<'a>,
    waiting: Mutex<VecDeque<(&'static str, Keep)>>,
    outcomes: Mutex<Outcomes>,
    threads: AtomicUsize,
}

impl<'a> Queue<'a> {
    /// Those whose names contain `filter`.
    pub fn of(
        (workshop, payload): (&'a Workshop, &'a Payload),
        hosts: impl Iterator<Item = (&'a Definition, &'a Image)>,
        filter: &str,
        repeats: u32,
    ) -> Self {
        let is_asked_for = !filter.is_empty();
        let ground = Ground { workshop, payload, hosts: hosts.collect(), repeats, is_asked_for };
        let waiting = PROMISES.into_iter().filter(|(name, _)| name.contains(filter)).collect();
        Self { ground, waiting: Mutex::new(waiting), outcomes: Mutex::default(), threads: AtomicUsize::new(0) }
    }

    /// Keeps one after the other until none waits, unless there are threads enough that do so.
    pub fn keep(&self) {
        if self.threads.fetch_add(1, Ordering::Relaxed) >= AT_ONCE {
            return;
        }
        // Taken by a statement of its own: the lock is not held while it is kept.
        let next = || lock(&self.waiting).pop_front();
        while let Some((name, keep)) = next() {
            let (outcome, remark) = kept(&self.ground, name, keep);
            let mut outcomes = lock(&self.outcomes);
            outcomes.add(name, COLUMN, outcome);
            remark.into_iter().for_each(|remark| outcomes.remark(remark));
        }
    }

    /// What came of them.
    pub fn outcomes(self) -> Outcomes {
        self.outcomes.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is behind it, also after a panic of another thread, which the scope reports.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps one, and prints what came of it. It is kept once more, by other hosts, when it is broken and the kernel of one of its hosts has
/// hung or ended: that is remarked.
fn kept(ground: &Ground<'_>, name: &str, keep: Keep) -> (Outcome, Option<String>) {
    let place = name.replace(':', "-");
    let (outcome, said) = once(ground, name, keep, &place);
    let (Outcome::Failed(_), Some(said)) = (&outcome, said) else { return (outcome, None) };
    let remark = format!("a host of {name} hung, and it was kept once more\n{said}");
    println!("{remark}");
    match once(ground, name, keep, &format!("{place}-again")).0 {
        Outcome::Skipped(_) => (outcome, Some(remark)),
        again => (again, Some(remark)),
    }
}

/// Keeps one, and prints what came of it; also what a host said that hung, if one did.
fn once(ground: &Ground<'_>, name: &str, keep: Keep, place: &str) -> (Outcome, Option<String>) {
    let began = Instant::now();
    let (kept, logs) = match ground.lab(place) {
        // Its hosts are gone when it returns, and have written their last words.
        Ok(lab) => (keep(&lab), lab.workshop.serial_logs()),
        Err(error) => (Err(error), BTreeMap::new()),
    };
    let outcome = match kept.map_err(|error| error.downcast::<Skip>()) {
        Ok(()) => Outcome::Passed,
        Err(Ok(Skip(reason))) => Outcome::Skipped(reason),
        Err(Err(error)) => Outcome::Failed(format!("{error:#}")),
    };
    println!("{:6.1} {COLUMN}: test {name} ... {outcome:?}", began.elapsed().as_secs_f64());
    if let Outcome::Failed(_) = outcome {
        for (file, log) in &logs {
            println!("{name}: the end of {file}\n{}", serial::end(log, SERIAL_LINES));
        }
    }
    (outcome, logs.values().find_map(|log| serial::hang(log)))
}

/// Builds the busybox template in a host that is new.
fn prepare(host: &Host) -> Result<()> {
    host.sh("vsctl template build busybox").context("build the template")?;
    Ok(())
}

/// The JSON that a command in a host prints.
fn json(host: &Host, command: &str) -> Result<serde_json::Value> {
    let done = host.ssh(command).succeed()?;
    done.json()
}
