//! One service while the supervisor runs: its file, its state, its process, its timer, its log.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use kernel::process::signal_child;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::fs::OFlags;
use rustix::io::{fcntl_dupfd_cloexec, read};
use rustix::pipe::{PipeFlags, pipe_with};

use super::log_file::LogFile;
use super::notify::Notify;
use super::reap::End;
use super::{LOGS, backoff, spawn};
use crate::failure::{During, Result};
use crate::service::{Kind, Log, ServiceFile};
use crate::state::{self, Event, State};

/// At most this much of a service's output is taken in one round, so that a chatterbox leaves
/// time for the others.
const DRAIN_BYTES: usize = 64 * 1024;

/// A service.
pub struct Service {
    /// Its definition as last read.
    pub file: ServiceFile,
    /// What is.
    pub state: State,
    /// Since when.
    pub since: Instant,
    /// What should be: down, or else up.
    pub down: bool,
    /// Its file is gone: forget it when it is down.
    pub removed: bool,
    /// The cycle that it waits in, for the user.
    pub cycle: Option<String>,
    /// Its main process.
    pub pid: Option<i32>,
    /// The one event that comes by time.
    pub timer: Option<(Instant, Event)>,
    /// The pause before the last restart.
    pub pause: Option<Duration>,
    /// How often it was started without being asked.
    pub restarts: u32,
    /// How its last process ended, or why there was none.
    pub last: Option<String>,
    /// The pipe to its log file.
    pub output: Option<Output>,
    /// The socket on which its process says that it is ready.
    pub notify: Option<Notify>,
    name: String,
    started: Instant,
}

/// The pipe from a service to its log. It outlives the service's processes, so nothing is lost
/// between two of them, and what they leave behind can go on writing.
pub struct Output {
    /// The supervisor's end.
    pub reader: OwnedFd,
    writer: OwnedFd,
    log: LogFile,
}

impl Service {
    /// A stopped service.
    pub fn new(name: &str, file: ServiceFile) -> Service {
        let now = Instant::now();
        Service {
            file,
            state: State::Stopped,
            since: now,
            down: false,
            removed: false,
            cycle: None,
            pid: None,
            timer: None,
            pause: None,
            restarts: 0,
            last: None,
            output: None,
            notify: None,
            name: name.into(),
            started: now,
        }
    }

    /// Takes a state of the table.
    pub fn enter(&mut self, next: State) {
        let is_stopping = |state| matches!(state, State::Stopping | State::Restarting);
        // Another wish in the middle of a stop does not make the stop longer.
        if !(is_stopping(self.state) && is_stopping(next)) {
            self.timer = None;
        }
        if self.state == State::Backoff && next == State::Waiting {
            self.restarts = self.restarts.saturating_add(1);
        }
        if self.state != next {
            self.since = Instant::now();
        }
        self.state = next;
    }

    /// Makes the process. `true`: it will say by itself that it is ready, or end.
    pub fn spawn(&mut self, environment: &BTreeMap<String, String>) -> Result<bool> {
        if self.file.log == Log::File && self.output.is_none() {
            self.output = Some(Output::open(&self.name, self.file.log_size_bytes)?);
        }
        self.notify = None;
        if self.file.notify {
            let notify = Notify::open(&self.name);
            self.notify = Some(notify.during(|| "make the notify socket".into())?);
        }
        self.started = Instant::now();
        let notify = self.notify.as_ref().map(Notify::path);
        let output = self.output.as_ref().map(|output| output.writer.as_fd());
        self.pid = Some(spawn::spawn(&self.file, environment, output, notify)?);
        let waits = self.file.notify || self.file.kind == Kind::Oneshot;
        if let Some(timeout) = self.file.start_timeout().filter(|_| waits) {
            self.timer = Some((self.started + timeout, Event::StartTimeout));
        }
        Ok(waits)
    }

    /// Notes the end of the process and ends what is left of its process group: a service that is
    /// started again must not meet its own remains.
    pub fn process_ended(&mut self, end: End) {
        self.last = Some(end.to_string());
        // A oneshot may have left something running on purpose.
        if let (Some(pid), Kind::Daemon) = (self.pid.take(), self.file.kind) {
            // While the group has members its number is not given to others, and the number of a
            // process that has just ended is not given again before all others have been used.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// What the end of its process means to it.
    pub fn ended_event(&self, success: bool) -> Event {
        state::ended(self.file.kind, self.file.restart_policy(), success)
    }

    /// Asks the process to end and sets the time until it is killed.
    pub fn terminate(&mut self) {
        let timeout = Duration::from_millis(self.file.stop_timeout_ms);
        self.timer = Some((Instant::now() + timeout, Event::StopTimeout));
        self.signal(self.file.stop_signal.number());
    }

    /// Ends the process and its group.
    pub fn kill(&mut self) {
        if let Some(pid) = self.pid {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        // Also when it has changed its group.
        self.signal(libc::SIGKILL);
    }

    fn signal(&self, number: i32) {
        let Some(pid) = self.pid else { return };
        // It was not collected yet. Servers that shall be migrated have no pidfds.
        if let Err(error) = signal_child(pid, number) {
            log::debug!("{}: {error}", self.name);
        }
    }

    /// Sets the time of the next start.
    pub fn delay(&mut self) {
        let pause = backoff::delay(&self.file, self.pause, self.started.elapsed());
        self.pause = Some(pause);
        self.timer = Some((Instant::now() + pause, Event::DelayOver));
    }

    /// Whether this service must be down before `other` may go: it came after it, and is wanted
    /// down too.
    pub fn holds_up(&self, other: &str) -> bool {
        self.down
            && !self.state.is_down()
            && self.name != other
            // In a cycle everybody came after everybody.
            && self.cycle.is_none()
            && self.file.dependencies().any(|before| before == other)
    }

    /// Moves what the processes have printed to the log.
    pub fn drain(&mut self) {
        if let Some(output) = &mut self.output {
            output.drain();
        }
    }
}

impl Output {
    fn open(name: &str, limit_bytes: u64) -> Result<Output> {
        let failed = || "make a pipe to the log".to_string();
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).during(failed)?;
        // Only this end: services expect to be able to wait.
        rustix::fs::fcntl_setfl(&reader, OFlags::NONBLOCK).during(failed)?;
        // Below are the numbers that a child's standard descriptors take.
        let writer = fcntl_dupfd_cloexec(&writer, 3).during(failed)?;
        let path = Path::new(LOGS).join(format!("{name}.log"));
        Ok(Output { reader, writer, log: LogFile::new(path, limit_bytes) })
    }

    fn drain(&mut self) {
        let mut buffer = [0; 4096];
        for _ in 0..DRAIN_BYTES / buffer.len() {
            match read(&self.reader, &mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(length) => self.log.append(buffer.get(..length).unwrap_or_default()),
            }
        }
    }
}
