//! What happened to servers: a log of JSON lines that every command and monitor appends to.
//!
//! No daemon collects it. Each change of state is one line, written with one `write` to a file opened for appending, so
//! writers need no lock; what changed while nobody could write (a power cut) is not in it.
//!
//! ```text
//! <state>/events.log        the newest lines; at ROTATE_BYTES it becomes
//! <state>/events.log.old    and the former old one goes
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use rustix::fs::inotify;
use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::site::Site;

/// The log is renamed when it is longer; so at most twice this is kept.
const ROTATE_BYTES: u64 = 1 << 20;

/// What can happen to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// It was made.
    Created,
    /// Its init runs.
    Started,
    /// It ended and was taken back.
    Stopped,
    /// Its processes are held.
    Frozen,
    /// They go on.
    Thawed,
    /// Its processes were put on the disk.
    Suspended,
    /// They came back from there.
    Resumed,
    /// A checkpoint of it was made that is kept.
    Checkpointed,
    /// It was set back to one.
    Restored,
    /// Its spec was changed.
    Changed,
    /// It has another name.
    Renamed,
    /// It is another host's now.
    Moved,
    /// It came from another host.
    Arrived,
    /// It is gone.
    Destroyed,
}

impl Kind {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Started => "started",
            Self::Stopped => "stopped",
            Self::Frozen => "frozen",
            Self::Thawed => "thawed",
            Self::Suspended => "suspended",
            Self::Resumed => "resumed",
            Self::Checkpointed => "checkpointed",
            Self::Restored => "restored",
            Self::Changed => "changed",
            Self::Renamed => "renamed",
            Self::Moved => "moved",
            Self::Arrived => "arrived",
            Self::Destroyed => "destroyed",
        }
    }
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in UTC: `2026-11-23T15:59:21.123Z`.
    pub time: String,
    /// To which server.
    pub server: Name,
    /// What.
    pub event: Kind,
    /// More about it: changed keys, a new name, a checkpoint's label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

fn file(site: &Site) -> PathBuf {
    site.state().join("events.log")
}

fn old_file(site: &Site) -> PathBuf {
    site.state().join("events.log.old")
}

/// Writes down that `event` happened to a server. A log that cannot be written is no reason to fail.
pub fn note(site: &Site, name: &Name, event: Kind) {
    note_with(site, name, event, None);
}

/// [`note`] with more about it.
pub fn note_with(site: &Site, name: &Name, event: Kind, detail: Option<String>) {
    let event = Event { time: timestamp(SystemTime::now()), server: name.clone(), event, detail };
    if let Err(error) = append(site, &event) {
        log::warn!("the event log: {error:#}");
    }
}

fn append(site: &Site, event: &Event) -> Result<()> {
    let path = file(site);
    let mut line = serde_json::to_vec(event).context("write an event as JSON")?;
    line.push(b'\n');
    let mut log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    log.write_all(&line).with_context(|| format!("write {}", path.display()))?;
    let length = log.metadata().with_context(|| format!("stat {}", path.display()))?.len();
    if length > ROTATE_BYTES { rotate(site) } else { Ok(()) }
}

