//! Writes what the sender sends. Below its own top it follows no link: what it did not make itself may be a trap.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::libc;

use super::End;
use super::destination;
use super::link::Link;
use super::packet::Packet;
use crate::failure::{Exit, Failure};

/// Whose the copies become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Root's, with all of their modes: into a server.
    Root,
    /// The caller's, without set-user-id bits, which a guest's root could have put there: out of a server.
    Caller,
    /// Nothing is written.
    Nobody,
}

/// Brings what is in a server now to its disk: a push that has been confirmed outlives a power cut. A tree by its whole file system,
/// since one commit costs less than one for each file.
fn confirm(at: &Path) -> io::Result<()> {
    let copied = File::open(at)?;
    if copied.metadata()?.is_dir() {
        return Ok(rustix::fs::syncfs(&copied)?);
    }
    let parent = at.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    for changed in [copied, File::open(parent)?] {
        match changed.sync_all() {
            // A file system without a disk (proc, sys).
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            done => done?,
        }
    }
    Ok(())
}

/// What is left of a mode without set-user-id, set-group-id and sticky bits.
const PLAIN_MODE: u32 = 0o777;

/// The mode of what comes from standard input.
const USUAL_MODE: u32 = 0o644;

/// Receives a source and writes it to `target`; returns a sentence for each copy that would be made when nothing is
/// written.
pub(super) fn receive(link: &Link, target: &End, owner: Owner) -> Result<Vec<String>> {
    let Packet::Source { is_directory, name } = link.receive()? else { bail!("no source came") };
    let at = match target {
        End::Path(path) => destination::resolve(path, is_directory, name.as_deref())?,
        End::Standard if is_directory => {
            let failure = Failure::new(Exit::BadParameter, "a directory cannot go to standard output");
            return Err(failure.hint("`vsctl exec NAME -- tar -c -C / DIR` sends one as an archive").into());
        }
        End::Standard => PathBuf::from("-"),
    };
    link.send(&Packet::At(at.clone()))?;
    let mut writer = Writer { at, owner, is_standard: *target == End::Standard, modes: Vec::new() };
    let mut sentences = Vec::new();
    loop {
        match (link.receive_with()?, owner) {
            ((Packet::End, _), _) => break,
            ((packet, _), Owner::Nobody) => {
                let packet = packet.without_privileges();
                sentences.extend(sentence(&packet, &writer.at, &|path| path.display().to_string()));
            }
            ((packet, pipe), _) => writer.write(&packet, pipe, &|pipe, file| link.receive_file(pipe, file))?,
        }
    }
    writer.finish()?;
    if owner == Owner::Root && !writer.is_standard {
        confirm(&writer.at).with_context(|| format!("bring {} to the disk", writer.at.display()))?;
    }
    link.send(&Packet::Done)?;
    Ok(sentences)
}

/// What would be done for `packet`.
pub(super) fn sentence(packet: &Packet, at: &Path, shown: &dyn Fn(&Path) -> String) -> Option<String> {
    let place = |path: &Path| shown(&below(at, path));
    Some(match packet {
        Packet::Directory { path, mode } => format!("make directory {} with mode {mode:04o}", place(path)),
        Packet::File { path, mode: Some(mode) } => format!("write file {} with mode {mode:04o}", place(path)),
        Packet::File { path, mode: None } => format!("write file {}", place(path)),
        Packet::Link { path, target } => format!("make link {} to {}", place(path), target.display()),
        Packet::Fifo { path, mode } => format!("make FIFO {} with mode {mode:04o}", place(path)),
        _ => return None,
    })
}

/// `join` would put a slash behind a file that is the source itself.
fn below(at: &Path, path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() { at.into() } else { at.join(path) }
}

impl Packet {
    /// As the caller would get it.
    fn without_privileges(self) -> Self {
        match self {
            Self::Directory { path, mode } => Self::Directory { path, mode: mode & PLAIN_MODE },
            Self::File { path, mode } => Self::File { path, mode: mode.map(|mode| mode & PLAIN_MODE) },
            other => other,
        }
    }
}

/// Brings a file's bytes from their pipe.
type Fill<'a> = &'a dyn Fn(&mut File, &mut dyn io::Write) -> Result<()>;

struct Writer {
    at: PathBuf,
    owner: Owner,
    is_standard: bool,
    /// Directories that are still ours alone, with the modes that they get in the end.
    modes: Vec<(PathBuf, u32)>,
}

