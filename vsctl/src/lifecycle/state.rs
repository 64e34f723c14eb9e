//! The states of a server, and what is seen of them in the runtime directory.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use kernel::process::{self, PidFd};
use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::site::Site;
use crate::store;

/// Where a server stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Half created or half destroyed.
    Incomplete,
    /// Defined and not running.
    Stopped,
    /// A start or a stop is under way, or was interrupted.
    Ready,
    /// Its init runs.
    Running,
    /// Its processes are held.
    Frozen,
}

/// What a user asks of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Everything but processes.
    Prepare,
    /// Init.
    Boot,
    /// Hold the processes.
    Freeze,
    /// Let them go on.
    Thaw,
    /// End it.
    Stop,
    /// Remove it.
    Destroy,
}

impl State {
    /// Every state, for help texts.
    pub const ALL: &[State] = &[State::Incomplete, State::Stopped, State::Ready, State::Running, State::Frozen];

    /// The state after `action`, or `None` when the action makes no sense here.
    pub fn after(self, action: Action) -> Option<State> {
        use {Action::*, State::*};
        Some(match (self, action) {
            (Stopped, Prepare) => Ready,
            (Ready, Boot) => Running,
            (Running, Freeze) => Frozen,
            (Frozen, Thaw) => Running,
            (Ready | Running | Frozen, Stop) => Stopped,
            (Incomplete | Stopped, Destroy) => Incomplete,
            _ => return None,
        })
    }

    /// Whether anything of it is on the host beside files.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Ready | Self::Running | Self::Frozen)
    }

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Incomplete => "incomplete",
            Self::Stopped => "stopped",
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Frozen => "frozen",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(self.as_str())
    }
}

/// `status.toml`: what names the running init for as long as the host runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Init's pid on the host.
    pub pid: i32,
    /// Its start time in clock ticks since boot: with the pid it names the process for ever (proc(5), field 22).
    pub start_ticks: u64,
    /// When it was started, on the clock that counts from boot.
    pub started_boottime_ns: u64,
    /// The init, as the template names it.
    pub init: String,
    /// The signal that asks it to power off.
    pub stop_signal: i32,
}

/// Path of the status.
pub fn status_file(site: &Site, name: &Name) -> PathBuf {
    site.server_run(name).join("status.toml")
}

/// Path of the journal of what a start has made.
pub fn journal_file(site: &Site, name: &Name) -> PathBuf {
    // Not in the server's runtime directory, which is itself a step.
    site.run().join("journal").join(name.as_str())
}

/// The running init of a server; `None` when it does not run.
pub fn status(site: &Site, name: &Name) -> Option<Status> {
    let text = fs::read_to_string(status_file(site, name)).ok()?;
    let status: Status = toml::from_str(&text).ok()?;
    // A zombie has ended: an adopted one stays one until the host's init gets round to it.
    let lives = |found: process::Stat| found.start_ticks == status.start_ticks && !found.has_ended;
    process::stat(status.pid).is_ok_and(lives).then_some(status)
}

/// Init's pidfd.
///
/// # Errors
/// When it does not run.
pub fn pidfd(status: &Status) -> Result<PidFd> {
    let pidfd = PidFd::open(status.pid)?;
    // The pid may have gone to another between reading and opening; the pidfd keeps it from now on.
    let same = process::start_time(status.pid).is_ok_and(|ticks| ticks == status.start_ticks);
    same.then_some(pidfd).context("init has ended")
}

/// What is seen of a server now. Costs a few file accesses: no lock, no parsing of its spec.
pub fn of(site: &Site, name: &Name) -> State {
    if !store::record_file(site, name).exists() {
        return State::Incomplete;
    }
    if status(site, name).is_some() {
        return if frozen(site, name) { State::Frozen } else { State::Running };
    }
    if journal_file(site, name).exists() { State::Ready } else { State::Stopped }
}

fn frozen(site: &Site, name: &Name) -> bool {
    // Freezing writes this mark, so that a list need not open a cgroup per server.
    site.server_run(name).join("frozen").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sensible_actions_have_a_state_after() {
        use {Action::*, State::*};
        assert_eq!(Stopped.after(Prepare).and_then(|state| state.after(Boot)), Some(Running));
        assert_eq!(Running.after(Freeze).and_then(|state| state.after(Stop)), Some(Stopped));
        assert_eq!(Running.after(Destroy), None);
        assert_eq!(Stopped.after(Freeze), None);
        for state in State::ALL {
            assert_eq!(state.after(Stop).is_some(), state.is_up(), "{state}");
        }
    }
}
