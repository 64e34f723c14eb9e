//! Checkpoints that are kept: a server's disk, and its processes if it had any, of one instant, under a label.
//!
//! ```text
//! servers/NAME/checkpoints/LABEL/record.toml    what it is of, and what tells that it is whole
//! servers/NAME/checkpoints/LABEL/volume/        as the server's own; with suspended/ in it if there is memory
//! servers/NAME/checkpoints/.new-LABEL/          one that is being made; renamed to LABEL at its end
//! servers/NAME/checkpoints/.gone-LABEL/         one that is being removed
//! servers/NAME/volume.new/                      a copy that is to be the server's volume, or the volume that it has followed
//! ```
//!
//! A restore copies the checkpoint's volume and exchanges the copy for the server's, which is one rename: at every instant
//! the server has the disk and the memory of either. With memory it is then a suspended server, which is resumed.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ipnet::IpNet;
use rustix::fs::{CWD, RenameFlags};
use serde::{Deserialize, Serialize};

use super::dump::{Subject, Then};
use super::image::Manifest;
use super::{check_fits, clear, resume_held, version};
use crate::edit;
use crate::events::{self, Kind};
use crate::failure::{Exit, Failure};
use crate::lifecycle::state::{self, State};
use crate::lifecycle::stop;
use crate::name::Name;
use crate::site::Site;
use crate::spec::{Spec, VolumeKind};
use crate::store::{self, Server};
use crate::template::record::survey;
use crate::template::{copy_tree, remove_tree};
use crate::volume::{self, IMAGES, MEMORY};

/// The layout that this build writes and reads.
const VERSION: u32 = 1;

/// What is written down of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Of this file's layout.
    pub version: u32,
    /// Seconds since 1970.
    pub created_s: u64,
    /// The server's identity.
    pub uuid: String,
    /// Digest of the template below its volume.
    pub template_digest: String,
    /// Length of all images; none when only the disk is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Space that the files of the disk take, when they share none.
    pub disk_bytes: u64,
    /// What tells a changed disk: every path with kind, mode, owner, size and time of change, but no content.
    pub disk_digest: String,
    /// The server's addresses.
    pub addresses: Vec<IpNet>,
    /// Its `server.toml`.
    pub spec: String,
}

/// A checkpoint that is whole by its name.
#[derive(Debug)]
pub struct Kept {
    /// Its label.
    pub label: Name,
    /// What is written down of it.
    pub record: Record,
    directory: PathBuf,
}

fn directory(site: &Site, name: &Name) -> PathBuf {
    site.server(name).join("checkpoints")
}

/// Where the disk that follows a server's, or that it has followed, is during a restore.
pub fn aside(site: &Site, name: &Name) -> PathBuf {
    volume::directory(site, name).with_extension("new")
}

/// The directory of a checkpoint whose making or removal was interrupted begins with one of these.
const PASSING: [&str; 2] = [".new-", ".gone-"];

/// Checkpoints that were not finished, or not removed to the end.
///
/// # Errors
/// When their directory cannot be read.
pub fn unfinished(site: &Site, name: &Name) -> Result<Vec<PathBuf>> {
    let directory = directory(site, name);
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.and_then(Iterator::collect::<io::Result<Vec<_>>>),
    };
    let mut paths: Vec<PathBuf> =
        entries.with_context(|| format!("read {}", directory.display()))?.iter().map(fs::DirEntry::path).collect();
    let is_passing = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        PASSING.iter().any(|prefix| name.starts_with(prefix))
    };
    paths.retain(is_passing);
    Ok(paths)
}

/// The labels of a server's checkpoints.
///
/// # Errors
/// When they cannot be read.
pub fn labels(site: &Site, name: &Name) -> Result<Vec<Name>> {
    let mut labels = store::entries(&directory(site, name))?;
    labels.sort();
    Ok(labels)
}

/// The labels of those that bring back processes, too.
///
/// # Errors
/// When they cannot be read.
pub fn with_memory(site: &Site, name: &Name) -> Result<Vec<Name>> {
    let mut labels = labels(site, name)?;
    labels.retain(|label| directory(site, name).join(label.as_str()).join("volume").join(IMAGES).exists());
    Ok(labels)
}

