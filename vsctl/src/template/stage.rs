//! A template under way: a directory beside the others that becomes one at the end, or goes.

use std::fs;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kernel::lock::Flock;

use super::definition::Definition;
use super::family::{Distribution, Family};
use super::progress::Progress;
use super::record::{self, Record};
use super::root::Root;
use super::{During, adapt, make_directory, remove_tree};
use crate::failure::{Exit, Failure};
use crate::name::Name;

/// Names that cannot be a template's, so that what an interrupted command left is known by its name.
const UNFINISHED: [&str; 2] = [".new-", ".gone-"];

/// How long a program may go on writing whose command was killed, and how often it is looked whether it does.
const WRITERS_END: Duration = Duration::from_secs(5);
const WRITERS_MOMENT: Duration = Duration::from_millis(20);

/// A build or an import under way. Dropping it removes what it made.
pub struct Stage<'a> {
    name: Name,
    templates: PathBuf,
    directory: PathBuf,
    progress: Collected<'a>,
    lock: Flock,
    finished: bool,
}

/// Passes everything on, and keeps the warnings for the record.
struct Collected<'a> {
    to: &'a mut dyn Progress,
    warnings: Vec<String>,
}

impl Progress for Collected<'_> {
    fn phase(&mut self, what: &str, total_bytes: Option<u64>) {
        self.to.phase(what, total_bytes);
    }

    fn advance(&mut self, done_bytes: u64) {
        self.to.advance(done_bytes);
    }

    fn note(&mut self, what: &str) {
        self.to.note(what);
    }

    fn warn(&mut self, what: &str) {
        self.warnings.push(what.to_owned());
        self.to.warn(what);
    }
}

/// Waits until no other command makes or removes templates, and clears away what an interrupted one left.
pub fn lock(templates: &Path, progress: &mut dyn Progress) -> Result<Flock> {
    let path = templates.join(".lock");
    let lock = match Flock::try_exclusive(&path)? {
        Some(lock) => lock,
        None => {
            progress.phase("waiting for another build", None);
            Flock::exclusive(&path)?
        }
    };
    sweep(templates)?;
    Ok(lock)
}

/// The directory of all templates, where there was none.
fn make_place(templates: &Path) -> Result<()> {
    if templates.is_dir() {
        return Ok(());
    }
    let state = templates.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(state).with_context(|| format!("make directory {}", state.display()))?;
    make_directory(templates, 0o700)
}

fn sweep(templates: &Path) -> Result<()> {
    for entry in fs::read_dir(templates).with_context(|| format!("list {}", templates.display()))? {
        let entry = entry.with_context(|| format!("list {}", templates.display()))?;
        let name = entry.file_name();
        if UNFINISHED.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            remove_left(&entry.path()).context("cannot remove what an interrupted build left")?;
        }
    }
    Ok(())
}

/// Removes it also while a program of a killed command still writes there: that ends with its input.
fn remove_left(path: &Path) -> Result<()> {
    let end = Instant::now() + WRITERS_END;
    loop {
        let removed = remove_tree(path);
        let is_written = |error: &io::Error| error.kind() == io::ErrorKind::DirectoryNotEmpty;
        match &removed {
            Err(error) if error.downcast_ref().is_some_and(is_written) && Instant::now() < end => {
                thread::sleep(WRITERS_MOMENT);
            }
            _ => return removed,
        }
    }
}

impl<'a> Stage<'a> {
    /// Begins the template `name` with an empty root.
    pub fn begin(templates: &Path, name: &Name, progress: &'a mut dyn Progress) -> Result<Self> {
        make_place(templates)?;
        let lock = lock(templates, progress)?;
        Self::begin_held(templates, name, lock, progress)
    }

    /// The same, where `lock` says how long another command is waited for.
    pub fn begin_soon(
        templates: &Path,
        name: &Name,
        lock: impl FnOnce(&Path) -> Result<Flock>,
        progress: &'a mut dyn Progress,
    ) -> Result<Self> {
        make_place(templates)?;
        let lock = lock(&templates.join(".lock"))?;
        sweep(templates)?;
        Self::begin_held(templates, name, lock, progress)
    }

    fn begin_held(templates: &Path, name: &Name, lock: Flock, progress: &'a mut dyn Progress) -> Result<Self> {
        if templates.join(name.as_str()).symlink_metadata().is_ok() {
            return Err(Failure::new(Exit::Exists, format!("there is a template '{name}' already"))
                .hint(format!("`vsctl template remove {name}` makes room for a new one"))
                .into());
        }
        let directory = templates.join(format!(".new-{name}"));
        let progress = Collected { to: progress, warnings: Vec::new() };
        make_directory(&directory, 0o700)?;
        let stage =
            Self { name: name.clone(), templates: templates.to_owned(), directory, progress, lock, finished: false };
        make_directory(&stage.root(), 0o755)?;
        Ok(stage)
    }

