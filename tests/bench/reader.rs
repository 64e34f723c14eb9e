//! The reader: a process in a server's control groups and pid namespace, which reads the same statistics files through
//! one file system after the other.
//!
//! Debian's lxcfs answers by who asks, so it has to be asked from inside. Ours answers by the inode, and is asked by the
//! same process. Both are reached by a descriptor of a directory: the reader stays in the host's mount namespace.
//!
//! ```text
//! reader GROUP INIT WORDS…   joins, and has a child (a pid namespace is for children only) do the rest:
//!   times KIB ROUNDS SOURCE…    lines `SOURCE FILE NANOSECONDS`, by their numbers
//!   rate KIB MS READERS SOURCE  a line `READS NANOSECONDS`
//! ```
//!
//! A source is a directory with `proc` and `sys` in it, or one file that is read in place of each. KIB is the memory that
//! the server has: a source that says otherwise is not the server's.

use std::{
    io::{BufWriter, Write},
    os::fd::OwnedFd,
    process::Command,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use kernel::{
    cgroup::{Group, Hierarchies},
    namespace,
};
use rustix::fs::{CWD, Mode, OFlags, openat};

/// The word that makes the bench's program a reader, and the one for its child.
pub const READER: &str = "reader";
const MEMBER: &str = "member";

/// The files that ours and Debian's lxcfs both have.
pub const FILES: [&str; 8] = [
    "proc/meminfo",
    "proc/stat",
    "proc/cpuinfo",
    "proc/uptime",
    "proc/loadavg",
    "proc/swaps",
    "proc/diskstats",
    "sys/devices/system/cpu/online",
];

/// Readings of one source before the next one's turn. A file system that is busy with what came after a reading (to
/// release the file) shall be in its own way, and not in the next one's.
const TURN: usize = 10;

/// Longer than any of the files.
const BUFFER: usize = 64 * 1024;

/// Acts as a reader, or a reader's child, if the words of the command line say so.
pub fn act(words: &[String]) -> Option<Result<()>> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        [READER, group, init, ref rest @ ..] => Some(join(group, init, rest)),
        [MEMBER, "times", kib, rounds, ref sources @ ..] => Some(times(kib, rounds, sources)),
        [MEMBER, "rate", kib, ms, readers, source] => Some(rate(kib, ms, readers, source)),
        _ => None,
    }
}

fn join(group: &str, init: &str, words: &[&str]) -> Result<()> {
    let group = Group::new(&Hierarchies::detect()?, group);
    group.attach(i32::try_from(std::process::id())?)?;
    let pids = namespace::open(init.parse()?, "pid")?;
    namespace::enter(std::os::fd::AsFd::as_fd(&pids), namespace::Kinds::PID)?;
    let status = Command::new("/proc/self/exe").arg(MEMBER).args(words).status().context("run the reader's child")?;
    ensure!(status.success(), "the reader's child ended with {status}");
    Ok(())
}

/// Where files are read.
enum Source {
    Directory(OwnedFd),
    File(String),
}

impl Source {
    /// Opens it, and looks whether it tells of the server.
    fn open(path: &str, kib: &str) -> Result<Self> {
        if std::fs::metadata(path).with_context(|| format!("look for {path}"))?.is_file() {
            return Ok(Self::File(path.to_owned()));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, path, flags, Mode::empty()).with_context(|| format!("open {path}"))?;
        let source = Self::Directory(directory);
        let mut buffer = vec![0; BUFFER];
        let length = source.read("proc/meminfo", &mut buffer)?;
        let text = String::from_utf8_lossy(&buffer[..length]);
        let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
        ensure!(total.split_whitespace().next() == Some(kib), "{path} says MemTotal:{total}, the server has {kib} KiB");
        Ok(source)
    }

    /// Opens, reads and closes a file; what it says is in `buffer`.
    fn read(&self, file: &str, buffer: &mut [u8]) -> Result<usize> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = match self {
            Self::Directory(directory) => openat(directory, file, flags, Mode::empty()),
            Self::File(path) => openat(CWD, path.as_str(), flags, Mode::empty()),
        };
        let opened = opened.with_context(|| format!("open {file}"))?;
        rustix::io::read(&opened, buffer).with_context(|| format!("read {file}"))
    }
}

/// Times each file's reading, the sources in turns.
fn times(kib: &str, rounds: &str, sources: &[&str]) -> Result<()> {
    let turns = rounds.parse::<usize>()?.div_ceil(TURN);
    let sources = sources.iter().map(|path| Source::open(path, kib)).collect::<Result<Vec<_>>>()?;
    let mut buffer = vec![0; BUFFER];
    let mut found = Vec::with_capacity(FILES.len() * sources.len() * turns * TURN);
    // All files in each turn, so that a slow moment of the machine meets them all.
    for _ in 0..turns {
        for (number, file) in FILES.iter().enumerate() {
            for (place, source) in sources.iter().enumerate() {
                // The first one finds the caches as the other source has left them.
                for reading in 0..=TURN {
                    let begun = Instant::now();
                    source.read(file, &mut buffer)?;
                    let took = begun.elapsed();
                    if reading > 0 {
                        found.push((place, number, took.as_nanos()));
                    }
                }
            }
        }
    }
    let mut out = BufWriter::new(std::io::stdout().lock());
    for (source, file, nanoseconds) in found {
        writeln!(out, "{source} {file} {nanoseconds}")?;
    }
    Ok(out.flush()?)
}

/// Counts how often several readers at once get through with all files of one source, one after the other.
fn rate(kib: &str, ms: &str, readers: &str, source: &str) -> Result<()> {
    let (readers, time) = (readers.parse::<usize>()?, Duration::from_millis(ms.parse()?));
    let source = Source::open(source, kib)?;
    let start = Barrier::new(readers);
    let read = || -> Result<(u64, Duration)> {
        let mut buffer = vec![0; BUFFER];
        let mut reads = 0;
        start.wait();
        let begun = Instant::now();
        while begun.elapsed() < time {
            for file in FILES {
                source.read(file, &mut buffer)?;
                reads += 1;
            }
        }
        Ok((reads, begun.elapsed()))
    };
    let (mut reads, mut took) = (0, Duration::ZERO);
    thread::scope(|scope| {
        let running: Vec<_> = (0..readers).map(|_| scope.spawn(read)).collect();
        for reader in running {
            let Ok(done) = reader.join() else { bail!("a reader panicked") };
            let (count, time) = done?;
            reads += count;
            took = took.max(time);
        }
        Ok(())
    })?;
    println!("{reads} {}", took.as_nanos());
    Ok(())
}
