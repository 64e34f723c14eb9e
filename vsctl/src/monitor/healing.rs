//! Keeps a server's files of `/proc` served when the supervisor of `lxcfs-fuse` has ended.
//!
//! ```text
//!   keeper lives ── ends ──> due ──> attempt ── healed: the next keeper ──> keeper lives
//!                             ^         │ failed
//!                             └─ pause ─┘ (doubled each time)
//! ```
//!
//! An attempt is this program anew (`vsctl heal NAME FD`), for a monitor shall stay small and wait for nobody. The first of all
//! monitors starts the next supervisor, under the host's lock; each puts the new files into its own server. So nobody walks over
//! all servers.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kernel::channel;
use kernel::process::{self, CloneOptions, Fork, PidFd};
use nix::poll::{PollFd, PollFlags};

use super::{environment, own_program};
use crate::aside;
use crate::lifecycle::facilities::Facilities;
use crate::lifecycle::{calls, state, view};
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// The hidden verb of an attempt.
pub const VERB: &str = "heal";

/// What an attempt says when it has succeeded, with the pidfd of the supervisor that serves now.
const HEALED: &[u8] = b"healed";

/// Attempts begin at least this far apart: supervisors that die again and again must not keep the host busy.
const INTERVAL: Duration = Duration::from_millis(250);

/// Pauses after failures are doubled this many times at most: 256 s.
const DOUBLINGS_MAX: u32 = 10;

/// An attempt under way; dropped, it is killed.
struct Attempt {
    answer: OwnedFd,
    process: PidFd,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        aside::end(&self.process);
    }
}

pub(super) struct Healing<'a> {
    site: &'a Site,
    name: &'a Name,
    /// The supervisor whose files the server has.
    keeper: Option<PidFd>,
    attempt: Option<Attempt>,
    /// When the next attempt begins.
    due: Option<Instant>,
    /// When the last one has begun.
    begun: Option<Instant>,
    failures: u32,
}

impl<'a> Healing<'a> {
    /// Without a keeper it is not known whose files the server has: an attempt finds out.
    pub fn new(site: &'a Site, name: &'a Name, keeper: Option<PidFd>) -> Self {
        let due = keeper.is_none().then(Instant::now);
        Self { site, name, keeper, attempt: None, due, begun: None, failures: 0 }
    }

    /// What to wait for.
    pub fn polled(&self) -> impl Iterator<Item = PollFd<'_>> {
        let answer = self.attempt.iter().map(|attempt| attempt.answer.as_fd());
        let watched = answer.chain(self.keeper.iter().map(AsFd::as_fd));
        watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN))
    }

    /// When [`Healing::serve`] has something to do though nothing happens.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Goes on with what has happened. Whether a new supervisor serves the server since now.
    pub fn serve(&mut self, ready: &[(RawFd, PollFlags)]) -> bool {
        let happened = |fd: RawFd| ready.iter().any(|(ready, _)| *ready == fd);
        let now = Instant::now();
        if let Some(attempt) = self.attempt.take_if(|attempt| happened(attempt.answer.as_raw_fd())) {
            self.keeper = answer_of(&attempt.answer);
            if self.keeper.is_some() {
                self.failures = 0;
                return true;
            }
            self.failed(now);
        }
        if self.keeper.take_if(|keeper| happened(keeper.as_fd().as_raw_fd())).is_some() {
            self.due = Some(self.begun.map_or(now, |begun| now.max(begun + INTERVAL)));
        }
        if self.due.take_if(|due| *due <= now).is_some() {
            self.begun = Some(now);
            match begin(self.site, self.name, self.failures == 0) {
                Ok(attempt) => self.attempt = Some(attempt),
                Err(_) => self.failed(now),
            }
        }
        false
    }

    fn failed(&mut self, now: Instant) {
        self.due = Some(now + INTERVAL * 2_u32.pow(self.failures.min(DOUBLINGS_MAX)));
        self.failures += 1;
    }
}

/// Begins an attempt. Only the first one in a row tells why it fails, in the log of `lxcfs-fuse`.
fn begin(site: &Site, name: &Name, tells: bool) -> Result<Attempt> {
    let (ours, theirs) = channel::pair()?;
    match process::fork(&CloneOptions::default())? {
        Fork::Parent { pidfd, .. } => Ok(Attempt { answer: ours.into(), process: pidfd }),
        Fork::Child => {
            let program = || -> Result<std::convert::Infallible> {
                if tells {
                    let log = File::options().append(true).open(site.lxcfs().join("log")).context("open the log")?;
                    process::place_descriptor(&log, 2)?;
                }
                let theirs = OwnedFd::from(theirs);
                process::keep_across_exec(theirs.as_fd())?;
                let words = ["vsctl", VERB, name.as_str(), &theirs.as_raw_fd().to_string()].map(CString::new);
                let words = words.into_iter().collect::<Result<Vec<_>, _>>().context("an argument with NUL")?;
                Err(process::exec_path(&own_program()?, &words, &environment()).into())
            };
            let Err(_) = program();
            std::process::exit(1)
        }
    }
}

/// The supervisor that serves now; `None` when the attempt has failed.
fn answer_of(answer: &OwnedFd) -> Option<PidFd> {
    let mut words = [0; 16];
    let (length, descriptors) = channel::receive(answer.as_fd(), &mut words).ok()?;
    descriptors.into_iter().next().filter(|_| &words[..length] == HEALED).map(PidFd::from)
}

/// The main of an attempt: `heal NAME FD`.
///
/// # Errors
/// Why the server's files are not served.
pub fn main(arguments: &[String]) -> Result<i32> {
    let [name, answer] = arguments else { bail!("'{VERB}' is for monitors only") };
    let answer: RawFd = answer.parse().with_context(|| format!("'{answer}' is no descriptor"))?;
    process::close_from(3, &[answer])?;
    let answer = process::adopt_descriptor(answer)?;
    let name: Name = name.parse()?;
    let site = Site::from_environment()?;
    match heal(&site, &name).with_context(|| format!("cannot heal the files of /proc of '{name}'")) {
        Ok(keeper) => channel::send(answer.as_fd(), HEALED, &[keeper.as_fd()])?,
        Err(error) => {
            // Closed by the end of this process only: the monitor kills it when it sees that, and the error is not printed yet.
            std::mem::forget(answer);
            return Err(error);
        }
    }
    Ok(0)
}

fn heal(site: &Site, name: &Name) -> Result<PidFd> {
    Facilities(site).ensure_view()?;
    // Before its files are taken: if another comes meanwhile, this one's end says so.
    let keeper = calls::supervisor(site)?;
    let status = state::status(site, name)?.context("the server has ended")?;
    view::reattach(site, name, store::load_record(site, name)?.id, &status)?;
    Ok(keeper)
}
