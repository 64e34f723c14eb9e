//! The side that a server leaves: `vsctl migrate`. It alone decides who may run the server.
//!
//! Until `migration.toml` says `moved`, the server is this host's own, and a failure lets it go on here. From then on it is the
//! target's, and `--continue` says so again until the target has heard it and the copy here is gone.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kernel::file::write_atomic;
use kernel::lock::Flock;
use kernel::process::wait_for_joined_threads;

use super::changes::Survey;
use super::files::{Place, Wanted};
use super::link::Link;
use super::wire::{Channel, Deal, Lost, Message, Offer, Size, Sum, send_bulk, unexpected};
use super::{check, files, processes};
use crate::checkpoint::{self, Ahead, kept};
use crate::edit;
use crate::events;
use crate::failure::{self, Exit, Failure};
use crate::lifecycle::state::{self, State};
use crate::lifecycle::stop::{self, Manner};
use crate::lifecycle::world::World;
use crate::lifecycle::{create, execute, start};
use crate::name::Name;
use crate::site::Site;
use crate::size::show_bytes;
use crate::store::{self, Migration, Server, Side};
use crate::template::progress::Progress;

/// What becomes of a server that runs, for the time that it is on its way.
#[derive(Debug, Clone, Copy)]
pub enum Pause {
    /// It is stopped in this manner, and started anew.
    Stop(Manner),
    /// Its processes are put on the disk, and go on.
    Suspend,
    /// The same, after most of their memory was sent while they ran: until the rest is expected to be there within this time.
    Live(Duration),
}

/// How often memory is sent ahead at most: what changes faster than it can be sent does not become less.
const ROUNDS_MAX: u32 = 6;

/// How much of its memory is sent ahead at most, and with the rest: each round but the first is at most [`WORTH_WHILE`] of the one before, or the last.
const SENT_MAX: u64 = 4;

/// A round that leaves more than this part of the one before is the last.
const WORTH_WHILE: f64 = 0.7;

/// What a dry run has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// What would be sent.
    pub size: Size,
    /// Whether the server runs, and would be paused.
    pub runs: bool,
    /// Whether its processes go along.
    pub is_whole: bool,
}

/// A migration under way at its source.
struct Departure<'a> {
    site: &'a Site,
    host: &'a str,
    deal: Deal,
    link: Link,
    /// The target has all of it: from now on it does not take it back by itself.
    is_prepared: bool,
    moments: usize,
}

/// Asks `host` whether it would take the server as it is. Changes nothing.
///
/// # Errors
/// All that speaks against it.
pub fn try_out(site: &Site, name: &Name, host: &str, pause: &Pause) -> Result<Found> {
    let lock = store::lock(site, name)?;
    let server = store::load(site, name)?;
    let found = examine(site, &server, pause, &lock)?;
    Departure::open(site, host, &server)?.offer(&server, found)?;
    Ok(found)
}

/// Moves a server to `host`. One that is stopped or suspended stays so; one that runs is paused on the way, and runs there.
///
/// # Errors
/// What refused. Before it is the target's it goes on here; after that the hint says how to go on.
pub fn go(site: &Site, name: &Name, host: &str, pause: &Pause, progress: &mut dyn Progress) -> Result<()> {
    let lock = store::lock(site, name)?;
    edit::recover(site, name)?;
    let server = store::load(site, name)?;
    let found = examine(site, &server, pause, &lock)?;
    // Of what was interrupted, nothing goes along.
    checkpoint::clear(site, name)?;
    progress.phase("checking", None);
    let mut departure = Departure::open(site, host, &server)?;
    departure.offer(&server, found)?;
    let sent = departure.send(&server, found, pause, &lock, progress);
    if let Err(error) = sent.and_then(|()| departure.give_up_right(found.runs)) {
        departure.call_off();
        return Err(back(site, name, host, found.runs, lock, error));
    }
    departure.finish(found.runs, lock, progress)
}

/// Ends a migration whose command was interrupted after the server had become the target's.
///
/// # Errors
/// When there is none; as [`go`].
pub fn proceed(site: &Site, name: &Name, host: &str, progress: &mut dyn Progress) -> Result<()> {
    let lock = store::lock(site, name)?;
    let server = store::load(site, name)?;
    let migration = match store::migration(site, name)? {
        Some(migration) if migration.side == Side::Moved => migration,
        Some(migration) => return Err(migration.refusal(name).into()),
        None => {
            let hint = format!("migrate it, or `vsctl migrate {name} {host} --abort` removes what {host} has of it");
            return Err(Failure::new(Exit::Failed, format!("'{name}' is this host's own")).hint(hint).into());
        }
    };
    if host != migration.peer {
        let hint = format!("`vsctl migrate {name} {} --continue`", migration.peer);
        return Err(Failure::new(Exit::Failed, format!("'{name}' has moved to {}", migration.peer)).hint(hint).into());
    }
    let mut departure = Departure::open(site, host, &server)?;
    departure.deal.transaction = migration.transaction;
    departure.finish(migration.start, lock, progress)
}

