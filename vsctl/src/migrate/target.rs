//! The side that a server comes to: `vsctl migrate-receive`, which another host's `vsctl migrate` has started.
//!
//! It does what it is told, one message after the other, and decides nothing: what it has taken in becomes its own only when the
//! other side says so. When the connection ends before all is on the disk, it takes back what it has made.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use anyhow::{Context, Result, anyhow};
use kernel::lock::Flock;
use kernel::process::wait_for_joined_threads;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::files::Place;
use super::wire::{Bulk, Channel, Deal, Lost, Message, Offer, Problem, is_lost, unexpected};
use super::{changes, check, files};
use crate::checkpoint;
use crate::events;
use crate::failure::{Exit, Failure};
use crate::lifecycle::arrive::Arrival;
use crate::lifecycle::start::{self, Starting};
use crate::lifecycle::state::{self, State};
use crate::lifecycle::{create, execute};
use crate::name::Name;
use crate::site::Site;
use crate::spec::Spec;
use crate::store::{self, Migration, Record, Server, Side};
use crate::template::Templates;

/// One connection.
struct Session<'a> {
    site: &'a Site,
    channel: Channel<Heard, File>,
    patience_s: Arc<AtomicI64>,
    peer: String,
    moments: usize,
}

/// How long the other side may be silent. A host that has lost its current does not say so, and what it has begun here holds the
/// server's lock.
const PATIENCE_S: i64 = 15 * 60;

/// … and while processes stand still for its word, which it says at once.
const PATIENCE_RESTORED_S: i64 = 60;

/// What comes from the other side; it ends when that is silent for too long.
struct Heard {
    from: File,
    patience_s: Arc<AtomicI64>,
}

