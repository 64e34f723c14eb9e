//! A group by name, in every hierarchy at once: making, removing, handing over.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::hierarchies::{Controller, Hierarchies};
use super::interface::{is_missing, read, read_optional, write};
use crate::Result;
use crate::error::{During, Error};
use crate::poll::Deadline;

/// A group's pressure files, where the kernel counts it (`irq.pressure` from Linux 6.1).
pub const PRESSURE: [&str; 4] = ["cpu.pressure", "io.pressure", "irq.pressure", "memory.pressure"];

/// How long [`Group::remove`] waits for the last processes of a group to be gone.
const REMOVE_TIMEOUT_MS: u64 = 5_000;

/// A group of processes: the same relative path below the root of every hierarchy.
#[derive(Clone, Debug)]
pub struct Group {
    pub(super) hierarchies: Hierarchies,
    path: PathBuf,
}

impl Group {
    /// Names a group, such as `vsos/web1`; nothing is made.
    pub fn new(hierarchies: &Hierarchies, path: &str) -> Group {
        Group { hierarchies: hierarchies.clone(), path: PathBuf::from(path.trim_matches('/')) }
    }

    /// The path below the root of each hierarchy.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the group in every hierarchy, or in none. Its parent must be there. One that exists is an error
    /// (`AlreadyExists`): it may be a stranger's.
    pub fn create(&self) -> Result<()> {
        self.prepare_parent()?;
        let mut made: Vec<PathBuf> = Vec::new();
        for directory in self.directories() {
            let result = std::fs::create_dir(&directory).during("create cgroup", directory.display());
            let result = result.and_then(|()| {
                made.push(directory.clone());
                self.initialise(&directory)
            });
            if let Err(error) = result {
                // They are new and empty; what cannot be removed now is reported by the error that follows from it.
                for directory in made.iter().rev() {
                    let _ = std::fs::remove_dir(directory);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Makes the group, and its ancestors, where they are missing. For the group that holds all others.
    pub fn ensure(&self) -> Result<()> {
        if let Some(parent) = self.parent() {
            parent.ensure()?;
        }
        self.prepare_parent()?;
        for directory in self.directories() {
            match std::fs::create_dir(&directory) {
                Ok(()) => self.initialise(&directory)?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).during("create cgroup", directory.display()),
            }
        }
        Ok(())
    }

    /// Whether the group is there in any hierarchy.
    pub fn exists(&self) -> bool {
        self.directories().iter().any(|directory| directory.exists())
    }

    /// Removes the group and the groups below it from every hierarchy. Already gone is fine.
    ///
    /// The kernel says EBUSY while a process is in it, also for a moment after its last one was reaped; that is tried
    /// again for a bounded time. A failure in one hierarchy does not keep it in the others; the first error is returned.
    pub fn remove(&self) -> Result<()> {
        let deadline = Deadline::after(Some(REMOVE_TIMEOUT_MS));
        let mut first_error = None;
        for directory in self.directories() {
            if let Err(error) = remove_tree(&directory, deadline) {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// The directory with the files of `controller`, of v1 or v2.
    pub fn directory(&self, controller: Controller) -> Option<PathBuf> {
        self.hierarchies.root_of(controller).map(|root| root.join(&self.path))
    }

    /// The directory in the cgroup2 hierarchy.
    pub fn unified_directory(&self) -> Option<PathBuf> {
        self.hierarchies.unified().map(|root| root.join(&self.path))
    }

    /// The cgroup2 directory opened, for `process::CloneOptions::cgroup`.
    pub fn open_unified(&self) -> Result<Option<OwnedFd>> {
        let Some(directory) = self.unified_directory() else {
            return Ok(None);
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&directory, flags, Mode::empty()).map(Some).during("open cgroup", directory.display())
    }

    /// Gives the cgroup2 group to a user, who may then make groups in it and move processes among them
    /// (cgroups(7), "delegation"), and be woken by its own pressure. Limits stay the host's, and v1 hierarchies are never
    /// given away.
    pub fn delegate(&self, uid: u32, gid: u32) -> Result<()> {
        let Some(directory) = self.unified_directory() else {
            return Ok(());
        };
        let listed = read_optional(Path::new("/sys/kernel/cgroup/delegate"))?;
        let listed = listed.as_deref().unwrap_or("cgroup.procs\ncgroup.threads\ncgroup.subtree_control");
        // Not listed, because a group's own root may not write them where cgroup2 is mounted with `nsdelegate`.
        let files = listed.lines().chain(PRESSURE).map(|name| directory.join(name));
        for path in std::iter::once(directory.clone()).chain(files) {
            match std::os::unix::fs::lchown(&path, Some(uid), Some(gid)) {
                // The list names files of controllers that may not be enabled here.
                Err(error) if error.kind() == io::ErrorKind::NotFound && path != directory => {}
                other => other.during("give away cgroup", path.display())?,
            }
        }
        Ok(())
    }

    /// The directories of the group, each once: v1 hierarchies first, the unified one last.
    pub(super) fn directories(&self) -> Vec<PathBuf> {
        let roots = self.hierarchies.v1_roots().into_iter().chain(self.hierarchies.unified());
        roots.map(|root| root.join(&self.path)).collect()
    }

    /// The group one level up, `None` for one below the root.
    fn parent(&self) -> Option<Group> {
        let path = self.path.parent().filter(|path| !path.as_os_str().is_empty())?;
        Some(Group { hierarchies: self.hierarchies.clone(), path: path.to_owned() })
    }

    /// On v2 a group has a controller's files only if every ancestor passes that controller on.
    fn prepare_parent(&self) -> Result<()> {
        let Some(root) = self.hierarchies.unified() else {
            return Ok(());
        };
        let mut directory = root.to_owned();
        enable_controllers(&directory)?;
        let Some(parents) = self.path.parent() else {
            return Ok(());
        };
        for component in parents.components() {
            directory.push(component);
            enable_controllers(&directory)?;
        }
        Ok(())
    }

    /// A new v1 cpuset has neither processors nor memory nodes and takes no process until it has.
    fn initialise(&self, directory: &Path) -> Result<()> {
        let is_cpuset = self.hierarchies.v1(Controller::Cpuset).is_some_and(|root| directory == root.join(&self.path));
        if is_cpuset { inherit_cpuset(directory) } else { Ok(()) }
    }
}

/// Passes on to the children of `directory` what it has and we need; writes nothing when nothing is missing.
fn enable_controllers(directory: &Path) -> Result<()> {
    let Some(available) = read_optional(&directory.join("cgroup.controllers"))? else {
        return Ok(());
    };
    if available.is_empty() {
        // The usual case of a hybrid host: v1 has them all.
        return Ok(());
    }
    let control = directory.join("cgroup.subtree_control");
    let enabled = read(&control)?;
    let missing = missing_controllers(&available, &enabled);
    if missing.is_empty() {
        return Ok(());
    }
    let Err(error) = write(&control, missing.join(" ")) else { return Ok(()) };
    // One write is all or nothing, and a host may refuse one of them for good (cpu, when real-time tasks are about).
    let refused: Vec<_> = missing.iter().filter(|name| write(&control, name).is_err()).collect();
    if refused.len() == missing.len() {
        return Err(error);
    }
    // Not an error of the group: only a limit of that kind cannot be set, and setting it will say so.
    refused.iter().for_each(|name| log::warn!("{} refuses {name}", control.display()));
    Ok(())
}

/// What to write to `cgroup.subtree_control`: `+cpu`, `+memory`.
fn missing_controllers(available: &str, enabled: &str) -> Vec<String> {
    let enabled: BTreeSet<&str> = enabled.split_ascii_whitespace().collect();
    let available: BTreeSet<&str> = available.split_ascii_whitespace().collect();
    let wanted = Controller::UNIFIED.iter().map(|controller| controller.as_str());
    let missing = wanted.filter(|name| available.contains(name) && !enabled.contains(name));
    missing.map(|name| format!("+{name}")).collect()
}

/// Copies processors and memory nodes of the parent (files with or without prefix, by mount option).
pub(super) fn inherit_cpuset(directory: &Path) -> Result<()> {
    let Some(parent) = directory.parent() else {
        return Ok(());
    };
    for file in ["cpuset.mems", "cpuset.cpus"] {
        write(&directory.join(file), read(&parent.join(file))?)?;
    }
    Ok(())
}

/// Removes a directory and, when it is not empty of groups, first those below it.
fn remove_tree(directory: &Path, deadline: Deadline) -> Result<()> {
    let mut pause = Duration::from_micros(100);
    loop {
        let error = match std::fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => error,
        };
        // EBUSY stands for child groups as well as for processes.
        if error.raw_os_error() != Some(libc::EBUSY) {
            return Err(error).during("remove cgroup", directory.display());
        }
        for child in children(directory)? {
            remove_tree(&child, deadline)?;
        }
        match std::fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(_) if !deadline.is_over() => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).during("remove cgroup", directory.display()),
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// The groups directly below `directory`.
pub(super) fn children(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).during("list cgroup", directory.display()),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = match entry.during("list cgroup", directory.display()) {
            Ok(entry) => entry,
            // Removed while it was being listed.
            Err(error) if is_missing(&error) => return Ok(found),
            Err(error) => return Err(error),
        };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// An error of a facility that this host has in no hierarchy.
pub(super) fn no_hierarchy(operation: &'static str, group: &Group) -> Error {
    Error::refused(operation, group.path.display(), io::ErrorKind::Unsupported, "no cgroup hierarchy for it is mounted")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_there_and_missing_is_enabled() {
        assert_eq!(
            missing_controllers("cpuset cpu io memory hugetlb pids rdma", "memory pids"),
            ["+cpu", "+cpuset", "+io"]
        );
        assert!(missing_controllers("cpu", "cpu").is_empty() && missing_controllers("", "").is_empty());
    }

    #[test]
    fn names_lead_below_every_root_once() {
        let v1 = [(Controller::Cpu, "/c/cpu"), (Controller::Cpuacct, "/c/cpu"), (Controller::Memory, "/c/memory")];
        let v1 = v1.into_iter().map(|(controller, path)| (controller, PathBuf::from(path))).collect();
        let hierarchies = Hierarchies::at(Some("/c/unified".into()), v1);
        let group = Group::new(&hierarchies, "/vsos/web1/");
        let expected: Vec<PathBuf> =
            ["/c/cpu/vsos/web1", "/c/memory/vsos/web1", "/c/unified/vsos/web1"].map(PathBuf::from).into();
        assert_eq!(group.directories(), expected);
        assert_eq!(group.directory(Controller::Pids), Some("/c/unified/vsos/web1".into()));
        assert_eq!(group.parent().unwrap().path(), Path::new("vsos"));
        assert!(group.parent().unwrap().parent().is_none());
    }
}
