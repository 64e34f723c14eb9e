//! The listeners that a monitor keeps: init's, and those of processes that joined.
//!
//! Each is given to the supervisor of `lxcfs-fuse`, and to the next one when that has ended. A joiner's only when it is
//! needed: when a call arrives, or when the joiner has lived for a while, since most end before and call nothing.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use kernel::process::PidFd;
use nix::poll::{PollFd, PollFlags};

use crate::lifecycle::calls::{self, Calls};
use crate::site::Site;

/// A joiner of this age shall not depend on its monitor any more.
const GROWN_UP: Duration = Duration::from_secs(1);

/// How often a supervisor is looked for when there is none.
const RETRY: Duration = Duration::from_millis(250);

struct Kept {
    calls: Calls,
    parked: bool,
    /// When it has to be parked.
    due: Instant,
}

pub(super) struct Listeners<'a> {
    site: &'a Site,
    server: u32,
    kept: Vec<Kept>,
    /// The supervisor that has what is parked.
    keeper: Option<PidFd>,
    /// There was none: not before this.
    retry: Option<Instant>,
}

impl<'a> Listeners<'a> {
    pub fn new(site: &'a Site, server: u32) -> Self {
        Self { site, server, kept: Vec::new(), keeper: None, retry: None }
    }

    /// Keeps init's listener, or what an earlier monitor kept.
    pub fn keep(&mut self, calls: Calls) {
        self.kept.push(Kept { calls, parked: false, due: Instant::now() });
    }

    /// Keeps the listener of a process that joined.
    pub fn keep_joiners(&mut self, calls: Calls) {
        self.kept.push(Kept { calls, parked: false, due: Instant::now() + GROWN_UP });
    }

    /// What to wait for.
    pub fn polled(&self) -> impl Iterator<Item = PollFd<'_>> {
        let listeners = self.kept.iter().map(|kept| {
            // Without events only the hang-up is told.
            let heard = !kept.parked && self.retry.is_none();
            PollFd::new(kept.calls.listener.as_fd(), if heard { PollFlags::POLLIN } else { PollFlags::empty() })
        });
        listeners.chain(self.keeper.iter().map(|keeper| PollFd::new(keeper.as_fd(), PollFlags::POLLIN)))
    }

    /// When [`Listeners::serve`] has something to do though nothing happens.
    pub fn due(&self) -> Option<Instant> {
        let due = self.kept.iter().filter(|kept| !kept.parked).map(|kept| kept.due).min()?;
        Some(self.retry.map_or(due, |retry| retry.max(due)))
    }

    /// A new supervisor is there: whatever waits for one need not wait longer.
    pub fn hurry(&mut self) {
        self.retry = None;
    }

    /// Lets go of those that nobody is behind, and parks what is due. `ready` tells of which something happened.
    pub fn serve(&mut self, ready: &[(RawFd, PollFlags)]) {
        let happened = |fd: RawFd| ready.iter().find(|(ready, _)| *ready == fd).map(|(_, flags)| *flags);
        if self.keeper.as_ref().is_some_and(|keeper| happened(keeper.as_fd().as_raw_fd()).is_some()) {
            self.keeper = None;
            self.kept.iter_mut().for_each(|kept| kept.parked = false);
        }
        let now = Instant::now();
        self.kept.retain_mut(|kept| match happened(kept.calls.listener.as_raw_fd()) {
            Some(flags) if !flags.contains(PollFlags::POLLIN) => false,
            Some(_) => {
                kept.due = now;
                true
            }
            None => true,
        });
        if self.retry.is_some_and(|retry| now < retry) {
            return;
        }
        self.retry = None;
        for kept in self.kept.iter_mut().filter(|kept| !kept.parked && kept.due <= now) {
            match calls::park(self.site, self.server, &kept.calls) {
                Ok(keeper) => {
                    kept.parked = true;
                    self.keeper = Some(keeper);
                }
                Err(error) => {
                    // Calls wait meanwhile, as readers of its files do.
                    log::debug!("{error:#}");
                    self.retry = Some(now + RETRY);
                    return;
                }
            }
        }
    }
}