impl Read for Heard {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let patience = Timespec { tv_sec: self.patience_s.load(Ordering::Relaxed), tv_nsec: 0 };
        match poll(&mut [PollFd::new(&self.from, PollFlags::IN)], Some(&patience)) {
            Ok(0) => Ok(0),
            Ok(_) => self.from.read(into),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Serves the connection on standard input and output.
///
/// # Errors
/// Only what the other side cannot be told: that the connection is gone.
pub fn receive(site: &Site) -> Result<()> {
    let own = |fd: io::Result<std::os::fd::OwnedFd>| fd.map(File::from).context("take the connection");
    let from = own(io::stdin().as_fd().try_clone_to_owned())?;
    let to = own(io::stdout().as_fd().try_clone_to_owned())?;
    let patience_s = Arc::new(AtomicI64::new(PATIENCE_S));
    let heard = Heard { from, patience_s: Arc::clone(&patience_s) };
    let mut session = Session { site, channel: Channel::new(heard, to), patience_s, peer: String::new(), moments: 0 };
    let Err(error) = session.serve() else { return Ok(()) };
    if is_lost(&error) {
        // Nobody is there to be told, and what came was taken back: else the error says what is left.
        log::debug!("{error:#}");
        return Ok(());
    }
    // Told where the command was typed, and printed there.
    session.channel.send(&Message::Failed(Problem::of(&error))).map_err(|_| error)
}

impl Session<'_> {
    fn serve(&mut self) -> Result<()> {
        self.peer = self.channel.greet()?.host;
        let mut offered: Option<(Offer, Spec)> = None;
        let mut deal: Option<Deal> = None;
        // Its processes, which are whole and stand still. Gone before they may go on, they are taken back.
        let mut restored: Option<Starting> = None;
        while let Some(message) = self.hear()? {
            match (message, offered.take(), &deal) {
                (Message::Offer(offer), None, None) => {
                    let spec = Spec::parse(&offer.spec, "server.toml")?;
                    let problems = check::problems(self.site, &offer, &spec)?;
                    self.channel.send(&Message::Checked(problems))?;
                    offered = Some((*offer, spec));
                }
                (Message::Prepare, Some((offer, spec)), None) => self.take_in(&offer, &spec)?,
                (Message::Restore(told), None, None) if restored.is_none() => restored = Some(self.restore(&told)?),
                (Message::Commit(told), None, None) => {
                    self.commit(&told, restored.as_mut())?;
                    deal = Some(told);
                }
                (Message::Start, None, Some(deal)) => {
                    let name = deal.name.clone();
                    self.start(&name, restored.take())?;
                }
                (Message::Abort(told), None, None) => {
                    if let Some(restored) = restored.take() {
                        // That it does not run is what was asked for.
                        let _ = restored.finish(self.site);
                    }
                    self.abort(&told)?;
                }
                (other, ..) => return Err(unexpected(&other)),
            }
        }
        Ok(())
    }

    /// The next message; none when the other side has said all.
    fn hear(&mut self) -> Result<Option<Message>> {
        match self.channel.receive() {
            Err(error) if error.is::<Lost>() => Ok(None),
            heard => heard.map(Some),
        }
    }

    /// For tests of crashes: see [`execute::fault`].
    fn moment(&mut self) -> Result<()> {
        self.moments += 1;
        execute::fault("migrate-receive", self.moments)
    }

    /// Takes the server's lock, for one message: while the next is waited for, another connection may come with it.
    fn hold(&self, name: &Name) -> Result<Flock> {
        let lock = store::lock(self.site, name)?;
        create::settle(self.site, name)?;
        Ok(lock)
    }

    fn take_in(&mut self, offer: &Offer, spec: &Spec) -> Result<()> {
        self.moment()?;
        let site = self.site;
        // Until the record names it, nobody may remove it.
        let _template = Templates::below(&site.state()).hold(&spec.template)?;
        self.forget(&offer.deal)?;
        let lock = self.hold(&offer.deal.name)?;
        let arrival = Arrival::begin(site, &offer.deal.name, &offer.record, spec.volume)?;
        if let Err(error) = self.fill(offer, spec, arrival.record()) {
            return Err(match arrival.give_up() {
                Ok(()) => error,
                Err(left) => anyhow!("{error:#}; {left:#}"),
            });
        }
        let migration = Migration {
            side: Side::Incoming,
            transaction: offer.deal.transaction.clone(),
            peer: self.peer.clone(),
            start: false,
        };
        arrival.complete(&offer.spec, &migration)?;
        drop(lock);
        let told = self.moment().and_then(|()| self.channel.send(&Message::Prepared));
        if told.as_ref().is_err_and(|error| !is_lost(error)) {
            // Not told, so nobody counts on it. Where the connection has ended, that is not known.
            self.forget(&offer.deal)?;
        }
        told
    }

    /// Has the files sent.
    fn fill(&mut self, offer: &Offer, spec: &Spec, record: &Record) -> Result<()> {
        self.moment()?;
        self.channel.send(&Message::Ready)?;
        let name = &offer.deal.name;
        let place = Place::of(self.site, name, spec)?;
        let mut listing = None;
        loop {
            match self.channel.receive()? {
                Message::Files => {}
                Message::Changes => {
                    let mut told = Vec::new();
                    Bulk::new(&mut self.channel).read_to_end(&mut told).context("hear which files there are")?;
                    changes::make_room(&place.directory, &place.members(), &told)?;
                    listing = Some(told);
                }
                Message::Whole => break,
                other => return Err(unexpected(&other)),
            }
            files::unpack(self.site, name, &place, spec, &mut Bulk::new(&mut self.channel))?;
            self.channel.send(&Message::Arrived)?;
        }
        if let Some(listing) = listing {
            changes::check_whole(&place.directory, &place.members(), &listing)?;
        }
        place.sync()?;
        let server = Server { name: name.clone(), spec: spec.clone(), record: record.clone() };
        checkpoint::adopt(self.site, &server)?;
        self.moment()
    }

    /// Brings the processes back, which are the other host's still.
    fn restore(&mut self, deal: &Deal) -> Result<Starting> {
        let outcome = self.bring_back(deal).and_then(|restored| {
            self.moment()?;
            self.patience_s.store(PATIENCE_RESTORED_S, Ordering::Relaxed);
            self.channel.send(&Message::Restored)?;
            Ok(restored)
        });
        outcome.or_else(|error| match is_lost(&error) {
            true => Err(error),
            // Told that it failed, the other side counts on nothing that is here.
            false => self.forget(deal).and(Err(error)),
        })
    }

    fn bring_back(&mut self, deal: &Deal) -> Result<Starting> {
        self.moment()?;
        let (site, name) = (self.site, &deal.name);
        let lock = self.hold(name)?;
        self.check_is(deal)?;
        let came = store::migration(site, name)?;
        if came.is_none_or(|came| came.side != Side::Incoming || came.transaction != deal.transaction) {
            return Err(unexpected(&Message::Restore(deal.clone())));
        }
        wait_for_joined_threads();
        let restored = checkpoint::restore_waiting(site, name, lock)?;
        match restored.is_whole()? {
            true => Ok(restored),
            false => {
                restored.finish(site).and_then(|()| Err(anyhow!("'{name}' was not restored, and nobody says why")))
            }
        }
    }

    /// From here on the server is this host's own, and what was `restored` of it may go on.
    fn commit(&mut self, deal: &Deal, restored: Option<&mut Starting>) -> Result<()> {
        self.moment()?;
        let name = &deal.name;
        // Of what was restored, its monitor has the lock.
        let lock = if restored.is_none() { Some(self.hold(name)?) } else { None };
        self.check_is(deal)?;
        match store::migration(self.site, name)? {
            // It was committed before the connection was cut.
            None => {}
            Some(Migration { side: Side::Incoming, transaction, .. }) if transaction == deal.transaction => {
                let mark = store::migration_file(self.site, name);
                fs::remove_file(&mark).with_context(|| format!("remove {}", mark.display()))?;
                kernel::file::sync_entry(&mark)?;
                events::note_with(self.site, name, events::Kind::Arrived, Some(format!("from {}", self.peer)));
            }
            Some(_) => {
                let message = format!("what is here of '{name}' came in another migration");
                return Err(Failure::new(Exit::Failed, message).into());
            }
        }
        drop(lock);
        self.moment()?;
        if let Some(restored) = restored {
            restored.open();
        }
        self.channel.send(&Message::Committed)
    }

    fn check_is(&self, deal: &Deal) -> Result<()> {
        let name = &deal.name;
        let record = store::load_record(self.site, name)?;
        if record.uuid == deal.uuid {
            return Ok(());
        }
        Err(Failure::new(Exit::Exists, format!("'{name}' is another server here")).into())
    }

    fn start(&mut self, name: &Name, restored: Option<Starting>) -> Result<()> {
        self.moment()?;
        if let Some(restored) = restored {
            restored.finish(self.site)?;
        } else if !matches!(state::of(self.site, name)?, State::Running | State::Frozen) {
            let lock = self.hold(name)?;
            wait_for_joined_threads();
            match checkpoint::is_suspended(self.site, name) {
                true => checkpoint::resume_held(self.site, name, lock)?,
                false => start::begin_held(self.site, name, lock)?.finish(self.site)?,
            }
        }
        self.moment()?;
        self.channel.send(&Message::Started)
    }

    fn abort(&mut self, deal: &Deal) -> Result<()> {
        self.forget(deal)?;
        self.channel.send(&Message::Aborted)
    }

    /// Removes what came of a server whose host has kept it.
    fn forget(&self, deal: &Deal) -> Result<()> {
        let (site, name) = (self.site, &deal.name);
        let lock = self.hold(name)?;
        if !store::record_file(site, name).exists() {
            return Ok(());
        }
        self.check_is(deal)?;
        match store::migration(site, name)? {
            Some(Migration { side: Side::Incoming, .. }) => create::destroy_held(site, name, true, lock),
            _ => Err(Failure::new(Exit::Exists, format!("'{name}' is this host's own")).into()),
        }
    }
}
