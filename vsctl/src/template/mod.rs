//! Templates: where the roots of servers come from.
//!
//! ```text
//! <state>/templates/                 0700: programs with setuid bits of unknown origin are in it
//!     NAME/                          flock: shared while a server is being made of it, exclusive to remove it
//!     NAME/template.toml             the definition (definition.rs)
//!     NAME/record.toml               what was made of it, with a digest (record.rs)
//!     NAME/root/                     the tree, never written again
//!     .new-NAME/                     a build, an import or what comes from another host; renamed to NAME at its end
//!     .gone-NAME/                    a template that is being removed
//!     .lock                          held by whoever builds, imports or removes
//! ```
//!
//! A root gets to its server in two steps of edits, each computed from the tree and then applied: [`adapt`] once for
//! the template, [`personalise`] for every server. This module knows no server; names of users are told to it.

pub mod adapt;
mod busybox;
pub mod copy;
pub mod definition;
pub mod edit;
pub mod family;
pub mod host_keys;
mod import;
mod incoming;
mod mmdebstrap;
pub mod password;
pub mod personalise;
pub mod progress;
pub mod record;
mod remove;
pub mod resolver;
pub mod root;
mod stage;
mod unpack;

use std::fmt::Display;
use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::FlockOperation;

use crate::failure::{Exit, Failure};
use crate::name::Name;
use definition::{Definition, Source};
use family::Family;
use progress::Progress;
use record::Record;
use root::Root;
use stage::Stage;

pub use copy::copy_tree;
pub use definition::{Init, buildable};
pub use incoming::Incoming;
pub use remove::remove_tree;
pub use unpack::{Content, InTheWay, Members, complains_only, listen, pack_stream, unpack_stream};

/// Where the host keeps its static busybox.
const BUSYBOX: &str = "/bin/busybox";

/// All templates of one installation.
#[derive(Debug, Clone)]
pub struct Templates {
    directory: PathBuf,
}

/// One template that is ready for use.
#[derive(Debug, Clone)]
pub struct Template {
    /// Its name.
    pub name: Name,
    /// What it was made of.
    pub definition: Definition,
    /// What was made of it.
    pub record: Record,
    directory: PathBuf,
}

/// A template that nobody can remove while this value lives.
#[derive(Debug)]
pub struct Held {
    /// The template.
    pub template: Template,
    _lock: File,
}

/// What may be chosen for a build.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// A Debian mirror's URI instead of those of the host's apt.
    pub mirror: Option<String>,
}

impl Template {
    /// The tree.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// The rules of its distribution.
    pub fn family(&self) -> &'static Family {
        Family::named(&self.definition.family)
    }
}

impl Templates {
    /// The templates below the state directory (`/var/lib/vsos`).
    pub fn below(state: &Path) -> Self {
        Self { directory: state.join("templates") }
    }

