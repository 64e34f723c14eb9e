//! The side that a server comes to: `vsctl migrate-receive`, which another host's `vsctl migrate` has started.
//!
//! It does what it is told, one message after the other, and decides nothing: what it has taken in becomes its own only when the
//! other side says so. When the connection ends before all is on the disk, it takes back what it has made.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kernel::lock::Flock;
use kernel::process::wait_for_joined_threads;

use super::alive::{Connection, Limit};
use super::blocks::{self, Answer};
use super::files::Place;
use super::pages::{Event, Relay};
use super::wire::{Bulk, Deal, Lost, Message, Offer, Problem, is_lost, send_whole, unexpected};
use super::{changes, check, files};
use crate::checkpoint::{self, Memory};
use crate::events;
use crate::failure::{Exit, Failure, exit_of};
use crate::lifecycle::arrive::Arrival;
use crate::lifecycle::facilities::Facilities;
use crate::lifecycle::gate::Lifeline;
use crate::lifecycle::start::{self, Starting};
use crate::lifecycle::state::{self, State};
use crate::lifecycle::{create, execute, stop};
use crate::name::Name;
use crate::site::Site;
use crate::spec::Spec;
use crate::store::{self, Migration, Record, Server, Side};
use crate::template::progress::Silent;
use crate::template::{Held, InTheWay, Templates};

/// One connection.
struct Session<'a> {
    site: &'a Site,
    channel: Connection,
    peer: String,
    /// Memory that is on its way, and what its server hangs on when that runs already.
    relay: Option<Relay>,
    lifeline: Option<(Name, Lifeline)>,
    /// What is here came by this connection.
    has_taken_in: bool,
    moments: usize,
}

