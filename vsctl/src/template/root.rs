//! A server's root on disk: a directory, or a writable layer over a template.
//!
//! The tree belongs to a guest that may be hostile. Nothing here follows a symbolic link out of it: paths are walked
//! name by name, links are expanded by us and clamped at the root, and what is found is opened by `openat2` that
//! follows nothing (`RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH`). What the overlay file system calls white-outs and opaque
//! directories is understood, so that a layer reads here as it reads when it is mounted.
//!
//! Limit: a layer that is mounted in a running server must not be written; use the mounted root then.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, XattrFlags};
use rustix::io::Errno;

use super::During;
use super::edit::{Access, Change, Edit};

/// Configuration files are small; more than this in one is a guest's trick.
const MOST_BYTES: u64 = 1 << 20;
/// As the kernel (path_resolution(7)).
const MOST_LINKS: usize = 40;
/// What overlayfs marks a directory with that hides the lower one (mounts with `userxattr`, and without).
const OPAQUE: [&str; 2] = ["user.overlay.opaque", "trusted.overlay.opaque"];

/// A root, its writable layer first.
#[derive(Debug)]
pub struct Root {
    layers: Vec<OwnedFd>,
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link and what it says.
    Link(String),
    /// A device, socket or pipe.
    Other,
}

/// An object of the topmost layer that has it.
struct Found {
    layer: usize,
    fd: OwnedFd,
    stat: Stat,
}

impl Found {
    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    fn access(&self) -> Access {
        Access { mode: self.stat.st_mode & 0o7777, uid: self.stat.st_uid, gid: self.stat.st_gid }
    }
}

impl Root {
    /// A root that is one directory.
    pub fn directory(path: &Path) -> Result<Self> {
        Ok(Self { layers: vec![open_directory(path)?] })
    }

    /// The layer `upper` over the template `lower`. An empty `upper` gets the mode and owner of `lower`: it is `/`.
    pub fn overlay(upper: &Path, lower: &Path) -> Result<Self> {
        let root = Self { layers: vec![open_directory(upper)?, open_directory(lower)?] };
        if Dir::read_from(&root.layers[0]).during(format!("list {}", upper.display()))?.all(is_dot) {
            let lower = rustix::fs::fstat(&root.layers[1]).during("stat the template's root")?;
            let access = Access { mode: lower.st_mode & 0o7777, uid: lower.st_uid, gid: lower.st_gid };
            grant(&root.layers[0], access).with_context(|| format!("set owner and mode of {}", upper.display()))?;
        }
        Ok(root)
    }

    /// What is at `path`; a link there is not followed, links on the way are.
    pub fn entry(&self, path: &str) -> Result<Option<Entry>> {
        let Some(place) = self.resolve(path, false)? else {
            return Ok(None);
        };
        let Some(found) = self.find(&place)? else {
            return Ok(None);
        };
        Ok(Some(match found.kind() {
            FileType::RegularFile => Entry::File,
            FileType::Directory => Entry::Directory,
            FileType::Symlink => Entry::Link(read_link(&found)?),
            _ => Entry::Other,
        }))
    }

    /// Whether anything is at `path`, links followed.
    pub fn exists(&self, path: &str) -> Result<bool> {
        let Some(place) = self.resolve(path, true)? else {
            return Ok(false);
        };
        Ok(self.find(&place)?.is_some())
    }