/// Has `host` remove what it has of a server that this host has kept.
///
/// # Errors
/// When the server is the target's.
pub fn abort(site: &Site, name: &Name, host: &str) -> Result<()> {
    let _lock = store::lock(site, name)?;
    let server = store::load(site, name)?;
    store::check_own(site, name)?;
    Departure::open(site, host, &server)?.abort()
}

/// What can be seen here before anybody is asked.
fn examine(site: &Site, server: &Server, pause: &Pause, lock: &Flock) -> Result<Found> {
    let name = &server.name;
    store::check_own(site, name)?;
    let refuse = |why: &str, hint: String| Err(Failure::new(Exit::Failed, format!("'{name}' {why}")).hint(hint).into());
    if let Some(label) = kept::labels(site, name)?.first() {
        let hint = format!("`vsctl checkpoint delete {name} LABEL...` first: they do not go along");
        return refuse(&format!("has checkpoints, '{label}' is one"), hint);
    }
    let (runs, is_whole) = match state::of(site, name)? {
        State::Stopped => (false, false),
        State::Suspended => (false, true),
        State::Running => (true, matches!(pause, Pause::Suspend | Pause::Live(_))),
        State::Frozen => return refuse("is frozen", format!("`vsctl thaw {name}` first")),
        _ => return refuse("is half started or stopped", "`vsctl doctor --fix` takes that back".into()),
    };
    let mut size = Place::of(site, name, &server.spec)?.survey(name)?.size();
    if runs && is_whole {
        checkpoint::check(site, server, lock)?;
        // An upper bound: what is in files is not in the images. What is sent ahead may all have to be sent again.
        let usage = World::new(site).group(&site.server_cgroup(name))?.usage()?;
        let bytes =
            (usage.memory_bytes + usage.swap_bytes) * if matches!(pause, Pause::Live(_)) { SENT_MAX } else { 1 };
        // It is written here before it is sent.
        check::room(site, Size { bytes, entries: 0 })?;
        size.bytes += bytes;
    }
    Ok(Found { size, runs, is_whole })
}

/// Sends a bulk stream. Where the other side has ended because of something, it has said that before.
fn stream<R: Read, W: Write>(
    channel: &mut Channel<R, W>,
    from: &mut dyn Read,
    moved: &mut dyn FnMut(u64),
) -> Result<Sum> {
    match send_bulk(channel, from, moved) {
        Err(error) if error.is::<Lost>() => Err(channel.receive().err().unwrap_or(error)),
        sent => sent,
    }
}

/// The server goes on where it was.
fn back(site: &Site, name: &Name, host: &str, ran: bool, lock: Flock, error: anyhow::Error) -> anyhow::Error {
    let failed = format!("cannot move '{name}' to {host}");
    let error = error.context(failed);
    if !ran || state::of(site, name).is_ok_and(State::is_up) {
        // Memory that was written ahead is of no use any more.
        if let Err(left) = checkpoint::clear(site, name) {
            log::warn!("'{name}': {left:#}");
        }
        return error;
    }
    wait_for_joined_threads();
    let again = match checkpoint::is_suspended(site, name) {
        true => checkpoint::resume_held(site, name, lock),
        false => start::begin_held(site, name, lock).and_then(|starting| starting.finish(site)),
    };
    let outcome = match (again, state::of(site, name)) {
        (Ok(()), _) => format!("'{name}' runs here again"),
        (Err(left), Ok(now)) => format!("'{name}' is {now} here, and does not run again: {left:#}"),
        (Err(left), Err(_)) => format!("'{name}' does not run again here: {left:#}"),
    };
    error.context(execute::Outcome(outcome))
}

impl<'a> Departure<'a> {
    fn open(site: &'a Site, host: &'a str, server: &Server) -> Result<Self> {
        let (link, _) = Link::open(site, host)?;
        let deal = Deal { name: server.name.clone(), uuid: server.record.uuid.clone(), transaction: store::new_uuid() };
        Ok(Self { site, host, deal, link, is_prepared: false, moments: 0 })
    }

    /// For tests of crashes: see [`execute::fault`].
    fn moment(&mut self) -> Result<()> {
        self.moments += 1;
        execute::fault("migrate", self.moments)
    }

    /// Says `told`, and waits for `answer`.
    fn ask(&mut self, told: &Message, answer: &Message) -> Result<()> {
        let channel = self.link.channel()?;
        channel.send(told)?;
        channel.expect(answer)
    }

