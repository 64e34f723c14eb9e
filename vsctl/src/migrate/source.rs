//! The side that a server leaves: `vsctl migrate`. It alone decides who may run the server.
//!
//! Until `migration.toml` says `moved`, the server is this host's own, and a failure lets it go on here. From then on it is the
//! target's, and `--continue` says so again until the target has heard it and the copy here is gone.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kernel::file::write_atomic;
use kernel::lock::Flock;
use kernel::process::wait_for_joined_threads;

use super::alive::Alive;
use super::changes::Survey;
use super::files::{Place, Wanted};
use super::ladder::Hindrance;
use super::link::Link;
use super::pages::Relay;
use super::passes::Passes;
use super::rounds::{Round, Rounds};
use super::wire::{Checked, Deal, Lost, Message, Offer, Size, stream, unexpected};
use super::{check, files, processes};
use crate::checkpoint::{self, Ahead, Subject, kept};
use crate::edit;
use crate::events;
use crate::failure::{self, Exit, Failure};
use crate::interrupt::{self, Hold};
use crate::lifecycle::state::{self, State};
use crate::lifecycle::stop::{self, Manner};
use crate::lifecycle::world::World;
use crate::lifecycle::{create, execute, start};
use crate::name::Name;
use crate::site::Site;
use crate::size::show_bytes;
use crate::store::{self, Leaving, Migration, Pausing, Server, Side};
use crate::template::progress::Progress;
use crate::template::{Held, Templates};

/// What becomes of a server that runs, for the time that it is on its way.
#[derive(Debug, Clone, Copy)]
pub enum Pause {
    /// It is stopped in this manner, and started anew.
    Stop(Manner),
    /// Its processes are put on the disk, and go on.
    Suspend(Memory),
    /// The same, after most of their memory was sent while they ran: until the rest is expected to be there within this time.
    Live(Duration, Memory),
}

/// When the memory is sent that was not while they ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Before they go on.
    First,
    /// While they do: what they ask for at once, and all else bit by bit.
    Later,
}

impl Pause {
    fn is_postcopy(&self) -> bool {
        matches!(self, Self::Suspend(Memory::Later) | Self::Live(_, Memory::Later))
    }
}

/// How often memory is sent ahead at most: what changes faster than it can be sent does not become less.
const ROUNDS_MAX: u32 = 6;

/// How much of its memory is sent ahead at most, and with the rest: each round but the first is less than the one before, or the last ([`Rounds`]).
const SENT_MAX: u64 = 4;

/// What a dry run has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// What would be sent, at most.
    pub size: Size,
    /// How much of it is for memory, in bytes.
    pub memory_bytes: u64,
    /// Whether the server runs, and would be paused.
    pub runs: bool,
    /// Whether it would run there: it does here, or did until an attempt was interrupted.
    pub starts: bool,
    /// Whether its processes go along.
    pub is_whole: bool,
    /// What the template takes, if it can be sent; after the target has answered, if it has to be.
    pub template: Option<Size>,
}

/// A migration under way at its source.
struct Departure<'a> {
    site: &'a Site,
    host: &'a str,
    deal: Deal,
    link: Link,
    /// The target has all of it: from now on it does not take it back by itself.
    is_prepared: bool,
    /// The other side is told that somebody works here.
    working: Option<Alive>,
    /// Its memory, of which so many bytes come later.
    later: Option<u64>,
    relay: Option<Relay>,
    /// It ended or was started anew by itself: what becomes of it is not ours.
    has_ended: bool,
    /// Since when its processes stand still.
    stands_still: Option<Instant>,
    moments: usize,
}

/// Asks `host` whether it would take the server as it is, and with its template if it `sends_template`. Changes nothing.
///
/// # Errors
/// All that speaks against it.
pub fn try_out(site: &Site, name: &Name, host: &str, pause: &Pause, sends_template: bool) -> Result<Found> {
    let lock = store::lock(site, name)?;
    let server = store::load(site, name)?;
    let template = sends_template.then(|| template_of(site, &server)).transpose()?;
    let found = examine(site, &server, pause, template.as_ref(), &lock)?;
    Departure::open(site, host, &server, false)?.offer(&server, found, pause)
}