    /// The content of the regular file at `path`, links followed inside the root; `None` when there is none.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        match self.file(path)? {
            Some((_, found)) => self.content(path, &found).map(Some),
            None => Ok(None),
        }
    }

    /// [`Root::read`] as text; bytes that are not UTF-8 are replaced.
    pub fn text(&self, path: &str) -> Result<Option<String>> {
        Ok(self.read(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Mode and owner of what is at `path`, links followed.
    pub fn access(&self, path: &str) -> Result<Option<Access>> {
        let Some(place) = self.resolve(path, true)? else {
            return Ok(None);
        };
        Ok(self.find(&place)?.map(|found| found.access()))
    }

    /// The names in the directory `path`, sorted; empty when there is none. Names that are not UTF-8 are left out.
    pub fn names(&self, path: &str) -> Result<Vec<String>> {
        let Some(place) = self.resolve(path, true)? else {
            return Ok(Vec::new());
        };
        let mut names = BTreeSet::new();
        for layer in &self.layers {
            let Ok(directory) = open_in(layer, &place, OFlags::RDONLY | OFlags::DIRECTORY) else {
                continue;
            };
            for entry in Dir::new(directory).during(format!("list /{}", place.join("/")))? {
                let entry = entry.during(format!("list /{}", place.join("/")))?;
                if let Ok(name) = entry.file_name().to_str() {
                    names.insert(name.to_owned());
                }
            }
        }
        let mut present = Vec::new();
        for name in names.into_iter().filter(|name| name != "." && name != "..") {
            let full: Vec<String> = place.iter().cloned().chain([name.clone()]).collect();
            if self.find(&full)?.is_some() {
                present.push(name);
            }
        }
        Ok(present)
    }

    /// Makes `edits` in the writable layer, in order. What is already as it should be is not touched, so that a
    /// second time changes nothing.
    pub fn apply(&self, edits: &[Edit]) -> Result<()> {
        let mut changed = BTreeSet::new();
        for edit in edits {
            changed.extend(self.apply_one(edit).with_context(|| format!("cannot {edit}"))?);
        }
        // The files are there already: a server whose host name or keys are empty after a power cut is broken.
        for place in changed {
            let directory = self.directory_for_writing(&place)?;
            rustix::fs::fsync(directory).during(format!("sync /{}", place.join("/")))?;
        }
        Ok(())
    }

    /// The directory that was changed, if one was.
    fn apply_one(&self, edit: &Edit) -> Result<Option<Vec<String>>> {
        // A link at the path itself is replaced, never followed.
        let Some(place) = self.resolve(&edit.path, false)? else { bail!("a file is where a directory should be") };
        let Some((name, parent)) = place.split_last() else { bail!("the root itself cannot be edited") };
        let found = self.find(&place)?;
        if self.is_as_wanted(found.as_ref(), &edit.change)? {
            return Ok(None);
        }
        let is_directory = found.as_ref().is_some_and(|found| found.kind() == FileType::Directory);
        if is_directory && !matches!(edit.change, Change::Directory(_)) {
            bail!("a directory is there");
        }
        match &edit.change {
            Change::Directory(access) => {
                if found.is_some() && !is_directory {
                    self.remove(parent, name)?;
                }
                let directory = self.directory_for_writing(&place)?;
                grant(&directory, *access)?;
            }
            Change::File { content, access } => {
                let directory = self.directory_for_writing(parent)?;
                write_over(&directory, name, content, *access)?;
            }
            Change::Link { target } => {
                let directory = self.directory_for_writing(parent)?;
                link_over(&directory, name, target)?;
            }
            Change::Absent => self.remove(parent, name)?,
        }
        Ok(Some(parent.to_owned()))
    }

    fn is_as_wanted(&self, found: Option<&Found>, change: &Change) -> Result<bool> {
        Ok(match (found, change) {
            (None, Change::Absent) => true,
            (Some(found), Change::Directory(access)) => {
                found.kind() == FileType::Directory && found.access() == *access
            }
            (Some(found), Change::Link { target }) => found.kind() == FileType::Symlink && read_link(found)? == *target,
            (Some(found), Change::File { content, access }) => {
                found.kind() == FileType::RegularFile
                    && found.access() == *access
                    && found.stat.st_size as usize == content.len()
                    && self.content("", found)? == *content
            }
            _ => false,
        })
    }

    /// Removes `name`, and hides a lower one by a white-out (overlayfs: character device 0:0).
    fn remove(&self, parent: &[String], name: &str) -> Result<()> {
        let place: Vec<String> = parent.iter().cloned().chain([name.to_owned()]).collect();
        let below = self.find_from(&place, 1)?.is_some();
        let directory = self.directory_for_writing(parent)?;
        match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno).during("remove"),
        }
        if below {
            rustix::fs::mknodat(&directory, name, FileType::CharacterDevice, Mode::empty(), 0)
                .during("make a white-out")?;
        }
        Ok(())
    }

    /// Opens a directory of the writable layer; what is missing of the way there is made, like the lower one where
    /// there is one.
    fn directory_for_writing(&self, place: &[String]) -> Result<OwnedFd> {
        let mut directory = open_in(&self.layers[0], &[], OFlags::RDONLY | OFlags::DIRECTORY).during("open /")?;
        for depth in 1..=place.len() {
            let path = &place[..depth];
            let name = path[depth - 1].as_str();
            directory =
                match open_in(&directory, std::slice::from_ref(&path[depth - 1]), OFlags::RDONLY | OFlags::DIRECTORY) {
                    Ok(existing) => existing,
                    Err(Errno::NOENT | Errno::NOTDIR) => self.make_directory(&directory, path)?,
                    Err(errno) => return Err(errno).during(format!("open directory {name}")),
                };
        }
        Ok(directory)
    }

    fn make_directory(&self, parent: &OwnedFd, place: &[String]) -> Result<OwnedFd> {
        let name = place.last().map(String::as_str).unwrap_or_default();
        let visible = self.find(place)?;
        let hidden = visible.is_none() && remove_white_out(parent, name)?;
        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)).during(format!("make directory {name}"))?;
        let made = open_in(parent, &[name.to_owned()], OFlags::RDONLY | OFlags::DIRECTORY)
            .during(format!("open directory {name}"))?;
        match visible {
            Some(lower) => {
                let from = open_in(&self.layers[lower.layer], place, OFlags::RDONLY | OFlags::DIRECTORY)
                    .during(format!("open the template's {name}"))?;
                copy_attributes(&from, &made)?;
                grant(&made, lower.access())?;
            }
            None => {
                // Like its parent: what is missing in a user's home is the user's.
                let above = rustix::fs::fstat(parent).during("stat")?;
                grant(&made, Access { mode: 0o755, uid: above.st_uid, gid: above.st_gid })?;
            }
        }
        if hidden {
            // What the guest removed must not come back through the new directory.
            rustix::fs::fsetxattr(&made, OPAQUE[0], b"y", XattrFlags::empty()).during("mark the directory opaque")?;
        }
        Ok(made)
    }

    fn file(&self, path: &str) -> Result<Option<(Vec<String>, Found)>> {
        let Some(place) = self.resolve(path, true)? else {
            return Ok(None);
        };
        let found = self.find(&place)?.filter(|found| found.kind() == FileType::RegularFile);
        Ok(found.map(|found| (place, found)))
    }

    fn content(&self, path: &str, found: &Found) -> Result<Vec<u8>> {
        // The found descriptor is O_PATH; its own link in /proc opens the very inode that was checked.
        let opened = File::open(format!("/proc/self/fd/{}", raw(&found.fd))).with_context(|| format!("open {path}"))?;
        let mut bytes = Vec::new();
        opened.take(MOST_BYTES + 1).read_to_end(&mut bytes).with_context(|| format!("read {path}"))?;
        if bytes.len() as u64 > MOST_BYTES {
            bail!("{path} is larger than {MOST_BYTES} bytes");
        }
        Ok(bytes)
    }

    /// The names from the root to `path` with every link on the way expanded, and the last one too if `follow`.
    /// `None` when a part of the way is there and is no directory. Missing parts stay as they are written.
    fn resolve(&self, path: &str, follow: bool) -> Result<Option<Vec<String>>> {
        let mut todo: VecDeque<String> = names_of(path);
        let mut place: Vec<String> = Vec::new();
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if name == ".." {
                place.pop();
                continue;
            }
            place.push(name);
            if todo.is_empty() && !follow {
                break;
            }
            let Some(found) = self.find(&place)? else {
                continue;
            };
            match found.kind() {
                FileType::Directory => {}
                FileType::Symlink => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(Errno::LOOP).during(format!("resolve {path}"));
                    }
                    let target = read_link(&found)?;
                    place.pop();
                    if target.starts_with('/') {
                        place.clear();
                    }
                    for name in names_of(&target).into_iter().rev() {
                        todo.push_front(name);
                    }
                }
                _ if todo.is_empty() => {}
                _ => return Ok(None),
            }
        }
        Ok(Some(place))
    }

    fn find(&self, place: &[String]) -> Result<Option<Found>> {
        self.find_from(place, 0)
    }

    /// The object at `place` (no links in it) in the topmost layer from `first` that has it.
    fn find_from(&self, place: &[String], first: usize) -> Result<Option<Found>> {
        for (layer, root) in self.layers.iter().enumerate().skip(first) {
            match open_in(root, place, OFlags::PATH | OFlags::NOFOLLOW) {
                Ok(fd) => {
                    let stat = rustix::fs::fstat(&fd).during(format!("stat /{}", place.join("/")))?;
                    let found = Found { layer, fd, stat };
                    return Ok((!is_white_out(&found.stat)).then_some(found));
                }
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if hides_lower(root, place)? => {
                    return Ok(None);
                }
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(errno) => return Err(errno).during(format!("look up /{}", place.join("/"))),
            }
        }
        Ok(None)
    }
}

