//! Files: writing that is all or nothing, and opening that cannot leave a directory.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::path::Arg;

use crate::Result;
use crate::error::{During, Error};

/// Replaces `path` by `bytes`: after a crash either the old or the new content is there, whole. Mode 0644.
///
/// A temporary file beside it, fsync, rename, fsync of the directory.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_mode(path, bytes, 0o644)
}

/// [`write_atomic`] with the mode of the new file.
pub fn write_atomic_mode(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let temporary = temporary_beside(path)?;
    let written = write_new(&temporary, bytes, mode, true)
        .and_then(|()| std::fs::rename(&temporary, path).during("rename to", path.display()));
    if let Err(error) = written {
        // Best effort: the first error is the one that matters.
        let _ = std::fs::remove_file(&temporary);
        return Err(error);
    }
    sync_entry(path)
}

/// Makes the file `path`, which must not exist, with `bytes` and mode 0644, and brings it to the disk: only one of many who try
/// at once succeeds, and it has what it took after a power cut as well.
///
/// `AlreadyExists` when somebody has it. When anything else fails there is no file.
pub fn create_exclusive(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = open_new(path, 0o644)?;
    fill(file, path, bytes, true).and_then(|()| sync_entry(path)).inspect_err(|_| {
        // The first error is the one that matters.
        let _ = std::fs::remove_file(path);
    })
}

/// A file system that will be written to. Whoever opens it after a write is not told that the write has failed, if somebody else was: so it is opened
/// before (syncfs(2)).
#[derive(Debug)]
pub struct FileSystem {
    opened: File,
    path: PathBuf,
}

impl FileSystem {
    /// The one that `directory` is on.
    pub fn of(directory: &Path) -> Result<Self> {
        let opened = File::open(directory).during("open", directory.display())?;
        Ok(Self { opened, path: directory.to_owned() })
    }

    /// Brings all of it to the disk, and tells of what could not be written since it was opened, or since the last time.
    pub fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(&self.opened).during("bring to the disk", self.path.display())
    }
}

/// Has the kernel begin to bring what is dirty of `file`, in these `bytes` of it, to the disk (sync_file_range(2)): whoever waits for it later
/// waits for less. It does not wait for the disk itself, but for room in the queue of a slow one. No promise by itself.
pub fn begin_writing(file: &File, bytes: Range<u64>) -> Result<()> {
    let length = bytes.end.saturating_sub(bytes.start);
    // To the kernel, none is all.
    if length == 0 {
        return Ok(());
    }
    let (offset, length) = (bytes.start.min(i64::MAX as u64) as i64, length.min(i64::MAX as u64) as i64);
    crate::sys::begin_writing(file.as_fd(), offset, length).during("begin to write", "a file")
}

/// Brings the name `path`, as it is or is no longer in its directory, to the disk (fsync(2) of the directory).
pub fn sync_entry(path: &Path) -> Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).during("sync directory", directory.display())
}

/// [`write_atomic`] without the two fsync: for files below /run, where a crash of the host leaves nothing anyway, and for those that
/// the caller brings to the disk with others.
/// A reader sees the old or the new content, whole.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let temporary = temporary_beside(path)?;
    let written = write_new(&temporary, bytes, mode, false)
        .and_then(|()| std::fs::rename(&temporary, path).during("rename to", path.display()));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// A name in the same directory that no other writer uses: process and a count within it.
fn temporary_beside(path: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let Some(name) = path.file_name() else {
        return Err(Error::refused(
            "write",
            path.display(),
            std::io::ErrorKind::InvalidInput,
            "the path has no file name",
        ));
    };
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    Ok(path.with_file_name(format!(".{}.{}.{count}.new", name.to_string_lossy(), std::process::id())))
}

/// Creates `path` exclusively with `bytes`.
fn write_new(path: &Path, bytes: &[u8], mode: u32, sync: bool) -> Result<()> {
    let file = match open_new(path, mode) {
        // Left by a process of the same pid that was killed in between.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            std::fs::remove_file(path).during("remove", path.display())?;
            open_new(path, mode)
        }
        other => other,
    };
    fill(file?, path, bytes, sync)
}