/// Moves a server to `host`. One that is stopped or suspended stays so; one that runs is paused on the way, and runs there. With
/// `sends_template` its template goes before it, where it is missing.
///
/// # Errors
/// What refused. Before it is the target's it goes on here; after that the hint says how to go on.
pub fn go(
    site: &Site,
    name: &Name,
    host: &str,
    pause: &Pause,
    sends_template: bool,
    progress: &mut dyn Progress,
) -> Result<()> {
    let lock = store::lock(site, name)?;
    edit::recover(site, name)?;
    let server = store::load(site, name)?;
    let template = sends_template.then(|| template_of(site, &server)).transpose()?;
    let found = examine(site, &server, pause, template.as_ref(), &lock)?;
    // Of what was interrupted, nothing goes along.
    checkpoint::clear(site, name)?;
    progress.phase("checking", None);
    let mut departure = Departure::open(site, host, &server, true)?;
    let found = departure.offer(&server, found, pause)?;
    if found.starts && !found.runs {
        progress.note("it ran when another attempt was interrupted, and goes on there");
    }
    // Until here an end leaves nothing behind.
    let hold = Hold::begin()?;
    departure.working = departure.link.alive();
    let sent = match (&template, found.template) {
        (Some(template), Some(size)) => departure.send_template(template, size, progress),
        _ => Ok(()),
    };
    let sent = sent.and_then(|()| departure.send(&server, found, pause, &lock, progress));
    let given_up = sent.and_then(|()| {
        departure.working = None;
        interrupt::check()?;
        hold.ignore();
        departure.give_up_right(found.starts)
    });
    departure.working = None;
    if let Err(error) = given_up.map_err(interrupt::instead_of) {
        hold.ignore();
        departure.relay = None;
        // First: the other side may be one that does not answer, and nothing of the server moves there.
        let error = back(site, name, host, found.runs && !departure.has_ended, lock, error);
        departure.call_off();
        return Err(error);
    }
    departure.finish(found.starts, lock, progress)
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
    let mut departure = Departure::open(site, host, &server, true)?;
    // From now on an end of this command may cost the server its memory, if that comes later.
    let hold = Hold::begin()?;
    hold.ignore();
    departure.deal.transaction = migration.transaction;
    if migration.is_postcopy && checkpoint::is_on_disk(site, name) {
        progress.phase("restoring", None);
        departure.working = departure.link.alive();
        let again = departure.restore_again();
        departure.working = None;
        if let Err(error) = again {
            return Err(departure.does_not_go_on(&error));
        }
    }
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
    Departure::open(site, host, &server, false)?.abort()
}

/// The server's template, which stays as long as it may have to be sent.
fn template_of(site: &Site, server: &Server) -> Result<Held> {
    let held = Templates::below(&site.state()).hold(&server.spec.template)?;
    if held.template.record.digest == server.record.template_digest {
        return Ok(held);
    }
    let message = format!("'{}' was made from another template than '{}' is now", server.name, server.spec.template);
    Err(Failure::new(Exit::NoTemplate, message).into())
}

/// What can be seen here before anybody is asked.
fn examine(site: &Site, server: &Server, pause: &Pause, template: Option<&Held>, lock: &Flock) -> Result<Found> {
    let name = &server.name;
    store::check_own(site, name)?;
    let refuse = |why: &str, hint: String| Err(Failure::new(Exit::Failed, format!("'{name}' {why}")).hint(hint).into());
    if let Some(label) = kept::labels(site, name)?.first() {
        let hint = format!("`vsctl checkpoint delete {name} LABEL...` first: they do not go along");
        return refuse(&format!("has checkpoints, '{label}' is one"), hint);
    }
    let (runs, is_whole) = match state::of(site, name)? {
        State::Stopped => (false, false),
        State::Suspended if checkpoint::is_thin(site, name)? => {
            return refuse(
                "waits for its memory",
                format!("end the migration that it came by, or `vsctl start --discard {name}`"),
            );
        }
        State::Suspended => (false, true),
        State::Running => (true, matches!(pause, Pause::Suspend(_) | Pause::Live(..))),
        State::Frozen => return refuse("is frozen", format!("`vsctl thaw {name}` first")),
        _ => return refuse("is half started or stopped", "`vsctl doctor --fix` takes that back".into()),
    };
    let mut size = Place::of(site, name, &server.spec)?.survey(name)?.size();
    let mut memory_bytes = 0;
    if runs && is_whole {
        checkpoint::check(site, server, lock).context(Hindrance::Unfit)?;
        let features = checkpoint::features(site).context(Hindrance::Unfit)?;
        if features.notes_changes != Some(true) && matches!(pause, Pause::Live(..)) {
            let message = "the kernel does not note which memory changes (soft-dirty), which --live needs";
            // The next rung does without.
            return Err(Failure::new(Exit::Unsupported, message).hint("--near-live does without"))
                .context(Hindrance::Attempt);
        }
        // What is sent ahead may all have to be sent again.
        let times = if matches!(pause, Pause::Live(..)) { SENT_MAX } else { 1 };
        memory_bytes = processes::memory_bytes(&World::new(site).group(&site.server_cgroup(name))?)? * times;
        // It is written here before it is sent.
        check::room_with_memory(site, Size { bytes: memory_bytes, entries: 0 }, memory_bytes)?;
        size.bytes += memory_bytes;
    }
    let template = template.map(|held| &held.template.record);
    let template = template.map(|record| Size { bytes: record.size_bytes, entries: record.entries });
    let starts = runs || store::leaving(site, name)?.is_some_and(|leaving| leaving.pausing.is_some());
    Ok(Found { size, memory_bytes, runs, starts, is_whole, template })
}

