//! Open files: with positions and flags, without names, and locked.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::fd::AsFd,
    path::Path,
};

use anyhow::{Context, Result, ensure};
use nix::{
    fcntl::{FcntlArg, Flock, FlockArg, OFlag, fcntl, open},
    libc,
    sys::stat::Mode,
};

use super::{Check, Kind, same};

pub const KINDS: &[Kind] = &[
    ("file", file),
    ("file-that-was-removed", removed),
    ("file-that-was-removed-and-has-another-name", removed_with_another_name),
    ("file-that-was-renamed", renamed),
    ("file-in-a-removed-directory", in_a_removed_directory),
    ("file-of-a-tmpfs-that-was-removed", removed_of_tmpfs),
    ("directory", directory),
    ("path", path_only),
    ("lock-flock", flock),
    ("lock-fcntl", fcntl_lock),
    ("lock-of-open-file-description", ofd_lock),
];

const TEXT: &[u8] = b"0123456789";

/// Made with [`TEXT`] in it, open for both, at 4.
fn made(path: &Path) -> Result<File> {
    let mut file = OpenOptions::new();
    let file = file.read(true).write(true).create(true).truncate(true).open(path);
    let mut file = file.with_context(|| format!("make {}", path.display()))?;
    file.write_all(TEXT)?;
    file.seek(SeekFrom::Start(4))?;
    Ok(file)
}

/// It is at 4, and has what it had.
fn whole(file: &mut File) -> Result<()> {
    same("the position", file.stream_position()?, 4)?;
    let mut rest = Vec::new();
    file.read_to_end(&mut rest)?;
    same("the rest", rest.as_slice(), &TEXT[4..])?;
    file.seek(SeekFrom::Start(4))?;
    Ok(())
}

fn flags(file: &File) -> Result<OFlag> {
    Ok(OFlag::from_bits_retain(fcntl(file.as_fd(), FcntlArg::F_GETFL).context("ask for flags")?))
}

fn file(place: &Path) -> Result<Check> {
    let mut plain = made(&place.join("plain"))?;
    let mut appended = OpenOptions::new().append(true).create(true).open(place.join("appended"))?;
    appended.write_all(b"one")?;
    let flagged = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_SYNC | OFlag::O_CLOEXEC | OFlag::O_NOATIME;
    let flagged = File::from(open(&place.join("plain"), flagged, Mode::empty()).context("open with flags")?);
    let before = (flags(&plain)?, flags(&appended)?, flags(&flagged)?);
    let mut length = 3;
    let appended_to = place.join("appended");
    Ok(Box::new(move || {
        whole(&mut plain)?;
        same("the flags", (flags(&plain)?, flags(&appended)?, flags(&flagged)?), before)?;
        appended.write_all(b"more")?;
        length += 4;
        same("the length after appending", fs::metadata(&appended_to)?.len(), length)
    }))
}

fn removed(place: &Path) -> Result<Check> {
    let path = place.join("file");
    let mut file = made(&path)?;
    fs::remove_file(&path)?;
    Ok(Box::new(move || {
        whole(&mut file)?;
        same("the number of names", std::os::unix::fs::MetadataExt::nlink(&file.metadata()?), 0)
    }))
}

fn removed_of_tmpfs(_: &Path) -> Result<Check> {
    let place = Path::new("/dev/shm");
    removed(place)
}

fn removed_with_another_name(place: &Path) -> Result<Check> {
    let (path, other) = (place.join("file"), place.join("other"));
    let mut file = made(&path)?;
    fs::hard_link(&path, &other)?;
    fs::remove_file(&path)?;
    let place = place.to_owned();
    Ok(Box::new(move || {
        whole(&mut file)?;
        let names: Vec<_> =
            fs::read_dir(&place)?.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>()?;
        same("what lies there", names, vec!["other".into()])?;
        // The same file still.
        same("the number of names", std::os::unix::fs::MetadataExt::nlink(&file.metadata()?), 1)
    }))
}