impl Writer {
    fn write(&mut self, packet: &Packet, pipe: Option<File>, fill: Fill) -> Result<()> {
        match packet {
            Packet::Directory { path, mode } => {
                let place = below(&self.at, path);
                self.directory(&place, *mode).with_context(|| format!("make directory {}", place.display()))
            }
            Packet::File { path, mode } => {
                let place = below(&self.at, path);
                let mut pipe = pipe.context("the file did not arrive")?;
                if self.is_standard {
                    return fill(&mut pipe, &mut io::stdout().lock()).context("write to standard output");
                }
                let is_top = path.as_os_str().is_empty();
                let written = self.file(|file| fill(&mut pipe, file), &place, *mode, is_top);
                written.with_context(|| format!("write {}", place.display()))
            }
            Packet::Link { path, target } => {
                let place = below(&self.at, path);
                let made = clear(&place).and_then(|()| Ok(std::os::unix::fs::symlink(target, &place)?));
                made.with_context(|| format!("make link {}", place.display()))
            }
            Packet::Fifo { path, mode } => {
                let place = below(&self.at, path);
                let mode = nix::sys::stat::Mode::from_bits_truncate(self.allowed(*mode));
                let made = clear(&place).and_then(|()| Ok(nix::unistd::mkfifo(&place, mode)?));
                made.with_context(|| format!("make FIFO {}", place.display()))
            }
            other => bail!("unexpected {other:?}"),
        }
    }

    /// One that is there stays as it is, and what it holds besides stays too.
    fn directory(&mut self, place: &Path, mode: u32) -> Result<()> {
        // Writable for us while it is filled, whatever its mode will be.
        match DirBuilder::new().mode(0o700).create(place) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let found = if place == self.at { fs::metadata(place)? } else { fs::symlink_metadata(place)? };
                if found.is_dir() {
                    return Ok(());
                }
                let message = format!("{} is there and is no directory", place.display());
                return Err(Failure::new(Exit::BadParameter, message).into());
            }
            Err(error) => return Err(error.into()),
        }
        if self.owner == Owner::Root {
            // Its parent may give its own group to what is made in it.
            std::os::unix::fs::lchown(place, Some(0), Some(0))?;
        }
        self.modes.push((place.into(), self.allowed(mode)));
        Ok(())
    }

    fn file(
        &self,
        fill: impl FnOnce(&mut File) -> Result<()>,
        place: &Path,
        mode: Option<u32>,
        is_top: bool,
    ) -> Result<()> {
        let (mut file, is_new) = open(place, is_top)?;
        let filled = fill(&mut file);
        if is_new && filled.is_err() {
            // Half a file is worse than none; why it is half is what is reported.
            let _ = fs::remove_file(place);
        }
        filled?;
        if self.owner == Owner::Root {
            std::os::unix::fs::fchown(&file, Some(0), Some(0))?;
        }
        match mode {
            Some(mode) => file.set_permissions(Permissions::from_mode(self.allowed(mode)))?,
            None if is_new => file.set_permissions(Permissions::from_mode(USUAL_MODE))?,
            None => {}
        }
        Ok(())
    }

    fn allowed(&self, mode: u32) -> u32 {
        if self.owner == Owner::Root { mode } else { mode & PLAIN_MODE }
    }

    /// The directories' modes, the deepest first.
    fn finish(&self) -> Result<()> {
        for (place, mode) in self.modes.iter().rev() {
            let done = fs::set_permissions(place, Permissions::from_mode(*mode));
            done.with_context(|| format!("set the mode of {}", place.display()))?;
        }
        Ok(())
    }
}

/// A file to write, emptied, and whether it is new. Only the one that the user named may be a link.
fn open(place: &Path, is_top: bool) -> Result<(File, bool)> {
    let mut options = OpenOptions::new();
    // A FIFO has no reader, and is no file anyway.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | if is_top { 0 } else { libc::O_NOFOLLOW };
    options.write(true).mode(0o600).custom_flags(flags);
    match options.clone().create_new(true).open(place) {
        Ok(file) => return Ok((file, true)),
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        Err(_) => {}
    }
    if !is_top && fs::symlink_metadata(place)?.is_symlink() {
        fs::remove_file(place)?;
        return Ok((options.create_new(true).open(place)?, true));
    }
    // A link that dangles is made true by this.
    let file = options.create(is_top).mode(USUAL_MODE).open(place)?;
    if !file.metadata()?.is_file() {
        let message = format!("{} is there and is no file", place.display());
        return Err(Failure::new(Exit::BadParameter, message).into());
    }
    file.set_len(0)?;
    Ok((file, false))
}

