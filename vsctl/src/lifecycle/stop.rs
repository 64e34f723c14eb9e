//! Stop a server, and take back what its start had made.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kernel::process::PidFd;

use super::execute;
use super::journal::{Journal, Lasting};
use super::state::{self, State, Status};
use super::waiters;
use super::world::World;
use crate::events;
use crate::failure::{Exit, Failure};
use crate::monitor;
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// How to stop.
#[derive(Debug, Clone, Copy)]
pub struct Manner {
    /// How long the guest may take for an orderly shutdown.
    pub timeout: Duration,
    /// No orderly shutdown at all.
    pub kill: bool,
}

impl Default for Manner {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(60), kill: false }
    }
}

impl Manner {
    /// At once.
    pub fn kill() -> Self {
        Self { timeout: Duration::ZERO, kill: true }
    }
}

/// How often an unanswered wish is repeated: an init that had no handler yet has lost the first one.
const AGAIN: Duration = Duration::from_secs(2);

/// How long killed processes may take to end, memory to give back included, before it is asked what they wait for.
const PROMPT_MS: u64 = 2_000;
/// … and after that.
const STUBBORN_MS: u64 = 10_000;

/// Stops a server.
///
/// # Errors
/// Exit 31 when it does not run; what could not be taken back.
pub fn stop(site: &Site, name: &Name, manner: &Manner) -> Result<()> {
    let _lock = store::lock(site, name)?;
    store::load(site, name)?;
    store::try_forget_leaving(site, name);
    match state::of(site, name)? {
        State::Running | State::Frozen => stop_locked(site, name, manner),
        // Interrupted half way: nothing runs, and taking it back is what was asked for.
        State::Ready => recover(site, name),
        State::Stopped | State::Suspended | State::Incoming | State::Moved | State::Incomplete => {
            Err(Failure::new(Exit::NotRunning, format!("'{name}' is not running")).into())
        }
    }
}

/// Stops a server whose lock the caller holds.
///
/// # Errors
/// What could not be taken back.
pub fn stop_locked(site: &Site, name: &Name, manner: &Manner) -> Result<()> {
    if let Some(status) = state::status(site, name)? {
        // Told first, so that it leaves the taking back to the holder of the lock.
        let handed = monitor::hand_over(site, name)?;
        if let Some(pidfd) = state::pidfd(&status)? {
            end(site, name, &status, &pidfd, manner)?;
        }
        handed.wait_gone();
    }
    recover(site, name)?;
    events::note(site, name, events::Kind::Stopped);
    Ok(())
}

/// Kills everything of a server that may not go on, and waits until it has ended. Its monitor, or who finds it next, takes it back.
///
/// # Errors
/// When the kernel refuses, or something does not end.
pub fn end_at_once(site: &Site, name: &Name) -> Result<()> {
    let group = World::new(site).group(&site.server_cgroup(name))?;
    group.kill()?;
    if !group.wait_empty(STUBBORN_MS)? {
        return Err(Failure::new(Exit::System, format!("the processes of '{name}' do not end")).into());
    }
    Ok(())
}

/// Asks init to shut down and waits; kills the whole group when it takes too long.
fn end(site: &Site, name: &Name, status: &Status, pidfd: &PidFd, manner: &Manner) -> Result<()> {
    let world = World::new(site);
    let group = world.group(&site.server_cgroup(name))?;
    if !manner.kill {
        if group.is_frozen()? {
            group.thaw()?;
        }
        let started = Instant::now();
        while let Some(left) = manner.timeout.checked_sub(started.elapsed()).filter(|left| !left.is_zero()) {
            // Refused only when init has just ended.
            let _ = pidfd.signal(status.stop_signal);
            if pidfd.wait_exit(Some(left.min(AGAIN).as_millis() as u64))? {
                return Ok(());
            }
        }
        log::warn!("'{name}' did not shut down within {} s and is killed", manner.timeout.as_secs());
    }
    group.kill()?;
    if pidfd.wait_exit(Some(PROMPT_MS))? {
        return Ok(());
    }
    let ended = waiters::let_go(&group)?;
    if ended > 0 {
        log::warn!("'{name}': {ended} FUSE file systems of its own kept killed processes waiting and were ended");
    }
    if !pidfd.wait_exit(Some(STUBBORN_MS))? {
        return Err(Failure::new(Exit::System, format!("the processes of '{name}' do not end")).into());
    }
    Ok(())
}

/// Takes back what a start has made; nothing of the server must run, or it is killed.
///
/// # Errors
/// What could not be taken back.
pub fn recover(site: &Site, name: &Name) -> Result<()> {
    let mut journal = Journal::open(&state::journal_file(site, name), Lasting::Boot)?;
    execute::take_back("stop", &mut World::new(site), &mut journal)
        .with_context(|| format!("cannot take back all of '{name}'"))?;
    journal.remove()
}
