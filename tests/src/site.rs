//! One installation for one promise: a temporary `VSOS_ROOT` with its own settings, templates and servers.
//!
//! Templates are built once per run and shared by hard links; nothing else is shared. What a promise leaves behind is
//! first compared (see `promise`), then scrubbed here, so that one failure does not cause the next.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    command::{Finished, Invocation},
    host::{HostState, Scope},
    promise::skip,
    server::Template,
};

/// Put into the environment of every command; a guest that can read it has the host's environment.
pub const SECRET: (&str, &str) = ("VSOS_TEST_SECRET", "a-word-that-only-the-host-knows");
/// How the names of sites begin.
const PREFIX: &str = "vsos-site-";
/// Templates of the tests' own: name, the shipped one that it is, and packages beside that one's.
const ENRICHED: [(&str, &str, &str); 1] =
    [("consumers", "debian-13", "htop,sysstat,stress-ng,python3-minimal,busybox")];
/// A distribution is unpacked and configured from a mirror: minutes on a slow one.
const TEMPLATE_LIMIT: Duration = Duration::from_secs(900);

/// An installation that exists for one promise.
pub struct Site {
    root: PathBuf,
    programs: PathBuf,
    transcript: Mutex<Vec<String>>,
}

impl Site {
    /// An empty installation.
    pub fn new() -> Result<Self> {
        Self::below(&place())
    }

    /// An empty installation below `place`: a file system of the promise's choice.
    pub fn below(place: &Path) -> Result<Self> {
        // The pid tells a later run whether this one is over.
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let directory = tempfile::Builder::new().prefix(&prefix).tempdir_in(place).context("make a site")?;
        // As open as the real directories are: a server's root has to pass through as nobody.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).context("open the site")?;
        Self::at(directory.keep())
    }

    fn at(root: PathBuf) -> Result<Self> {
        Ok(Self { root, programs: programs()?, transcript: Mutex::default() })
    }

    /// Its `VSOS_ROOT`.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The four digits in its global names.
    pub fn suffix(&self) -> String {
        suffix_of(self.root())
    }

    /// The supervisor of its FUSE service, once it serves.
    pub fn fuse_supervisor(&self) -> Option<i32> {
        fs::read_to_string(self.path("run/vsos/lxcfs/pid")).ok()?.trim().parse().ok()
    }

    /// The name of its control group, the parent of its servers'.
    pub fn cgroup(&self) -> String {
        format!("vsos-{}", self.suffix())
    }

    /// The name of its bridge.
    pub fn bridge(&self) -> String {
        format!("vsbr{}", self.suffix())
    }

