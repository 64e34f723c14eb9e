//! The names of files and directories that are watched (inotify(7)).
//!
//! CRIU watches them again by name. The kernel tells numbers only, and a file of an overlay cannot be opened by its handle: so CRIU
//! looks for the numbers below directories that it is told. For what lies elsewhere in the server's root, the names are looked for
//! here, before anything is frozen.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::processes::{self, Process};

/// The numbers of what the processes `watching` watch on the file system with the number `device`, as stat(2) has it.
pub fn numbers(watching: &[Process], device: u64) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    for process in watching {
        for (_, text) in processes::descriptors(process.pid) {
            found.extend(text.lines().filter_map(watch).filter(|(on, _)| *on == device).map(|(_, number)| number));
        }
    }
    found
}

/// Device and number of `inotify wd:3 ino:9e7e sdev:800013 mask:…` (proc_pid_fdinfo(5)). The kernel's own form of a device has the
/// minor number in the lower 20 bits.
fn watch(line: &str) -> Option<(u64, u64)> {
    let words = line.strip_prefix("inotify ")?.split(' ');
    let value = |name: &str| {
        let digits = words.clone().find_map(|word| word.strip_prefix(name)?.strip_prefix(':'))?;
        u64::from_str_radix(digits, 16).ok()
    };
    let device = value("sdev")?;
    Some((rustix::fs::makedev((device >> 20) as u32, (device & 0xf_ffff) as u32), value("ino")?))
}

/// Where below `root`, on its file system, the files with the `wanted` numbers are; as seen from inside. What is in `known` anyway
/// is not looked for.
///
/// # Errors
/// When a directory cannot be read.
pub fn paths(root: &Path, wanted: BTreeSet<u64>, known: &[&str]) -> Result<Vec<PathBuf>> {
    let mut left = wanted;
    if left.is_empty() {
        return Ok(Vec::new());
    }
    let device = fs::symlink_metadata(root).with_context(|| format!("look at {}", root.display()))?.dev();
    let mut found = Vec::new();
    // Mostly all are in there. Each round of memory comes by here: no step more than it takes.
    for place in known {
        let ended = walk(&root.join(place.trim_start_matches('/')), device, &mut |_, number| {
            left.remove(&number);
            if left.is_empty() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if ended.is_break() {
            return Ok(found);
        }
    }
    let _ = walk(root, device, &mut |path, number| {
        if left.remove(&number) {
            found.push(Path::new("/").join(path.strip_prefix(root).unwrap_or(path)));
        }
        if left.is_empty() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(found)
}

/// Shows `see` all that lies at and below `path` on `device`, with its number, until it has seen enough. What goes away meanwhile is left out,
/// and no link is followed.
fn walk(path: &Path, device: u64, see: &mut dyn FnMut(&Path, u64) -> ControlFlow<()>) -> Result<ControlFlow<()>> {
    const ON: Result<ControlFlow<()>> = Ok(ControlFlow::Continue(()));
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return ON,
        found => found.with_context(|| format!("look at {}", path.display()))?,
    };
    if found.dev() != device {
        return ON;
    }
    let seen = see(path, found.ino());
    if seen.is_break() || !found.is_dir() {
        return Ok(seen);
    }
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return ON,
        entries => entries.with_context(|| format!("read {}", path.display()))?,
    };
    for entry in entries.flatten() {
        if walk(&entry.path(), device, see)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    ON
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_read_from_its_line() {
        let line = "inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1";
        assert_eq!(watch(line), Some((rustix::fs::makedev(8, 19), 0x9e7e)));
        assert_eq!(watch("pos:\t0"), None);
        assert_eq!(watch("inotify wd:3 ino:x sdev:1"), None);
    }

    #[test]
    fn what_is_watched_is_found_by_its_number_unless_it_is_known() {
        let root = tempfile::tempdir().unwrap();
        let number = |path: &str| fs::metadata(root.path().join(path)).unwrap().ino();
        for directory in ["etc", "srv/deep", "srv/other"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        fs::write(root.path().join("srv/deep/file"), "").unwrap();
        std::os::unix::fs::symlink("/", root.path().join("srv/deep/link")).unwrap();
        let wanted = BTreeSet::from([number("etc"), number("srv/deep/file"), number("srv/other")]);
        let mut found = paths(root.path(), wanted, &["/etc", "/nowhere"]).unwrap();
        found.sort();
        assert_eq!(found, [Path::new("/srv/deep/file"), Path::new("/srv/other")]);
        assert!(paths(root.path(), BTreeSet::new(), &[]).unwrap().is_empty());
    }
}
