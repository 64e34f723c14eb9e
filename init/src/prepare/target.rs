//! Places in the guest's root to attach mounts over: found, or made, without ever leaving the root.
//!
//! The root disk is the guest's and may hold any symbolic link. Every look-up is openat2(2) with
//! `RESOLVE_IN_ROOT`: links work as they will for the guest, and end in the guest.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

use kernel::file::open_beneath_with;
use kernel::{Error, Result};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// What is made is root's, readable by all.
const DIRECTORY_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o644;

/// Opens the attached root as the place where the other functions begin.
pub fn open_root(stage: &Path) -> crate::failure::Result<OwnedFd> {
    use crate::failure::During;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(stage, flags, Mode::empty());
    root.during(|| format!("open the server's root at {}", stage.display()))
}

/// The directory at `path` below `root`, made with those above it where they are missing.
pub fn directory(root: &OwnedFd, path: &Path) -> Result<OwnedFd> {
    names(path)?;
    // The whole path at once: almost every directory is there.
    let error = match open(root, path, OFlags::DIRECTORY) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => error,
        found => return found,
    };
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else { return Err(error) };
    make_directory(&directory(root, above)?, name, path)?;
    open(root, path, OFlags::DIRECTORY)
}

/// The file (or node, or socket) at `path` below `root`, made empty where it is missing.
pub fn file(root: &OwnedFd, path: &Path) -> Result<OwnedFd> {
    match open(root, path, OFlags::empty()) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        found => return found,
    }
    let parent = directory(root, path.parent().unwrap_or(Path::new("/")))?;
    let name = names(path)?.pop().unwrap_or_default();
    // EXCL follows no link at the end: a dangling one gives EEXIST and is an error.
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(FILE_MODE))
        .map_err(|errno| Error::new("make file", path.display(), errno))?;
    open(root, path, OFlags::empty())
}

fn open(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd> {
    open_beneath_with(root, path, OFlags::PATH | flags, 0)
}

fn make_directory(parent: &OwnedFd, name: &OsStr, path: &Path) -> Result<()> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(DIRECTORY_MODE)) {
        Ok(()) => Ok(()),
        Err(errno) => Err(Error::new("make directory", path.display(), errno)),
    }
}

/// The names in an absolute path. `..` would climb by text where a link was followed by the
/// kernel, so it is refused.
fn names(path: &Path) -> Result<Vec<&OsStr>> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => names.push(name),
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Error::new("use path", path.display(), Errno::INVAL));
            }
        }
    }
    Ok(names)
}

/// Makes a symbolic link in the directory `place`; whatever is there already stays.
pub fn link(place: &OwnedFd, name: &str, to: &str) -> Result<()> {
    match rustix::fs::symlinkat(to, place, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(Error::new("make link", name, errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A root beside a directory that stands for the host.
    fn root() -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("root")).unwrap();
        std::fs::create_dir(directory.path().join("host")).unwrap();
        let root = open_root(&directory.path().join("root")).unwrap();
        (directory, root)
    }

    #[test]
    fn missing_places_are_made() {
        let (temp, root) = root();
        directory(&root, Path::new("/a/b/c")).unwrap();
        file(&root, Path::new("/a/d/e.txt")).unwrap();
        file(&root, Path::new("/top")).unwrap();
        directory(&root, Path::new("/a/b/c")).unwrap();
        assert!(temp.path().join("root/a/b/c").is_dir());
        assert_eq!(std::fs::read(temp.path().join("root/a/d/e.txt")).unwrap(), b"");
        assert!(temp.path().join("root/top").is_file());
    }

    #[test]
    fn links_end_in_the_root() {
        let (temp, root) = root();
        let host = temp.path().join("host");
        symlink(&host, temp.path().join("root/absolute")).unwrap();
        symlink("../host", temp.path().join("root/relative")).unwrap();
        symlink(host.join("file"), temp.path().join("root/file")).unwrap();
        for path in ["/absolute/x", "/relative/x"] {
            let _ = directory(&root, Path::new(path));
            let _ = file(&root, Path::new(path));
        }
        // Dangling for the guest: refused, and nothing made on the host.
        assert!(file(&root, Path::new("/file")).is_err());
        assert_eq!(std::fs::read_dir(&host).unwrap().count(), 0);
    }

    #[test]
    fn links_that_work_for_the_guest_work() {
        let (temp, root) = root();
        std::fs::create_dir(temp.path().join("root/run")).unwrap();
        std::fs::create_dir(temp.path().join("root/var")).unwrap();
        symlink("/run", temp.path().join("root/var/run")).unwrap();
        file(&root, Path::new("/var/run/x/y")).unwrap();
        assert!(temp.path().join("root/run/x/y").is_file());
    }

    #[test]
    fn climbing_and_wrong_kinds_are_refused() {
        let (temp, root) = root();
        std::fs::write(temp.path().join("root/plain"), "").unwrap();
        assert!(directory(&root, Path::new("/a/../b")).is_err());
        assert!(directory(&root, Path::new("/plain")).is_err());
        assert!(file(&root, Path::new("/plain/x")).is_err());
    }
}