    /// A path of the installation, such as `var/lib/vsos/servers`.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.root().join(relative)
    }

    /// What of the host is compared before and after.
    pub fn scope(&self) -> Scope {
        match std::env::var("VSOS_TEST_HOST").as_deref() {
            Ok("shared") => Scope::Site { root: self.root().to_owned(), suffix: self.suffix() },
            _ => Scope::Host,
        }
    }

    /// A call of one of our programs in this installation, to be changed or run by the caller.
    pub fn program<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, program: &str, arguments: I) -> Invocation {
        Invocation::new(self.programs.join(program))
            .args(arguments)
            .env("VSOS_ROOT", self.root())
            .env(SECRET.0, SECRET.1)
    }

    /// A call of `vsctl`, to be changed or run by the caller.
    pub fn vsctl<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, arguments: I) -> Invocation {
        self.program("vsctl", arguments)
    }

    /// Runs `vsctl`, whatever its exit status, and keeps what it said for the transcript.
    pub fn run<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, arguments: I) -> Result<Finished> {
        self.keep(self.vsctl(arguments))
    }

    /// Runs `vsctl` and asks for success.
    pub fn ok<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, arguments: I) -> Result<Finished> {
        self.run(arguments)?.success()
    }

    /// Runs `vsctl` and reads its output as JSON.
    pub fn json<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, arguments: I) -> Result<serde_json::Value> {
        self.ok(arguments)?.json()
    }

    /// Runs a prepared call and keeps what it said for the transcript.
    pub fn keep(&self, call: Invocation) -> Result<Finished> {
        let done = call.run();
        self.note(match &done {
            Ok(done) => shortened(&done.to_string()),
            Err(error) => format!("{error:#}"),
        });
        done
    }

    /// Adds a line to the transcript.
    pub fn note(&self, line: impl Into<String>) {
        locked(&self.transcript).push(line.into());
    }

    /// The last commands with what they said, for the report of a failure.
    pub fn transcript(&self) -> String {
        const SHOWN: usize = 30;
        let lines = locked(&self.transcript);
        let skipped = lines.len().saturating_sub(SHOWN);
        let head = if skipped > 0 { format!("({skipped} earlier ones left out)\n") } else { String::new() };
        head + &lines[skipped..].join("\n")
    }

    /// A template, built once per run and put into this installation. Skips the promise where it cannot be built.
    pub fn template(&self, name: &str) -> Result<Template<'_>> {
        let shared = shared_template(name)?;
        let here = self.path("var/lib/vsos/templates");
        fs::create_dir_all(&here).context("make the template store")?;
        if !here.join(name).exists() {
            let copy = |how: &str| Invocation::new("cp").args([how]).args([&shared, &here]).succeed();
            // Links first; another file system gets a copy.
            if copy("-al").is_err() {
                let _ = fs::remove_dir_all(here.join(name));
                copy("-a")?;
            }
        }
        Ok(Template::new(self, name))
    }

    /// The names of the servers that this installation knows.
    pub fn servers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("var/lib/vsos/servers")).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Takes away whatever is left, by the product's own means and then by force.
    ///
    /// Only what carries this site's names or directory is touched.
    pub fn scrub(&self) {
        for name in self.servers() {
            let _ = self.run(["destroy", "--force", &name]);
        }
        if self.leftovers().is_empty() {
            return;
        }
        let _ = self.run(["doctor", "--fix"]);
        for line in self.leftovers().of("process") {
            if let Some(pid) = line.split(' ').next().and_then(|pid| pid.parse().ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        // Deepest first.
        for line in self.leftovers().of("mount").rev() {
            if let Some(point) = line.split(' ').next() {
                let _ = Invocation::new("umount").args(["-l", point]).run();
            }
        }
        for link in self.leftovers().of("link") {
            let _ = Invocation::new("ip").args(["link", "delete", link]).run();
        }
        for table in self.leftovers().of("nft table") {
            let _ = Invocation::new("nft").args(["delete"]).args(table.split(' ')).run();
        }
        for group in self.leftovers().of("cgroup").rev() {
            let _ = fs::remove_dir(group);
        }
    }

    /// What on the host names this site now.
    fn leftovers(&self) -> HostState {
        HostState::capture(&Scope::Site { root: self.root().to_owned(), suffix: self.suffix() })
    }
}

/// The first lines of what a command said: a failure's report is read by people.
fn shortened(text: &str) -> String {
    const LINES: usize = 16;
    let more = text.lines().count().saturating_sub(LINES);
    let head: String = text.lines().take(LINES).map(|line| format!("{line}\n")).collect();
    if more > 0 { format!("{head}  ({more} more lines)\n") } else { head }
}

impl Drop for Site {
    fn drop(&mut self) {
        // Never through a mount: it may lead to files that are not the site's. What stays is found by the next run.
        if self.leftovers().of("mount").next().is_none() {
            let _ = fs::remove_dir_all(&self.root);
        }
    }
}

/// Removes what runs that were killed have left.
pub fn sweep() {
    for entry in fs::read_dir(place()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            if let Ok(site) = Site::at(entry.path()) {
                site.scrub();
            }
        }
    }
}

/// Waits until no other run compares all of the host, and keeps others waiting until it is dropped.
///
/// Runs that compare only what is their own (`VSOS_TEST_HOST=shared`) may go on side by side.
pub fn take_turn() -> Result<Flock<File>> {
    let path = Path::new("/run/lock/vsos-system-tests");
    fs::create_dir_all("/run/lock").context("make /run/lock")?;
    let file =
        || File::options().create(true).append(true).open(path).with_context(|| format!("open {}", path.display()));
    let (at_once, waiting) = match std::env::var("VSOS_TEST_HOST").as_deref() {
        Ok("shared") => (FlockArg::LockSharedNonblock, FlockArg::LockShared),
        _ => (FlockArg::LockExclusiveNonblock, FlockArg::LockExclusive),
    };
    if let Ok(turn) = Flock::lock(file()?, at_once) {
        return Ok(turn);
    }
    eprintln!("another run of the system tests is at work on this host: waiting for its end");
    Flock::lock(file()?, waiting).map_err(|(_, errno)| anyhow!("lock {}: {errno}", path.display()))
}

/// The directory for sites: `VSOS_TEST_DIR`, else one that is on a disk and stays open to all.
fn place() -> PathBuf {
    std::env::var_os("VSOS_TEST_DIR").unwrap_or_else(|| "/var/tmp".into()).into()
}

/// Where the three programs are: `VSOS_PROGRAMS`, else the release directory of this tree.
pub fn programs() -> Result<PathBuf> {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release");
    let directory = std::env::var_os("VSOS_PROGRAMS").map_or_else(built, PathBuf::from);
    let directory = directory.canonicalize().map_err(|_| no_programs(&directory))?;
    for program in ["vsctl", "vsinit", "lxcfs-fuse"] {
        ensure!(directory.join(program).is_file(), no_programs(&directory));
    }
    Ok(directory)
}

fn no_programs(directory: &Path) -> anyhow::Error {
    anyhow!("{} lacks vsctl, vsinit or lxcfs-fuse: run `make programs`", directory.display())
}

/// The digits that an installation puts into names global to the host: FNV-1a of its root, folded to 16 bits.
///
/// `installations_live_side_by_side` fails when the product does it otherwise.
pub fn suffix_of(root: &Path) -> String {
    let bytes = root.as_os_str().as_bytes();
    let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    format!("{:04x}", (hash >> 16) ^ (hash & 0xffff))
}

