//! Checkpoints of trees: a process of the host's with all below it, outside any server.
//!
//! ```text
//! trees/LABEL/tree.toml     who was in it, and what tells that it is whole
//! trees/LABEL/*.img         CRIU's
//! trees/.new-LABEL/         one that is being made; renamed to LABEL at its end, while nothing of the tree moves
//! trees/.gone-LABEL/        one that is being removed
//! ```
//!
//! A tree has no disk and no network of its own: its files stay where they are, and CRIU compares their lengths with those of then.
//! It needs no journal either: images without their name are nobody's, and CRIU lets a tree go on, or ends what it has brought back,
//! when nobody answers it any more.

mod blockers;
mod members;
mod record;
mod run;

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kernel::lock::Flock;
use kernel::process::PidFd;

use super::beside::{Begun, Beside};
use super::blockers::refuse;
use super::dump::Then;
use super::kept::label_of_now;
use super::{criu, doubt, version};
use crate::criu::message::{CGROUPS_IGNORE, Kind, Options};
use crate::criu::{self, Criu, Event};
use crate::failure::{self, Exit, Failure};
use crate::lifecycle::execute::fault;
use crate::lifecycle::restore::{DUMP_LIMIT_S, GHOST_BYTES_MAX};
use crate::lifecycle::thread_settings;
use crate::name::Name;
use crate::processes;
use crate::site::Site;
use crate::store;
use crate::template::remove_tree;
use members::Members;

pub use record::Record;
pub use run::{Ended, Wish, run, wait};

/// The variable by which a tree tells its name.
pub const NAME_VARIABLE: &str = "VSOS_TREE";

/// How long killed processes may take to end.
const END_MS: u64 = 10_000;

/// A checkpoint that is being made, or removed, has a name that begins so.
const PASSING: [&str; 2] = [".new-", ".gone-"];

/// A checkpoint that is whole by its name.
#[derive(Debug)]
pub struct Kept {
    /// Its label.
    pub label: Name,
    /// What is written down of it.
    pub record: Record,
    directory: PathBuf,
}

impl Kept {
    /// The checkpoint `label`.
    ///
    /// # Errors
    /// When there is none, or its record cannot be used.
    pub fn open(site: &Site, label: &Name) -> Result<Self> {
        let directory = find(site, label)?;
        Ok(Self { label: label.clone(), record: Record::read(&directory)?, directory })
    }

    /// Whether it is whole, and its processes have a place.
    fn check(&self) -> Result<()> {
        self.record.verify(&self.label, &self.directory)?;
        let taken = self.record.taken(record::holder);
        if taken.is_empty() {
            return Ok(());
        }
        let list: Vec<String> = taken.iter().map(|taken| format!("\n  {} is {}", taken.pid, taken.by)).collect();
        let message = format!("numbers of the tree '{}' are taken:{}", self.label, list.concat());
        Err(Failure::new(Exit::Exists, message)
            .hint("its processes come back with their numbers, or not at all")
            .into())
    }
}

/// The directory of the checkpoint `label`.
///
/// # Errors
/// When there is none.
pub fn find(site: &Site, label: &Name) -> Result<PathBuf> {
    let directory = site.trees().join(label.as_str());
    match directory.exists() {
        true => Ok(directory),
        false => Err(Failure::new(Exit::NoServer, format!("there is no checkpoint of a tree '{label}'"))
            .hint("`vsctl checkpoint list --tree` shows them")
            .into()),
    }
}

/// The labels of all checkpoints of trees.
///
/// # Errors
/// When they cannot be read.
pub fn labels(site: &Site) -> Result<Vec<Name>> {
    let mut labels = store::entries(&site.trees())?;
    labels.sort();
    Ok(labels)
}

/// The checkpoint that has ended process `pid`, which had started at `start_ticks`.
///
/// # Errors
/// When the checkpoints cannot be listed.
pub fn that_ended(site: &Site, pid: i32, start_ticks: u64) -> Result<Option<Name>> {
    let has_it = |label: &Name| {
        Kept::open(site, label).is_ok_and(|kept| (kept.record.root(), kept.record.start_ticks) == (pid, start_ticks))
    };
    Ok(labels(site)?.into_iter().find(has_it))
}

/// The lock of a label, or none when a command works on it just now.
///
/// # Errors
/// When the disk refuses.
pub fn try_lock(site: &Site, label: &Name) -> Result<Option<Flock>> {
    Ok(Flock::try_exclusive(&lock_file(site, label)?)?)
}

