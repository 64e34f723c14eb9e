//! Create and destroy: between nothing and a defined server.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use ipnet::IpNet;
use kernel::lock::Flock;

use super::execute;
use super::facilities::Facilities;
use super::files::FilesStep;
use super::journal::{Journal, Lasting};
use super::state;
use super::step::Step;
use super::stop;
use super::world::World;
use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::network::{self, Networks};
use crate::site::Site;
use crate::spec::{NetworkMode, Spec, VolumeKind};
use crate::store::{self, Record, Server};
use crate::template::Template;
use crate::template::personalise::Identity;
use crate::volume;
use crate::{edit, events};

/// What a new server is made from.
#[derive(Debug)]
pub struct Creation {
    /// What its owner wants.
    pub spec: Spec,
    /// The text of its `server.toml`.
    pub spec_text: String,
    /// Its template.
    pub template: Template,
    /// What goes into its root beside name and identity: passwords, keys, name servers.
    pub identity: Identity,
}

/// The number of the first server of a site.
pub const FIRST_NUMBER: u32 = 1;

/// Plans a creation: chooses number and addresses that are free now. The number is not below `from`.
///
/// # Errors
/// When the name or an address is taken, or no number is left.
pub fn plan(site: &Site, name: &Name, creation: &Creation, from: u32) -> Result<(Record, Vec<Step>)> {
    check_name(site, name)?;
    let networks = Networks::of(site)?;
    let id = free_id(site, from)?;
    let addresses = addresses(site, &networks, id, &creation.spec)?;
    let mut identity = creation.identity.clone();
    let uuid = store::new_uuid();
    identity.hostname = Some(creation.spec.hostname_or(name));
    identity.machine_id = Some(uuid.clone());
    let record = Record {
        version: 1,
        id,
        uuid,
        created_s: store::now_s(),
        template_digest: creation.template.record.digest.clone(),
        addresses,
    };
    let mut steps = plan_reservations(site, name, &record);
    steps.extend(volume::plan(site, name, &creation.spec.template, creation.spec.volume));
    let personalise = FilesStep::Personalise {
        lower: (creation.spec.volume == VolumeKind::Overlay).then(|| creation.template.root()),
        writable: volume::writable(site, name, creation.spec.volume),
        family: creation.template.definition.family.clone(),
        identity: Some(Box::new(identity)),
    };
    steps.push(personalise);
    steps.push(FilesStep::WriteFile { path: store::spec_file(site, name), text: creation.spec_text.clone() });
    // Last: a server exists when its record does.
    let text = toml::to_string(&record).context("write the record as TOML")?;
    steps.push(FilesStep::WriteFile { path: store::record_file(site, name), text });
    Ok((record, steps.into_iter().map(Step::Files).collect()))
}

/// The steps that give a server its directory, its number and its addresses.
pub(super) fn plan_reservations(site: &Site, name: &Name, record: &Record) -> Vec<FilesStep> {
    let mut steps = vec![FilesStep::MakeDirectory { path: site.server(name), mode: 0o700 }];
    let reserve = |path| FilesStep::Reserve { path, owner: name.to_string() };
    steps.extend(reservations(site, record).map(reserve));
    steps
}

/// The files that say who has the server's number and its addresses.
pub fn reservations<'a>(site: &'a Site, record: &'a Record) -> impl Iterator<Item = PathBuf> + 'a {
    let addresses = record.addresses.iter().map(|address| network::reservation(site, *address));
    std::iter::once(id_file(site, record.id)).chain(addresses)
}

pub(super) fn check_name(site: &Site, name: &Name) -> Result<()> {
    let record = store::record_file(site, name);
    if record.exists() {
        return Err(Failure::new(Exit::Exists, format!("there is a server '{name}' already"))
            .hint("choose another name")
            .into());
    }
    if site.server(name).exists() {
        return Err(Failure::new(Exit::Exists, format!("{} is left from something", site.server(name).display()))
            .hint("`vsctl doctor --fix` removes what an interrupted command left")
            .into());
    }
    Ok(())
}

fn id_file(site: &Site, id: u32) -> PathBuf {
    site.state().join("ids").join(id.to_string())
}

/// Who has a number, if anybody.
pub fn owner_of_number(site: &Site, id: u32) -> Option<Name> {
    fs::read_to_string(id_file(site, id)).ok()?.parse().ok()
}

