//! A service's log: bounded, on disk, with the time before each line.
//!
//! ```text
//! /var/log/vsinit/NAME.log      the newest lines
//! /var/log/vsinit/NAME.log.1    those before; replaced at each rotation
//! ```
//! Nothing here fails upward: a full disk loses log lines, not services.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A line that never ends is cut into pieces of this length, so that one service without line
/// ends cannot make a file without bounds between two rotations.
const MAX_LINE_BYTES: u64 = 8192;

/// The writer of one service's log.
pub struct LogFile {
    path: PathBuf,
    limit_bytes: u64,
    open: Option<Open>,
    /// Bytes since the last line end.
    column: u64,
    /// Whether a failure was told already; it is told once until writing works again.
    complained: bool,
}

struct Open {
    file: File,
    size: u64,
}

impl LogFile {
    /// No effect until the first [`LogFile::append`].
    pub fn new(path: PathBuf, limit_bytes: u64) -> Self {
        LogFile { path, limit_bytes, open: None, column: 0, complained: false }
    }

    /// Writes what a service printed; on failure it is lost, and the console says so once.
    pub fn append(&mut self, bytes: &[u8]) {
        let text = self.stamped(bytes, &time_stamp(now_s()));
        match self.write(&text) {
            Ok(()) => self.complained = false,
            Err(error) => {
                self.open = None;
                if !std::mem::replace(&mut self.complained, true) {
                    log::warn!("{}: log lines are lost: {error}", self.path.display());
                }
            }
        }
    }

    /// `bytes` with `stamp` before each line that begins in it.
    fn stamped(&mut self, bytes: &[u8], stamp: &str) -> Vec<u8> {
        let mut text = Vec::with_capacity(bytes.len() + 64);
        for &byte in bytes {
            if self.column >= MAX_LINE_BYTES {
                text.push(b'\n');
                self.column = 0;
            }
            if self.column == 0 {
                text.extend_from_slice(stamp.as_bytes());
                text.push(b' ');
            }
            text.push(byte);
            self.column = if byte == b'\n' { 0 } else { self.column + 1 };
        }
        text
    }

    fn write(&mut self, text: &[u8]) -> std::io::Result<()> {
        if self.open.as_ref().is_some_and(|open| open.size >= self.limit_bytes) {
            // Not in the middle of a line if it can be helped: the next piece is soon enough.
            self.open = None;
            std::fs::rename(&self.path, rotated(&self.path))?;
        }
        if self.open.is_none() {
            self.open = Some(open(&self.path)?);
        }
        if let Some(open) = &mut self.open {
            open.file.write_all(text)?;
            open.size += text.len() as u64;
        }
        Ok(())
    }
}

/// The name of the older file.
pub fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

fn open(path: &Path) -> std::io::Result<Open> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path)?;
    let size = file.metadata()?.len();
    Ok(Open { file, size })
}

/// The last `lines` lines of a log, from both files, at most `limit_bytes` of them.
pub fn tail(path: &Path, lines: usize, limit_bytes: usize) -> String {
    let mut text = String::new();
    for path in [rotated(path), path.to_path_buf()] {
        if let Ok(bytes) = std::fs::read(path) {
            text.push_str(&String::from_utf8_lossy(&bytes));
        }
    }
    last_lines(&text, lines, limit_bytes).to_string()
}

fn last_lines(text: &str, lines: usize, limit_bytes: usize) -> &str {
    let text = text.strip_suffix('\n').unwrap_or(text);
    if lines == 0 {
        return "";
    }
    let start = text.rmatch_indices('\n').nth(lines - 1).map_or(0, |(index, _)| index + 1);
    let mut cut = text.len().saturating_sub(limit_bytes).max(start);
    while !text.is_char_boundary(cut) {
        cut += 1;
    }
    &text[cut..]
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// `2026-11-23T15:30:27Z`: seconds since 1970 as UTC. No time zone is looked up: that would read
/// the guest's files at each line.
fn time_stamp(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar.
fn date(days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    // 146,097 days are 400 years: the calendar repeats, so the loops below stay short.
    let (mut year, mut rest) = (1970 + days / 146_097 * 400, days % 146_097);
    while rest >= 365 + u64::from(leap(year)) {
        rest -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stamps() {
        let cases = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (253_402_300_799, "9999-12-31T23:59:59Z"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(time_stamp(seconds), expected, "{seconds}");
        }
    }

    #[test]
    fn each_line_gets_one_stamp_however_it_arrives() {
        let mut log = LogFile::new("x".into(), 0);
        let mut text = log.stamped(b"one\ntw", "T");
        text.extend(log.stamped(b"o\n\nthree", "T"));
        assert_eq!(String::from_utf8(text).unwrap(), "T one\nT two\nT \nT three");
    }

    #[test]
    fn endless_lines_are_cut() {
        let mut log = LogFile::new("x".into(), 0);
        let text = log.stamped(&vec![b'x'; 20_000], "T");
        assert_eq!(text.split(|byte| *byte == b'\n').count(), 3);
    }

    #[test]
    fn rotation_keeps_two_files_and_the_newest_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log/x.log");
        let mut log = LogFile::new(path.clone(), 1000);
        for number in 0..200 {
            log.append(format!("line {number}\n").as_bytes());
        }
        let names: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(names.len(), 2);
        for file in [path.clone(), rotated(&path)] {
            assert!(std::fs::metadata(file).unwrap().len() < 1100);
        }
        let last = tail(&path, 3, 10_000);
        let ends: Vec<&str> = last.lines().map(|line| line.split_once("Z ").unwrap().1).collect();
        assert_eq!(ends, ["line 197", "line 198", "line 199"]);
    }

    #[test]
    fn a_log_that_cannot_be_written_is_no_error() {
        let mut log = LogFile::new("/proc/nothing/x.log".into(), 1000);
        log.append(b"lost\n");
        assert!(log.complained);
    }

    #[test]
    fn last_lines_are_bounded_twice() {
        assert_eq!(last_lines("a\nb\nc\n", 2, 100), "b\nc");
        assert_eq!(last_lines("a\nb\nc", 9, 100), "a\nb\nc");
        assert_eq!(last_lines("a\nb\nc", 0, 100), "");
        assert_eq!(last_lines("aaaa\nbb", 9, 4), "a\nbb");
        assert_eq!(last_lines("éé", 1, 3), "é");
        assert_eq!(last_lines("", 1, 3), "");
    }
}