/// Whether something in this layer on the way to `place` hides what the layers below have there.
fn hides_lower(layer: &OwnedFd, place: &[String]) -> Result<bool> {
    for depth in 1..place.len() {
        let fd = match open_in(layer, &place[..depth], OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(fd) => fd,
            Err(_) => return Ok(false),
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&fd).during("stat")?.st_mode) != FileType::Directory
            || is_opaque(layer, &place[..depth])
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_opaque(layer: &OwnedFd, place: &[String]) -> bool {
    let Ok(fd) = open_in(layer, place, OFlags::RDONLY | OFlags::DIRECTORY) else {
        return false;
    };
    OPAQUE.iter().any(|name| {
        let mut value = [0u8; 1];
        matches!(rustix::fs::fgetxattr(&fd, *name, &mut value[..]), Ok(1)) && value == *b"y"
    })
}

fn is_white_out(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Takes a white-out away; `true` if there was one.
fn remove_white_out(parent: &OwnedFd, name: &str) -> Result<bool> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if is_white_out(&stat) => {
            rustix::fs::unlinkat(parent, name, AtFlags::empty()).during("remove a white-out")?;
            Ok(true)
        }
        Ok(_) | Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno).during("stat"),
    }
}

/// Writes beside and renames over: whatever `name` is, it is replaced and not followed.
fn write_over(directory: &OwnedFd, name: &str, content: &[u8], access: Access) -> Result<()> {
    let temporary = temporary_name();
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(directory, &temporary, flags, Mode::from_raw_mode(0o600)).during("create")?;
    let written = (|| {
        let mut file = File::from(fd);
        file.write_all(content).context("write")?;
        grant(&file, access).context("set owner and mode")?;
        file.sync_all().context("sync")?;
        rustix::fs::renameat(directory, &temporary, directory, name).during("rename")
    })();
    if written.is_err() {
        // The first error is the one that matters.
        let _ = rustix::fs::unlinkat(directory, &temporary, AtFlags::empty());
    }
    written
}