/// The lowest number from `from` up that nobody has.
///
/// # Errors
/// When none is left.
pub fn free_id(site: &Site, from: u32) -> Result<u32> {
    let directory = site.state().join("ids");
    let taken: BTreeSet<u32> = match fs::read_dir(&directory) {
        Ok(found) => found.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect(),
        Err(_) => BTreeSet::new(),
    };
    (from..=site.settings.max_servers).find(|id| !taken.contains(id)).ok_or_else(|| {
        Failure::new(Exit::Failed, format!("all {} servers' ids are taken", site.settings.max_servers))
            .hint("raise max_servers in vsos.toml")
            .into()
    })
}

/// The addresses of a new server: the asked ones, or those of its number that nobody has.
fn addresses(site: &Site, networks: &Networks, id: u32, spec: &Spec) -> Result<Vec<IpNet>> {
    if spec.net == NetworkMode::None {
        return Ok(Vec::new());
    }
    for address in &spec.ip {
        networks.check(*address)?;
        if let Some(owner) = network::owner(site, *address) {
            let message = format!("ip: {address} is taken by '{owner}'");
            return Err(Failure::new(Exit::BadParameter, message).hint("leave --ip out to get a free one").into());
        }
    }
    if !spec.ip.is_empty() {
        return Ok(spec.ip.clone());
    }
    // The number's own addresses; those of later numbers where somebody asked for ours by name.
    let free = |all: Vec<IpNet>| all.into_iter().all(|address| network::owner(site, address).is_none());
    let number = (id..id + site.settings.max_servers).find(|number| free(networks.defaults_of(*number)));
    let chosen = networks.defaults_of(number.unwrap_or(id));
    if chosen.iter().all(|address| matches!(address, IpNet::V6(_))) {
        log::warn!(
            "{} is full: this server gets an IPv6 address only (ipv4 in vsos.toml gives more room)",
            networks.ipv4
        );
    }
    Ok(chosen)
}

/// Creates a server.
///
/// # Errors
/// What refused; nothing is left then.
pub fn create(site: &Site, name: &Name, creation: &Creation) -> Result<Server> {
    let _lock = store::lock(site, name)?;
    let mut journal = open_journal(site, name)?;
    let allocation = allocation_lock(site)?;
    let planned = plan(site, name, creation, FIRST_NUMBER);
    let (record, steps) = match planned {
        Ok(planned) => planned,
        Err(error) => {
            journal.remove()?;
            return Err(error);
        }
    };
    // Numbers and addresses are chosen and reserved under one short lock; the volume is made without it.
    let is_volume =
        |step: &Step| matches!(step, Step::Files(FilesStep::MakeDirectory { path, .. }) if path.ends_with("volume"));
    let reserved = steps.iter().take_while(|step| !is_volume(step)).count();
    let mut world = World::new(site);
    let (first, rest) = steps.split_at(reserved);
    let outcome = execute::run("create", 1, first, &mut world, &mut journal);
    drop(allocation);
    let outcome = outcome.and_then(|()| execute::run("create", 1 + reserved, rest, &mut world, &mut journal));
    // What stands now is to last; what failed has been taken back, or stays in the journal for the doctor.
    if outcome.is_ok() || journal.standing().is_empty() {
        journal.remove()?;
    }
    outcome.with_context(|| format!("cannot create '{name}'"))?;
    events::note(site, name, events::Kind::Created);
    Ok(Server { name: name.clone(), spec: creation.spec.clone(), record })
}

/// Opens the journal of a server that is to be made, with nothing in it: what a killed command left is taken back.
///
/// # Errors
/// When the directories cannot be made; what could not be taken back.
pub(super) fn open_journal(site: &Site, name: &Name) -> Result<Journal> {
    for directory in ["servers", "ids", "addresses", "journal"] {
        let path = site.state().join(directory);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
    }
    let mut journal = Journal::open(&journal_file(site, name), Lasting::Disk)?;
    // A record means that it had come to its end.
    recover(site, name, &mut journal)?;
    Ok(journal)
}

/// Held while numbers and addresses are chosen and reserved.
///
/// # Errors
/// When it cannot be taken.
pub(super) fn allocation_lock(site: &Site) -> Result<Flock> {
    Ok(Flock::exclusive(&site.state().join("ids/.lock"))?)
}

