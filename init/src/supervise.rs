//! The supervisor: one loop over signals, the control socket, readiness messages, log pipes and
//! timers. No threads.
//!
//! Once [`Supervisor::run`] is entered nothing makes it return or exit but the end of the server:
//! what fails is logged, and life goes on. The lives of services are the table in
//! [`crate::state`]; this file only turns its actions into effects.
//!
//! A service has a state (what is) and a wish (what should be: up, unless `down` is set). Starting
//! is parallel: every service waits by itself for those before it. Stopping is the same in
//! reverse: a service that is wanted down waits until those that came after it are down, if they
//! are wanted down too.

mod backoff;
mod control;
mod load;
mod log_file;
mod notify;
pub mod reap;
mod requests;
mod service;
pub mod spawn;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kernel::process;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::failure::{During, Result};
use crate::power::{self, Power, Wish};
use crate::prepare::{NOTIFY_SOCKET, Prepared};
use crate::service::ServiceFile;
use crate::state::{self, Action, Event, State};
use control::Control;
use reap::End;
use service::Service;

/// Where the service files are.
const SERVICES: &str = "/etc/vsinit";

/// Where the services' logs are.
const LOGS: &str = "/var/log/vsinit";

/// How much longer than its slowest service a shutdown may take: for processes that even SIGKILL
/// does not end (uninterruptible sleep).
const SHUTDOWN_MARGIN: Duration = Duration::from_secs(10);

/// After this long without an event, memory that is not in use goes back to the kernel.
const REST: Duration = Duration::from_millis(100);

/// What the supervisor has in its hands.
pub struct Supervisor {
    services: BTreeMap<String, Service>,
    /// Files that are no service, and why; they are listed, and what requires them fails.
    broken: BTreeMap<String, String>,
    /// Where service files are read; none in the rescue role.
    directory: Option<PathBuf>,
    /// Variables that every service gets.
    environment: BTreeMap<String, String>,
    signals: SignalFd,
    control: Control,
    prepared: Prepared,
    shutdown: Option<Shutdown>,
    /// Whether the monitor was told that the boot is over.
    told_ready: bool,
    /// Whether nothing has happened since memory was given back.
    rested: bool,
}

struct Shutdown {
    power: Power,
    deadline: Instant,
}

/// What has become readable.
enum Source {
    Signals,
    Control,
    Client(usize),
    Notify(String),
    Output(String),
}

/// Blocks what the loop receives by descriptor. All of them, so that none is lost and none ends
/// PID 1, but those that the processor raises, which only a bug can cause.
fn supervised_signals() -> SigSet {
    use Signal::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
    let mut signals = SigSet::all();
    for fault in [SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP] {
        signals.remove(fault);
    }
    signals
}