    /// The tree that becomes the template's.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// A new empty directory that goes when the stage ends.
    pub fn scratch(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        make_directory(&path, 0o700)?;
        Ok(path)
    }

    /// Where to tell how it goes.
    pub fn progress(&mut self) -> &mut dyn Progress {
        &mut self.progress
    }

    /// Another descriptor of the lock, for a child to keep.
    pub fn lock_file(&self) -> Result<File> {
        self.lock.file().try_clone().context("copy the build lock's descriptor")
    }

    /// Adapts the root, describes it, and makes it the template.
    pub fn finish(&mut self, definition: &Definition, text: &str, origin: String) -> Result<()> {
        let path = self.root();
        self.progress.phase("adapting", None);
        let root = Root::directory(&path)?;
        root.apply(&adapt::plan(&root, Family::named(&definition.family))?)?;
        root.apply(&definition.edits(self.name.as_str())?)?;
        self.remove_devices(&path)?;
        let survey = record::survey(&path)?;
        if survey.foreign_owners > 0 {
            let count = survey.foreign_owners;
            self.progress.warn(&format!(
                "{count} files belong to ids above 65535, which no server has: they will belong to nobody"
            ));
        }
        let distribution = Distribution::detect(&root)?;
        let record = Record::of(survey, origin, distribution, std::mem::take(&mut self.progress.warnings));
        self.become_template(text, &record)
    }

    /// Makes the root the template as it is.
    pub fn become_template(&mut self, text: &str, record: &Record) -> Result<()> {
        kernel::file::write_atomic(&self.directory.join("template.toml"), text.as_bytes())?;
        let record = toml::to_string(record).context("write record.toml")?;
        kernel::file::write_atomic(&self.directory.join("record.toml"), record.as_bytes())?;
        self.publish()
    }

    /// A server's devices come from its manager; nodes on disk would only wait for a mistake.
    fn remove_devices(&mut self, root: &Path) -> Result<()> {
        let devices = record::survey(root)?.devices;
        for device in &devices {
            let path = root.join(device);
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        let strange: Vec<String> =
            devices.iter().filter(|path| !is_ordinary(path)).map(|path| format!("/{}", path.display())).collect();
        if !strange.is_empty() {
            let shown =
                strange.iter().take(5).map(|path| path.escape_debug().to_string()).collect::<Vec<_>>().join(", ");
            self.progress.warn(&format!("{} device nodes or sockets were left out: {shown}", strange.len()));
        }
        Ok(())
    }

    /// The tree is on disk before its name is: after a power cut a template is whole or not there.
    fn publish(&mut self) -> Result<()> {
        self.progress.phase("writing to disk", None);
        for entry in fs::read_dir(&self.directory).context("list the new template")? {
            let path = entry.context("list the new template")?.path();
            let keep = ["root", "template.toml", "record.toml"].map(|name| self.directory.join(name));
            if !keep.contains(&path) {
                remove_tree(&path)?;
            }
        }
        let directory = File::open(&self.directory).context("open the new template")?;
        rustix::fs::syncfs(&directory).during(format!("write {} to disk", self.directory.display()))?;
        let target = self.templates.join(self.name.as_str());
        fs::rename(&self.directory, &target).with_context(|| format!("rename to {}", target.display()))?;
        self.finished = true;
        let templates = File::open(&self.templates).context("open the templates' directory")?;
        templates.sync_all().with_context(|| format!("sync {}", self.templates.display()))
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        if !self.finished {
            // What cannot be removed now is swept by the next build, and the first error is the one that matters.
            let _ = remove_tree(&self.directory);
        }
    }
}
/// Whether the node is one that every tarball of a root has and every server gets from its manager: no news.
fn is_ordinary(path: &Path) -> bool {
    const NAMES: &[&str] = &["null", "zero", "full", "random", "urandom", "console", "ptmx"];
    let name = path.strip_prefix("dev").ok().and_then(Path::to_str);
    name.is_some_and(|name| NAMES.contains(&name) || name.starts_with("tty"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_still_written_to_is_removed_when_that_ends() {
        let root = tempfile::tempdir().unwrap();
        let left = root.path().join(".new-busybox");
        fs::create_dir(&left).unwrap();
        let place = left.clone();
        let writer = thread::spawn(move || {
            let end = Instant::now() + Duration::from_millis(300);
            for number in 0.. {
                if fs::write(place.join(number.to_string()), "").is_err() || Instant::now() > end {
                    return number;
                }
            }
            0
        });
        while fs::read_dir(&left).unwrap().count() < 10 {}
        remove_left(&left).unwrap();
        assert!(writer.join().unwrap() > 10 && !left.exists());
    }
}