/// A label for who gives none: the time, in UTC.
pub fn label_of_now() -> Name {
    let time = events::timestamp(std::time::SystemTime::now());
    let digits = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>();
    let (date, rest) = time.split_at("2026-11-28".len());
    let label = format!("{}T{}Z", digits(date), digits(&rest[.."T15:59:21".len()]));
    label.parse().expect("digits and letters are a label")
}

/// What making a checkpoint of a server takes now.
enum Source<'a> {
    /// Its processes and its disk.
    Running(Subject<'a>),
    /// What lies on the disk: with the images of its processes, or without.
    Still(State),
}

fn source<'a>(site: &'a Site, server: &'a Server, lock: &'a kernel::lock::Flock, label: &Name) -> Result<Source<'a>> {
    let name = &server.name;
    store::check_own(site, name)?;
    if directory(site, name).join(label.as_str()).exists() {
        return Err(Failure::new(Exit::Exists, format!("'{name}' has a checkpoint '{label}' already"))
            .hint("choose another label, or delete that one: `vsctl checkpoint delete`")
            .into());
    }
    match state::of(site, name)? {
        now @ (State::Stopped | State::Suspended) => Ok(Source::Still(now)),
        State::Ready => Err(interrupted(name)),
        _ => Ok(Source::Running(Subject::find(site, server, lock)?)),
    }
}

fn interrupted(name: &Name) -> anyhow::Error {
    let message = format!("a start or a stop of '{name}' was interrupted");
    Failure::new(Exit::Failed, message).hint(format!("`vsctl stop {name}` or `vsctl doctor --fix`")).into()
}

/// What [`create`] would do, in sentences.
///
/// # Errors
/// As [`create`], as far as that can be seen before.
pub fn plan_create(site: &Site, name: &Name, label: &Name, then: Then) -> Result<Vec<String>> {
    let lock = store::lock(site, name)?;
    let server = store::load(site, name)?;
    let source = source(site, &server, &lock, label)?;
    let from = volume::directory(site, name);
    let to = directory(site, name).join(label.as_str()).join("volume");
    let layer = volume::layer(server.spec.volume);
    let copy = |part: &str| format!("copy {} to {}", from.join(part).display(), to.join(part).display());
    Ok(match source {
        Source::Running(_) => vec![
            format!("dump the processes of {name} to {}", to.join(IMAGES).display()),
            copy(layer),
            format!("{} {name}", if then == Then::GoOn { "let go on" } else { "end" }),
        ],
        Source::Still(State::Suspended) => vec![copy(layer), copy(IMAGES)],
        Source::Still(_) => vec![copy(layer)],
    })
}

/// Makes a checkpoint. A running server ends with it, or goes on; one that is down stays as it is.
///
/// # Errors
/// When the label is taken, or the processes cannot be dumped; then there is no checkpoint, and the server goes on.
pub fn create(site: &Site, name: &Name, label: &Name, then: Then) -> Result<Kept> {
    let lock = store::lock(site, name)?;
    let server = store::load(site, name)?;
    let source = source(site, &server, &lock, label)?;
    if then == Then::End {
        store::forget_leaving(site, name)?;
    }
    clear(site, name)?;
    let draft = Draft::begin(site, &server, label)?;
    let outcome = match &source {
        Source::Running(subject) => {
            subject.dump(&draft.directory.join("volume").join(IMAGES), then, |manifest| draft.finish(Some(&manifest)))
        }
        Source::Still(State::Suspended) => whole_images(site, name).and_then(|manifest| draft.finish(Some(&manifest))),
        Source::Still(_) => draft.finish(None),
    };
    if let Err(error) = outcome {
        if draft.named.exists() {
            return Err(error.context(format!("the checkpoint '{label}' is whole")));
        }
        remove_tree(&draft.directory)?;
        return Err(error);
    }
    events::note_with(site, name, Kind::Checkpointed, Some(label.to_string()));
    if matches!(source, Source::Running(_)) && then == Then::End {
        events::note(site, name, Kind::Stopped);
    }
    Kept::open(site, name, label)
}

/// What is written down of a suspended server's images, which are whole.
fn whole_images(site: &Site, name: &Name) -> Result<Manifest> {
    let images = state::suspended_directory(site, name);
    let manifest = Manifest::read(&images)?;
    manifest.verify(&images, "`vsctl resume` could not bring them back either")?;
    Ok(manifest)
}