impl Supervisor {
    /// Blocks the signals and opens the sockets: after it no request is lost.
    pub fn new(prepared: Prepared, environment: BTreeMap<String, String>) -> Result<Supervisor> {
        let signals = supervised_signals();
        signals.thread_set_mask().during(|| "block signals".into())?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&signals, flags).during(|| "receive signals".into())?;
        std::fs::create_dir_all("/run/vsinit").during(|| "make /run/vsinit".into())?;
        let control = Path::new(init::control::SOCKET);
        let control = Control::bind(control).during(|| format!("bind {}", control.display()))?;
        Ok(Supervisor {
            services: BTreeMap::new(),
            broken: BTreeMap::new(),
            directory: None,
            environment,
            signals,
            control,
            prepared,
            shutdown: None,
            told_ready: false,
            rested: false,
        })
    }

    /// Reads the service files and wants all services up.
    pub fn start_services(&mut self) {
        self.directory = Some(SERVICES.into());
        self.reload();
    }

    /// Wants nothing but a root shell on the console.
    pub fn start_rescue(&mut self) {
        const SHELL: &str = "exec = ['/bin/sh', '-l']\nconsole = '/dev/console'\ndir = '/root'\n\
            restart_delay_ms = 1000\nrestart_delay_max_ms = 1000";
        // A root disk without /root must not keep the rescuer out.
        let shell = match Path::new("/root").is_dir() {
            true => SHELL.to_string(),
            false => SHELL.replace("dir = '/root'\n", ""),
        };
        match ServiceFile::parse("rescue", &shell) {
            Ok(file) => {
                self.services.insert("rescue".into(), Service::new("rescue", file));
                self.feed("rescue", Event::Start);
            }
            Err(error) => log::error!("{error}"),
        }
    }

    /// Supervises until the server ends.
    pub fn run(&mut self) -> ! {
        loop {
            self.settle();
            let sources = self.wait();
            self.act_on(sources);
        }
    }

    // Out of line, as is what else is called by the loop: it sleeps on a small stack then.
    #[inline(never)]
    fn act_on(&mut self, sources: Vec<Source>) {
        for source in sources {
            match source {
                Source::Signals => self.receive_signals(),
                Source::Control => self.control.accept(),
                Source::Client(index) => self.serve(index),
                Source::Notify(name) => self.receive_notification(&name),
                Source::Output(name) => self.drain(&name),
            }
        }
        self.control.drop_finished();
        self.fire_timers();
    }

    /// Sleeps until something is readable or a timer is due.
    #[inline(never)]
    fn wait(&mut self) -> Vec<Source> {
        let rest = (!self.rested).then_some(REST);
        let timer = self.next_timer().map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = rest.into_iter().chain(timer).min();
        let timeout =
            timeout.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
        let (sources, mut polled): (Vec<Source>, Vec<PollFd>) =
            self.sources().map(|(source, fd)| (source, PollFd::from_borrowed_fd(fd, PollFlags::IN))).unzip();
        if poll(&mut polled, timeout.as_ref()).is_err() {
            return Vec::new();
        }
        let ready = polled.iter().map(|fd| !fd.revents().is_empty());
        let ready: Vec<Source> =
            sources.into_iter().zip(ready).filter_map(|(source, ready)| ready.then_some(source)).collect();
        let rested = ready.is_empty();
        if rested && !self.rested {
            process::give_memory_back();
        }
        self.rested = rested;
        ready
    }

    fn sources(&self) -> impl Iterator<Item = (Source, BorrowedFd<'_>)> {
        let signals = [(Source::Signals, self.signals.as_fd())];
        let notifies = self
            .services
            .iter()
            .filter_map(|(name, service)| Some((Source::Notify(name.clone()), service.notify.as_ref()?.as_fd())));
        let outputs = self.services.iter().filter_map(|(name, service)| {
            Some((Source::Output(name.clone()), service.output.as_ref()?.reader.as_fd()))
        });
        let clients = self.control.reading().map(|(index, fd)| (Source::Client(index), fd));
        // New clients last: they may push out old ones, whose indices were given above.
        let control = [(Source::Control, self.control.as_fd())];
        signals.into_iter().chain(notifies).chain(outputs).chain(clients).chain(control)
    }

    fn next_timer(&self) -> Option<Instant> {
        let services = self.services.values().filter_map(|service| Some(service.timer?.0));
        let shutdown = self.shutdown.iter().map(|shutdown| shutdown.deadline);
        services.chain(shutdown).chain(self.control.deadline()).min()
    }

    fn fire_timers(&mut self) {
        let now = Instant::now();
        let mut due = Vec::new();
        for (name, service) in &mut self.services {
            if let Some((_, event)) = service.timer.take_if(|(at, _)| *at <= now) {
                due.push((name.clone(), event));
            }
        }
        for (name, event) in due {
            if matches!(event, Event::StartTimeout | Event::StopTimeout) {
                log::warn!("{name}: takes too long, killed");
            }
            self.feed(&name, event);
        }
        self.control.drop_late(now);
    }

    fn receive_signals(&mut self) {
        // Many signals of one kind may have become one: what counts is that it came.
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match power::wish(signal.ssi_signo as i32) {
                Some(Wish::Reap) => self.reap(),
                Some(Wish::Power(power)) => self.shut_down(power),
                Some(Wish::Reload) if self.shutdown.is_none() => self.reload(),
                Some(Wish::Reload) | None => {}
            }
        }
    }

    fn reap(&mut self) {
        let mut ended = Vec::new();
        reap::collect(|pid, end| {
            let of = self.services.iter().find(|(_, service)| service.pid == Some(pid));
            ended.extend(of.map(|(name, _)| (name.clone(), end)));
        });
        for (name, end) in ended {
            self.process_ended(&name, end);
        }
    }

    fn process_ended(&mut self, name: &str, end: End) {
        // What it printed last comes before what is said about its end.
        self.drain(name);
        let Some(service) = self.services.get_mut(name) else {
            return;
        };
        let asked = matches!(service.state, State::Stopping | State::Restarting);
        service.process_ended(end);
        let event = service.ended_event(end.is_success());
        self.feed(name, event);
        if !asked && !end.is_success() {
            self.tell_failure(name);
        }
    }

    fn tell_failure(&self, name: &str) {
        let Some(service) = self.services.get(name) else {
            return;
        };
        let last = service.last.as_deref().unwrap_or("failed");
        match (service.state, service.pause) {
            (State::Backoff, Some(pause)) => {
                log::warn!("{name}: {last}; again in {} ms", pause.as_millis());
            }
            (state, _) => log::warn!("{name}: {last}; {}", state.as_str()),
        }
    }

    fn receive_notification(&mut self, name: &str) {
        let notify = self.services.get(name).and_then(|service| service.notify.as_ref());
        if notify.is_some_and(notify::Notify::receive) {
            self.feed(name, Event::Ready);
        }
    }

    fn drain(&mut self, name: &str) {
        if let Some(service) = self.services.get_mut(name) {
            service.drain();
        }
    }

    /// One step of a service's life: the table says what, this does it.
    fn feed(&mut self, name: &str, event: Event) {
        let Some(service) = self.services.get_mut(name) else {
            return;
        };
        let Some((next, action)) = service.state.after(event) else {
            return;
        };
        service.enter(next);
        match action {
            // `settle` looks at what waits, after every round.
            Action::Nothing | Action::Await => {}
            Action::Spawn => self.spawn(name),
            Action::Terminate => service.terminate(),
            Action::Kill => service.kill(),
            Action::Delay => service.delay(),
        }
    }

    fn spawn(&mut self, name: &str) {
        let Some(service) = self.services.get_mut(name) else {
            return;
        };
        match service.spawn(&self.environment) {
            Ok(true) => {}
            Ok(false) => self.feed(name, Event::Ready),
            Err(error) => {
                service.last = Some(crate::failure::chain(&error));
                let event = service.ended_event(false);
                self.feed(name, event);
                self.tell_failure(name);
            }
        }
    }

    /// Lets every service go on that waits for others, until nothing changes any more; then
    /// answers who waits for a result.
    #[inline(never)]
    fn settle(&mut self) {
        while let Some((name, event)) = self.services.keys().find_map(|name| self.due(name)) {
            if event == Event::DependencyFailed {
                self.tell_missing(&name);
            }
            self.feed(&name, event);
        }
        self.services.retain(|_, service| !service.removed || !service.state.is_down());
        self.answer_waiting();
        self.tell_ready();
        if let Some(shutdown) = &self.shutdown {
            let down = self.services.values().all(|service| service.state.is_down());
            if down || shutdown.deadline <= Instant::now() {
                power::finish(shutdown.power);
            }
        }
    }

    /// What a service that waits for others may do now.
    fn due(&self, name: &str) -> Option<(String, Event)> {
        let service = self.services.get(name)?;
        let event = match (service.down, service.state) {
            (true, State::Stopping) => None,
            (true, state) if state.is_down() => None,
            (true, _) if self.services.values().any(|other| other.holds_up(name)) => None,
            (true, _) => Some(Event::Stop),
            (false, State::Waiting) if service.cycle.is_none() => self.dependencies(service),
            (false, _) => None,
        };
        Some((name.into(), event?))
    }

    fn dependencies(&self, service: &Service) -> Option<Event> {
        let state = |name: &String| self.services.get(name).map(|other| other.state);
        let requires = service.file.requires.iter().map(state);
        state::dependencies(requires, service.file.after.iter().filter_map(state))
    }

    /// Notes why a service cannot be started although nothing of its own is wrong.
    fn tell_missing(&mut self, name: &str) {
        let is_up = |name: &String| self.services.get(name).is_some_and(|s| s.state.is_up());
        let Some(service) = self.services.get(name) else {
            return;
        };
        let missing = service.file.requires.iter().find(|name| !is_up(name));
        let message = format!("requires '{}', which is not up", missing.map_or("", |name| name));
        log::warn!("{name}: {message}");
        if let Some(service) = self.services.get_mut(name) {
            service.last = Some(message);
        }
    }

    /// Wants everything down, then the server.
    fn shut_down(&mut self, power: Power) {
        log::info!("shutting down to {}", power.as_str());
        let slowest = self.services.values().map(|service| service.file.stop_timeout_ms).max();
        // One after the other in the worst case; each is killed at its own time-out.
        let longest = Duration::from_millis(slowest.unwrap_or(0)) * self.services.len() as u32;
        match &mut self.shutdown {
            Some(shutdown) => shutdown.power = power,
            shutdown => {
                let deadline = Instant::now() + longest + SHUTDOWN_MARGIN;
                *shutdown = Some(Shutdown { power, deadline });
            }
        }
        self.services.values_mut().for_each(|service| service.down = true);
    }

    /// Tells the monitor once that every service has got somewhere.
    fn tell_ready(&mut self) {
        if self.told_ready || !self.services.values().all(|service| service.state.is_settled()) {
            return;
        }
        self.told_ready = true;
        let up = self.services.values().filter(|service| service.state.is_up()).count();
        let total = self.services.len() + self.broken.len();
        log::info!("{up} of {total} services are up");
        let send = || {
            let socket = std::os::unix::net::UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            socket.send_to(format!("READY=1\nSTATUS={up}/{total} services").as_bytes(), NOTIFY_SOCKET)
        };
        if let Err(error) = send() {
            log::warn!("cannot tell the monitor that the boot is over: {error}");
        }
    }
}