/// The server goes on where it was.
fn back(site: &Site, name: &Name, host: &str, ran: bool, lock: Flock, error: anyhow::Error) -> anyhow::Error {
    let failed = format!("cannot move '{name}' to {host}");
    let error = error.context(failed);
    // Memory that was written ahead is of no use any more.
    if let Err(left) = checkpoint::clear(site, name) {
        log::warn!("'{name}': {left:#}");
    }
    let state = state::of(site, name);
    if matches!(state, Ok(State::Running)) {
        store::try_forget_leaving(site, name);
    }
    if !ran || state.is_ok_and(State::is_up) {
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
    fn open(site: &'a Site, host: &'a str, server: &Server, apart: bool) -> Result<Self> {
        let (link, _) = Link::open(site, host, apart)?;
        let deal = Deal { name: server.name.clone(), uuid: server.record.uuid.clone(), transaction: store::new_uuid() };
        Ok(Self {
            site,
            host,
            deal,
            link,
            is_prepared: false,
            working: None,
            later: None,
            relay: None,
            has_ended: false,
            stands_still: None,
            moments: 0,
        })
    }

    /// For tests of crashes: see [`execute::fault`].
    fn moment(&mut self) -> Result<()> {
        self.moments += 1;
        execute::fault("migrate", self.moments)
    }

    /// Says `told`, and waits for `answer`.
    fn ask(&mut self, told: &Message, answer: &Message) -> Result<()> {
        self.link.channel()?.send(told)?;
        match self.hear()? {
            message if message == *answer => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// What the other side says next; memory that goes there is passed on meanwhile.
    fn hear(&mut self) -> Result<Message> {
        let channel = self.link.channel()?;
        match &mut self.relay {
            Some(relay) => relay.message(channel),
            None => channel.receive(),
        }
    }

    /// Has the target look at what would come. What is returned says whether the template has to.
    fn offer(&mut self, server: &Server, found: Found, pause: &Pause) -> Result<Found> {
        let offer = Offer {
            deal: self.deal.clone(),
            spec: edit::text(self.site, &server.name)?,
            record: server.record.clone(),
            architecture: std::env::consts::ARCH.to_owned(),
            size: found.size,
            memory_bytes: found.memory_bytes,
            processes: found.is_whole.then(|| processes::of(self.site, &server.name)).transpose()?,
            is_postcopy: found.runs && pause.is_postcopy(),
            template: found.template,
        };
        let channel = self.link.channel()?;
        channel.send(&Message::Offer(Box::new(offer)))?;
        let (problems, template) = match channel.receive()? {
            Message::Checked(Checked { wants_template: true, .. }) if found.template.is_none() => {
                bail!("the other side wants a template that nobody has offered")
            }
            Message::Checked(said) => (said.problems, found.template.filter(|_| said.wants_template)),
            other => return Err(unexpected(&other)),
        };
        let Some(first) = problems.first() else { return Ok(Found { template, ..found }) };
        let list: Vec<String> = problems.iter().map(|problem| format!("\n  {problem}")).collect();
        let message = format!("'{}' cannot be moved to {}:{}", server.name, self.host, list.concat());
        let error = anyhow::Error::from(Failure::new(Exit::from_code(first.exit), message));
        let hindrance = Hindrance::of_all(problems.iter().map(|problem| problem.hindrance)).filter(|_| found.runs);
        Err(match hindrance {
            Some(hindrance) => error.context(hindrance),
            None => error,
        })
    }

    /// Sends the template, unless somebody else has brought it there meanwhile.
    fn send_template(&mut self, held: &Held, size: Size, progress: &mut dyn Progress) -> Result<()> {
        self.moment()?;
        progress.phase("sending the template", Some(size.bytes));
        let channel = self.link.channel()?;
        channel.send(&Message::Template(held.template.name.clone()))?;
        match channel.receive()? {
            Message::SendTemplate => {}
            Message::TemplateArrived => return self.moment(),
            other => return Err(unexpected(&other)),
        }
        self.moment()?;
        let mut packing = files::pack_template(self.site, held)?;
        let channel = self.link.channel()?;
        let sum = stream(channel, &mut packing.output()?, &mut |bytes| progress.advance(bytes))?;
        packing.finish()?;
        self.moment()?;
        self.ask(&Message::End(sum), &Message::TemplateArrived)?;
        self.moment()
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
        if found.runs {
            self.note_leaving(None)?;
        }
        self.moment()?;
        interrupt::check()?;
        let place = Place::of(self.site, &server.name, &server.spec)?;
        let mut passes = None;
        if found.runs {
            progress.phase("sending the volume", Some(found.size.bytes - found.memory_bytes));
            let channel = self.link.channel()?;
            let mut begun = Passes::begin((self.site, &server.spec, &place), channel, progress)?;
            begun.while_less_is_left(channel, progress)?;
            passes = Some(begun);
            self.moment()?;
        }
        let (mut ahead, mut expected) = (None, String::new());
        if let (Pause::Live(pause, _), Some(passes)) = (pause, &mut passes) {
            (ahead, expected) = self.send_memory(server, &place, *pause, passes, lock, progress)?;
            self.moment()?;
        }
        if found.runs && !matches!(state::of(self.site, &server.name)?, State::Running) {
            // Its monitor, which waits for the lock, does what it wanted.
            self.has_ended = true;
            return Err(Failure::new(Exit::NotRunning, format!("'{}' has ended by itself", server.name)).into());
        }
        interrupt::check()?;
        let pausing = if matches!(pause, Pause::Stop(_)) { Pausing::Stops } else { Pausing::Suspends };
        if found.runs {
            self.note_leaving(Some(pausing))?;
        }
        match pause {
            _ if !found.runs => {}
            Pause::Stop(manner) => {
                progress.phase("stopping", None);
                stop::stop_locked(self.site, &server.name, manner)?;
            }
            Pause::Suspend(_) | Pause::Live(..) => {
                progress.phase(&format!("suspending{expected}"), None);
                let subject = self.subject(server, lock)?;
                self.stands_still = Some(Instant::now());
                checkpoint::suspend_held(self.site, server, subject, ahead.as_ref()).context(Hindrance::Attempt)?;
                if pause.is_postcopy() {
                    self.later = self.make_thin(server, progress).context(Hindrance::Attempt)?;
                }
            }
        }
        self.moment()?;
        match passes {
            None => {
                progress.phase("sending the volume", Some(found.size.bytes));
                self.send_files(server, &place, Wanted::All, progress)?;
            }
            Some(mut passes) => {
                let now = if self.later.is_some() { Place::survey_thin } else { Place::survey };
                let changes = passes.since(&now(&place, &server.name)?)?;
                log::info!("'{}': {} to send while it stands still", server.name, show_bytes(changes.size.bytes));
                progress.phase("sending what has changed", Some(changes.size.bytes));
                let wanted = Wanted::Names { listing: &changes.listing, names: &changes.names };
                self.send_files(server, &place, wanted, progress)?;
                passes.send_at_rest(self.link.channel()?, &changes.patched, progress)?;
            }
        }
        self.moment()?;
        progress.phase("waiting for the disk", None);
        let told = self.ask(&Message::Whole, &Message::Prepared);
        // A target that is at it does not look meanwhile whether anybody is still there.
        self.is_prepared = told.is_ok() || interrupt::check().is_err();
        told?;
        self.moment()?;
        interrupt::check()?;
        if found.runs && found.is_whole {
            progress.phase("restoring", None);
            match self.later {
                None => self.restore()?,
                Some(_) => self.restore_thin()?,
            }
        }
        Ok(())
    }

    fn note_leaving(&self, pausing: Option<Pausing>) -> Result<()> {
        store::note_leaving(self.site, &self.deal.name, &Leaving { peer: self.host.to_owned(), pausing })
    }

    /// Looks at the server's processes before each dump. It forks for that, so nobody says meanwhile that it works.
    fn subject<'s>(&mut self, server: &'s Server, lock: &'s Flock) -> Result<Subject<'s>>
    where
        'a: 's,
    {
        self.working = None;
        wait_for_joined_threads();
        let found = Subject::find(self.site, server, lock).context(Hindrance::Attempt);
        self.working = self.link.alive();
        found
    }

    /// Sends memory while its programs run, round by round, until what has changed meanwhile is expected to be there within `pause`.
    /// Files of these rounds do not change any more: they are noted in `passes`. Returns what was sent, if it is worth anything,
    /// and what pause is expected, in words.
    fn send_memory(
        &mut self,
        server: &Server,
        place: &Place,
        pause: Duration,
        passes: &mut Passes<'_>,
        lock: &Flock,
        progress: &mut dyn Progress,
    ) -> Result<(Option<Ahead>, String)> {
        let (mut ahead, mut rounds, first) = (Ahead::default(), Rounds::default(), Instant::now());
        let mut said = String::new();
        for round in 1..=ROUNDS_MAX {
            interrupt::check()?;
            progress.phase(&format!("writing memory, round {round}{said}"), None);
            let subject = self.subject(server, lock)?;
            let began = first.elapsed();
            let written = ahead.round(self.site, server, &subject).context(Hindrance::Attempt)?;
            let wrote = first.elapsed() - began;
            let Some((directory, bytes)) = written else {
                progress.warn("what of its memory was sent is worth nothing: all of it is sent when it stands still");
                said.clear();
                break;
            };
            let changes = rounds.changes(began, bytes);
            let changes = changes.map_or_else(String::new, |rate| format!(", {}/s change", show_bytes(rate as u64)));
            progress.phase(&format!("sending memory, round {round}{changes}"), Some(bytes));
            let member = place.below(&directory)?;
            self.send_files(server, place, Wanted::Member(&member), progress)?;
            // Now, and not when the server stands still and all that there is has to be on the disk.
            place.sync()?;
            let sent = first.elapsed() - began - wrote;
            let files = passes.again(self.link.channel()?, progress)?;
            let took = first.elapsed() - began;
            passes.include_settled(Survey::take(&place.directory, &[&member])?);
            let outlook = rounds.after(Round {
                began,
                wrote,
                sent,
                took,
                bytes,
                files_bytes: files.bytes,
                files_read: files.read,
                files_took: took - wrote - sent,
            });
            let expected = outlook.pause.as_secs_f64();
            said = format!(", a pause of {expected:.1} s is expected");
            log::info!("'{}': round {round}: {} in {:.1} s{said}", server.name, show_bytes(bytes), took.as_secs_f64());
            if outlook.pause <= pause {
                break;
            }
            if outlook.is_over || round == ROUNDS_MAX {
                let wanted = pause.as_secs_f64();
                progress
                    .warn(&format!("a pause of {expected:.1} s is expected: more rounds do not lead to {wanted:.1} s"));
                break;
            }
        }
        Ok(((!ahead.is_empty()).then_some(ahead), said))
    }

    fn send_files(
        &mut self,
        server: &Server,
        place: &Place,
        wanted: Wanted<'_>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        files::send(self.link.channel()?, self.site, place, &server.spec, wanted, progress)
    }

    /// Has the processes brought back there, whole and still: what speaks against it is found while they can go on here.
    fn restore(&mut self) -> Result<()> {
        self.ask(&Message::Restore(self.deal.clone()), &Message::Restored).map_err(|error| {
            match error.is::<Lost>() {
                true => error,
                false => error.context(Hindrance::Attempt),
            }
        })?;
        self.moment()
    }

    /// Makes what goes ahead of its memory, and says how much comes later. None: as much as may not fit there, since what processes have in common
    /// from a fork comes to each of them.
    fn make_thin(&self, server: &Server, progress: &mut dyn Progress) -> Result<Option<u64>> {
        let name = &server.name;
        let later = checkpoint::make_thin(self.site, name)?;
        if server.spec.memory.is_none_or(|limit| later < limit.0) {
            return Ok(Some(later));
        }
        progress.warn(&format!(
            "{} that could come later may be more than its limit when it comes: it is sent first",
            show_bytes(later)
        ));
        checkpoint::forget_thin(self.site, name)?;
        Ok(None)
    }

    /// What is sent again is what it was: it has lain here since.
    fn restore_again(&mut self) -> Result<()> {
        checkpoint::restorable(self.site, &self.deal.name)?;
        // First, since it is theirs whatever comes of this.
        self.ask(&Message::Commit(self.deal.clone()), &Message::Committed)?;
        self.restore_thin()
    }

    /// The same, with memory that is sent meanwhile and later. What has gone on there before is not restored again.
    fn restore_thin(&mut self) -> Result<()> {
        self.relay = Some(Relay::of(checkpoint::send_pages(self.site, &self.deal.name)?));
        self.link.channel()?.send(&Message::RestoreThin(self.deal.clone()))?;
        match self.hear() {
            Ok(Message::Restored) => {}
            Ok(Message::Spent) => self.relay = None,
            Ok(other) => return Err(unexpected(&other)),
            Err(error) if error.is::<Lost>() => return Err(error),
            Err(error) => return Err(error.context(Hindrance::Attempt)),
        }
        self.moment()
    }

    fn abort(&mut self) -> Result<()> {
        self.link.channel()?.send(&Message::Abort(self.deal.clone()))?;
        loop {
            match self.hear()? {
                Message::Aborted => return Ok(()),
                // What nobody waited for any more.
                Message::Prepared | Message::Restored => {}
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Has the target forget it, and waits for that: the end of the connection is enough until all is on its disk.
    fn call_off(mut self) {
        if self.is_prepared {
            // Over a connection of its own where this one has ended.
            let aborted = self.abort().or_else(|_| {
                // One at a time works on it there.
                self.link.end();
                self.link = Link::open(self.site, self.host, false)?.0;
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
        let (peer, is_postcopy) = (self.host.to_owned(), self.later.is_some());
        let migration = Migration { side: Side::Moved, transaction, peer, start, is_postcopy };
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
        let working = self.link.alive();
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
            return Err(self.does_not_go_on(error));
        }
        if let (Some(since), Ok(())) = (self.stands_still, &started) {
            progress.note(&format!("goes on at {host} after {:.1} s", since.elapsed().as_secs_f64()));
        }
        self.send_rest(progress)?;
        drop(working);
        events::note_with(site, &name, events::Kind::Moved, Some(format!("to {host}")));
        create::destroy_held(site, &name, true, lock)?;
        self.moment()?;
        started.with_context(|| format!("'{name}' has moved to {host}, and does not start there"))
    }

    fn does_not_go_on(&self, error: &anyhow::Error) -> anyhow::Error {
        let (name, host) = (&self.deal.name, self.host);
        let message = format!("'{name}' belongs to {host}, and does not go on there: {error:#}");
        let hint = format!(
            "`vsctl migrate {name} {host} --continue` tries again, and what is here stays until then; docs/migration.md says how to take it back"
        );
        Failure::new(failure::exit_of(error), message).hint(hint).into()
    }

    /// Sends the memory that its programs have not asked for.
    fn send_rest(&mut self, progress: &mut dyn Progress) -> Result<()> {
        let Some(relay) = &mut self.relay else { return Ok(()) };
        progress.phase("sending memory", self.later);
        let sent = self.link.channel().and_then(|channel| relay.rest(channel, &mut |bytes| progress.advance(bytes)));
        sent.map_err(|error| {
            let (name, host) = (&self.deal.name, self.host);
            let message =
                format!("'{name}' went on at {host}, and ends there, since not all of its memory came: {error:#}");
            let hint = format!("`vsctl migrate {name} {host} --continue` boots it there anew, from its disk");
            Failure::new(failure::exit_of(&error), message).hint(hint)
        })?;
        self.moment()
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
        match self.ask(&Message::Start, &Message::Started) {
            Err(error) if error.is::<Lost>() => Err(error),
            started => {
                self.moment()?;
                Ok(started)
            }
        }
    }
}
