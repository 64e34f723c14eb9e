//! One server's cgroup files: found once, opened at first use, read with pread(2) ever after.
//!
//! An open cgroup file costs the kernel a buffer, so the files of a server that nobody reads are closed
//! (`watch`); one of a cgroup that was removed answers ENODEV, which is [`Unreadable::Gone`].
//!
//! Limit: knows where a value is kept in cgroup v1 and v2, not what it means.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::Unreadable;
use crate::registration::Cgroup;

/// One file of a cgroup. `read` opens it at first use.
///
/// The kernel removes a group's files before its directory, so a file that is missing may be a sign of that. Where some kernels
/// lack the file it is taken for that; no value that is shown hangs on such a file alone.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    is_certain: bool,
    file: OnceLock<File>,
}

impl Source {
    /// A file that not every kernel has.
    fn new(directory: &Path, name: &str) -> Source {
        Source { path: directory.join(name), is_certain: false, file: OnceLock::new() }
    }

    /// A file that every group of its kind has, or that was seen in this one.
    fn certain(directory: &Path, name: &str) -> Source {
        Source { is_certain: true, ..Source::new(directory, name) }
    }

    /// Passes the file's text to `parse`; `None` if there is no such file in this cgroup (yet).
    pub fn read<T>(&self, parse: impl FnOnce(&str) -> T) -> Result<Option<T>, Unreadable> {
        let Some(file) = self.open()? else {
            return Ok(None);
        };
        BUFFER.with_borrow_mut(|buffer| {
            let length = read_record(file, buffer)?;
            let text = String::from_utf8_lossy(&buffer[..length]);
            Ok(Some(parse(&text)))
        })
    }

