//! The servers: registrations read on demand and checked against the file, cgroup files kept open while they
//! are read, load sampled while somebody asks for it.
//!
//! ```text
//! DIR/servers/<id>.toml ──(mtime, inode, size)──> Server { registration, files, accounts, load }
//! ```
//!
//! Limits: a server that nobody reads costs nothing; the files of at most [`OPEN_SERVERS_MAX`] servers are open.

use std::collections::HashMap;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::SystemTime;

use crate::account::Accounts;
use crate::clock::Now;
use crate::last::LastTexts;
use crate::load::Load;
use crate::registration::Registration;
use crate::snapshot::{Files, Host, Snapshot, Unreadable};

/// A registration file is looked at again after this. A removed one is noticed that soon.
const CHECKED_MS: u64 = 100;

/// A server that was not read for this long is idle: its files are closed, its load is no longer sampled.
const IDLE_MS: u64 = 120_000;

/// How often it is looked for servers that are gone or idle.
const HOUSE_KEEPING_MS: u64 = 5_000;

/// Open cgroup files cost the kernel a page or so each; beyond this the servers read longest ago are closed.
pub const OPEN_SERVERS_MAX: usize = 256;

/// One registered server.
#[derive(Debug)]
pub struct Server {
    /// Its number.
    pub id: u64,
    /// Its registration.
    pub registration: Registration,
    /// When it started, for time stamps.
    pub started: SystemTime,
    /// What its files said last.
    pub last: LastTexts,
    files: Mutex<Option<Arc<Files>>>,
    accounts: Mutex<Accounts>,
    load: Mutex<Load>,
    read_ms: AtomicU64,
    load_read_ms: AtomicU64,
}

impl Server {
    fn new(id: u64, registration: Registration, now: Now) -> Server {
        let ns = |usec: u64| usec.saturating_mul(1_000);
        let before = registration.cpu_before;
        let accounts = Accounts::after(ns(before.user_usec), ns(before.system_usec));
        Server {
            id,
            started: now.system_time_of(registration.started_boottime_ns),
            registration,
            last: LastTexts::default(),
            files: Mutex::default(),
            accounts: Mutex::new(accounts),
            load: Mutex::default(),
            read_ms: AtomicU64::new(now.boottime_ms()),
            load_read_ms: AtomicU64::new(0),
        }
    }

    /// The server's cgroup files, found anew if they were closed.
    pub fn files(&self, now: Now) -> Result<Arc<Files>, Unreadable> {
        self.read_ms.store(now.boottime_ms(), Ordering::Relaxed);
        let mut files = locked(&self.files);
        if let Some(files) = &*files {
            return Ok(files.clone());
        }
        let found = Arc::new(Files::find(&self.registration.cgroup)?);
        *files = Some(found.clone());
        Ok(found)
    }

    /// Closes the cgroup files; those in use by an answer right now are closed after it.
    pub fn close_files(&self) {
        *locked(&self.files) = None;
    }