fn lock(site: &Site, label: &Name) -> Result<Flock> {
    store::lock_soon(&lock_file(site, label)?, &format!("the tree '{label}'"))
}

fn lock_file(site: &Site, label: &Name) -> Result<PathBuf> {
    let directory = site.tree_run(label);
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    Ok(directory.join("lock"))
}

/// Checkpoints that were not finished, or not removed to the end, with their labels.
///
/// # Errors
/// When their directory cannot be read.
pub fn leftovers(site: &Site) -> Result<Vec<(Name, PathBuf)>> {
    let directory = site.trees();
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.and_then(Iterator::collect::<io::Result<Vec<_>>>),
    };
    let mut found = Vec::new();
    for entry in entries.with_context(|| format!("read {}", directory.display()))? {
        let name = entry.file_name().to_string_lossy().into_owned();
        let label = PASSING.iter().find_map(|prefix| name.strip_prefix(prefix)?.parse().ok());
        found.extend(label.map(|label: Name| (label, entry.path())));
    }
    found.sort();
    Ok(found)
}

/// Removes what interrupted commands have left, but for what another is at work on. The caller has the lock of `own`.
fn clear(site: &Site, own: &Name) -> Result<()> {
    for (label, left) in leftovers(site)? {
        let lock = if label == *own { None } else { try_lock(site, &label)? };
        if label == *own || lock.is_some() {
            remove_tree(&left)?;
        }
    }
    Ok(())
}

/// What CRIU is told alike for dump and restore.
fn common() -> Options {
    Options {
        file_locks: Some(true),
        ghost_limit: Some(GHOST_BYTES_MAX),
        timeout: Some(DUMP_LIMIT_S),
        // They come back where the command is that restores them.
        manage_cgroups_mode: Some(CGROUPS_IGNORE),
        notify_scripts: Some(true),
        ..Options::default()
    }
}

/// A tree that nothing known stands in the way of dumping.
struct Subject {
    pid: i32,
    pidfd: PidFd,
    criu: Criu,
    version: String,
}

impl Subject {
    fn find(site: &Site, pid: i32) -> Result<Self> {
        if let Ok((server, inside)) = processes::owner(site, pid) {
            let message = format!("process {pid} is no tree of the host's, but process {inside} of '{server}'");
            return Err(Failure::new(Exit::BadParameter, message)
                .hint(format!("`vsctl checkpoint create {server}` keeps all of the server"))
                .into());
        }
        let tree = Members::of(pid)?;
        let criu = criu(site);
        let version = version(site)?;
        refuse(&format!("the tree of process {pid}"), &blockers::find(&tree)?)?;
        Ok(Self { pid, pidfd: PidFd::open(pid)?, criu, version })
    }

    /// A label for who gives none: the tree's name and the time.
    fn label(&self) -> Result<Name> {
        let now = label_of_now();
        match name_of(self.pid) {
            Some(name) => Ok(format!("{name}-{now}").parse()?),
            None => Ok(now),
        }
    }

    /// Dumps it into `draft`, which becomes `named` while nothing of the tree moves.
    fn dump(&self, site: &Site, draft: &Path, named: &Path, then: Then, (label, lock): (&Name, &Flock)) -> Result<()> {
        fault(CREATE, 1)?;
        let options = Options { pid: Some(self.pid), leave_running: Some(then == Then::GoOn), ..common() };
        let mut session = self.criu.begin(Kind::Dump, draft, &site.tree_run(label), options, Some(lock))?;
        let mut sums = Beside::begin(draft);
        loop {
            match session.listen()? {
                Event::Stage { name, .. } if name == "post-dump" => match self.finish(draft, named, sums.end()) {
                    Ok(()) => session.go_on()?,
                    Err(error) => {
                        session.take_back();
                        return Err(error);
                    }
                },
                Event::Stage { .. } => session.go_on()?,
                Event::Done => break,
            }
        }
        if then == Then::End && !self.pidfd.wait_exit(Some(END_MS))? {
            return Err(Failure::new(Exit::System, format!("process {} does not end", self.pid)).into());
        }
        Ok(())
    }

