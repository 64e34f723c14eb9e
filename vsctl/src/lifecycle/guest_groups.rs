//! The control groups that a guest has made below its own: what a checkpoint has to remember of them.
//!
//! CRIU makes groups anew and knows the values of v1; which controllers a group of cgroup2 hands on it does not. So they are made
//! before it comes, and it leaves what is there as it is.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What a guest may have set (Documentation/admin-guide/cgroup-v2.rst); devices are named by the host's numbers, which stay.
const VALUES: &[&str] = &[
    "cgroup.max.depth",
    "cgroup.max.descendants",
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.weight",
    "cpuset.cpus",
    "cpuset.mems",
    "io.max",
    "io.weight",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.oom.group",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
    "pids.max",
];

/// Names the controllers that a group hands on to those below it.
const CONTROL: &str = "cgroup.subtree_control";

/// One group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestGroup {
    /// Below the server's; empty for that itself, of which only the controllers are remembered.
    pub path: String,
    /// Controllers for the groups below it, separated by blanks.
    pub controllers: String,
    /// Its owner on the host.
    pub uid: u32,
    /// Its group on the host.
    pub gid: u32,
    /// File and what stands in it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub values: BTreeMap<String, String>,
}

/// The groups from `directory` down, each after the one that it lies in.
///
/// # Errors
/// When one cannot be read.
pub fn survey(directory: &Path) -> Result<Vec<GuestGroup>> {
    let mut found = Vec::new();
    walk(directory, String::new(), &mut found)
        .with_context(|| format!("read the groups in {}", directory.display()))?;
    Ok(found)
}

fn walk(directory: &Path, path: String, found: &mut Vec<GuestGroup>) -> io::Result<()> {
    let owner = fs::metadata(directory)?;
    let mut values = BTreeMap::new();
    for name in VALUES.iter().filter(|_| !path.is_empty()) {
        match fs::read_to_string(directory.join(name)) {
            Ok(text) => drop(values.insert((*name).to_owned(), text.trim_end().to_owned())),
            // The controller is not handed on to this group, or the kernel has no such file.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let controllers = match fs::read_to_string(directory.join(CONTROL)) {
        Ok(text) => text.trim_end().to_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    found.push(GuestGroup { path: path.clone(), controllers, uid: owner.uid(), gid: owner.gid(), values });
    let mut below: Vec<_> = fs::read_dir(directory)?.collect::<io::Result<_>>()?;
    below.retain(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.sort_by_key(fs::DirEntry::file_name);
    for entry in below {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if path.is_empty() { name } else { format!("{path}/{name}") };
        walk(&entry.path(), path, found)?;
    }
    Ok(())
}

/// Makes `groups` below `directory`, which exists, without controllers: init begins in the uppermost one, where no process may be
/// once that hands on any.
///
/// # Errors
/// The group that the kernel refuses.
pub fn make(directory: &Path, groups: &[GuestGroup]) -> Result<()> {
    for group in groups.iter().filter(|group| !group.path.is_empty()) {
        let place = directory.join(&group.path);
        fs::create_dir(&place).with_context(|| format!("make {}", place.display()))?;
    }
    Ok(())
}

/// Gives `groups` below `directory` their owners, values and controllers.
///
/// # Errors
/// The group and file that the kernel refuses.
pub fn fill(directory: &Path, groups: &[GuestGroup]) -> Result<()> {
    for group in groups {
        let place = directory.join(&group.path);
        if !group.path.is_empty() {
            own(&place, group.uid, group.gid).with_context(|| format!("give {} away", place.display()))?;
        }
        for (name, value) in &group.values {
            set(&place.join(name), value)?;
        }
        let wanted: Vec<String> = group.controllers.split_whitespace().map(|name| format!("+{name}")).collect();
        if !wanted.is_empty() {
            set(&place.join(CONTROL), &wanted.join(" "))?;
        }
    }
    Ok(())
}

/// Gives a group and its files to the one who had made it.
fn own(place: &Path, uid: u32, gid: u32) -> io::Result<()> {
    chown(place, Some(uid), Some(gid))?;
    for entry in fs::read_dir(place)? {
        chown(entry?.path(), Some(uid), Some(gid))?;
    }
    Ok(())
}

fn set(file: &Path, value: &str) -> Result<()> {
    let now = fs::read_to_string(file);
    // Most stand at their default, and a set of CPUs that is empty cannot be written again.
    if now.as_deref().is_ok_and(|now| now.trim_end() == value) {
        return Ok(());
    }
    for line in value.lines() {
        fs::write(file, line).with_context(|| format!("write '{line}' to {}", file.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files stand for the kernel's; a group without a controller has none of its files.
    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        file("cgroup.subtree_control", "memory pids\n");
        file("memory.max", "1000\n");
        file("b.slice/cgroup.subtree_control", "pids\n");
        file("b.slice/memory.max", "max\n");
        file("b.slice/x.service/pids.max", "17\n");
        file("a.slice/pids.max", "max\n");
        root
    }

    #[test]
    fn parents_come_first_and_the_server_s_own_limits_are_not_the_guest_s() {
        let root = tree();
        let found = survey(root.path()).unwrap();
        assert_eq!(
            found.iter().map(|group| group.path.as_str()).collect::<Vec<_>>(),
            ["", "a.slice", "b.slice", "b.slice/x.service"]
        );
        assert!(found[0].values.is_empty() && found[0].controllers == "memory pids");
        assert_eq!(found[3].values["pids.max"], "17");
        assert_eq!(found[2].values.keys().collect::<Vec<_>>(), ["memory.max"]);
    }

    #[test]
    fn what_was_there_is_made_again() {
        let groups = survey(tree().path()).unwrap();
        let root = tempfile::tempdir().unwrap();
        make(root.path(), &groups).unwrap();
        fill(root.path(), &groups).unwrap();
        let read = |path: &str| fs::read_to_string(root.path().join(path)).unwrap();
        assert_eq!(read("cgroup.subtree_control"), "+memory +pids");
        assert_eq!(read("b.slice/cgroup.subtree_control"), "+pids");
        assert_eq!(read("b.slice/x.service/pids.max"), "17");
    }
}
