//! The journal of one server: steps that stand and must be taken back some day.
//!
//! A line of JSON per event. A step is put down before it is made, so that a reader after `kill -9` knows what may
//! exist; all undos are harmless when the thing is not there. The file exists exactly as long as something may have to
//! be taken back.
//!
//! ```text
//! {"begin":{"files":{"make-directory":{…}}}}
//! {"begin":{"group":{"make":{…}}}}
//! {"keep":1}                                 only the first one stands now
//! {"drop":1}                                 the first one is gone, those after it stand
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::step::Step;

/// Whether the journal must survive a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasting {
    /// Its steps change the disk: a whole plan is put down and synced before its first step.
    Disk,
    /// Its steps change what a reboot takes away: each is put down when its turn comes, without sync.
    Boot,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Event {
    Begin(Step),
    Keep(usize),
    Drop(usize),
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    lasting: Lasting,
    standing: Vec<Step>,
}

impl Journal {
    /// Opens the journal at `path`, with what stands in it; makes an empty one when there is none.
    ///
    /// # Errors
    /// When it cannot be read or made.
    pub fn open(path: &Path, lasting: Lasting) -> Result<Self> {
        let standing = standing(path)?;
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("open the journal {}", path.display()))?;
        let journal = Self { path: path.to_owned(), file, lasting, standing };
        journal.end_torn_line()?;
        Ok(journal)
    }

    /// A write that was cut short must not swallow the next event.
    fn end_torn_line(&self) -> Result<()> {
        let text = fs::read(&self.path).with_context(|| format!("read {}", self.path.display()))?;
        if text.last().is_some_and(|last| *last != b'\n') {
            (&self.file).write_all(b"\n").context("end the journal's last line")?;
        }
        Ok(())
    }

    /// The steps that stand, first one first.
    pub fn standing(&self) -> &[Step] {
        &self.standing
    }

    /// How long its events last.
    pub fn lasting(&self) -> Lasting {
        self.lasting
    }

    /// Puts `steps` down as standing, in one write.
    ///
    /// # Errors
    /// When the disk refuses: then they must not be made.
    pub fn begin(&mut self, steps: &[Step]) -> Result<()> {
        let mut text = Vec::new();
        for step in steps {
            line(&mut text, &Event::Begin(step.clone()))?;
        }
        self.write(&text)?;
        if self.lasting == Lasting::Disk {
            self.file.sync_data().with_context(|| format!("sync {}", self.path.display()))?;
        }
        self.standing.extend_from_slice(steps);
        Ok(())
    }

    /// Puts down that only the first `count` steps stand. Not synced: taking back twice is harmless.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn keep(&mut self, count: usize) -> Result<()> {
        let mut text = Vec::new();
        line(&mut text, &Event::Keep(count))?;
        self.write(&text)?;
        self.standing.truncate(count);
        Ok(())
    }

    /// Puts down that the first `count` steps are gone and only those after them stand.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn replace(&mut self, count: usize) -> Result<()> {
        let mut text = Vec::new();
        line(&mut text, &Event::Drop(count))?;
        self.write(&text)?;
        self.standing.drain(..count.min(self.standing.len()));
        Ok(())
    }

    /// Removes the file: nothing is left to take back, or what stands is to last. One on the disk goes for good: back after a power
    /// cut, it would have what was confirmed taken back.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(self) -> Result<()> {
        match fs::remove_file(&self.path) {
            // With the directory that it lay in.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            removed => removed.with_context(|| format!("remove {}", self.path.display()))?,
        }
        if self.lasting == Lasting::Disk {
            kernel::file::sync_entry(&self.path)?;
        }
        Ok(())
    }

    fn write(&mut self, lines: &[u8]) -> Result<()> {
        // One write: a reader sees whole lines, or one torn last line.
        self.file.write_all(lines).with_context(|| format!("write {}", self.path.display()))
    }
}

fn line(text: &mut Vec<u8>, event: &Event) -> Result<()> {
    serde_json::to_writer(&mut *text, event).context("write a step as JSON")?;
    text.push(b'\n');
    Ok(())
}

/// The steps that stand in the journal at `path`; none when there is no such file.
///
/// A torn last line is an event that did not happen: its step had not been begun.
///
/// # Errors
/// When the file cannot be read, or a whole line makes no sense.
pub fn standing(path: &Path) -> Result<Vec<Step>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    parse(&text).with_context(|| format!("the journal {} is damaged", path.display()))
}

fn parse(text: &str) -> Result<Vec<Step>> {
    let mut standing = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let event = match serde_json::from_str(line) {
            Ok(event) => event,
            // Torn by a crash, or ended by the next writer after one.
            Err(error) if error.is_eof() => continue,
            Err(error) => return Err(error).with_context(|| format!("line {}", index + 1)),
        };
        match event {
            Event::Begin(step) => standing.push(step),
            Event::Keep(count) => standing.truncate(count),
            Event::Drop(count) => drop(standing.drain(..count.min(standing.len()))),
        }
    }
    Ok(standing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::files::FilesStep;

    fn step(path: &str) -> Step {
        Step::Files(FilesStep::MakeDirectory { path: path.into(), mode: 0o700 })
    }

    #[test]
    fn what_stands_is_read_back_at_every_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let mut journal = Journal::open(&path, Lasting::Boot).unwrap();
        journal.begin(&[step("/a")]).unwrap();
        journal.begin(&[step("/b"), step("/c")]).unwrap();
        journal.keep(2).unwrap();
        journal.keep(1).unwrap();
        assert_eq!(journal.standing(), [step("/a")]);
        assert_eq!(standing(&path).unwrap(), [step("/a")]);

        let text = fs::read_to_string(&path).unwrap();
        for cut in 0..text.len() {
            let stands = parse(&text[..cut]).unwrap();
            assert!(stands.len() <= 3 && stands.first().is_none_or(|first| *first == step("/a")), "cut at {cut}");
        }
    }

    #[test]
    fn a_torn_line_does_not_swallow_the_next_event() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        fs::write(&path, "{\"begin\":{\"files\":{\"make-dir").unwrap();
        let mut journal = Journal::open(&path, Lasting::Boot).unwrap();
        journal.begin(&[step("/a")]).unwrap();
        assert_eq!(standing(&path).unwrap(), [step("/a")]);
    }

    #[test]
    fn nonsense_is_an_error_and_not_an_empty_journal() {
        assert!(parse("{\"begin\":{\"dance\":1}}\n").is_err());
        assert!(parse("\"explode\"\n").is_err());
    }
}
