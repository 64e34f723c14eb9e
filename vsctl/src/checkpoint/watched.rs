//! The names of files and directories that are watched (inotify(7)).
//!
//! CRIU watches them again by name. The kernel tells numbers only, and a file of an overlay cannot be opened by its handle: so CRIU
//! looks for the numbers below directories that it is told. For what lies elsewhere in the server's root, the names are looked for
//! here, before anything is frozen.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kernel::file;
use rustix::fs::{AtFlags, Dir, DirEntry, FileType, Mode, OFlags, fstat, openat, statat};
use rustix::io::Errno;

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
    let tree = Tree::of(root)?;
    let mut found = Vec::new();
    // Mostly all are in there. Each round of memory comes by here: no step more than it takes.
    for place in known {
        let ended = tree.walk(Path::new(place), &mut |_, number| {
            left.remove(&number);
            until_empty(&left)
        })?;
        if ended.is_break() {
            return Ok(found);
        }
    }
    for (path, number) in tree.named_by_links_of("etc", root)? {
        if left.remove(&number) {
            found.push(path);
        }
    }
    if !left.is_empty() {
        let _ = tree.walk(Path::new("/"), &mut |path, number| {
            if left.remove(&number) {
                found.push(path.to_owned());
            }
            until_empty(&left)
        })?;
    }
    Ok(found)
}

fn until_empty(left: &BTreeSet<u64>) -> ControlFlow<()> {
    if left.is_empty() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// The files of a server's root. Its guest may exchange any of them meanwhile: no link is followed out of it, and so nobody waits for a file
/// system of a guest's.
struct Tree {
    root: OwnedFd,
    device: u64,
    /// Whether the numbers that a listing has are those of stat(2): an overlay's over two file systems are not
    /// (Documentation/filesystems/overlayfs.rst). To ask for those of each file takes several times as long.
    lists_numbers: bool,
}

/// How deep it is looked. Each directory on the way is two open files; what is watched below, CRIU does not find, and says so.
const DEPTH_MAX: usize = 256;

impl Tree {
    fn of(root: &Path) -> Result<Self> {
        let look = || -> io::Result<Self> {
            let root = OwnedFd::from(File::open(root)?);
            let device = fstat(&root)?.st_dev;
            let same = |entry: &DirEntry| match statat(&root, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(told) => told.st_dev != device || told.st_ino == entry.ino(),
                Err(_) => true,
            };
            let mut lists_numbers = true;
            for entry in entries(&root)? {
                lists_numbers &= same(&entry?);
            }
            Ok(Self { root, device, lists_numbers })
        };
        look().with_context(|| format!("look at {}", root.display()))
    }

    /// Shows `see` all that lies at and below `place` on this file system, with its number, until it has seen enough. What goes away meanwhile
    /// is left out.
    fn walk(&self, place: &Path, see: &mut See<'_>) -> Result<ControlFlow<()>> {
        match file::open_beneath_with(&self.root, place, OFlags::PATH | OFlags::NOFOLLOW, 0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(ControlFlow::Continue(())),
            opened => Ok(self.look(&opened?, place, DEPTH_MAX, see)?),
        }
    }

    fn look(&self, file: &OwnedFd, path: &Path, depth: usize, see: &mut See<'_>) -> io::Result<ControlFlow<()>> {
        let told = fstat(file)?;
        if told.st_dev != self.device {
            return Ok(ControlFlow::Continue(()));
        }
        let seen = see(path, told.st_ino);
        if seen.is_break() || FileType::from_raw_mode(told.st_mode) != FileType::Directory || depth == 0 {
            return Ok(seen);
        }
        for entry in entries(file)? {
            let entry = entry?;
            let path = path.join(OsStr::from_bytes(entry.file_name().to_bytes()));
            let is_leaf = !matches!(entry.file_type(), FileType::Directory | FileType::Unknown);
            let seen = if self.lists_numbers && is_leaf {
                see(&path, entry.ino())
            } else {
                match openat(file, entry.file_name(), OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
                {
                    Err(Errno::NOENT) => continue,
                    child => self.look(&child?, &path, depth - 1, see)?,
                }
            };
            if seen.is_break() {
                return Ok(seen);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// What the symbolic links in `directory` lead to: who watches `/etc/localtime` or `/etc/resolv.conf` watches that.
    fn named_by_links_of(&self, directory: &str, root: &Path) -> Result<Vec<(PathBuf, u64)>> {
        let listed =
            match file::open_beneath_with(&self.root, Path::new(directory), OFlags::RDONLY | OFlags::DIRECTORY, 0) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                opened => opened?,
            };
        let target = |entry: DirEntry| {
            let link = Path::new(directory).join(OsStr::from_bytes(entry.file_name().to_bytes()));
            let target = file::open_beneath_with(&self.root, &link, OFlags::PATH, 0).ok()?;
            let told = fstat(&target).ok().filter(|told| told.st_dev == self.device && told.st_nlink > 0)?;
            let path = fs::read_link(format!("/proc/self/fd/{}", target.as_raw_fd())).ok()?;
            Some((Path::new("/").join(path.strip_prefix(root).ok()?), told.st_ino))
        };
        let links = entries(&listed)?.filter_map(Result::ok).filter(|entry| entry.file_type() == FileType::Symlink);
        Ok(links.filter_map(target).collect())
    }
}

/// Looks at a path and the number of its file.
type See<'a> = dyn FnMut(&Path, u64) -> ControlFlow<()> + 'a;

/// What is in a directory; nothing in one that is removed meanwhile.
fn entries(directory: &OwnedFd) -> rustix::io::Result<impl Iterator<Item = rustix::io::Result<DirEntry>> + use<>> {
    let listed = match openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::NOENT) => None,
        opened => Some(Dir::new(opened?)?),
    };
    let is_named = |entry: &DirEntry| !matches!(entry.file_name().to_bytes(), b"." | b"..");
    Ok(listed.into_iter().flatten().filter(move |entry| entry.as_ref().map_or(true, is_named)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

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
        let mut found = paths(root.path(), wanted.clone(), &["/etc", "/nowhere"]).unwrap();
        found.sort();
        assert_eq!(found, [Path::new("/srv/deep/file"), Path::new("/srv/other")]);
        assert!(paths(root.path(), BTreeSet::new(), &[]).unwrap().is_empty());
        // Where listings have other numbers.
        let tree = Tree { lists_numbers: false, ..Tree::of(root.path()).unwrap() };
        let mut seen = BTreeSet::new();
        let on =
            tree.walk(Path::new("/"), &mut |_, number| (seen.insert(number), ControlFlow::Continue(())).1).unwrap();
        assert!(on.is_continue() && wanted.is_subset(&seen));
    }

    #[test]
    fn what_links_lead_to_is_found_without_a_look_at_all() {
        let root = tempfile::tempdir().unwrap();
        for directory in ["etc", "usr/share/zoneinfo"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        fs::write(root.path().join("usr/share/zoneinfo/UTC"), "").unwrap();
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, root.path().join("etc").join(name)).unwrap();
        link("/usr/share/zoneinfo/UTC", "localtime");
        link("/../../nowhere", "mtab");
        let zone = root.path().join("usr/share/zoneinfo/UTC");
        let found = Tree::of(root.path()).unwrap().named_by_links_of("etc", root.path()).unwrap();
        assert_eq!(found, [(PathBuf::from("/usr/share/zoneinfo/UTC"), fs::metadata(zone).unwrap().ino())]);
        assert!(Tree::of(root.path()).unwrap().named_by_links_of("nowhere", root.path()).unwrap().is_empty());
    }
}