    /// Has the target look at what would come.
    fn offer(&mut self, server: &Server, found: Found) -> Result<()> {
        let offer = Offer {
            deal: self.deal.clone(),
            spec: edit::text(self.site, &server.name)?,
            record: server.record.clone(),
            architecture: std::env::consts::ARCH.to_owned(),
            size: found.size,
            processes: found.is_whole.then(|| processes::here(self.site, &server.name)).transpose()?,
        };
        let channel = self.link.channel()?;
        channel.send(&Message::Offer(Box::new(offer)))?;
        let problems = match channel.receive()? {
            Message::Checked(problems) => problems,
            other => return Err(unexpected(&other)),
        };
        let Some(first) = problems.first() else { return Ok(()) };
        let list: Vec<String> = problems.iter().map(|problem| format!("\n  {problem}")).collect();
        let message = format!("'{}' cannot be moved to {}:{}", server.name, self.host, list.concat());
        Err(Failure::new(Exit::from_code(first.exit), message).into())
    }

    /// Everything up to where the target has all of it on its disk, and its processes back.
    fn send(
        &mut self,
        server: &Server,
        found: Found,
        pause: &Pause,
        lock: &Flock,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        self.moment()?;
        self.ask(&Message::Prepare, &Message::Ready)?;
        self.moment()?;
        let place = Place::of(self.site, &server.name, &server.spec)?;
        let mut before = None;
        if found.runs {
            progress.phase("sending the volume", Some(found.size.bytes));
            let survey = place.survey_root()?;
            // In this order: see `changes`.
            place.sync()?;
            self.send_files(server, &place, Wanted::Root, None, progress)?;
            before = Some(survey);
            self.moment()?;
        }
        let mut ahead = None;
        if let (Pause::Live(pause), Some(before)) = (pause, &mut before) {
            ahead = Some(self.send_memory(server, &place, *pause, before, lock, progress)?);
            self.moment()?;
        }
        if found.runs && !matches!(state::of(self.site, &server.name)?, State::Running) {
            // Its monitor, which waits for the lock, does what it wanted.
            return Err(Failure::new(Exit::NotRunning, format!("'{}' has ended by itself", server.name)).into());
        }
        match pause {
            _ if !found.runs => {}
            Pause::Stop(manner) => {
                progress.phase("stopping", None);
                stop::stop_locked(self.site, &server.name, manner)?;
            }
            Pause::Suspend | Pause::Live(_) => {
                progress.phase("suspending", None);
                checkpoint::suspend_held(self.site, server, ahead.as_ref(), lock)?;
            }
        }
        self.moment()?;
        match before {
            None => {
                progress.phase("sending the volume", Some(found.size.bytes));
                self.send_files(server, &place, Wanted::All, None, progress)?;
            }
            Some(before) => {
                let changes = place.survey(&server.name)?.since(&before);
                progress.phase("sending what has changed", Some(changes.size.bytes));
                self.send_files(server, &place, Wanted::Names(&changes.names), Some(&changes.listing), progress)?;
            }
        }
        self.moment()?;
        progress.phase("waiting for the disk", None);
        self.ask(&Message::Whole, &Message::Prepared)?;
        self.is_prepared = true;
        self.moment()?;
        if found.runs && found.is_whole {
            progress.phase("restoring", None);
            self.restore()?;
        }
        Ok(())
    }

    /// Sends memory while its programs run, round by round, until what has changed meanwhile is expected to be there within `pause`.
    /// Files of these rounds do not change any more: they are noted in `before`.
    fn send_memory(
        &mut self,
        server: &Server,
        place: &Place,
        pause: Duration,
        before: &mut Survey,
        lock: &Flock,
        progress: &mut dyn Progress,
    ) -> Result<Ahead> {
        let (mut ahead, mut last_bytes) = (Ahead::default(), None);
        for round in 1..=ROUNDS_MAX {
            progress.phase(&format!("writing memory, round {round}"), None);
            let began = Instant::now();
            let (directory, bytes) = ahead.round(self.site, server, lock)?;
            progress.phase(&format!("sending memory, round {round}"), Some(bytes));
            let member = place.below(&directory)?;
            self.send_files(server, place, Wanted::Member(&member), None, progress)?;
            before.include_settled(Survey::take(&place.directory, &[&member])?);
            // As this round is to the one before, so will be what has changed during it; after the first, nobody knows.
            let took = began.elapsed();
            let changed = last_bytes.map_or(1.0, |last: u64| bytes as f64 / last.max(1) as f64);
            let expected = took.mul_f64(changed.min(1.0));
            log::info!(
                "'{}': round {round}: {} in {:.1} s, a pause of {:.1} s is expected",
                server.name,
                show_bytes(bytes),
                took.as_secs_f64(),
                expected.as_secs_f64()
            );
            if expected <= pause || (round > 1 && changed > WORTH_WHILE) {
                break;
            }
            last_bytes = Some(bytes);
        }
        Ok(ahead)
    }

