//! What the control socket's requests do to services.

use std::collections::BTreeSet;
use std::time::Instant;

use init::control::{Reply, Request, Service as Line};

use super::control::Goal;
use super::{LOGS, Supervisor, log_file};
use crate::power::Power;
use crate::state::{Event, State};

/// The most of a log that one reply carries: it has to fit a socket's buffer.
const LOG_REPLY_BYTES: usize = 64 * 1024;

impl Supervisor {
    /// Reads a client's request on, and does it when it is complete.
    pub(super) fn serve(&mut self, index: usize) {
        let request = match self.control.read(index) {
            None => return,
            Some(Err(message)) => return self.reply(index, &Reply::Failed { message }),
            Some(Ok(request)) => request,
        };
        let answer = match (&request, &self.shutdown) {
            (Request::Start { .. } | Request::Restart { .. }, Some(_)) => Err("the server is shutting down".into()),
            _ => self.answer(request, index),
        };
        match answer {
            Ok(Some(reply)) => self.reply(index, &reply),
            Ok(None) => {}
            Err(message) => self.reply(index, &Reply::Failed { message }),
        }
    }

    fn reply(&mut self, index: usize, reply: &Reply) {
        self.control.reply(index, reply, &[]);
    }

    /// The reply, or nothing yet when the client has to wait.
    fn answer(&mut self, request: Request, index: usize) -> Result<Option<Reply>, String> {
        if let Some(power) = Power::from_request(&request) {
            self.shut_down(power);
        }
        match request {
            Request::List => {
                return Ok(Some(Reply::Services { services: self.lines() }));
            }
            Request::Log { name, lines } => return self.log(&name, lines as usize).map(Some),
            Request::Start { name } => {
                self.check(&name)?;
                self.start(&name);
                self.control.keep(index, Goal::Started(name));
            }
            Request::Stop { name } => {
                self.check(&name)?;
                self.stop(&name);
                self.control.keep(index, Goal::Stopped(name));
            }
            Request::Restart { name } => {
                self.check(&name)?;
                self.start_required(&name);
                self.want_up(&name, Event::Restart);
                self.control.keep(index, Goal::Started(name));
            }
            Request::Consoles => self.send_consoles(index),
            Request::Poweroff | Request::Reboot | Request::Halt => return Ok(Some(Reply::Done)),
        }
        Ok(None)
    }

    /// Whether anything can be done with the service.
    fn check(&self, name: &str) -> Result<(), String> {
        match (self.services.get(name), self.broken.get(name)) {
            (Some(service), _) => match &service.cycle {
                Some(cycle) if !service.state.has_process() => Err(format!("{name} comes after itself: {cycle}")),
                _ => Ok(()),
            },
            (None, Some(message)) => Err(message.clone()),
            (None, None) => Err(format!("no service '{name}'")),
        }
    }

    /// Wants the service up, and what it requires.
    fn start(&mut self, name: &str) {
        self.start_required(name);
        self.want_up(name, Event::Start);
    }

    fn start_required(&mut self, name: &str) {
        let required = self.closure(name, |supervisor, name| {
            let service = supervisor.services.get(name);
            service.map(|service| service.file.requires.clone()).unwrap_or_default()
        });
        for other in required {
            let is_up = self.services.get(&other).is_some_and(|service| service.state.is_up());
            // One that is up stays as it is; a oneshot that is done does not run again.
            if !is_up {
                self.want_up(&other, Event::Start);
            }
        }
    }

    /// Wants one service up, by `event`. One that waits for itself is left as it is.
    pub(super) fn want_up(&mut self, name: &str, event: Event) {
        let service = self.services.get_mut(name);
        if let Some(service) = service.filter(|service| service.cycle.is_none()) {
            service.down = false;
            service.pause = None;
            self.feed(name, event);
        }
    }

    /// Wants the service down, and what requires it. `settle` stops them in order.
    fn stop(&mut self, name: &str) {
        let mut names = self.closure(name, |supervisor, name| {
            let requires = |file: &crate::service::ServiceFile| file.requires.iter().any(|r| r == name);
            let services = supervisor.services.iter();
            services.filter(|(_, s)| requires(&s.file)).map(|(other, _)| other.clone()).collect()
        });
        names.insert(name.into());
        for name in names {
            if let Some(service) = self.services.get_mut(&name) {
                service.down = true;
            }
        }
        if let Some(service) = self.services.get_mut(name) {
            // Done and failed are down already; stopped is what was asked for.
            if service.state.is_down() {
                service.enter(State::Stopped);
            }
        }
    }

    /// All services that `next` leads to from `name`, without it.
    fn closure(&self, name: &str, next: impl Fn(&Supervisor, &str) -> Vec<String>) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut open = vec![name.to_string()];
        while let Some(name) = open.pop() {
            for other in next(self, &name) {
                if found.insert(other.clone()) {
                    open.push(other);
                }
            }
        }
        found.remove(name);
        found
    }

    /// Answers the clients whose goal is reached.
    pub(super) fn answer_waiting(&mut self) {
        for (index, goal) in self.control.waiting() {
            if let Some(reply) = self.outcome(&goal) {
                self.reply(index, &reply);
            }
        }
        self.control.drop_finished();
    }

    fn outcome(&self, goal: &Goal) -> Option<Reply> {
        let (Goal::Started(name) | Goal::Stopped(name)) = goal;
        let Some(service) = self.services.get(name) else {
            // Its file went away while somebody waited.
            return Some(Reply::Done);
        };
        let state = service.state;
        let failed = |what: &str| {
            let last = service.last.as_deref().unwrap_or("no process");
            Some(Reply::Failed { message: format!("{name} {what}: {last}") })
        };
        match goal {
            Goal::Started(_) => match state {
                _ if state.is_up() => Some(Reply::Done),
                State::Backoff => failed("ended and is tried again"),
                State::Failed => failed("failed"),
                State::Stopped => Some(Reply::Failed { message: format!("{name} was stopped") }),
                _ => None,
            },
            Goal::Stopped(_) if state.is_down() => Some(Reply::Done),
            // Somebody else wants it up again.
            Goal::Stopped(_) if !service.down => Some(Reply::Failed { message: format!("{name} was started again") }),
            Goal::Stopped(_) => None,
        }
    }

    fn lines(&self) -> Vec<Line> {
        let now = Instant::now();
        let services = self.services.iter().map(|(name, service)| Line {
            name: name.clone(),
            state: service.state.as_str().into(),
            pid: service.pid,
            since_s: now.saturating_duration_since(service.since).as_secs(),
            restarts: service.restarts,
            last: service.last.clone(),
        });
        let broken = self.broken.iter().filter(|(name, _)| !self.services.contains_key(*name));
        let broken = broken.map(|(name, message)| Line {
            name: name.clone(),
            state: "invalid".into(),
            pid: None,
            since_s: 0,
            restarts: 0,
            last: Some(message.clone()),
        });
        services.chain(broken).collect()
    }

    fn log(&mut self, name: &str, lines: usize) -> Result<Reply, String> {
        if !self.services.contains_key(name) {
            return Err(format!("no service '{name}'"));
        }
        // What was printed a moment ago is asked for too.
        self.drain(name);
        let path = std::path::Path::new(LOGS).join(format!("{name}.log"));
        Ok(Reply::Log { text: log_file::tail(&path, lines, LOG_REPLY_BYTES) })
    }

    fn send_consoles(&mut self, index: usize) {
        let descriptors = self.prepared.descriptors();
        let reply = Reply::Consoles { count: descriptors.len() as u32 };
        self.control.reply(index, &reply, &descriptors);
    }
}