/// A checkpoint that is being made.
struct Draft<'a> {
    site: &'a Site,
    server: &'a Server,
    directory: PathBuf,
    named: PathBuf,
}

impl<'a> Draft<'a> {
    fn begin(site: &'a Site, server: &'a Server, label: &Name) -> Result<Self> {
        let all = directory(site, &server.name);
        let (made, named) = (all.join(format!("{}{label}", PASSING[0])), all.join(label.as_str()));
        let make = DirBuilder::new().recursive(true).mode(0o700).create(made.join("volume"));
        make.with_context(|| format!("make {}", made.display()))?;
        Ok(Self { site, server, directory: made, named })
    }

    /// Copies the disk, seals all and gives it its name: from now on it counts.
    fn finish(&self, memory: Option<&Manifest>) -> Result<()> {
        let Self { site, server, .. } = self;
        let to = self.directory.join("volume");
        copy_volume(&volume::directory(site, &server.name), &to, server.spec.volume)?;
        if let Some(manifest) = memory {
            manifest.seal(&to.join(IMAGES))?;
        }
        let disk = survey(&to.join(volume::layer(server.spec.volume)))?;
        let record = Record {
            version: VERSION,
            created_s: store::now_s(),
            uuid: server.record.uuid.clone(),
            template_digest: server.record.template_digest.clone(),
            memory_bytes: memory.map(Manifest::bytes),
            disk_bytes: disk.size_bytes,
            disk_digest: disk.digest,
            addresses: server.addresses().to_vec(),
            spec: edit::text(site, &server.name)?,
        };
        let text = toml::to_string(&record).context("write a record as TOML")?;
        kernel::file::write_atomic(&self.directory.join("record.toml"), text.as_bytes())?;
        fs::rename(&self.directory, &self.named).with_context(|| format!("name {}", self.named.display()))?;
        Ok(kernel::file::sync_entry(&self.named)?)
    }
}

/// Copies what lasts of the volume `from`, and its images if it has some, into the directory `to`.
fn copy_volume(from: &Path, to: &Path, kind: VolumeKind) -> Result<()> {
    if kind == VolumeKind::Overlay {
        // The kernel's own, and empty while nothing is mounted. First, since each copy ends with all before it on the disk.
        let work = to.join("work");
        DirBuilder::new().mode(0o755).create(&work).with_context(|| format!("make {}", work.display()))?;
    }
    copy_tree(&from.join(volume::layer(kind)), &to.join(volume::layer(kind)))?;
    if !from.join(IMAGES).exists() {
        return Ok(());
    }
    // What was written ahead belongs to images.
    if from.join(MEMORY).exists() {
        copy_tree(&from.join(MEMORY), &to.join(MEMORY))?;
    }
    copy_tree(&from.join(IMAGES), &to.join(IMAGES))
}

impl Kept {
    /// The checkpoint `label` of a server.
    ///
    /// # Errors
    /// When there is none, or its record cannot be used.
    pub fn open(site: &Site, name: &Name, label: &Name) -> Result<Self> {
        let directory = directory(site, name).join(label.as_str());
        let file = directory.join("record.toml");
        if !directory.exists() {
            return Err(missing(name, label));
        }
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let bad = |why: String| Failure::new(Exit::BadConfiguration, format!("{}: {why}", file.display()));
        let record: Record = toml::from_str(&text).map_err(|error| bad(error.message().to_owned()))?;
        if record.version != VERSION {
            return Err(bad(format!("version {} is not known", record.version)).into());
        }
        Ok(Self { label: label.clone(), record, directory })
    }

    /// Whether it brings back processes.
    pub fn has_memory(&self) -> bool {
        self.record.memory_bytes.is_some()
    }

    fn volume(&self) -> PathBuf {
        self.directory.join("volume")
    }