/// Templates of this run by name: their directory, or why they could not be built.
struct Shared {
    store: Option<Site>,
    built: BTreeMap<String, Result<PathBuf, Unbuilt>>,
}

#[derive(Clone)]
enum Unbuilt {
    /// This machine lacks something.
    Lacking(String),
    /// The product failed.
    Failed(String),
}

static SHARED: Mutex<Shared> = Mutex::new(Shared { store: None, built: BTreeMap::new() });

/// Removes the templates of this run; called when the last promise has been kept.
pub fn remove_shared_templates() {
    if let Some(store) = locked(&SHARED).store.take() {
        store.scrub();
    }
}

fn shared_template(name: &str) -> Result<PathBuf> {
    if let Some(template) = ready_made(name) {
        return Ok(template);
    }
    let shared = &mut *locked(&SHARED);
    if shared.store.is_none() {
        shared.store = Some(Site::new()?);
    }
    let store = shared.store.as_ref().context("no store")?;
    let built = shared.built.entry(name.to_owned()).or_insert_with(|| build(store, name));
    built.clone().map_err(|why| match why {
        Unbuilt::Lacking(why) => skip(why),
        Unbuilt::Failed(why) => anyhow!("{why}"),
    })
}

/// A template that was built before the run, where `VSOS_TEST_TEMPLATES` names a store with it: on an emulated processor
/// the building takes minutes, and it is a promise of its own elsewhere.
fn ready_made(name: &str) -> Option<PathBuf> {
    let store = PathBuf::from(std::env::var_os("VSOS_TEST_TEMPLATES")?);
    Some(store.join(name)).filter(|template| template.exists())
}

fn build(store: &Site, name: &str) -> Result<PathBuf, Unbuilt> {
    if let Some((_, base, packages)) = ENRICHED.iter().find(|(enriched, ..)| *enriched == name) {
        return enrich(store, name, base, packages);
    }
    build_with(store, name, None)
}

/// Builds the template `base` with more packages, and calls it `name`.
fn enrich(store: &Site, name: &str, base: &str, packages: &str) -> Result<PathBuf, Unbuilt> {
    if std::env::var_os("VSOS_TEST_TEMPLATES").is_some() {
        return Err(Unbuilt::Lacking(format!("the store of ready templates has no '{name}'")));
    }
    let failed = |error: anyhow::Error| Unbuilt::Failed(format!("{error:#}"));
    // Apart, since the plain one is called `base` too.
    let apart = Site::new().map_err(failed)?;
    let built = build_with(&apart, base, Some(packages))?;
    let place = store.path("var/lib/vsos/templates");
    let moved = fs::create_dir_all(&place).and_then(|()| fs::rename(built, place.join(name)));
    moved.context("put a template into the store").map_err(failed)?;
    Ok(place.join(name))
}

/// Has a shipped template built. `packages` reach mmdebstrap by a script of its name, which is found before it.
fn build_with(store: &Site, name: &str, packages: Option<&str>) -> Result<PathBuf, Unbuilt> {
    if name.starts_with("debian") && Invocation::new("mmdebstrap").args(["--version"]).succeed().is_err() {
        return Err(Unbuilt::Lacking("mmdebstrap is not installed".into()));
    }
    let mut call = store.vsctl(["template", "build", name]).limit(TEMPLATE_LIMIT);
    if let Some(packages) = packages {
        let path = put_before(store, packages).map_err(|error| Unbuilt::Failed(format!("{error:#}")))?;
        call = call.env("PATH", path);
    }
    let done = call.run();
    let done = done.map_err(|error| Unbuilt::Failed(format!("{error:#}")))?;
    if done.code != 0 {
        let errors = done.errors().to_lowercase();
        let unreachable = ["could not resolve", "unable to fetch", "connection refused", "connection timed out"];
        let why = done.to_string();
        let lacking = name.starts_with("debian") && unreachable.iter().any(|word| errors.contains(word));
        return Err(if lacking {
            Unbuilt::Lacking(format!("no mirror can be reached: {why}"))
        } else {
            Unbuilt::Failed(why)
        });
    }
    Ok(store.path("var/lib/vsos/templates").join(name))
}

/// A `PATH` on which mmdebstrap is a script that adds `packages` to what it is asked for.
fn put_before(store: &Site, packages: &str) -> Result<String> {
    let path = std::env::var("PATH").context("no PATH")?;
    let real = std::env::split_paths(&path).map(|directory| directory.join("mmdebstrap")).find(|file| file.is_file());
    let real = real.context("mmdebstrap is not installed")?;
    let directory = store.path("programs");
    let script = directory.join("mmdebstrap");
    fs::create_dir_all(&directory).context("make a directory for programs")?;
    fs::write(&script, format!("#!/bin/sh\nexec {} --include={packages} \"$@\"\n", real.display()))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).context("make a script executable")?;
    Ok(format!("{}:{path}", directory.display()))
}

/// A promise that panicked elsewhere does not spoil the list.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