    /// All that are ready, by name. One that cannot be read is left out; [`Templates::open`] says why.
    pub fn list(&self) -> Result<Vec<Template>> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(error).with_context(|| format!("list {}", self.directory.display()));
            }
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<Name>().ok());
        let mut templates: Vec<Template> = names.filter_map(|name| self.open(&name).ok()).collect();
        templates.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(templates)
    }

    /// The template `name`.
    ///
    /// # Errors
    /// [`Exit::NoTemplate`] when there is none.
    pub fn open(&self, name: &Name) -> Result<Template> {
        let directory = self.directory.join(name.as_str());
        let read = |file: &str| {
            let path = directory.join(file);
            match fs::read_to_string(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Err(self.missing(name)),
                other => other.with_context(|| format!("read {}", path.display())),
            }
        };
        let bad = |file: &str| format!("{} cannot be used", directory.join(file).display());
        let definition = Definition::parse(&read("template.toml")?).with_context(|| bad("template.toml"))?;
        let record = toml::from_str(&read("record.toml")?).map_err(|error| {
            Failure::new(Exit::BadConfiguration, format!("{}: {}", bad("record.toml"), error.message()))
        })?;
        Ok(Template { name: name.clone(), definition, record, directory })
    }

    fn missing(&self, name: &Name) -> anyhow::Error {
        let hint = match Definition::shipped(name.as_str()) {
            Ok(_) => format!("make it: `vsctl template build {name}`"),
            Err(_) => "`vsctl template list` shows those that there are".to_owned(),
        };
        Failure::new(Exit::NoTemplate, format!("there is no template '{name}'")).hint(hint).into()
    }

    /// What has the name of the template `name` here, be it one or not.
    pub fn stray(&self, name: &Name) -> Option<PathBuf> {
        Some(self.directory.join(name.as_str())).filter(|path| path.symlink_metadata().is_ok())
    }

    /// The template `name`, kept from being removed: for the time in which a server of it is made, until the server's
    /// own files name it.
    pub fn hold(&self, name: &Name) -> Result<Held> {
        let template = self.open(name)?;
        let busy = || Failure::new(Exit::Locked, format!("template '{name}' is just being removed"));
        let lock = lock_directory(&template.directory, FlockOperation::NonBlockingLockShared)?.ok_or_else(busy)?;
        // It may have been removed meanwhile, and the lock be one on a directory that is gone.
        let held = lock.metadata().with_context(|| format!("stat {}", template.directory.display()))?;
        match fs::metadata(&template.directory) {
            Ok(meta) if (meta.dev(), meta.ino()) == (held.dev(), held.ino()) => Ok(Held { template, _lock: lock }),
            _ => Err(self.missing(name)),
        }
    }

    /// Makes the shipped template `name`.
    ///
    /// # Errors
    /// [`Exit::Exists`] when there is one of the name, [`Exit::NoTemplate`] when none of the name is shipped,
    /// [`Exit::Unsupported`] when a program is missing, [`Exit::NoSpace`]. Nothing is left behind.
    pub fn build(&self, name: &Name, options: &BuildOptions, progress: &mut dyn Progress) -> Result<Template> {
        let (definition, text) = Definition::shipped(name.as_str())?;
        let mut stage = Stage::begin(&self.directory, name, progress)?;
        let origin = match &definition.source {
            Source::Busybox {} => {
                stage.progress().phase("linking the words of busybox", None);
                busybox::fill(&stage.root(), Path::new(BUSYBOX))?
            }
            Source::Mmdebstrap { suite, components, packages } => {
                let recipe = mmdebstrap::Recipe { suite, components, packages, mirror: options.mirror.as_deref() };
                mmdebstrap::check(&recipe)?;
                let (root, lock) = (stage.root(), stage.lock_file()?);
                mmdebstrap::fill(&root, &recipe, &lock, stage.progress())?
            }
            Source::Import { .. } => bail!("a shipped template cannot be an import"),
        };
        stage.finish(&definition, text, origin)?;
        self.open(name)
    }

    /// Makes the template `name` of a tarball of a whole root, which is not trusted.
    ///
    /// # Errors
    /// [`Exit::BadParameter`] when the archive cannot be used, [`Exit::Exists`], [`Exit::NoSpace`]. Nothing is left behind.
    pub fn import(&self, name: &Name, archive: &Path, progress: &mut dyn Progress) -> Result<Template> {
        let mut stage = Stage::begin(&self.directory, name, progress)?;
        let (root, sandbox) = (stage.root(), stage.scratch("sandbox")?);
        for warning in unpack::unpack(archive, &root, &sandbox, stage.progress())? {
            stage.progress().warn(&warning);
        }
        import::lift(&root, &stage.scratch("lifted")?)?;
        let file = archive.file_name().unwrap_or(archive.as_os_str()).to_string_lossy().into_owned();
        let definition = import::describe(&Root::directory(&root)?, &file)?;
        let text = toml::to_string(&definition).context("write template.toml")?;
        stage.finish(&definition, &text, format!("import of {file}"))?;
        self.open(name)
    }

    /// Removes the template `name`. `users` says which servers are made of it, and is asked when no new one can be.
    ///
    /// # Errors
    /// [`Exit::Locked`] when a server uses it, or is just being made of it.
    pub fn remove(&self, name: &Name, users: impl FnOnce() -> Result<Vec<Name>>) -> Result<()> {
        let template = self.open(name)?;
        let _lock = stage::lock(&self.directory, &mut progress::Silent)?;
        let Some(_held) = lock_directory(&template.directory, FlockOperation::NonBlockingLockExclusive)? else {
            let message = format!("a server is just being made of template '{name}'");
            return Err(Failure::new(Exit::Locked, message).into());
        };
        let users = users()?;
        if !users.is_empty() {
            let shown: Vec<&str> = users.iter().take(5).map(Name::as_str).collect();
            let more = users.len().checked_sub(6).map(|more| format!(" and {} more", more + 1)).unwrap_or_default();
            return Err(Failure::new(Exit::Locked, format!("template '{name}' is used by {}{more}", shown.join(", ")))
                .hint("destroy these servers first")
                .into());
        }
        let gone = self.directory.join(format!(".gone-{name}"));
        fs::rename(&template.directory, &gone).with_context(|| format!("rename {}", template.directory.display()))?;
        remove_tree(&gone)
    }
}

/// The lock of a template's directory, or `None` when another holds it.
fn lock_directory(path: &Path, operation: FlockOperation) -> Result<Option<File>> {
    let directory = File::open(path).with_context(|| format!("open {}", path.display()))?;
    match rustix::fs::flock(&directory, operation) {
        Ok(()) => Ok(Some(directory)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(errno).during(format!("lock {}", path.display())),
    }
}

/// A new directory with exactly `mode`, whatever the umask.
fn make_directory(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let made = fs::DirBuilder::new().mode(mode).create(path);
    made.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("make directory {}", path.display()))
}

/// Says what failed, and keeps the reason in the form in which a full disk is recognised (`failure::exit_of`).
trait During<T> {
    /// Adds what was being done.
    fn during(self, what: impl Display) -> Result<T>;
}

impl<T> During<T> for rustix::io::Result<T> {
    fn during(self, what: impl Display) -> Result<T> {
        self.map_err(io::Error::from).with_context(|| what.to_string())
    }
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests;