/// Renames a log that is too long. A line that another writes at this moment goes to the renamed file: it is not lost.
fn rotate(site: &Site) -> Result<()> {
    let Some(_lock) = kernel::lock::Flock::try_exclusive(&site.state().join("events.lock"))? else { return Ok(()) };
    let path = file(site);
    // Another may have done it between looking and locking.
    match fs::metadata(&path) {
        Ok(found) if found.len() > ROTATE_BYTES => {
            fs::rename(&path, old_file(site)).with_context(|| format!("rename {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Everything that is kept, oldest first. Lines that make no sense are left out.
///
/// # Errors
/// When a file cannot be read.
pub fn read(site: &Site) -> Result<Vec<Event>> {
    let mut events = Vec::new();
    for path in [old_file(site), file(site)] {
        match fs::read(&path) {
            Ok(text) => events.extend(text.split(|byte| *byte == b'\n').filter_map(parse)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        }
    }
    Ok(events)
}

fn parse(line: &[u8]) -> Option<Event> {
    serde_json::from_slice(line).ok()
}

/// Waits for what happens from now on, and gives it to `hear` until that fails.
///
/// # Errors
/// What `hear` says, or when the log cannot be watched.
pub fn follow(site: &Site, mut hear: impl FnMut(Event) -> Result<()>) -> Result<()> {
    let directory = site.state();
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).context("watch the event log")?;
    // The directory, not the file: it may not be there yet, and is renamed some day.
    let flags = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE;
    inotify::add_watch(&watch, &directory, flags).with_context(|| format!("watch {}", directory.display()))?;
    let mut tail = Tail::at_end(site)?;
    let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
    let mut reader = inotify::Reader::new(&watch, &mut buffer);
    loop {
        tail.read_on(site)?.into_iter().try_for_each(&mut hear)?;
        match reader.next() {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error)).context("watch the event log"),
        }
        // The rest of what woke us says the same.
        while !reader.is_buffer_empty() {
            let _ = reader.next();
        }
    }
}

/// A reader that stays at the end of the log, over its renaming.
struct Tail {
    open: Option<BufReader<File>>,
    /// A line whose end has not been written yet.
    torn: Vec<u8>,
}

impl Tail {
    fn at_end(site: &Site) -> Result<Self> {
        let mut tail = Self { open: open(site)?, torn: Vec::new() };
        if let Some(log) = &mut tail.open {
            io::Seek::seek(log, io::SeekFrom::End(0)).context("go to the end of the event log")?;
        }
        Ok(tail)
    }

    fn read_on(&mut self, site: &Site) -> Result<Vec<Event>> {
        let mut events = self.lines()?;
        let inode = |file: &File| file.metadata().map(|found| found.ino()).ok();
        let current = fs::metadata(file(site)).map(|found| found.ino()).ok();
        if current.is_some() && current != self.open.as_ref().and_then(|log| inode(log.get_ref())) {
            self.open = open(site)?;
            self.torn.clear();
            events.extend(self.lines()?);
        }
        Ok(events)
    }

    fn lines(&mut self) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        let Some(log) = &mut self.open else { return Ok(events) };
        while log.read_until(b'\n', &mut self.torn).context("read the event log")? > 0 {
            if self.torn.ends_with(b"\n") {
                events.extend(parse(&self.torn));
                self.torn.clear();
            }
        }
        Ok(events)
    }
}

fn open(site: &Site) -> Result<Option<BufReader<File>>> {
    match File::open(file(site)) {
        Ok(file) => Ok(Some(BufReader::new(file))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("open the event log"),
    }
}

/// RFC 3339 in UTC with milliseconds; sorted as text it is sorted by time.
pub fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

/// The day's date in the Gregorian calendar, from days since 1970.
///
/// Years are counted from March, so that the leap day is a year's last one.
fn date(days: u64) -> (u64, u64, u64) {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    // 0000-03-01 was so many days before 1970-01-01.
    let days = days + 719_468;
    let (era, day_of_era) = (days / DAYS_OF_400_YEARS, days % DAYS_OF_400_YEARS);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months of 31, 30, 31, 30, 31 days repeat from March: 153 days each five.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn site() -> (tempfile::TempDir, Site) {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        fs::create_dir_all(site.state()).unwrap();
        (root, site)
    }

    #[test]
    fn times_are_dates_of_the_calendar() {
        let at = |seconds| timestamp(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(951_868_800), "2000-03-01T00:00:00.000Z");
        assert_eq!(at(1_767_225_599), "2025-12-31T23:59:59.000Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.000Z");
    }

    #[test]
    fn what_is_noted_is_read_and_nonsense_is_not() {
        let (_root, site) = site();
        let name: Name = "web1".parse().unwrap();
        note(&site, &name, Kind::Created);
        OpenOptions::new().append(true).open(file(&site)).unwrap().write_all(b"nonsense\n").unwrap();
        note_with(&site, &name, Kind::Changed, Some("memory".into()));
        let events = read(&site).unwrap();
        assert_eq!(events.iter().map(|event| event.event).collect::<Vec<_>>(), [Kind::Created, Kind::Changed]);
        assert_eq!(events[1].detail.as_deref(), Some("memory"));
    }

    #[test]
    fn the_log_stays_bounded_and_a_tail_survives_its_renaming() {
        let (_root, site) = site();
        let name: Name = "web1".parse().unwrap();
        let mut tail = Tail::at_end(&site).unwrap();
        let mut seen = 0;
        let long = Some("x".repeat(10_000));
        let count = 3 * ROTATE_BYTES / 10_000;
        for _ in 0..count {
            note_with(&site, &name, Kind::Changed, long.clone());
            seen += tail.read_on(&site).unwrap().len() as u64;
        }
        assert_eq!(seen, count);
        let kept =
            fs::metadata(file(&site)).map_or(0, |found| found.len()) + fs::metadata(old_file(&site)).unwrap().len();
        assert!(kept <= 2 * ROTATE_BYTES + 40_000, "{kept}");
    }

    #[test]
    fn a_log_that_cannot_be_written_harms_nothing() {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        note(&site, &"web1".parse().unwrap(), Kind::Started);
        assert_eq!(read(&site).unwrap(), []);
    }
}