fn open_new(path: &Path, mode: u32) -> Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::from_raw_mode(mode)).map(File::from).during("create", path.display())
}

fn fill(mut file: File, path: &Path, bytes: &[u8], sync: bool) -> Result<()> {
    file.write_all(bytes).during("write", path.display())?;
    if sync {
        file.sync_all().during("sync", path.display())?;
    }
    Ok(())
}

/// Opens `path` as a process chrooted to `root` would see it: `..` and absolute symbolic links stay below
/// (openat2(2) `RESOLVE_IN_ROOT`), and magic links are refused. For reading trees that a guest controls.
pub fn open_beneath(root: impl AsFd, path: &Path) -> Result<OwnedFd> {
    open_beneath_with(root, path, OFlags::RDONLY, 0)
}

/// [`open_beneath`] with open(2) flags and the mode of a created file; `O_CLOEXEC` is added.
pub fn open_beneath_with(root: impl AsFd, path: &Path, flags: OFlags, mode: u32) -> Result<OwnedFd> {
    // Who renames all the time, and has links with many `..`, would be asked for ever.
    const TRIES: u32 = 1000;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let open = || rustix::fs::openat2(root.as_fd(), path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(mode), resolve);
    // The kernel says EAGAIN when a rename raced with the look-up; it asks to be asked again.
    let is_last = |opened: &rustix::io::Result<OwnedFd>| {
        flags.contains(OFlags::NONBLOCK) || !matches!(opened, Err(rustix::io::Errno::AGAIN))
    };
    let opened = (1..TRIES).map(|_| open()).find(is_last).unwrap_or_else(open);
    opened.during("open below root", path.display())
}

/// Opens `path` below `directory` where no part of it is a link (openat2(2) `RESOLVE_NO_SYMLINKS`); `O_CLOEXEC` is added. For trees whose
/// names mean what they say, and lead nowhere else while somebody exchanges them: `ELOOP` where a link is, `EXDEV` for what is not below.
pub fn open_without_links(directory: impl AsFd, path: impl Arg, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn an_atomic_write_replaces_and_leaves_no_temporary() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record.toml");
        write_atomic(&path, b"one").unwrap();
        write_atomic_mode(&path, b"two", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        replace(&path, b"three", 0o644).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("is-a-directory");
        std::fs::create_dir(&path).unwrap();
        assert!(write_atomic(&path, b"x").is_err());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn links_out_of_the_root_stay_in_it() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("etc")).unwrap();
        std::fs::write(directory.path().join("etc/name"), "inside").unwrap();
        symlink("/etc/name", directory.path().join("absolute")).unwrap();
        symlink("../../../etc/name", directory.path().join("dots")).unwrap();
        let root = File::open(directory.path()).unwrap();
        for link in ["absolute", "dots", "/etc/name", "../etc/name"] {
            let mut text = String::new();
            File::from(open_beneath(&root, Path::new(link)).unwrap()).read_to_string(&mut text).unwrap();
            assert_eq!(text, "inside", "{link}");
        }
    }

    #[test]
    fn what_a_link_leads_to_is_not_opened_without_links() {
        use rustix::io::Errno;
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("etc")).unwrap();
        std::fs::write(directory.path().join("etc/name"), "inside").unwrap();
        symlink("etc", directory.path().join("link")).unwrap();
        let root = File::open(directory.path()).unwrap();
        let open = |path: &str| open_without_links(&root, path, OFlags::RDONLY);
        let mut text = String::new();
        File::from(open("etc/name").unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
        assert_eq!(open("link/name").unwrap_err(), Errno::LOOP);
        assert_eq!(open("../name").unwrap_err(), Errno::XDEV);
        assert_eq!(open("/etc").unwrap_err(), Errno::XDEV);
    }
}
