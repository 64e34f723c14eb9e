//! The host's own files: opened once, read with pread(2), and kept for a second where they change slowly.
//!
//! What a server gets to see of them are names, constants and totals, never what the host or others use.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use super::parse::{self, CpuBlock};
use crate::clock::Now;

/// Host text is read again after this: memory and CPUs may be plugged in and out, frequencies change.
const KEPT_MS: u64 = 1_000;

/// The host.
#[derive(Debug)]
pub struct Host {
    root: PathBuf,
    meminfo: Kept<HostMemory>,
    cpuinfo: Kept<Vec<CpuBlock>>,
    online: Kept<Vec<u32>>,
    possible: Kept<Vec<u32>>,
    diskstats: Kept<Vec<(u32, u32, String)>>,
    partitions: Kept<DiskSizes>,
    vmstat: OnceLock<Vec<String>>,
    schedstat: OnceLock<u64>,
}

/// Block devices' major and minor numbers, and sizes in blocks of 1 KiB.
pub type DiskSizes = Vec<(u32, u32, u64)>;

/// What `/proc/meminfo` of the host is needed for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostMemory {
    /// Name and value of each line: for their names and order.
    pub lines: Vec<(String, String)>,
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
            possible: Kept::new(root.join("sys/devices/system/cpu/possible")),
            diskstats: Kept::new(root.join("proc/diskstats")),
            partitions: Kept::new(root.join("proc/partitions")),
            vmstat: OnceLock::new(),
            schedstat: OnceLock::new(),
        }
    }

    /// Names and totals of `/proc/meminfo`.
    pub fn memory(&self, now: Now) -> io::Result<Arc<HostMemory>> {
        self.meminfo.get(now, |text| HostMemory {
            lines: parse::meminfo(text),
            total_bytes: kilobytes(text, "MemTotal"),
            swap_total_bytes: kilobytes(text, "SwapTotal"),
        })
    }

    /// The blocks of `/proc/cpuinfo`.
    pub fn cpuinfo(&self, now: Now) -> io::Result<Arc<Vec<CpuBlock>>> {
        self.cpuinfo.get(now, parse::cpuinfo)
    }

    /// The CPUs that are online.
    pub fn online(&self, now: Now) -> io::Result<Arc<Vec<u32>>> {
        self.online.get(now, parse::cpu_list)
    }

    /// How many CPUs the kernel has numbers for (`nr_cpu_ids`).
    pub fn cpu_ids(&self, now: Now) -> io::Result<u32> {
        Ok(self.possible.get(now, parse::cpu_list)?.last().map_or(1, |last| last + 1))
    }

    /// Names of block devices by number.
    pub fn disks(&self, now: Now) -> io::Result<Arc<Vec<(u32, u32, String)>>> {
        self.diskstats.get(now, |text| text.lines().filter_map(disk_name).collect())
    }

    /// Sizes of block devices by number, in blocks of 1 KiB.
    pub fn disk_sizes(&self, now: Now) -> io::Result<Arc<DiskSizes>> {
        self.partitions.get(now, |text| text.lines().filter_map(disk_size).collect())
    }

    /// The version of `/proc/schedstat`; 15, of Linux 2.6.30 to 6.10, where this kernel has none.
    pub fn schedstat_version(&self) -> u64 {
        *self.schedstat.get_or_init(|| {
            let text = self.text("proc/schedstat").unwrap_or_default();
            parse::value(&text, "version").unwrap_or(15)
        })
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

    /// The text of a file, read now.
    pub fn text(&self, path: &str) -> io::Result<String> {
        read_whole(&File::open(self.root.join(path))?)
    }

    /// Whether there is something at `path`.
    pub fn has(&self, path: &str) -> io::Result<bool> {
        self.root.join(path).try_exists()
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

/// Number and size of a line of `/proc/partitions`.
fn disk_size(line: &str) -> Option<(u32, u32, u64)> {
    let mut words = line.split_ascii_whitespace().map(|word| word.parse::<u64>().ok());
    Some((u32::try_from(words.next()??).ok()?, u32::try_from(words.next()??).ok()?, words.next()??))
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