/// Ends what an interrupted command left of a server, as the next creation of its name would. The caller holds its lock.
///
/// # Errors
/// What could not be taken back.
pub fn settle(site: &Site, name: &Name) -> Result<()> {
    if !journal_file(site, name).exists() {
        return Ok(());
    }
    open_journal(site, name)?.remove()
}

/// Whether an interrupted command left something of a server that is not whole.
pub fn is_interrupted(site: &Site, name: &Name) -> bool {
    journal_file(site, name).exists() && !store::record_file(site, name).exists()
}

fn journal_file(site: &Site, name: &Name) -> PathBuf {
    site.state().join("journal").join(name.as_str())
}

/// Ends what an interrupted create or destroy left: a complete creation stays, everything else goes.
fn recover(site: &Site, name: &Name, journal: &mut Journal) -> Result<()> {
    let complete = |step: &Step| matches!(step, Step::Files(FilesStep::WriteFile { path, .. }) if *path == store::record_file(site, name));
    if journal.standing().is_empty() {
        return Ok(());
    }
    if journal.standing().last().is_some_and(complete) && store::load(site, name).is_ok() {
        return Ok(());
    }
    execute::take_back("recover", &mut World::new(site), journal)
        .with_context(|| format!("cannot take back what an interrupted command left of '{name}'"))
}

/// Recovers the servers that an interrupted create or destroy left, and tells which.
///
/// # Errors
/// What could not be taken back.
pub fn recover_all(site: &Site, fix: bool) -> Result<Vec<Name>> {
    let mut found = Vec::new();
    for name in store::entries(&site.state().join("journal"))? {
        let path = journal_file(site, &name);
        found.push(name.clone());
        if fix {
            let _lock = store::lock(site, &name)?;
            let mut journal = Journal::open(&path, Lasting::Disk)?;
            recover(site, &name, &mut journal)?;
            journal.remove()?;
        }
    }
    Ok(found)
}

/// The steps that destroying a server takes back, last one first: its record, then what its directory and number hold.
/// The volume goes with the directory, so that a server whose spec cannot be read can be destroyed as well.
pub fn plan_destroy(site: &Site, name: &Name, record: &Record) -> Vec<Step> {
    let mut steps = plan_reservations(site, name, record);
    steps.push(FilesStep::WriteFile { path: store::record_file(site, name), text: String::new() });
    steps.into_iter().map(Step::Files).collect()
}

/// Destroys a server: everything that creating it had made.
///
/// # Errors
/// Exit 32 when it runs and `force` is not given; when it is between two hosts and `force` is not given; what could not be removed.
pub fn destroy(site: &Site, name: &Name, force: bool) -> Result<()> {
    let lock = store::lock(site, name)?;
    if !force && site.server(name).exists() {
        store::check_own(site, name)?;
    }
    destroy_held(site, name, force, lock)
}

/// [`destroy`] of a server whose lock the caller holds.
///
/// # Errors
/// As [`destroy`].
pub fn destroy_held(site: &Site, name: &Name, force: bool, lock: Flock) -> Result<()> {
    edit::recover(site, name)?;
    let record = store::load_record(site, name)?;
    // Processes of one that is not this host's, too: they may have lost who was to say that they may go on.
    if state::beneath(site, name)?.is_up() {
        if !force {
            return Err(Failure::new(Exit::AlreadyRunning, format!("'{name}' is running"))
                .hint("stop it first, or use --force")
                .into());
        }
        stop::stop_locked(site, name, &stop::Manner::kill())?;
    }
    let mut journal = Journal::open(&journal_file(site, name), Lasting::Disk)?;
    if journal.standing().is_empty() {
        journal.begin(&plan_destroy(site, name, &record))?;
    }
    execute::take_back("destroy", &mut World::new(site), &mut journal)
        .with_context(|| format!("cannot destroy '{name}'"))?;
    journal.remove()?;
    events::note(site, name, events::Kind::Destroyed);
    // A monitor that was not told of the end, being too young to listen, waits for the lock to see what is left to do. It
    // is in the group that goes with the last server.
    drop(lock);
    // The last one turns off the light.
    Facilities(site).remove_unused()
}
