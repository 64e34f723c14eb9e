//! The host's own files: opened once, read with pread(2), and kept for a second where they change slowly.
//!
//! What a server gets to see of them are names, constants and totals, never what the host or others use.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use super::parse;
use crate::clock::Now;

/// Host text is read again after this: memory and CPUs may be plugged in and out, frequencies change.
const KEPT_MS: u64 = 1_000;

/// The host.
#[derive(Debug)]
pub struct Host {
    root: PathBuf,
    meminfo: Kept<HostMemory>,
    cpuinfo: Kept<String>,
    online: Kept<Vec<u32>>,
    diskstats: Kept<Vec<(u32, u32, String)>>,
    vmstat: OnceLock<Vec<String>>,
}

/// What `/proc/meminfo` of the host is needed for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostMemory {
    /// The whole text: for the names and order of its lines.
    pub text: String,
    /// `MemTotal` in bytes.
    pub total_bytes: u64,
    /// `SwapTotal` in bytes.
    pub swap_total_bytes: u64,
}

impl Host {
    /// The host whose `proc` and `sys` are below `root` (`/`, or a captured tree).
    pub fn at(root: &Path) -> Host {
        Host {
            root: root.to_owned(),
            meminfo: Kept::new(root.join("proc/meminfo")),
            cpuinfo: Kept::new(root.join("proc/cpuinfo")),
            online: Kept::new(root.join("sys/devices/system/cpu/online")),
            diskstats: Kept::new(root.join("proc/diskstats")),
            vmstat: OnceLock::new(),
        }
    }

    /// Names and totals of `/proc/meminfo`.
    pub fn memory(&self, now: Now) -> io::Result<Arc<HostMemory>> {
        self.meminfo.get(now, |text| HostMemory {
            text: text.to_owned(),
            total_bytes: kilobytes(text, "MemTotal"),
            swap_total_bytes: kilobytes(text, "SwapTotal"),
        })
    }

    /// The text of `/proc/cpuinfo`.
    pub fn cpuinfo(&self, now: Now) -> io::Result<Arc<String>> {
        self.cpuinfo.get(now, str::to_owned)
    }

    /// The CPUs that are online.
    pub fn online(&self, now: Now) -> io::Result<Arc<Vec<u32>>> {
        self.online.get(now, parse::cpu_list)
    }

    /// Names of block devices by number.
    pub fn disks(&self, now: Now) -> io::Result<Arc<Vec<(u32, u32, String)>>> {
        self.diskstats.get(now, |text| text.lines().filter_map(disk_name).collect())
    }

    /// The names of the lines of `/proc/vmstat`, fixed while the kernel runs.
    pub fn vmstat_names(&self) -> io::Result<&[String]> {
        if let Some(names) = self.vmstat.get() {
            return Ok(names);
        }
        let text = std::fs::read_to_string(self.root.join("proc/vmstat"))?;
        let names = parse::pairs(&text).map(|(name, _)| name.to_owned()).collect();
        Ok(self.vmstat.get_or_init(|| names))
    }

    /// The state letter of one thread; `None` when it has ended.
    pub fn task_state(&self, thread: u32) -> Option<char> {
        // The file of the thread itself: `/proc/TID/stat` would add up the times of all its process's threads.
        let path = self.root.join(format!("proc/{thread}/task/{thread}/stat"));
        parse::task_state(&std::fs::read_to_string(path).ok()?)
    }
}

/// The value of one line of meminfo, in bytes; 0 if it is missing.
fn kilobytes(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value: Option<u64> = line.and_then(|value| value.trim().trim_end_matches("kB").trim().parse().ok());
    value.unwrap_or(0).saturating_mul(1024)
}

/// Number and name of a line of `/proc/diskstats`.
fn disk_name(line: &str) -> Option<(u32, u32, String)> {
    let mut words = line.split_ascii_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.to_owned()))
}

/// A host file that stays open, and what was made of it less than a second ago.
#[derive(Debug)]
struct Kept<T> {
    path: PathBuf,
    state: Mutex<Option<(u64, File, Arc<T>)>>,
}

impl<T> Kept<T> {
    fn new(path: PathBuf) -> Kept<T> {
        Kept { path, state: Mutex::new(None) }
    }

    fn get(&self, now: Now, parse: impl FnOnce(&str) -> T) -> io::Result<Arc<T>> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((read_ms, file, value)) = &mut *state {
            if now.boottime_ms().saturating_sub(*read_ms) >= KEPT_MS {
                *value = Arc::new(parse(&read_whole(file)?));
                *read_ms = now.boottime_ms();
            }
            return Ok(value.clone());
        }
        let file = File::open(&self.path)?;
        let value = Arc::new(parse(&read_whole(&file)?));
        *state = Some((now.boottime_ms(), file, value.clone()));
        Ok(value)
    }
}

/// The whole text of an open file, from its start. procfs gives at most a page or so at a time.
fn read_whole(file: &File) -> io::Result<String> {
    let mut bytes = vec![0; 16 * 1024];
    let mut length = 0;
    loop {
        match file.read_at(&mut bytes[length..], length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if length == bytes.len() {
            bytes.resize(bytes.len() * 2, 0);
        }
    }
    bytes.truncate(length);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
