//! Walks the source and sends what it finds.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::libc;

use super::End;
use super::link::Link;
use super::packet::Packet;
use super::receive::sentence;
use crate::enter::terminal;
use crate::failure::{Exit, Failure};

/// File systems of the kernel's own making: proc, sysfs and cgroup2 (linux/magic.h).
const OF_THE_KERNEL: [u64; 3] = [0x9fa0, 0x6265_6572, 0x6367_7270];

/// Names a receiver's path for people.
pub(super) type Shown<'a> = &'a dyn Fn(&Path) -> String;

/// How much of a source is sent.
#[derive(Clone, Copy)]
pub(super) enum Extent<'a> {
    /// All of it.
    Whole,
    /// What it consists of, without the bytes of files.
    Names,
    /// Nothing: where it would go is asked, and said what would be copied.
    Plan(Shown<'a>),
}

/// Sends the source.
pub(super) fn send(link: &Link, source: &End, extent: Extent<'_>) -> Result<Vec<String>> {
    let (path, is_directory) = match source {
        End::Standard => (Path::new("standard input"), false),
        End::Path(path) => (path.as_path(), look_at(path)?.is_dir()),
    };
    let name = if *source == End::Standard { None } else { base_name(path) };
    link.send(&Packet::Source { is_directory, name })?;
    let Packet::At(at) = link.receive()? else { bail!("the other side did not say where") };
    let mut sentences = Vec::new();
    if let Extent::Plan(shown) = extent {
        let mut emit = |packet: Packet, _: Option<File>| {
            if let Packet::Note(text) = &packet {
                log::warn!("{text}");
            }
            sentences.extend(sentence(&packet, &at, shown));
            Ok(())
        };
        walk(source, &mut emit)?;
        return Ok(sentences);
    }
    walk(source, &mut |packet, file| match (file, extent) {
        (Some(mut file), Extent::Whole) => {
            let sent = link.send_file(&packet, &mut file);
            sent.with_context(|| format!("copy {}", shown_source(source, &packet)))
        }
        _ => link.send(&packet),
    })?;
    link.send(&Packet::End)?;
    let Packet::Done = link.receive()? else { bail!("the other side did not finish") };
    Ok(sentences)
}

/// What is being sent, for people.
fn shown_source(source: &End, packet: &Packet) -> String {
    match (source, packet) {
        (End::Standard, _) => "standard input".into(),
        (End::Path(top), Packet::File { path, .. }) if !path.as_os_str().is_empty() => {
            top.join(path).display().to_string()
        }
        (End::Path(top), _) => top.display().to_string(),
    }
}

/// A link that is named itself is followed.
fn look_at(path: &Path) -> Result<Metadata> {
    let found = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            Failure::new(Exit::BadParameter, format!("there is no {}", path.display())).into()
        }
        _ => anyhow::Error::from(error).context(format!("look at {}", path.display())),
    })?;
    if !found.is_dir() && !found.is_file() {
        let message = format!("{} is neither a file nor a directory", path.display());
        return Err(Failure::new(Exit::BadParameter, message).into());
    }
    Ok(found)
}

/// What the copy is called in a directory; nothing for `.`, `..` and `/`, whose content is meant.
fn base_name(path: &Path) -> Option<OsString> {
    let bytes = path.as_os_str().as_bytes();
    let is_itself = bytes == b"." || bytes.ends_with(b"/.") || bytes.ends_with(b"/./");
    if is_itself { None } else { path.file_name().map(Into::into) }
}

type Emit<'a> = &'a mut dyn FnMut(Packet, Option<File>) -> Result<()>;

fn walk(source: &End, emit: Emit) -> Result<()> {
    let path = match source {
        End::Standard => {
            let input = File::from(terminal::copy(rustix::stdio::stdin())?);
            return emit(Packet::File { path: PathBuf::new(), mode: None }, Some(input));
        }
        End::Path(path) => path,
    };
    let found = look_at(path)?;
    if found.is_dir() {
        return directory(path, Path::new(""), &found, emit);
    }
    let file = open(path, 0)?;
    emit(Packet::File { path: PathBuf::new(), mode: Some(mode(&found)) }, Some(file))
}

