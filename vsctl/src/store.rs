//! What is written down about servers: their directories, records and locks.
//!
//! State is files, so that a crash leaves what `ls` can show. Knows no process and no kernel object.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use ipnet::IpNet;
use kernel::file::write_atomic;
use kernel::lock::Flock;
use serde::{Deserialize, Serialize};

use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::site::Site;
use crate::spec::{NetworkMode, Spec};

/// How long a command waits for another that works on the same server.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was decided when the server was created; the user does not edit it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Version of this file's layout.
    pub version: u32,
    /// The server's number (≥ 1): its ids on this host and the name of its link derive from it.
    pub id: u32,
    /// Identity of the server for life, as `machine-id` wants it; its MAC address derives from it.
    pub uuid: String,
    /// Seconds since 1970.
    pub created_s: u64,
    /// Digest of the template that the volume was made from.
    pub template_digest: String,
    /// Addresses reserved for it.
    pub addresses: Vec<IpNet>,
}

/// One defined server.
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    /// Its name.
    pub name: Name,
    /// What its owner wants.
    pub spec: Spec,
    /// What was decided at creation.
    pub record: Record,
}

impl Server {
    /// The host's id of its root, and the first of its own; none when it is privileged and has the host's.
    pub fn first_id(&self, site: &Site) -> Option<u32> {
        (!self.spec.privileged).then(|| site.first_id(self.record.id))
    }

    /// Its addresses: the spec's, else the reserved ones.
    pub fn addresses(&self) -> &[IpNet] {
        match self.spec.net {
            NetworkMode::None => &[],
            NetworkMode::Bridge if self.spec.ip.is_empty() => &self.record.addresses,
            NetworkMode::Bridge => &self.spec.ip,
        }
    }
}

/// Path of the spec.
pub fn spec_file(site: &Site, name: &Name) -> PathBuf {
    site.server(name).join("server.toml")
}

/// Path of the record; a server exists when it does.
pub fn record_file(site: &Site, name: &Name) -> PathBuf {
    site.server(name).join("record.toml")
}

/// Loads one server.
///
/// # Errors
/// Exit 44 when there is none, 14 when a file of it cannot be used.
pub fn load(site: &Site, name: &Name) -> Result<Server> {
    let record = load_record(site, name)?;
    let file = spec_file(site, name);
    let Some(text) = read(&file)? else {
        return Err(Failure::new(Exit::NoServer, format!("{} is gone", file.display()))
            .hint("write it again by hand (server.toml(5)), or destroy the server")
            .into());
    };
    let spec = Spec::parse(&text, &file.display().to_string())?;
    Ok(Server { name: name.clone(), spec, record })
}

/// Loads what was decided at a server's creation.
///
/// # Errors
/// Exit 44 when there is no such server, 14 when the file cannot be used.
pub fn load_record(site: &Site, name: &Name) -> Result<Record> {
    let file = record_file(site, name);
    let Some(text) = read(&file)? else {
        let failure = Failure::new(Exit::NoServer, format!("there is no server '{name}'"));
        let hint = match site.server(name).exists() {
            true => "its creation or removal was interrupted: `vsctl doctor --fix`",
            false => "`vsctl list -a` shows the servers",
        };
        return Err(failure.hint(hint).into());
    };
    let bad = |error: toml::de::Error| {
        Failure::new(Exit::BadConfiguration, format!("{}: {}", file.display(), error.message()))
    };
    Ok(toml::from_str(&text).map_err(bad)?)
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Which side of a migration a server here is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// It came here, and is not this host's yet.
    Incoming,
    /// It is another host's, and what is here is a copy that never runs again.
    Moved,
}

/// `migration.toml`: there as long as a server is on two hosts and not this one's to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migration {
    /// Which of the two this host is.
    pub side: Side,
    /// The migration: the same on both hosts.
    pub transaction: String,
    /// The other host.
    pub peer: String,
    /// Whether it ran before, and shall run there.
    pub start: bool,
    /// Whether its memory comes when it runs there already.
    #[serde(default)]
    pub is_postcopy: bool,
}

impl Migration {
    /// What it means for who wants to do something with the server.
    pub fn refusal(&self, name: &Name) -> Failure {
        let peer = &self.peer;
        match self.side {
            Side::Moved => Failure::new(Exit::Failed, format!("'{name}' has moved to {peer}, and only a copy is here"))
                .hint(format!("`vsctl migrate {name} {peer} --continue` ends the migration")),
            Side::Incoming => {
                Failure::new(Exit::Failed, format!("'{name}' is on its way here, and still belongs to {peer}"))
                    .hint(format!("`vsctl migrate {name} HOST --continue` or `--abort`, on {peer}, decides"))
            }
        }
    }
}

/// Path of the mark that a migration leaves.
pub fn migration_file(site: &Site, name: &Name) -> PathBuf {
    site.server(name).join("migration.toml")
}

/// The migration that a server here is in; none when it is this host's own.
///
/// # Errors
/// When that cannot be known: then nothing may start it.
pub fn migration(site: &Site, name: &Name) -> Result<Option<Migration>> {
    mark(&migration_file(site, name))
}