    fn open(&self) -> Result<Option<&File>, Unreadable> {
        if let Some(file) = self.file.get() {
            return Ok(Some(file));
        }
        match File::open(&self.path) {
            Ok(file) => Ok(Some(self.file.get_or_init(|| file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Either the file does not exist in this kernel, or the whole group is gone.
                let directory = self.path.parent().unwrap_or(&self.path);
                if self.is_certain || !directory.exists() { Err(Unreadable::Gone) } else { Ok(None) }
            }
            Err(error) => Err(error.into()),
        }
    }
}

thread_local! {
    /// `memory.stat` has under 2 KiB; a longer file makes the buffer grow.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; 8 * 1024]);
}

/// Reads a cgroup file, which the kernel gives whole in one read if the buffer is long enough.
fn read_record(file: &File, buffer: &mut Vec<u8>) -> Result<usize, Unreadable> {
    loop {
        match file.read_at(buffer, 0) {
            Ok(length) if length == buffer.len() => buffer.resize(length * 2, 0),
            Ok(length) => return Ok(length),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The files of one server.
#[derive(Debug)]
pub struct Files {
    /// Memory use, limits and counters.
    pub memory: Memory,
    /// Quotas, from the server's own group up to the root.
    pub quota: Quota,
    /// The CPUs the server may run on; of the nearest group that has such a file.
    pub cpuset: Option<Source>,
    /// CPU time.
    pub cpu_time: CpuTime,
    /// Tasks now (`pids.current`).
    pub pids: Option<Source>,
    /// Groups below (`cgroup.stat`), in the tree that the guest manages.
    pub groups: Option<Source>,
    /// I/O by device.
    pub io: Io,
    /// The group whose tasks are the server's, and the name of the file that lists threads.
    pub tasks: Option<(PathBuf, &'static str)>,
}

/// Where memory is counted.
#[derive(Debug)]
pub enum Memory {
    /// cgroup v1. `memory.stat` has the tightest limits up the tree.
    V1 { usage: Source, stat: Source, oom: Source },
    /// cgroup v2.
    V2 { current: Source, stat: Source, swap: Source, events: Source, limits: Vec<Source>, swap_limits: Vec<Source> },
    /// Nowhere: the controller is not in use for this server.
    Uncounted,
}

/// Where quotas are kept, the server's own first.
#[derive(Debug)]
pub enum Quota {
    /// `cpu.cfs_quota_us` and `cpu.cfs_period_us`.
    V1(Vec<(Source, Source)>),
    /// `cpu.max`.
    V2(Vec<Source>),
}

/// Where CPU time is counted.
#[derive(Debug)]
pub enum CpuTime {
    /// v1 `cpuacct.usage_percpu`, `cpuacct.usage_all` (`cpuacct.stat` before Linux 4.7), `cpuacct.usage`, and the
    /// `cpu.stat` of `cpu`.
    V1 { usage_percpu: Source, usage_all: Source, stat: Source, usage: Source, throttling: Option<Source> },
    /// v2 `cpu.stat`, which every group has, with or without the controller.
    V2 { stat: Source },
    /// Nowhere.
    Uncounted,
}

/// Where I/O is counted.
#[derive(Debug)]
pub enum Io {
    /// v1 `blkio.throttle.io_service_bytes_recursive` and `io_serviced_recursive`.
    V1 { bytes: Source, operations: Source },
    /// v2 `io.stat`.
    V2 { stat: Source },
    /// Nowhere.
    Uncounted,
}

impl Files {
    /// Finds the files of a registration. Fails with [`Unreadable::Gone`] when one of its groups does not exist.
    pub fn find(cgroup: &Cgroup) -> Result<Files, Unreadable> {
        let unified = cgroup.unified.as_deref();
        let files = Files {
            memory: Memory::find(cgroup.memory.as_deref(), unified)?,
            quota: Quota::find(cgroup.cpu.as_deref(), unified)?,
            cpuset: cpuset(cgroup.cpuset.as_deref(), unified)?,
            cpu_time: CpuTime::find(cgroup, unified),
            pids: cgroup.pids.as_deref().or(unified).map(|directory| Source::new(directory, "pids.current")),
            groups: unified.map(|directory| Source::new(directory, "cgroup.stat")),
            io: Io::find(cgroup.blkio.as_deref(), unified),
            tasks: task_list(cgroup),
        };
        // After all else: what was not found of a group that was removed meanwhile would read as if it had no limit.
        if cgroup.directories().all(|directory| directory.is_dir()) { Ok(files) } else { Err(Unreadable::Gone) }
    }
}

impl Memory {
    fn find(v1: Option<&Path>, unified: Option<&Path>) -> Result<Memory, Unreadable> {
        if let Some(directory) = v1 {
            return Ok(Memory::V1 {
                usage: Source::certain(directory, "memory.usage_in_bytes"),
                stat: Source::certain(directory, "memory.stat"),
                oom: Source::new(directory, "memory.oom_control"),
            });
        }
        match unified {
            Some(directory) if directory.join("memory.current").exists() => Ok(Memory::V2 {
                current: Source::certain(directory, "memory.current"),
                stat: Source::certain(directory, "memory.stat"),
                swap: Source::new(directory, "memory.swap.current"),
                events: Source::new(directory, "memory.events"),
                limits: up_the_tree(directory, "memory.max"),
                swap_limits: up_the_tree(directory, "memory.swap.max"),
            }),
            Some(directory) => not_controlled(directory, "memory").map(|()| Memory::Uncounted),
            None => Ok(Memory::Uncounted),
        }
    }
}

impl Quota {
    fn find(v1: Option<&Path>, unified: Option<&Path>) -> Result<Quota, Unreadable> {
        match (v1, unified) {
            (Some(directory), _) => {
                // The root has the files too, but no quota can be set there; only it has a release agent.
                let groups = directory.ancestors().take_while(|group| !group.join("release_agent").exists());
                let limited = groups.take_while(|group| group.join("cpu.cfs_quota_us").exists());
                let files = |group| (Source::new(group, "cpu.cfs_quota_us"), Source::new(group, "cpu.cfs_period_us"));
                let quotas: Vec<_> = limited.map(files).collect();
                // All groups have one, or none has.
                let above = directory.parent().is_some_and(|parent| parent.join("cpu.cfs_quota_us").exists());
                if quotas.is_empty() && above { Err(Unreadable::Gone) } else { Ok(Quota::V1(quotas)) }
            }
            (None, Some(directory)) => {
                let quotas = up_the_tree(directory, "cpu.max");
                if quotas.is_empty() {
                    not_controlled(directory, "cpu")?;
                }
                Ok(Quota::V2(quotas))
            }
            (None, None) => Ok(Quota::V2(Vec::new())),
        }
    }
}

impl CpuTime {
    fn find(cgroup: &Cgroup, unified: Option<&Path>) -> CpuTime {
        match (cgroup.cpuacct.as_deref(), unified) {
            (Some(directory), _) => CpuTime::V1 {
                usage_percpu: Source::new(directory, "cpuacct.usage_percpu"),
                usage_all: Source::new(directory, "cpuacct.usage_all"),
                stat: Source::new(directory, "cpuacct.stat"),
                usage: Source::new(directory, "cpuacct.usage"),
                throttling: cgroup.cpu.as_deref().map(|directory| Source::new(directory, "cpu.stat")),
            },
            (None, Some(directory)) => CpuTime::V2 { stat: Source::new(directory, "cpu.stat") },
            (None, None) => CpuTime::Uncounted,
        }
    }
}

impl Io {
    fn find(v1: Option<&Path>, unified: Option<&Path>) -> Io {
        match (v1, unified) {
            (Some(directory), _) => Io::V1 {
                bytes: Source::new(directory, "blkio.throttle.io_service_bytes_recursive"),
                operations: Source::new(directory, "blkio.throttle.io_serviced_recursive"),
            },
            (None, Some(directory)) => Io::V2 { stat: Source::new(directory, "io.stat") },
            (None, None) => Io::Uncounted,
        }
    }
}

/// A v2 group without the cpuset controller has no such file: then an ancestor's holds.
fn cpuset(v1: Option<&Path>, unified: Option<&Path>) -> Result<Option<Source>, Unreadable> {
    let (directory, names): (_, &[&str]) = match (v1, unified) {
        (Some(directory), _) => (directory, &["cpuset.effective_cpus", "cpuset.cpus"]),
        (None, Some(directory)) => (directory, &["cpuset.cpus.effective"]),
        (None, None) => return Ok(None),
    };
    let found = directory.ancestors().find_map(|ancestor| {
        let name = names.iter().find(|name| ancestor.join(name).exists())?;
        Some((ancestor, Source::certain(ancestor, name)))
    });
    match found {
        Some((ancestor, _)) if ancestor != directory && v1.is_some() => Err(Unreadable::Gone),
        Some((ancestor, source)) if ancestor != directory => not_controlled(directory, "cpuset").map(|()| Some(source)),
        found => Ok(found.map(|(_, source)| source)),
    }
}

/// Whether a v2 group without a controller's files is without that controller; else it is being removed.
fn not_controlled(directory: &Path, controller: &str) -> Result<(), Unreadable> {
    match std::fs::read_to_string(directory.join("cgroup.controllers")) {
        Ok(text) if text.split_ascii_whitespace().all(|found| found != controller) => Ok(()),
        Ok(_) => Err(Unreadable::Gone),
        // Every group has this file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Unreadable::Gone),
        Err(error) => Err(error.into()),
    }
}

/// The files called `name` from `directory` up to the first ancestor that has none.
fn up_the_tree(directory: &Path, name: &str) -> Vec<Source> {
    let with_file = directory.ancestors().take_while(|ancestor| ancestor.join(name).exists());
    with_file.map(|ancestor| Source::certain(ancestor, name)).collect()
}

/// A v1 group is flat, because a guest manages only the unified tree: one file lists all its threads.
fn task_list(cgroup: &Cgroup) -> Option<(PathBuf, &'static str)> {
    let v1 = [&cgroup.pids, &cgroup.cpuacct, &cgroup.cpu, &cgroup.memory].into_iter().flatten().next();
    match (v1, &cgroup.unified) {
        (Some(directory), _) => Some((directory.clone(), "tasks")),
        (None, Some(directory)) => Some((directory.clone(), "cgroup.threads")),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let group = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(group.path().join(name), text).unwrap();
        }
        group
    }

    fn is_gone<T>(found: Result<T, Unreadable>) -> bool {
        matches!(found, Err(Unreadable::Gone))
    }

    #[test]
    fn a_server_that_has_lost_a_group_is_gone() {
        let (one, two) = (group(&[]), group(&[]));
        let cgroup = Cgroup { cpu: Some(one.path().into()), pids: Some(two.path().into()), ..Cgroup::default() };
        assert!(Files::find(&cgroup).is_ok());
        drop(two);
        assert!(is_gone(Files::find(&cgroup)));
    }

    #[test]
    fn a_group_that_loses_its_files_is_gone_before_its_directory_is() {
        let find = |group: &tempfile::TempDir| {
            Files::find(&Cgroup { unified: Some(group.path().into()), ..Cgroup::default() })
        };
        // Without a controller it is a group like any other.
        assert!(matches!(find(&group(&[("cgroup.controllers", "io pids\n")])).unwrap().memory, Memory::Uncounted));
        assert!(is_gone(find(&group(&[("cgroup.controllers", "memory\n")]))));
        assert!(is_gone(find(&group(&[("cgroup.controllers", "cpu\n")]))));
        assert!(is_gone(find(&group(&[]))));
        let whole = group(&[("cgroup.controllers", "memory\n"), ("memory.current", "1\n"), ("memory.max", "2\n")]);
        let Memory::V2 { limits, swap, .. } = find(&whole).unwrap().memory else { panic!("it is counted") };
        std::fs::remove_file(whole.path().join("memory.max")).unwrap();
        assert!(is_gone(limits[0].read(str::to_owned)));
        // Which a kernel may lack.
        assert_eq!(swap.read(str::to_owned).unwrap(), None);
    }
}