/// Makes room for a link or a FIFO; a directory is not replaced.
fn clear(place: &Path) -> Result<()> {
    match fs::symlink_metadata(place) {
        Ok(found) if found.is_dir() => {
            let message = format!("{} is there and is a directory", place.display());
            Err(Failure::new(Exit::BadParameter, message).into())
        }
        Ok(_) => Ok(fs::remove_file(place)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn writer(at: &Path, owner: Owner) -> Writer {
        Writer { at: at.into(), owner, is_standard: false, modes: Vec::new() }
    }

    fn content(text: &str) -> Option<File> {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        io::Seek::rewind(&mut file).unwrap();
        Some(file)
    }

    fn put(writer: &mut Writer, packet: Packet, content: Option<File>) -> Result<()> {
        writer.write(&packet, content, &|source, file| Ok(io::copy(source, file).map(drop)?))
    }

    fn mode_of(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_tree_arrives_with_its_modes() {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().join("top");
        let mut writer = writer(&top, Owner::Caller);
        put(&mut writer, Packet::Directory { path: "".into(), mode: 0o555 }, None).unwrap();
        put(&mut writer, Packet::File { path: "file".into(), mode: Some(0o4711) }, content("text")).unwrap();
        put(&mut writer, Packet::Link { path: "link".into(), target: "/etc".into() }, None).unwrap();
        put(&mut writer, Packet::Fifo { path: "fifo".into(), mode: 0o600 }, None).unwrap();
        writer.finish().unwrap();
        assert_eq!(fs::read_to_string(top.join("file")).unwrap(), "text");
        // Not set-user-id for the caller.
        assert_eq!((mode_of(&top), mode_of(&top.join("file"))), (0o555, 0o711));
        assert_eq!(fs::read_link(top.join("link")).unwrap(), Path::new("/etc"));
    }

    #[test]
    fn a_link_that_was_there_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let (top, trap) = (root.path().join("top"), root.path().join("trap"));
        fs::create_dir(&top).unwrap();
        fs::create_dir(&trap).unwrap();
        fs::write(trap.join("file"), "old").unwrap();
        symlink(&trap, top.join("dir")).unwrap();
        symlink(trap.join("file"), top.join("file")).unwrap();
        let mut writer = writer(&top, Owner::Caller);
        put(&mut writer, Packet::Directory { path: "".into(), mode: 0o755 }, None).unwrap();
        assert!(put(&mut writer, Packet::Directory { path: "dir".into(), mode: 0o755 }, None).is_err());
        put(&mut writer, Packet::File { path: "file".into(), mode: Some(0o644) }, content("new")).unwrap();
        assert_eq!(fs::read_to_string(trap.join("file")).unwrap(), "old");
        assert_eq!(fs::read_to_string(top.join("file")).unwrap(), "new");
    }

    #[test]
    fn the_file_that_the_user_named_may_be_a_link() {
        let root = tempfile::tempdir().unwrap();
        let (real, link) = (root.path().join("real"), root.path().join("link"));
        fs::write(&real, "a longer old text").unwrap();
        symlink("real", &link).unwrap();
        let mut writer = writer(&link, Owner::Caller);
        put(&mut writer, Packet::File { path: "".into(), mode: None }, content("new")).unwrap();
        assert_eq!(fs::read_to_string(&real).unwrap(), "new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn kinds_do_not_replace_each_other() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("dir")).unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let mut writer = writer(root.path(), Owner::Caller);
        assert!(put(&mut writer, Packet::File { path: "dir".into(), mode: None }, content("")).is_err());
        assert!(put(&mut writer, Packet::Directory { path: "file".into(), mode: 0o755 }, None).is_err());
        assert!(put(&mut writer, Packet::Link { path: "dir".into(), target: "x".into() }, None).is_err());
    }

    #[test]
    fn a_plan_is_sentences() {
        let say = |packet: Packet| sentence(&packet, Path::new("/srv/x"), &|path| format!("web1:{}", path.display()));
        let file = Packet::File { path: "".into(), mode: Some(0o644) };
        assert_eq!(say(file).unwrap(), "write file web1:/srv/x with mode 0644");
        let link = Packet::Link { path: "a".into(), target: "b".into() };
        assert_eq!(say(link).unwrap(), "make link web1:/srv/x/a to b");
        assert_eq!(say(Packet::End), None);
    }
}