    /// Whether it is whole and the server can be set back to it.
    fn check(&self, site: &Site, server: &Server) -> Result<()> {
        let (name, label) = (&server.name, &self.label);
        let refuse = |why: String| Failure::new(Exit::Failed, format!("the checkpoint '{label}' of '{name}' {why}"));
        if self.record.uuid != server.record.uuid {
            return Err(refuse("is of another server".into()).into());
        }
        if self.record.template_digest != server.record.template_digest {
            return Err(refuse("is over another template".into()).into());
        }
        let hint = "nothing was changed; `vsctl checkpoint list` shows the others";
        if self.has_memory() {
            self.check_spec(server)?;
            let images = self.volume().join(IMAGES);
            let manifest = Manifest::read(&images)?;
            check_fits(server, &manifest)?;
            manifest.verify(&images, hint)?;
            version(site)?;
        }
        let disk = self.volume().join(volume::layer(server.spec.volume));
        if survey(&disk)?.digest != self.record.disk_digest {
            let why = format!("is damaged: {} has other files than it had", disk.display());
            return Err(refuse(why).hint(hint).into());
        }
        Ok(())
    }

    /// What is in the images was so under the spec of then.
    fn check_spec(&self, server: &Server) -> Result<()> {
        let then = Spec::parse(&self.record.spec, &self.directory.join("record.toml").display().to_string())?;
        let mut others = edit::compare(&server.spec, &then, false)?;
        others.retain(|effect| effect.key != "autostart");
        let (name, label) = (&server.name, &self.label);
        if !others.is_empty() {
            let keys: Vec<&str> = others.iter().map(|effect| effect.key).collect();
            let message = format!("'{name}' had another spec when '{label}' was made: {}", keys.join(", "));
            let changes: Vec<String> = others.iter().map(|effect| change(effect.key, effect.after.as_ref())).collect();
            let hint = format!("give it that one: `vsctl set {name} {}`", changes.join(" "));
            return Err(Failure::new(Exit::Failed, message).hint(hint).into());
        }
        if self.record.addresses != server.addresses() {
            let list = self.record.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let message = format!("'{name}' had other addresses when '{label}' was made: {list}");
            return Err(Failure::new(Exit::Failed, message).hint(format!("`vsctl set {name} ip={list}`")).into());
        }
        Ok(())
    }
}

/// A change of a spec as `vsctl set` takes it.
fn change(key: &str, value: Option<&toml::Value>) -> String {
    let plain = |value: &toml::Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    let text = match value {
        None => String::new(),
        Some(toml::Value::Array(list)) => list.iter().map(plain).collect::<Vec<_>>().join(","),
        Some(value) => plain(value),
    };
    format!("{key}={text}")
}

fn missing(name: &Name, label: &Name) -> anyhow::Error {
    Failure::new(Exit::NoServer, format!("'{name}' has no checkpoint '{label}'"))
        .hint(format!("`vsctl checkpoint list {name}` shows those that it has"))
        .into()
}

/// Whether a server in this state can be set back.
fn check_down(site: &Site, name: &Name, discard: bool) -> Result<()> {
    store::check_own(site, name)?;
    let failure = match state::of(site, name)? {
        State::Suspended if !discard => Failure::new(Exit::AlreadyRunning, format!("'{name}' is suspended"))
            .hint("--discard: what it has in memory is lost, as is its present disk"),
        State::Stopped | State::Suspended => return Ok(()),
        State::Ready => return Err(interrupted(name)),
        now => Failure::new(Exit::AlreadyRunning, format!("'{name}' is {now}"))
            .hint(format!("`vsctl stop {name}` first: its present disk is lost with a restore")),
    };
    Err(failure.into())
}

/// What [`restore`] would do, in sentences.
///
/// # Errors
/// As [`restore`], as far as that can be seen before.
pub fn plan_restore(site: &Site, name: &Name, label: &Name, discard: bool) -> Result<Vec<String>> {
    let server = store::load(site, name)?;
    let kept = Kept::open(site, name, label)?;
    check_down(site, name, discard)?;
    kept.check(site, &server)?;
    let (aside, volume) = (aside(site, name), volume::directory(site, name));
    let mut sentences = vec![
        format!("copy {} to {}", kept.volume().display(), aside.display()),
        format!("exchange {} for {}", volume.display(), aside.display()),
        format!("remove {}", aside.display()),
    ];
    if kept.has_memory() {
        sentences.push(format!("resume {name}"));
    }
    Ok(sentences)
}