fn link_over(directory: &OwnedFd, name: &str, target: &str) -> Result<()> {
    let temporary = temporary_name();
    rustix::fs::symlinkat(target, directory, &temporary).during("make the link")?;
    let renamed = rustix::fs::renameat(directory, &temporary, directory, name).during("rename");
    if renamed.is_err() {
        let _ = rustix::fs::unlinkat(directory, &temporary, AtFlags::empty());
    }
    renamed
}

/// A name that no other writer of this process uses; exclusive creation guards against the rest.
fn temporary_name() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(".vsos-new-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Owner first: a change of owner clears setuid and setgid.
fn grant(object: impl AsFd, access: Access) -> Result<()> {
    let object = object.as_fd();
    let stat = rustix::fs::fstat(object).during("stat")?;
    if (stat.st_uid, stat.st_gid) != (access.uid, access.gid) {
        rustix::fs::fchown(
            object,
            Some(rustix::fs::Uid::from_raw(access.uid)),
            Some(rustix::fs::Gid::from_raw(access.gid)),
        )
        .during("set the owner")?;
    }
    rustix::fs::fchmod(object, Mode::from_raw_mode(access.mode)).during("set the mode")
}

/// Extended attributes (default ACLs, labels) of a directory that is copied up; overlayfs' own stay where they are.
fn copy_attributes(from: &OwnedFd, to: &OwnedFd) -> Result<()> {
    let mut names = vec![0u8; 64 << 10];
    let length = match rustix::fs::flistxattr(from, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(()),
        Err(errno) => return Err(errno).during("list attributes"),
    };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"user.overlay.") || name.starts_with(b"trusted.overlay.") {
            continue;
        }
        let mut value = vec![0u8; 64 << 10];
        let length = rustix::fs::fgetxattr(from, name, &mut value[..]).during("read an attribute")?;
        rustix::fs::fsetxattr(to, name, &value[..length], XattrFlags::empty()).during("write an attribute")?;
    }
    Ok(())
}