    /// Seals the images and gives them their name: from now on they are a checkpoint.
    fn finish(&self, draft: &Path, named: &Path, begun: Begun) -> Result<()> {
        fault(CREATE, 2)?;
        let record = Record::of(&Members::of(self.pid)?, &self.version, draft, begun)?;
        // The processes remember what they have written, wherever that is: it must be there when they come back.
        rustix::fs::sync();
        record.seal(draft)?;
        fault(CREATE, 3)?;
        fs::rename(draft, named).with_context(|| format!("name {}", named.display()))?;
        kernel::file::sync_entry(named)?;
        fault(CREATE, 4)
    }
}

/// What the moments of [`create`] and [`restore`] are called for tests ([`fault`]).
const CREATE: &str = "tree-create";
const RESTORE: &str = "tree-restore";

/// The name that a tree was given when it was started ([`NAME_VARIABLE`]).
fn name_of(pid: i32) -> Option<Name> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mut variables = environment.split(|byte| *byte == 0).filter_map(|variable| std::str::from_utf8(variable).ok());
    variables.find_map(|variable| variable.strip_prefix(NAME_VARIABLE)?.strip_prefix('=')?.parse().ok())
}

fn check_free(site: &Site, label: &Name) -> Result<()> {
    if !site.trees().join(label.as_str()).exists() {
        return Ok(());
    }
    Err(Failure::new(Exit::Exists, format!("there is a checkpoint of a tree '{label}' already"))
        .hint("choose another label, or delete that one: `vsctl checkpoint delete --tree`")
        .into())
}

/// What [`create`] would do, in sentences.
///
/// # Errors
/// As [`create`], as far as that can be seen before.
pub fn plan_create(site: &Site, pid: i32, label: Option<&Name>, then: Then) -> Result<Vec<String>> {
    let subject = Subject::find(site, pid)?;
    let label = label.map_or_else(|| subject.label(), |label| Ok(label.clone()))?;
    check_free(site, &label)?;
    let to = site.trees().join(label.as_str());
    Ok(vec![
        format!("dump process {pid} and those below it to {}", to.display()),
        format!("{} them", if then == Then::GoOn { "let go on" } else { "end" }),
    ])
}

/// Makes a checkpoint of process `pid` and all below it; they end with it, or go on.
///
/// # Errors
/// Exit 5 when they cannot be dumped, 43 when the label is taken; then there is no checkpoint, and they go on.
pub fn create(site: &Site, pid: i32, label: Option<&Name>, then: Then) -> Result<Kept> {
    let subject = Subject::find(site, pid)?;
    let label = label.map_or_else(|| subject.label(), |label| Ok(label.clone()))?;
    let lock = lock(site, &label)?;
    check_free(site, &label)?;
    clear(site, &label)?;
    let named = site.trees().join(label.as_str());
    let draft = site.trees().join(format!("{}{label}", PASSING[0]));
    // What others have in their memory is nobody's business.
    let make = DirBuilder::new().recursive(true).mode(0o700).create(&draft);
    make.with_context(|| format!("make {}", draft.display()))?;
    let dumped = subject.dump(site, &draft, &named, then, (&label, &lock));
    if let Err(error) = dumped.map_err(criu::say_if_the_disk_is_full) {
        if named.exists() {
            return Err(error.context(format!("the checkpoint '{label}' is whole, but not all went well")));
        }
        remove_tree(&draft)?;
        let goes_on = if subject.pidfd.is_alive() { "and it goes on" } else { "and it has ended meanwhile" };
        let error = match doubt(site) {
            Ok(Some(doubt)) => Failure::new(failure::exit_of(&error), format!("{error:#}")).hint(doubt).into(),
            _ => error,
        };
        return Err(error.context(format!("cannot put the tree of process {pid} on the disk, {goes_on}")));
    }
    Kept::open(site, &label)
}

/// What [`restore`] would do, in sentences.
///
/// # Errors
/// As [`restore`], as far as that can be seen before.
pub fn plan_restore(site: &Site, label: &Name) -> Result<Vec<String>> {
    let kept = Kept::open(site, label)?;
    kept.check()?;
    let member = |member: &record::Member| format!("restore process {}: {}", member.pid, member.command.escape_debug());
    Ok(kept.record.processes.iter().map(member).collect())
}