fn renamed(place: &Path) -> Result<Check> {
    let mut file = made(&place.join("before"))?;
    let after = place.join("after");
    fs::rename(place.join("before"), &after)?;
    Ok(Box::new(move || {
        whole(&mut file)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(TEXT)?;
        file.seek(SeekFrom::Start(4))?;
        same("what is at its name", fs::read(&after)?.as_slice(), TEXT)
    }))
}

fn in_a_removed_directory(place: &Path) -> Result<Check> {
    let inside = place.join("directory");
    fs::create_dir(&inside)?;
    let mut file = made(&inside.join("file"))?;
    fs::remove_dir_all(&inside)?;
    Ok(Box::new(move || whole(&mut file)))
}

fn directory(place: &Path) -> Result<Check> {
    let directory = File::open(place)?;
    made(&place.join("file"))?;
    Ok(Box::new(move || {
        let file = rustix::fs::openat(&directory, "file", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
        let mut text = Vec::new();
        File::from(file.context("open a file there")?).read_to_end(&mut text)?;
        same("the file", text.as_slice(), TEXT)
    }))
}

fn path_only(place: &Path) -> Result<Check> {
    let path = place.join("file");
    made(&path)?;
    let file = File::from(open(&path, OFlag::O_PATH, Mode::empty()).context("open a path")?);
    Ok(Box::new(move || {
        let (there, here) = (fs::metadata(&path)?, file.metadata()?);
        let number = std::os::unix::fs::MetadataExt::ino;
        same("the file", (number(&here), flags(&file)?.contains(OFlag::O_PATH)), (number(&there), true))
    }))
}

fn flock(place: &Path) -> Result<Check> {
    let (alone, together) = (place.join("alone"), place.join("together"));
    let locked = |path: &Path, how| {
        Flock::lock(made(path)?, how).map_err(|(_, errno)| anyhow::anyhow!("lock {}: {errno}", path.display()))
    };
    let held = (locked(&alone, FlockArg::LockExclusive)?, locked(&together, FlockArg::LockShared)?);
    Ok(Box::new(move || {
        let _ = &held;
        let can = |path: &Path, how| -> Result<bool> { Ok(Flock::lock(File::open(path)?, how).is_ok()) };
        same("a second lock of one that is alone", can(&alone, FlockArg::LockSharedNonblock)?, false)?;
        same("a second shared lock", can(&together, FlockArg::LockSharedNonblock)?, true)?;
        same("a lock over a shared one", can(&together, FlockArg::LockExclusiveNonblock)?, false)
    }))
}

fn range(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 2,
        l_len: 3,
        l_pid: 0,
    }
}

/// Who holds a lock there, as a new description of the file sees it: a pid, or -1 for another description.
fn holder(path: &Path, ask: impl Fn(&mut libc::flock) -> FcntlArg<'_>) -> Result<Option<(i32, i64, i64)>> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut found = libc::flock { l_start: 0, l_len: 0, ..range(libc::F_WRLCK) };
    fcntl(file.as_fd(), ask(&mut found)).context("ask for locks")?;
    // An `open` that is closed takes this process's locks with it, as fcntl(2) has it: kept for ever.
    std::mem::forget(file);
    Ok((i32::from(found.l_type) != libc::F_UNLCK).then_some((found.l_pid, found.l_start, found.l_len)))
}

fn fcntl_lock(place: &Path) -> Result<Check> {
    let path = place.join("file");
    let file = made(&path)?;
    fcntl(file.as_fd(), FcntlArg::F_SETLK(&range(libc::F_WRLCK))).context("lock a range")?;
    let pid = i32::try_from(std::process::id())?;
    Ok(Box::new(move || {
        let _ = &file;
        same("who holds the range", holder(&path, |lock| FcntlArg::F_OFD_GETLK(lock))?, Some((pid, 2, 3)))
    }))
}

fn ofd_lock(place: &Path) -> Result<Check> {
    let path = place.join("file");
    let file = made(&path)?;
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK))).context("lock a range")?;
    Ok(Box::new(move || {
        let _ = &file;
        let found = holder(&path, |lock| FcntlArg::F_GETLK(lock))?;
        ensure!(found == Some((-1, 2, 3)), "the range is held by {found:?}");
        Ok(())
    }))
}