    /// The CPU accounts, brought up to now.
    pub fn accounts(&self, snapshot: &Snapshot<'_>) -> Result<MutexGuard<'_, Accounts>, Unreadable> {
        let (cpus, times) = (snapshot.cpus()?, snapshot.cpu_times()?);
        let wall_ns = snapshot.now().since_ns(self.registration.started_boottime_ns);
        let mut accounts = locked(&self.accounts);
        accounts.advance(wall_ns, &cpus, &times);
        Ok(accounts)
    }

    /// The load as of the last sample; from now on [`Servers::tend`] takes samples. The first one is taken here,
    /// without the task `reader`, which asks.
    pub fn load(&self, snapshot: &Snapshot<'_>, reader: u32) -> Result<MutexGuard<'_, Load>, Unreadable> {
        let now_ms = snapshot.now().boottime_ms();
        let lately = self.load_read_ms.swap(now_ms, Ordering::Relaxed);
        if now_ms.saturating_sub(lately) >= IDLE_MS || locked(&self.load).is_due(now_ms) {
            self.sample(snapshot, Some(reader))?;
        }
        Ok(locked(&self.load))
    }

    /// Takes a sample of the server's tasks, unless the last one still holds.
    fn sample(&self, snapshot: &Snapshot<'_>, reader: Option<u32>) -> Result<(), Unreadable> {
        let now_ms = snapshot.now().boottime_ms();
        let busy_ns = snapshot.busy_ns()?;
        let still = {
            let load = locked(&self.load);
            load.still_holds(busy_ns).then(|| load.tasks())
        };
        // Without the lock: a server may have thousands of threads, and its other readers must not wait.
        let tasks = still.unwrap_or_else(|| snapshot.tasks(reader));
        // What it did before this host knew it, nobody counted.
        let started_ms = u64::try_from(self.registration.started_boottime_ns).unwrap_or_default() / 1_000_000;
        locked(&self.load).sample(now_ms, started_ms, tasks, busy_ns);
        Ok(())
    }
}

/// A poisoned lock only says that a thread panicked while it held it; the counters are still counters.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Why a server cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// It is not registered.
    Unregistered,
    /// Its registration is not one.
    Malformed,
}

/// What tells one version of a registration file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Stamp {
        Stamp { inode: metadata.ino(), size: metadata.size(), modified: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

/// A registration as last seen: a malformed one is remembered too, so that it is logged once.
#[derive(Debug)]
struct Entry {
    stamp: Stamp,
    checked_ms: AtomicU64,
    server: Option<Arc<Server>>,
}

/// All servers that were asked for.
#[derive(Debug)]
pub struct Servers {
    directory: PathBuf,
    entries: RwLock<HashMap<u64, Entry>>,
    kept_house_ms: AtomicU64,
}

impl Servers {
    /// The servers registered in `directory`; reads nothing yet.
    pub fn registered_in(directory: &Path) -> Servers {
        Servers { directory: directory.to_owned(), entries: RwLock::default(), kept_house_ms: AtomicU64::new(0) }
    }

    /// The server `id`, as its registration file is now (or was a moment ago).
    pub fn find(&self, id: u64, now: Now) -> Result<Arc<Server>, Missing> {
        let now_ms = now.boottime_ms();
        if let Some(entry) = self.entries().get(&id) {
            if now_ms.saturating_sub(entry.checked_ms.load(Ordering::Relaxed)) < CHECKED_MS {
                return entry.server.clone().ok_or(Missing::Malformed);
            }
        }
        self.check(id, now)
    }

    /// Looks at the registration file, and reads it if it is not the one that is known.
    fn check(&self, id: u64, now: Now) -> Result<Arc<Server>, Missing> {
        let path = self.directory.join(format!("{id}.toml"));
        let metadata = match std::fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    log::warn!("stat {}: {error}", path.display());
                }
                self.forget(id);
                return Err(Missing::Unregistered);
            }
        };
        let stamp = Stamp::of(&metadata);
        if let Some(entry) = self.entries().get(&id).filter(|entry| entry.stamp == stamp) {
            entry.checked_ms.store(now.boottime_ms(), Ordering::Relaxed);
            return entry.server.clone().ok_or(Missing::Malformed);
        }
        let server = read(&path, id, now);
        self.remember(id, Entry { stamp, checked_ms: AtomicU64::new(now.boottime_ms()), server })
            .ok_or(Missing::Malformed)
    }

    /// Puts an entry in. A server that goes on under a new registration keeps its counters.
    fn remember(&self, id: u64, mut entry: Entry) -> Option<Arc<Server>> {
        let mut entries = self.entries.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let before = entries.get(&id).and_then(|before| before.server.clone());
        if let (Some(before), Some(server)) = (before, &entry.server) {
            let (old, new) = (&before.registration, &server.registration);
            if old.started_boottime_ns == new.started_boottime_ns && old.cgroup == new.cgroup {
                *locked(&server.accounts) = locked(&before.accounts).clone();
                *locked(&server.load) = locked(&before.load).clone();
                server.load_read_ms.store(before.load_read_ms.load(Ordering::Relaxed), Ordering::Relaxed);
                if old == new {
                    entry.server = Some(before);
                }
            }
        }
        let server = entry.server.clone();
        entries.insert(id, entry);
        server
    }

    /// Drops what is known of a server, its open files with it.
    fn forget(&self, id: u64) {
        let known = self.entries().contains_key(&id);
        if known {
            self.entries.write().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(&id);
        }
    }

    /// The ids of all registration files, for listing.
    pub fn ids(&self) -> Vec<u64> {
        let Ok(entries) = std::fs::read_dir(&self.directory) else {
            return Vec::new();
        };
        let names = entries.flatten().map(|entry| entry.file_name());
        let mut ids: Vec<u64> = names
            .filter_map(|name| crate::inode::id_of(std::ffi::OsStr::new(name.to_str()?.strip_suffix(".toml")?)))
            .collect();
        ids.sort_unstable();
        ids
    }

    /// Whether [`Servers::tend`] would have nothing to do: no server has its files open.
    pub fn is_quiet(&self) -> bool {
        self.entries().values().flat_map(|entry| &entry.server).all(|server| locked(&server.files).is_none())
    }

    /// House-keeping, to be called every second or so: samples loads that are asked for, closes what is idle,
    /// forgets what is gone.
    pub fn tend(&self, host: &Host, now: Now) {
        let now_ms = now.boottime_ms();
        let servers: Vec<Arc<Server>> = self.entries().values().filter_map(|entry| entry.server.clone()).collect();
        for server in &servers {
            let load_read_ms = server.load_read_ms.load(Ordering::Relaxed);
            let asked = load_read_ms > 0 && now_ms.saturating_sub(load_read_ms) < IDLE_MS;
            // Where readers wait for the kernel, the house-keeper would too.
            if asked && !server.last.has_overdue() && locked(&server.load).is_due(now_ms) {
                self.sample(host, server, now);
            }
        }
        let kept_ms = self.kept_house_ms.load(Ordering::Relaxed);
        if now_ms.saturating_sub(kept_ms) >= HOUSE_KEEPING_MS {
            self.kept_house_ms.store(now_ms, Ordering::Relaxed);
            self.forget_unregistered();
            self.close_idle(now_ms);
        }
    }

    fn sample(&self, host: &Host, server: &Server, now: Now) {
        // Does not count as a reading: `files` would say so.
        let read_ms = server.read_ms.load(Ordering::Relaxed);
        let sampled = server.files(now).and_then(|files| server.sample(&Snapshot::new(host, &files, now), None));
        server.read_ms.store(read_ms, Ordering::Relaxed);
        if let Err(Unreadable::Gone) = sampled {
            server.close_files();
        }
    }

    /// Forgets the servers whose registration is gone, their open files with them.
    fn forget_unregistered(&self) {
        let known: Vec<u64> = self.entries().keys().copied().collect();
        for id in known {
            if !self.directory.join(format!("{id}.toml")).exists() {
                self.forget(id);
            }
        }
    }

    fn close_idle(&self, now_ms: u64) {
        let mut open: Vec<Arc<Server>> = self.entries().values().filter_map(|entry| entry.server.clone()).collect();
        open.retain(|server| locked(&server.files).is_some());
        open.sort_by_key(|server| std::cmp::Reverse(server.read_ms.load(Ordering::Relaxed)));
        for (rank, server) in open.iter().enumerate() {
            let idle = now_ms.saturating_sub(server.read_ms.load(Ordering::Relaxed)) >= IDLE_MS;
            if idle || rank >= OPEN_SERVERS_MAX {
                server.close_files();
                server.last.clear();
            }
        }
    }

    fn entries(&self) -> std::sync::RwLockReadGuard<'_, HashMap<u64, Entry>> {
        self.entries.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Reads a registration file; what is wrong with it is logged, as its reader cannot do anything about it.