    /// Sends files, with the listing of all of them where only some are sent.
    fn send_files(
        &mut self,
        server: &Server,
        place: &Place,
        wanted: Wanted<'_>,
        listing: Option<&[u8]>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let channel = self.link.channel()?;
        match listing {
            None => channel.send(&Message::Files)?,
            Some(mut listing) => {
                channel.send(&Message::Changes)?;
                let sum = stream(channel, &mut listing, &mut |_| {})?;
                channel.send(&Message::End(sum))?;
            }
        }
        let mut packing = files::pack(self.site, place, &server.spec, wanted)?;
        let sum = stream(channel, &mut packing.output()?, &mut |bytes| progress.advance(bytes))?;
        packing.finish()?;
        channel.send(&Message::End(sum))?;
        channel.expect(&Message::Arrived)
    }

    /// Has the processes brought back there, whole and still: what speaks against it is found while they can go on here.
    fn restore(&mut self) -> Result<()> {
        self.ask(&Message::Restore(self.deal.clone()), &Message::Restored)?;
        self.moment()
    }

    fn abort(&mut self) -> Result<()> {
        self.ask(&Message::Abort(self.deal.clone()), &Message::Aborted)
    }

    /// Has the target forget it, and waits for that: the end of the connection is enough until all is on its disk.
    fn call_off(mut self) {
        if self.is_prepared {
            // Over a connection of its own where this one has ended.
            let aborted = self.abort().or_else(|_| {
                self.link = Link::open(self.site, self.host)?.0;
                self.abort()
            });
            if let Err(error) = aborted {
                let (name, host) = (&self.deal.name, self.host);
                log::warn!("{host} still has what came of '{name}' (`vsctl migrate {name} {host} --abort`): {error:#}");
            }
        }
    }

    /// The point of no return: when this is on the disk, the server is the target's.
    fn give_up_right(&self, start: bool) -> Result<()> {
        let (site, name) = (self.site, &self.deal.name);
        let transaction = self.deal.transaction.clone();
        let migration = Migration { side: Side::Moved, transaction, peer: self.host.to_owned(), start };
        let text = toml::to_string(&migration).context("write the mark as TOML")?;
        let mark = store::migration_file(site, name);
        let Err(error) = write_atomic(&mark, text.as_bytes()) else { return Ok(()) };
        // The target has not been told: it must be gone before anybody runs the server here.
        match std::fs::remove_file(&mark) {
            Err(left) if left.kind() != std::io::ErrorKind::NotFound => {
                Err(left).context(format!("remove {}", mark.display()))
            }
            // Nor may a power cut bring it back.
            _ => Err(kernel::file::sync_entry(&mark).err().unwrap_or(error).into()),
        }
    }

    /// What is left when the server is the target's: to tell it so, to have it started there, and to remove the copy.
    fn finish(mut self, start: bool, lock: Flock, progress: &mut dyn Progress) -> Result<()> {
        let (site, host, name) = (self.site, self.host, self.deal.name.clone());
        progress.phase("handing over", None);
        let started = match self.hand_over(start, progress) {
            Ok(started) => started,
            Err(error) => {
                let message = format!("'{name}' belongs to {host}, which may not know it yet: {error:#}");
                let hint = format!("`vsctl migrate {name} {host} --continue` ends the migration");
                return Err(Failure::new(failure::exit_of(&error), message).hint(hint).into());
            }
        };
        if let (Err(error), true) = (&started, state::suspended_directory(site, &name).exists()) {
            // What is here may be the only one that its processes can go on from.
            let message = format!("'{name}' belongs to {host}, and does not go on there: {error:#}");
            let hint = format!(
                "`vsctl migrate {name} {host} --continue` tries again, and what is here stays until then; docs/migration.md says how to take it back"
            );
            return Err(Failure::new(failure::exit_of(error), message).hint(hint).into());
        }
        events::note_with(site, &name, events::Kind::Moved, Some(format!("to {host}")));
        create::destroy_held(site, &name, true, lock)?;
        self.moment()?;
        started.with_context(|| format!("'{name}' has moved to {host}, and does not start there"))
    }

    /// Tells the target; the inner result is that of the start.
    fn hand_over(&mut self, start: bool, progress: &mut dyn Progress) -> Result<Result<()>> {
        self.moment()?;
        self.ask(&Message::Commit(self.deal.clone()), &Message::Committed)?;
        self.moment()?;
        if !start {
            return Ok(Ok(()));
        }
        progress.phase("starting", None);
        self.link.channel()?.send(&Message::Start)?;
        match self.link.channel()?.expect(&Message::Started) {
            Err(error) if error.is::<Lost>() => Err(error),
            started => {
                self.moment()?;
                Ok(started)
            }
        }
    }
}