/// Sets a server that is down back to a checkpoint, which stays. With memory it then runs. `discard`: also one that is suspended.
///
/// # Errors
/// When it is up, or the checkpoint is damaged or of another spec; then nothing has changed. When only the resume fails, it is
/// suspended as it was then.
pub fn restore(site: &Site, name: &Name, label: &Name, discard: bool) -> Result<()> {
    let lock = store::lock(site, name)?;
    edit::recover(site, name)?;
    let server = store::load(site, name)?;
    let kept = Kept::open(site, name, label)?;
    if state::of(site, name)? == State::Ready {
        stop::recover(site, name)?;
    }
    check_down(site, name, discard)?;
    kept.check(site, &server)?;
    store::forget_leaving(site, name)?;
    clear(site, name)?;
    let (aside, volume) = (aside(site, name), volume::directory(site, name));
    let made = DirBuilder::new().mode(0o700).create(&aside).with_context(|| format!("make {}", aside.display()));
    made.and_then(|()| copy_volume(&kept.volume(), &aside, server.spec.volume))
        .and_then(|()| exchange(&aside, &volume))
        .inspect_err(|_| {
            if let Err(error) = remove_tree(&aside) {
                log::warn!("{error:#}");
            }
        })
        .with_context(|| format!("cannot set '{name}' back, which is as it was"))?;
    let lasts = kernel::file::sync_entry(&volume);
    lasts.with_context(|| format!("'{name}' is set back, and may not be after a power cut"))?;
    events::note_with(site, name, Kind::Restored, Some(label.to_string()));
    if let Err(error) = remove_tree(&aside) {
        log::warn!("{error:#}");
    }
    if kept.has_memory() {
        let suspended = || format!("'{name}' is suspended as it was at '{label}'");
        resume_held(site, name, lock).with_context(suspended)?;
    }
    Ok(())
}

/// Each directory gets the other's name, at once.
fn exchange(one: &Path, other: &Path) -> Result<()> {
    rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)
        .map_err(io::Error::from)
        .with_context(|| format!("exchange {} for {}", other.display(), one.display()))
}

/// Checks that a server has the checkpoint `label`.
///
/// # Errors
/// When it has none.
pub fn find(site: &Site, name: &Name, label: &Name) -> Result<PathBuf> {
    store::load_record(site, name)?;
    let directory = directory(site, name).join(label.as_str());
    if directory.exists() { Ok(directory) } else { Err(missing(name, label)) }
}

/// Removes a checkpoint.
///
/// # Errors
/// When there is none, or the disk refuses.
pub fn delete(site: &Site, name: &Name, label: &Name) -> Result<()> {
    let _lock = store::lock(site, name)?;
    let found = find(site, name, label)?;
    let gone = found.with_file_name(format!("{}{label}", PASSING[1]));
    // Of a removal that was interrupted.
    remove_tree(&gone)?;
    fs::rename(&found, &gone).with_context(|| format!("put {} aside", found.display()))?;
    remove_tree(&gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_label_of_now_is_the_time() {
        let label = label_of_now();
        let year: u32 = label.as_str()[..4].parse().unwrap();
        assert!(year >= 2026 && label.as_str().len() == "20261128T155921Z".len(), "{label}");
    }

    #[test]
    fn what_is_half_made_is_no_checkpoint() {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        let name: Name = "web1".parse().unwrap();
        assert!(labels(&site, &name).unwrap().is_empty() && unfinished(&site, &name).unwrap().is_empty());
        for entry in ["one/volume/suspended", "new", ".new-two/volume/suspended", ".gone-three"] {
            fs::create_dir_all(directory(&site, &name).join(entry)).unwrap();
        }
        assert_eq!(labels(&site, &name).unwrap(), ["new", "one"].map(|label| label.parse::<Name>().unwrap()));
        assert_eq!(with_memory(&site, &name).unwrap(), ["one".parse::<Name>().unwrap()]);
        assert_eq!(unfinished(&site, &name).unwrap().len(), 2);
    }

    #[test]
    fn changes_are_as_set_takes_them() {
        let table: toml::Table = "a = 1.5\nb = \"64M\"\nc = [\"x\", \"y\"]".parse().unwrap();
        let said: Vec<String> = ["a", "b", "c", "d"].iter().map(|key| change(key, table.get(*key))).collect();
        assert_eq!(said, ["a=1.5", "b=64M", "c=x,y", "d="]);
    }
}