/// The directory at `from`, called `path` on the way.
fn directory(from: &Path, path: &Path, found: &Metadata, emit: Emit) -> Result<()> {
    emit(Packet::Directory { path: path.into(), mode: mode(found) }, None)?;
    let listed = fs::read_dir(from).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut names: Vec<OsString> =
        listed.with_context(|| format!("read {}", from.display()))?.iter().map(fs::DirEntry::file_name).collect();
    names.sort();
    for name in names {
        match entry(&from.join(&name), &path.join(&name), found.dev(), emit) {
            // Gone meanwhile: a running server's files come and go.
            Err(error) if is_missing(&error) => {
                note(format!("{} has gone and is left out", from.join(&name).display()), emit)?;
            }
            other => other?,
        }
    }
    Ok(())
}

fn entry(from: &Path, path: &Path, parent_device: u64, emit: Emit) -> Result<()> {
    let found = fs::symlink_metadata(from).with_context(|| format!("look at {}", from.display()))?;
    let (path, kind) = (path.to_owned(), found.file_type());
    if kind.is_dir() {
        if found.dev() != parent_device && is_of_the_kernel(from)? {
            return note(format!("{} is the kernel's and is left out", from.display()), emit);
        }
        return directory(from, &path, &found, emit);
    }
    if kind.is_file() {
        let file = open(from, libc::O_NOFOLLOW)?;
        return emit(Packet::File { path, mode: Some(mode(&found)) }, Some(file));
    }
    if kind.is_symlink() {
        let target = fs::read_link(from).with_context(|| format!("read link {}", from.display()))?;
        return emit(Packet::Link { path, target }, None);
    }
    if kind.is_fifo() {
        return emit(Packet::Fifo { path, mode: mode(&found) }, None);
    }
    note(format!("{} is a device or a socket and is left out", from.display()), emit)
}

/// Told by way of the host's side: the one inside holds none of its descriptors.
fn note(text: String, emit: Emit) -> Result<()> {
    emit(Packet::Note(text), None)
}

/// Opens a file; what has become something else is neither waited for nor obeyed.
fn open(path: &Path, flags: i32) -> Result<File> {
    let flags = flags | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    if !file.metadata().with_context(|| format!("look at {}", path.display()))?.is_file() {
        bail!("{} is no file any more", path.display());
    }
    Ok(file)
}

fn mode(found: &Metadata) -> u32 {
    found.permissions().mode() & 0o7777
}

fn is_of_the_kernel(path: &Path) -> Result<bool> {
    let found = rustix::fs::statfs(path).with_context(|| format!("look at {}", path.display()))?;
    Ok(OF_THE_KERNEL.contains(&(found.f_type as u64)))
}

fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_called_as_its_source() {
        for (path, expected) in [("a/b", Some("b")), ("a/b/", Some("b")), (".", None), ("a/.", None), ("a/..", None)] {
            assert_eq!(base_name(Path::new(path)), expected.map(Into::into), "{path}");
        }
        assert_eq!(base_name(Path::new("/")), None);
        assert_eq!(base_name(Path::new("a/.hidden")), Some(".hidden".into()));
    }

    #[test]
    fn a_walk_has_parents_before_children_and_follows_no_link() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir(at("b")).unwrap();
        fs::write(at("b/file"), "x").unwrap();
        std::os::unix::fs::symlink("/etc", at("a")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let mut seen = Vec::new();
        let mut emit = |packet: Packet, file: Option<File>| {
            seen.push((packet, file.is_some()));
            Ok(())
        };
        walk(&End::Path(root.path().into()), &mut emit).unwrap();
        let paths = seen.iter().map(|(packet, with_file)| match packet {
            Packet::Directory { path, .. } => format!("d {}", path.display()),
            Packet::File { path, .. } => format!("f {} {with_file}", path.display()),
            Packet::Link { path, target } => format!("l {} {}", path.display(), target.display()),
            Packet::Note(_) => "n".to_owned(),
            other => format!("{other:?}"),
        });
        assert_eq!(paths.collect::<Vec<_>>(), ["d ", "l a /etc", "d b", "f b/file true", "n"]);
    }
}