/// Brings the processes of a checkpoint back, which stays. The root becomes a child of this process.
///
/// # Errors
/// When it is damaged, a number is taken (exit 43), or CRIU refuses; then nothing of it runs.
pub fn restore(site: &Site, label: &Name) -> Result<(i32, PidFd)> {
    let lock = lock(site, label)?;
    let kept = Kept::open(site, label)?;
    let criu = criu(site);
    version(site)?;
    clear(site, label)?;
    kept.check()?;
    fault(RESTORE, 1)?;
    let options = Options { rst_sibling: Some(true), ..common() };
    let bring = || -> Result<()> {
        let mut session = criu.begin(Kind::Restore, &kept.directory, &site.tree_run(label), options, Some(&lock))?;
        loop {
            match session.listen()? {
                Event::Stage { name, .. } => match moment(&name, &kept.record) {
                    Ok(()) => session.go_on()?,
                    Err(error) => {
                        session.take_back();
                        return Err(error);
                    }
                },
                Event::Done => return Ok(()),
            }
        }
    };
    bring().map_err(|error| {
        let failure =
            Failure::new(failure::exit_of(&error), format!("cannot bring back the tree '{label}': {error:#}"));
        failure.hint("its files, programs and libraries must be there, and as long as they were but for those it only appends to")
    })?;
    let pid = kept.record.root();
    // A child of ours: it is there until it is reaped.
    let root = PidFd::open(pid)?;
    fault(RESTORE, 5)?;
    Ok((pid, root))
}

/// The moments at which a restore can be interrupted by a test: before anything is there, before anything has run, and after. Between
/// the last two all processes are there, and none has run yet.
fn moment(stage: &str, record: &Record) -> Result<()> {
    match stage {
        "pre-restore" => fault(RESTORE, 2),
        "post-restore" => fault(RESTORE, 3),
        "pre-resume" => {
            thread_settings::apply(&record.settings, &record.pids());
            Ok(())
        }
        "post-resume" => fault(RESTORE, 4),
        _ => Ok(()),
    }
}

/// Removes a checkpoint.
///
/// # Errors
/// When there is none, or the disk refuses.
pub fn delete(site: &Site, label: &Name) -> Result<()> {
    let _lock = lock(site, label)?;
    let found = find(site, label)?;
    clear(site, label)?;
    let gone = found.with_file_name(format!("{}{label}", PASSING[1]));
    fs::rename(&found, &gone).with_context(|| format!("put {} aside", found.display()))?;
    remove_tree(&gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site() -> (tempfile::TempDir, Site) {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        for entry in ["one", "two", ".new-three", ".gone-one", ".other"] {
            fs::create_dir_all(site.trees().join(entry)).unwrap();
        }
        (root, site)
    }

    fn names<const N: usize>(names: [&str; N]) -> [Name; N] {
        names.map(|name| name.parse().unwrap())
    }

    #[test]
    fn what_is_half_made_is_no_checkpoint() {
        let (_root, site) = site();
        assert_eq!(labels(&site).unwrap(), names(["one", "two"]));
        let left: Vec<Name> = leftovers(&site).unwrap().into_iter().map(|(label, _)| label).collect();
        assert_eq!(left, names(["one", "three"]));
    }

    #[test]
    fn what_another_command_is_at_work_on_is_left() {
        let (_root, site) = site();
        let [one, two, three] = names(["one", "two", "three"]);
        let held = try_lock(&site, &three).unwrap().unwrap();
        clear(&site, &two).unwrap();
        assert!(site.trees().join(".new-three").exists() && !site.trees().join(".gone-one").exists());
        drop(held);
        clear(&site, &one).unwrap();
        assert_eq!(leftovers(&site).unwrap(), []);
        assert!(site.trees().join(".other").exists());
    }

    #[test]
    fn a_tree_tells_its_name() {
        let mut command = std::process::Command::new("sleep");
        let mut child = command.arg("60").env(NAME_VARIABLE, "job").spawn().unwrap();
        let pid = child.id() as i32;
        let told = loop {
            // Before exec it has our environment.
            match name_of(pid) {
                Some(name) => break name,
                None => std::thread::yield_now(),
            }
        };
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((told.as_str(), name_of(std::process::id() as i32)), ("job", None));
    }

    #[test]
    fn a_checkpoint_that_is_not_there_says_where_to_look() {
        let (_root, site) = site();
        let error = Kept::open(&site, &"nine".parse().unwrap()).unwrap_err();
        assert_eq!(failure::exit_of(&error), Exit::NoServer);
        assert!(check_free(&site, &"one".parse().unwrap()).is_err());
    }
}