fn names_of(path: &str) -> VecDeque<String> {
    path.split('/').filter(|name| !name.is_empty() && *name != ".").map(str::to_owned).collect()
}

fn is_dot(entry: rustix::io::Result<rustix::fs::DirEntry>) -> bool {
    entry.is_ok_and(|entry| matches!(entry.file_name().to_bytes(), b"." | b".."))
}

fn read_link(found: &Found) -> Result<String> {
    let target = rustix::fs::readlinkat(&found.fd, "", Vec::new()).during("read a link")?;
    target.into_string().map_err(|_| anyhow::anyhow!("a link's target is no text"))
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .during(format!("open directory {}", path.display()))
}

/// Opens `place` below `root` and follows nothing. An empty `place` is the root itself.
fn open_in(root: &OwnedFd, place: &[String], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if place.is_empty() { ".".to_owned() } else { place.join("/") };
    kernel::file::open_without_links(root, path, flags)
}

fn raw(fd: &OwnedFd) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn own(mode: u32) -> Access {
        Access { mode, uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }

    /// A root that wants to be left: links in the way, at the end, and in a circle; and a file outside.
    fn hostile() -> (tempfile::TempDir, Root) {
        let scratch = tempfile::tempdir().unwrap();
        let inside = scratch.path().join("root");
        fs::create_dir_all(inside.join("real")).unwrap();
        fs::create_dir(scratch.path().join("outside")).unwrap();
        fs::write(scratch.path().join("outside/secret"), "secret").unwrap();
        let outside = scratch.path().join("outside").display().to_string();
        symlink("../outside", inside.join("up")).unwrap();
        symlink(&outside, inside.join("absolute")).unwrap();
        symlink("../../../../../../real", inside.join("clamped")).unwrap();
        symlink("circle", inside.join("circle")).unwrap();
        symlink(format!("{outside}/secret"), inside.join("secret")).unwrap();
        let root = Root::directory(&inside).unwrap();
        (scratch, root)
    }

    #[test]
    fn nothing_outside_is_read_or_written() {
        let (scratch, root) = hostile();
        let paths = ["up/secret", "absolute/secret", "secret", "../outside/secret", "real/../../outside/secret"];
        for path in paths {
            assert_eq!(root.read(path).unwrap(), None, "{path}");
        }
        for path in paths {
            // Written inside, where the guest would find it; the way that a link names is made there.
            root.apply(&[Edit::file(path, own(0o600), "mine")]).unwrap();
        }
        let outside = scratch.path().join("outside");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(fs::read_to_string(outside.join("secret")).unwrap(), "secret");
        assert!(fs::symlink_metadata(scratch.path().join("root/secret")).unwrap().is_file());
        root.apply(&[Edit::file("clamped/file", own(0o600), "mine")]).unwrap();
        assert!(scratch.path().join("root/real/file").exists());
        assert!(root.read("circle/x").is_err());
    }

    #[test]
    fn a_directory_or_a_flood_in_the_way_is_an_error() {
        let (scratch, root) = hostile();
        let inside = scratch.path().join("root");
        let error = root.apply(&[Edit::file("real", own(0o644), "x")]).unwrap_err();
        assert_eq!(format!("{error:#}"), format!("cannot write /real ({}): a directory is there", own(0o644)));
        assert!(root.apply(&[Edit::absent("real")]).is_err());
        fs::File::create(inside.join("flood")).unwrap().set_len(MOST_BYTES + 1).unwrap();
        assert!(root.read("flood").is_err());
        rustix::fs::mknodat(rustix::fs::CWD, inside.join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .unwrap();
        // Would wait for ever if it were opened.
        assert_eq!(root.read("pipe").unwrap(), None);
        assert!(root.apply(&[Edit::file("flood/x", own(0o644), "x")]).is_err());
    }

    fn layers() -> (tempfile::TempDir, Root) {
        let scratch = tempfile::tempdir().unwrap();
        let (upper, lower) = (scratch.path().join("upper"), scratch.path().join("lower"));
        fs::create_dir_all(lower.join("etc/ssh")).unwrap();
        fs::create_dir(&upper).unwrap();
        fs::write(lower.join("etc/ssh/key"), "old").unwrap();
        fs::write(lower.join("etc/name"), "lower").unwrap();
        fs::set_permissions(lower.join("etc/ssh"), fs::Permissions::from_mode(0o710)).unwrap();
        fs::set_permissions(&lower, fs::Permissions::from_mode(0o751)).unwrap();
        let root = Root::overlay(&upper, &lower).unwrap();
        (scratch, root)
    }

    #[test]
    fn directories_come_up_with_their_modes() {
        let (scratch, root) = layers();
        root.apply(&[Edit::file("etc/ssh/new", own(0o600), "x")]).unwrap();
        let mode = |path: &str| fs::metadata(scratch.path().join(path)).unwrap().mode() & 0o7777;
        assert_eq!((mode("upper"), mode("upper/etc/ssh"), mode("upper/etc/ssh/new")), (0o751, 0o710, 0o600));
        assert_eq!(root.names("etc/ssh").unwrap(), ["key", "new"]);
        assert!(!scratch.path().join("lower/etc/ssh/new").exists());
    }

    #[test]
    fn a_removed_file_is_hidden_and_may_come_back() {
        let (scratch, root) = layers();
        root.apply(&[Edit::absent("etc/ssh/key")]).unwrap();
        assert_eq!(root.entry("etc/ssh/key").unwrap(), None);
        assert!(root.names("etc/ssh").unwrap().is_empty());
        assert!(scratch.path().join("lower/etc/ssh/key").exists());
        root.apply(&[Edit::file("etc/ssh/key", own(0o600), "new")]).unwrap();
        assert_eq!(root.text("etc/ssh/key").unwrap().unwrap(), "new");
        root.apply(&[Edit::absent("etc/nothing")]).unwrap();
        assert!(!scratch.path().join("upper/etc/nothing").exists());
    }

    /// What a guest that ran may have left: a directory removed and made anew, or replaced by a file.
    #[test]
    fn what_a_guest_removed_stays_removed() {
        let (scratch, root) = layers();
        let upper = scratch.path().join("upper");
        fs::create_dir(upper.join("etc")).unwrap();
        let white_out = upper.join("etc/ssh");
        rustix::fs::mknodat(rustix::fs::CWD, &white_out, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        assert!(!root.exists("etc/ssh").unwrap() && !root.exists("etc/ssh/key").unwrap());
        root.apply(&[Edit::file("etc/ssh/new", own(0o600), "x")]).unwrap();
        assert_eq!(root.names("etc/ssh").unwrap(), ["new"]);
        assert_eq!(root.read("etc/ssh/key").unwrap(), None);
        assert_eq!(root.text("etc/name").unwrap().unwrap(), "lower");
        fs::remove_dir_all(upper.join("etc")).unwrap();
        fs::write(upper.join("etc"), "a file now").unwrap();
        assert_eq!(root.read("etc/name").unwrap(), None);
        assert!(root.apply(&[Edit::file("etc/name", own(0o600), "x")]).is_err());
    }

    #[test]
    fn links_of_one_layer_lead_through_the_other() {
        let (scratch, root) = layers();
        symlink("/etc/ssh", scratch.path().join("upper/short")).unwrap();
        assert_eq!(root.text("short/key").unwrap().unwrap(), "old");
        root.apply(&[Edit::file("short/key", own(0o600), "new")]).unwrap();
        assert_eq!(fs::read_to_string(scratch.path().join("upper/etc/ssh/key")).unwrap(), "new");
    }

    #[test]
    fn a_link_or_a_file_can_become_a_directory() {
        let (_scratch, root) = layers();
        root.apply(&[Edit::link("etc/name", "elsewhere")]).unwrap();
        assert_eq!(root.entry("etc/name").unwrap(), Some(Entry::Link("elsewhere".into())));
        root.apply(&[Edit::directory("etc/name", own(0o700)), Edit::file("etc/name/x", own(0o600), "x")]).unwrap();
        assert_eq!(root.names("etc/name").unwrap(), ["x"]);
    }
}