/// Serves the connection on standard input and output.
///
/// # Errors
/// Only what the other side cannot be told: that the connection is gone.
pub fn receive(site: &Site) -> Result<()> {
    let own = |fd: io::Result<OwnedFd>| fd.context("take the connection");
    let (from, to) = (own(io::stdin().as_fd().try_clone_to_owned())?, own(io::stdout().as_fd().try_clone_to_owned())?);
    let limit = Limit::new(Duration::from_secs(site.settings.migrate.silence.get()));
    let channel = Connection::over(from, to, &limit)?;
    let mut session =
        Session { site, channel, peer: String::new(), relay: None, lifeline: None, has_taken_in: false, moments: 0 };
    let served = session.serve();
    // Before anything else ends: without who brings its memory it would go on with zeros.
    let ended = session.lifeline.take().map(|(name, _lifeline)| stop::end_at_once(site, &name));
    let Err(error) = served.and(ended.unwrap_or(Ok(()))) else { return Ok(()) };
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
        // What has come for the server that was offered: nobody may remove it before there is one.
        let mut template: Option<Held> = None;
        let mut deal: Option<Deal> = None;
        // Its processes, which are whole and stand still. Gone before they may go on, they are taken back.
        let mut restored: Option<Starting> = None;
        while let Some(message) = self.hear()? {
            match (message, offered.take(), &deal) {
                (Message::Offer(offer), None, None) => {
                    let spec = Spec::parse(&offer.spec, "server.toml")?;
                    let working = self.channel.alive();
                    let checked = check::look(self.site, &offer, &spec)?;
                    drop(working);
                    self.channel.send(&Message::Checked(checked))?;
                    offered = Some((*offer, spec));
                }
                (Message::Template(name), Some((offer, spec)), None) if name == spec.template => {
                    template = Some(self.take_template(&offer, &name)?);
                    offered = Some((offer, spec));
                }
                (Message::Prepare, Some((offer, spec)), None) => {
                    self.take_in(&offer, &spec)?;
                    drop(template.take());
                }
                (Message::Restore(told), None, None) if restored.is_none() => restored = Some(self.restore(&told)?),
                (Message::RestoreThin(told), None, _) if restored.is_none() => restored = self.restore_thin(&told)?,
                (Message::Commit(told), None, _) => {
                    self.commit(&told, restored.as_mut())?;
                    deal = Some(told);
                }
                (Message::Start, None, Some(deal)) => {
                    let name = deal.name.clone();
                    self.start(&name, restored.take())?;
                }
                (Message::Abort(told), None, None) => {
                    self.relay = None;
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
        match self.carry_until_message() {
            Err(error) if error.is::<Lost>() => Ok(None),
            heard => heard.map(Some),
        }
    }

    fn carry_until_message(&mut self) -> Result<Message> {
        // A slow line may be busy with one answer for long.
        let _working = self.relay.as_ref().map(|_| self.channel.alive());
        while let Some(relay) = &mut self.relay {
            match relay.next(&mut self.channel, None)? {
                Event::Message(message) => return Ok(message),
                Event::Done => self.settle()?,
                Event::Moved(_) | Event::Ready => {}
            }
        }
        self.channel.receive()
    }

    /// Carries memory, as long as there is any, until `ready` can be read.
    fn carry_until_ready(&mut self, ready: BorrowedFd<'_>) -> Result<()> {
        while let Some(relay) = &mut self.relay {
            match relay.next(&mut self.channel, Some(ready))? {
                Event::Ready => return Ok(()),
                Event::Done => self.settle()?,
                Event::Moved(_) => {}
                Event::Message(message) => return Err(unexpected(&message)),
            }
        }
        Ok(())
    }

    /// All memory is there.
    fn settle(&mut self) -> Result<()> {
        self.relay = None;
        if let Some((name, lifeline)) = self.lifeline.take() {
            // Its monitor does, too, if it has one.
            let _ = fs::remove_file(state::arriving_file(self.site, &name));
            lifeline.settle();
        }
        self.channel.send(&Message::PagesArrived)
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

    /// Takes in the template that is offered, unless somebody else has brought the same here meanwhile.
    fn take_template(&mut self, offer: &Offer, name: &Name) -> Result<Held> {
        let _working = self.channel.alive();
        self.moment()?;
        let digest = &offer.record.template_digest;
        let templates = Templates::below(&self.site.state());
        let mut silent = Silent;
        match templates.expect(name, |lock| store::lock_soon(lock, "the templates"), &mut silent) {
            Ok(mut incoming) => {
                self.channel.send(&Message::SendTemplate)?;
                let said = incoming.unpack(&mut Bulk::new(&mut self.channel))?;
                said.iter().for_each(|line| log::warn!("template '{name}': {line}"));
                self.moment()?;
                incoming.finish(digest)?;
            }
            Err(error) if exit_of(&error) == Exit::Exists => {}
            Err(error) => return Err(error),
        }
        let held = templates.hold(name)?;
        check::is_the_same(&held.template, digest)?;
        self.moment()?;
        self.channel.send(&Message::TemplateArrived)?;
        Ok(held)
    }

    /// Takes in all but processes, and makes this host ready for those, too.
    fn take_in(&mut self, offer: &Offer, spec: &Spec) -> Result<()> {
        let working = self.channel.alive();
        self.moment()?;
        let site = self.site;
        // Until the record names it, nobody may remove it.
        let _template = Templates::below(&site.state()).hold(&spec.template)?;
        self.forget(&offer.deal)?;
        let lock = self.hold(&offer.deal.name)?;
        let facilities = Facilities(site);
        let were_up = facilities.are_up()?;
        let arrival = Arrival::begin(site, &offer.deal.name, &offer.record, spec.volume)?;
        // What follows forks, so nobody says meanwhile that we work.
        drop(working);
        wait_for_joined_threads();
        let ready = match offer.processes {
            // Now, and not when they stand still.
            Some(_) => facilities.ensure().and_then(|()| facilities.ensure_view()),
            None => Ok(()),
        };
        let _working = self.channel.alive();
        if let Err(error) = ready.and_then(|()| self.fill(offer, spec, arrival.record())) {
            let dark = || if were_up { Ok(()) } else { facilities.remove_unused() };
            return Err(match arrival.give_up().and_then(|()| dark()) {
                Ok(()) => error,
                Err(left) => anyhow!("{error:#}; {left:#}"),
            });
        }
        let migration = Migration {
            side: Side::Incoming,
            transaction: offer.deal.transaction.clone(),
            peer: self.peer.clone(),
            start: false,
            is_postcopy: false,
        };
        arrival.complete(&offer.spec, &migration)?;
        self.has_taken_in = true;
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
            let mut in_the_way = InTheWay::Refused;
            match self.channel.receive()? {
                Message::Files => {}
                Message::Blocks => {
                    self.tell_blocks(&place)?;
                    continue;
                }
                Message::Patch => {
                    blocks::apply(&place.directory, &mut Bulk::new(&mut self.channel))?;
                    self.arrived(&place, listing.is_none())?;
                    continue;
                }
                Message::Again => {
                    changes::make_room(&place.directory, &[place.root()], &self.hear_listing()?)?;
                    in_the_way = InTheWay::Stays;
                }
                Message::Changes => {
                    let told = self.hear_listing()?;
                    changes::make_room(&place.directory, &place.members(), &told)?;
                    listing = Some(told);
                }
                Message::Whole => break,
                other => return Err(unexpected(&other)),
            }
            files::unpack(self.site, name, &place, spec, &mut Bulk::new(&mut self.channel), in_the_way)?;
            self.arrived(&place, listing.is_none())?;
        }
        if let Some(listing) = listing {
            changes::check_whole(&place.directory, &place.members(), &listing)?;
        }
        let server = Server { name: name.clone(), spec: spec.clone(), record: record.clone() };
        checkpoint::adopt(self.site, &server)?;
        place.sync()?;
        self.moment()
    }

    fn hear_listing(&mut self) -> Result<Vec<u8>> {
        let mut told = Vec::new();
        Bulk::new(&mut self.channel).read_to_end(&mut told).context("hear which files there are")?;
        Ok(told)
    }

    /// Files have come.
    fn arrived(&mut self, place: &Place, server_runs: bool) -> Result<()> {
        if server_runs {
            // It is on the disk before the server stands still.
            place.sync()?;
        }
        self.channel.send(&Message::Arrived)
    }

    /// Says what has come of large files.
    fn tell_blocks(&mut self, place: &Place) -> Result<()> {
        let mut asked = Vec::new();
        Bulk::new(&mut self.channel).read_to_end(&mut asked).context("hear which files may change again")?;
        self.channel.send(&Message::Sums)?;
        send_whole(&mut self.channel, &mut Answer::to(&asked, &place.directory)?, &mut |_| {}).map(drop)
    }

    /// The same of thin images; none when they are spent.
    fn restore_thin(&mut self, deal: &Deal) -> Result<Option<Starting>> {
        self.check_is(deal)?;
        if state::arriving_file(self.site, &deal.name).exists() {
            let message = format!(
                "the memory of '{}' is on its way, and the connection that it comes by may have ended",
                deal.name
            );
            let hint = "when that is certain the server is ended there; then `--continue` boots it anew";
            return Err(Failure::new(Exit::Locked, message).hint(hint).into());
        }
        if checkpoint::is_thin(self.site, &deal.name)? {
            return self.restore(deal).map(Some);
        }
        self.channel.send(&Message::Spent)?;
        Ok(None)
    }

    /// Brings the processes back, which are the other host's still.
    fn restore(&mut self, deal: &Deal) -> Result<Starting> {
        let outcome = self.bring_back(deal).and_then(|restored| {
            self.moment()?;
            self.channel.send(&Message::Restored)?;
            Ok(restored)
        });
        outcome.or_else(|error| {
            self.relay = None;
            let is_incoming = store::migration(self.site, &deal.name)?.is_some();
            match is_incoming && !is_lost(&error) {
                // Told that it failed, the other side counts on nothing that is here.
                true => self.forget(deal).and(Err(error)),
                false => Err(error),
            }
        })
    }

    fn bring_back(&mut self, deal: &Deal) -> Result<Starting> {
        self.moment()?;
        let (site, name) = (self.site, &deal.name);
        let working = self.channel.alive();
        let lock = self.hold(name)?;
        self.check_is(deal)?;
        let mut manifest = checkpoint::just_written(site, name)?;
        if manifest.is_thin && !self.has_taken_in {
            manifest = checkpoint::thin(site, name)?;
        }
        let is_incoming = |came: Migration| came.side == Side::Incoming && came.transaction == deal.transaction;
        // What was committed has its memory elsewhere as long as its images are thin.
        if !store::migration(site, name)?.map_or(manifest.is_thin, is_incoming) {
            return Err(unexpected(&Message::Restore(deal.clone())));
        }
        drop(working);
        wait_for_joined_threads();
        let mut memory = Memory::Waits;
        if manifest.is_thin {
            let pages = checkpoint::take_pages(site, name)?;
            memory = Memory::Comes(pages.socket().try_clone().context("keep a descriptor")?.into());
            self.relay = Some(Relay::of(pages));
        }
        let restored = checkpoint::restore(site, name, manifest, memory, lock)?;
        let _working = self.channel.alive();
        if let Some(gate) = restored.gate() {
            self.carry_until_ready(gate)?;
        }
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
            self.open(name, restored);
        }
        self.channel.send(&Message::Committed)
    }

    /// Lets what was restored go on.
    fn open(&mut self, name: &Name, restored: &mut Starting) {
        let Some(lifeline) = restored.open() else { return };
        match &mut self.relay {
            Some(relay) => {
                relay.leave();
                self.lifeline = Some((name.clone(), lifeline));
            }
            None => lifeline.settle(),
        }
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
        let site = self.site;
        if let Some(restored) = restored {
            let _working = self.channel.alive();
            self.carry_until_ready(restored.report())?;
            restored.finish(site)?;
        } else if !matches!(state::of(site, name)?, State::Running | State::Frozen) {
            let lock = self.hold(name)?;
            let working = self.channel.alive();
            let is_suspended = checkpoint::is_suspended(site, name);
            let manifest = is_suspended.then(|| checkpoint::restorable(site, name)).transpose()?;
            drop(working);
            wait_for_joined_threads();
            let starting = match manifest {
                Some(manifest) => checkpoint::restore(site, name, manifest, Memory::Here, lock)?,
                None => start::begin_held(site, name, lock)?,
            };
            let _working = self.channel.alive();
            starting.finish(site)?;
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
        let _working = self.channel.alive();
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