fn read(path: &Path, id: u64, now: Now) -> Option<Arc<Server>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            log::warn!("read {}: {error}", path.display());
            return None;
        }
    };
    match Registration::parse(&text) {
        Ok(registration) => Some(Arc::new(Server::new(id, registration, now))),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            log::warn!("{}: {error}{}", path.display(), cause.trim_end().replace('\n', " | "));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now { boottime_ns: ms * 1_000_000, realtime_ns: 0 }
    }

    fn text(started: u64) -> String {
        format!("name = \"a\"\nstarted_boottime_ns = {started}\n[cgroup]\nunified = \"/nowhere\"\n")
    }

    #[test]
    fn registrations_come_change_and_go() {
        let directory = tempfile::tempdir().unwrap();
        let servers = Servers::registered_in(directory.path());
        let file = directory.path().join("7.toml");
        assert_eq!(servers.find(7, at(0)).unwrap_err(), Missing::Unregistered);
        std::fs::write(&file, text(1)).unwrap();
        assert_eq!(servers.find(7, at(1)).unwrap().registration.started_boottime_ns, 1);
        std::fs::write(directory.path().join("new"), text(22)).unwrap();
        std::fs::rename(directory.path().join("new"), &file).unwrap();
        assert_eq!(servers.find(7, at(500)).unwrap().registration.started_boottime_ns, 22);
        assert_eq!(servers.ids(), [7]);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(servers.find(7, at(1000)).unwrap_err(), Missing::Unregistered);
    }

    #[test]
    fn a_malformed_registration_hurts_nobody_else() {
        let directory = tempfile::tempdir().unwrap();
        let servers = Servers::registered_in(directory.path());
        std::fs::write(directory.path().join("1.toml"), "name = ").unwrap();
        std::fs::write(directory.path().join("2.toml"), text(1)).unwrap();
        assert_eq!(servers.find(1, at(0)).unwrap_err(), Missing::Malformed);
        assert_eq!(servers.find(1, at(1)).unwrap_err(), Missing::Malformed);
        assert!(servers.find(2, at(1)).is_ok());
    }

    #[test]
    fn servers_that_are_gone_are_forgotten_though_nobody_asks() {
        let directory = tempfile::tempdir().unwrap();
        let servers = Servers::registered_in(directory.path());
        let file = directory.path().join("7.toml");
        std::fs::write(&file, text(1)).unwrap();
        servers.find(7, at(0)).unwrap();
        std::fs::remove_file(&file).unwrap();
        servers.tend(&Host::at(directory.path()), at(HOUSE_KEEPING_MS));
        assert!(servers.entries().is_empty());
    }

    #[test]
    fn a_server_without_a_cgroup_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let servers = Servers::registered_in(directory.path());
        std::fs::write(directory.path().join("2.toml"), text(1)).unwrap();
        let server = servers.find(2, at(0)).unwrap();
        assert!(matches!(server.files(at(0)), Err(Unreadable::Gone)));
    }
}
