//! Arrive: a server of another host is taken in, up to the point where only that host's word is missing.
//!
//! The same journal and undo as a creation: what is interrupted before the record is on the disk is taken back. From then on it is
//! there, marked as another's (`migration.toml`), and no command starts it.

use anyhow::{Context, Result};

use super::create;
use super::execute;
use super::files::FilesStep;
use super::journal::Journal;
use super::step::Step;
use super::world::World;
use crate::name::Name;
use crate::site::Site;
use crate::spec::VolumeKind;
use crate::store::{self, Migration, Record};
use crate::volume;

/// The word for its steps in `VSOS_FAULT`.
const PLAN: &str = "arrive";

/// A server that is being taken in. The caller holds its lock.
#[derive(Debug)]
pub struct Arrival<'a> {
    site: &'a Site,
    name: Name,
    record: Record,
    journal: Journal,
}

impl<'a> Arrival<'a> {
    /// Reserves a number and the server's addresses, and makes the directories that its files go to.
    ///
    /// # Errors
    /// What refused; nothing is left then.
    pub fn begin(site: &'a Site, name: &Name, theirs: &Record, kind: VolumeKind) -> Result<Self> {
        let mut journal = create::open_journal(site, name)?;
        let allocation = create::allocation_lock(site)?;
        let planned = create::check_name(site, name).and_then(|()| create::free_id(site, create::FIRST_NUMBER));
        let id = match planned {
            Ok(id) => id,
            Err(error) => {
                journal.remove()?;
                return Err(error);
            }
        };
        let record = Record { id, ..theirs.clone() };
        let reserved = create::plan_reservations(site, name, &record);
        let directories = volume::plan_empty(site, name, kind);
        let steps: Vec<Step> = reserved.into_iter().chain(directories).map(Step::Files).collect();
        let outcome = execute::run(PLAN, 1, &steps, &mut World::new(site), &mut journal);
        drop(allocation);
        match outcome {
            Ok(()) => Ok(Self { site, name: name.clone(), record, journal }),
            Err(error) => {
                if journal.standing().is_empty() {
                    journal.remove()?;
                }
                Err(error)
            }
        }
    }

    /// The record that it gets here.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Puts the server down as one that came, with the mark that it is another host's: its files are on the disk.
    ///
    /// # Errors
    /// What refused; nothing is left then.
    pub fn complete(mut self, spec: &str, migration: &Migration) -> Result<()> {
        let (site, name) = (self.site, &self.name);
        let write = |path, text| Step::Files(FilesStep::WriteFile { path, text });
        let mark = toml::to_string(migration).context("write the mark as TOML")?;
        let record = toml::to_string(&self.record).context("write the record as TOML")?;
        // The record last, and after the mark: there is no moment at which the server is there without it.
        let steps = [
            write(store::spec_file(site, name), spec.to_owned()),
            write(store::migration_file(site, name), mark),
            write(store::record_file(site, name), record),
        ];
        let number = self.journal.standing().len() + 1;
        let outcome = execute::run(PLAN, number, &steps, &mut World::new(site), &mut self.journal);
        if outcome.is_ok() || self.journal.standing().is_empty() {
            self.journal.remove()?;
        }
        outcome
    }

    /// Takes back all that was made.
    ///
    /// # Errors
    /// What could not be taken back; `vsctl doctor --fix` tries again.
    pub fn give_up(mut self) -> Result<()> {
        execute::take_back("recover", &mut World::new(self.site), &mut self.journal)
            .with_context(|| format!("cannot take back all that came of '{}'", self.name))?;
        self.journal.remove()
    }
}