fn mark<T: serde::de::DeserializeOwned>(file: &Path) -> Result<Option<T>> {
    let Some(text) = read(file)? else { return Ok(None) };
    let bad = |error: toml::de::Error| {
        Failure::new(Exit::BadConfiguration, format!("{}: {}", file.display(), error.message()))
    };
    Ok(Some(toml::from_str(&text).map_err(bad)?))
}

/// `leaving.toml`: there while a server that runs is on its way to another host, and is this host's still. When its command is killed,
/// nothing else tells that the server does not stand still by somebody's wish.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leaving {
    /// The other host.
    pub peer: String,
    /// What the command does or has done to it: before that, a server that is down has ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pausing: Option<Pausing>,
}

/// What becomes of a server while it is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pausing {
    /// It is stopped: its own end is the command's doing.
    Stops,
    /// It is suspended: either there are images, or it goes on.
    Suspends,
}

fn leaving_file(site: &Site, name: &Name) -> PathBuf {
    site.server(name).join("leaving.toml")
}

/// Notes that a server leaves, on the disk.
///
/// # Errors
/// When the disk refuses.
pub fn note_leaving(site: &Site, name: &Name, leaving: &Leaving) -> Result<()> {
    let text = toml::to_string(leaving).context("write the mark as TOML")?;
    Ok(kernel::file::write_atomic(&leaving_file(site, name), text.as_bytes())?)
}

/// Whether a server was on its way, if it has not run or been told otherwise since.
///
/// # Errors
/// When that cannot be known.
pub fn leaving(site: &Site, name: &Name) -> Result<Option<Leaving>> {
    mark(&leaving_file(site, name))
}

/// Forgets it: the server runs, or somebody has said what is to become of it.
///
/// # Errors
/// When the disk refuses.
pub fn forget_leaving(site: &Site, name: &Name) -> Result<()> {
    let file = leaving_file(site, name);
    let about = || format!("remove {}", file.display());
    // Looked for first: where the disk can only be read, removing what is not there fails, too.
    if !file.try_exists().with_context(about)? {
        return Ok(());
    }
    fs::remove_file(&file).with_context(about)?;
    Ok(kernel::file::sync_entry(&file)?)
}

/// The same for who cannot do anything else about it: that it is not forgotten is a warning.
pub fn try_forget_leaving(site: &Site, name: &Name) {
    if let Err(error) = forget_leaving(site, name) {
        log::warn!("'{name}': {error:#}");
    }
}

/// Refuses a server that is not this host's own.
///
/// # Errors
/// Why it is not, or why that cannot be known.
pub fn check_own(site: &Site, name: &Name) -> Result<()> {
    migration(site, name)?.map_or(Ok(()), |migration| Err(migration.refusal(name).into()))
}

/// Names of all defined servers, sorted.
///
/// # Errors
/// When the directory cannot be read.
pub fn names(site: &Site) -> Result<Vec<Name>> {
    let mut names: Vec<Name> =
        entries(&site.servers())?.into_iter().filter(|name| record_file(site, name).exists()).collect();
    names.sort();
    Ok(names)
}

/// The names in `directory` that can be a server's; none when it does not exist.
///
/// # Errors
/// When it cannot be read.
pub fn entries(directory: &Path) -> Result<Vec<Name>> {
    let found = match fs::read_dir(directory) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("read {}", directory.display())),
    };
    let mut names = Vec::new();
    for entry in found {
        let entry = entry.with_context(|| format!("read {}", directory.display()))?;
        names.extend(entry.file_name().to_str().and_then(|name| name.parse::<Name>().ok()));
    }
    Ok(names)
}

/// Writes the spec of a server.
///
/// # Errors
/// When the disk refuses.
pub fn save_spec(site: &Site, name: &Name, text: &str) -> Result<()> {
    Ok(write_atomic(&spec_file(site, name), text.as_bytes())?)
}

/// Takes the lock under which the server may be changed; waits for another command for a while.
///
/// # Errors
/// Exit 9 when the other command takes too long.
pub fn lock(site: &Site, name: &Name) -> Result<Flock> {
    lock_soon(&lock_file(site, name)?, &format!("'{name}'"))
}

/// Takes the lock at `path` under which `what` may be changed; waits for another command for a while.
///
/// # Errors
/// As [`lock`].
pub fn lock_soon(path: &Path, what: &str) -> Result<Flock> {
    let started = Instant::now();
    loop {
        if let Some(lock) = Flock::try_exclusive(path)? {
            return Ok(lock);
        }
        if started.elapsed() > PATIENCE {
            return Err(Failure::new(Exit::Locked, format!("another command works on {what}"))
                .hint(format!("`fuser {}` shows which", path.display()))
                .into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Takes the same lock, however long it takes: for who has to do something when all others are done.
///
/// # Errors
/// When it cannot be opened.
pub fn lock_at_last(site: &Site, name: &Name) -> Result<Flock> {
    Ok(Flock::exclusive(&lock_file(site, name)?)?)
}

fn lock_file(site: &Site, name: &Name) -> Result<PathBuf> {
    let directory = site.run().join("lock");
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    Ok(directory.join(name.as_str()))
}

/// A new random identity (RFC 9562, version 4, without dashes: the form of machine-id(5)).
pub fn new_uuid() -> String {
    let mut bytes = [0u8; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .expect("16 bytes come at once after boot");
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Seconds since 1970.
pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
