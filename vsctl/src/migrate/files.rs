//! A server's files as a stream: GNU tar(1) packs and unpacks them.
//!
//! Owners on the disk are the guest's own, 0 to 65535, whatever ids it has on a host, so nothing is translated. What an overlay
//! holds of the template is not in its upper layer; what the guest has removed of it is there as whiteouts (device 0:0), which go
//! as they are. Sockets stay behind: nobody listens at them.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};

use super::changes::Survey;
use super::wire::{Channel, Message, send_whole, stream};
use kernel::file::FileSystem;

use crate::checkpoint;
use crate::failure::{Exit, Failure};
use crate::lifecycle::state;
use crate::name::Name;
use crate::site::Site;
use crate::spec::{Spec, VolumeKind};
use crate::template::progress::Progress;
use crate::template::{Content, Held, InTheWay, Members, complains_only, listen, pack_stream, unpack_stream};
use crate::volume;

/// What goes along beside the volume, where it is.
const BESIDE: [&str; 3] = ["console.log", "console.log.1", "hostname.pending"];

/// tar at work.
#[derive(Debug)]
pub struct Packing {
    tar: Child,
    said: Option<JoinHandle<String>>,
    may_change: bool,
}

/// tar's exit status when files have changed under it, and nothing worse.
const CHANGED: i32 = 1;

/// Whether tar says no more than that a file has changed under it: also, between two looks, into a link, a socket, a whiteout or anything else,
/// which it calls an error. What is there then comes when it is looked at again.
fn is_of_a_change(complaint: &str) -> bool {
    const ENDS: [&str; 6] = [
        ": file changed as we read it",
        ": File removed before we read it",
        ": Cannot open: Too many levels of symbolic links",
        ": Cannot open: No such device or address",
        ": Cannot open: Permission denied",
        ": Cannot readlink: Invalid argument",
    ];
    let is_cut = || complaint.rsplit_once(": File shrank by ").is_some_and(|(_, rest)| !rest.contains(": "));
    ENDS.iter().any(|end| complaint.ends_with(end)) || is_cut()
}

/// What an archive of the server's files holds.
fn content(spec: &Spec) -> Content {
    match spec.volume {
        VolumeKind::Overlay if spec.privileged => Content::TrustedLayer,
        _ => Content::Layer,
    }
}

/// Where a server's files are, below its directory.
#[derive(Debug)]
pub struct Place {
    /// The server's directory.
    pub directory: PathBuf,
    /// What of it goes along.
    members: Vec<PathBuf>,
    /// Its root, which is one of them.
    volume: PathBuf,
    /// The images of its processes, which are, too.
    images: PathBuf,
    /// What the volume is on, if there is one.
    disk: Option<FileSystem>,
}

impl Place {
    /// Where the files of the server `name` are, or will be.
    ///
    /// # Errors
    /// Never, as long as a volume is among its server's files.
    pub fn of(site: &Site, name: &Name, spec: &Spec) -> Result<Self> {
        let directory = site.server(name);
        let disk = FileSystem::of(&volume::directory(site, name)).ok();
        let mut place = Self { directory, members: Vec::new(), volume: PathBuf::new(), images: PathBuf::new(), disk };
        place.volume = place.below(&volume::writable(site, name, spec.volume))?;
        place.images = place.below(&state::suspended_directory(site, name))?;
        let thin = place.below(&checkpoint::thin_directory(site, name))?;
        let memory = place.below(&checkpoint::memory_directory(site, name))?;
        place.members = [place.volume.clone(), place.images.clone(), thin, memory]
            .into_iter()
            .chain(BESIDE.map(PathBuf::from))
            .collect();
        Ok(place)
    }

    /// All of it, whether it is there or not.
    pub fn members(&self) -> Vec<&Path> {
        self.members.iter().map(PathBuf::as_path).collect()
    }

    /// A path in the server's directory as it is named here.
    ///
    /// # Errors
    /// When it is not there.
    pub fn below(&self, path: &Path) -> Result<PathBuf> {
        path.strip_prefix(&self.directory)
            .map(Path::to_path_buf)
            .with_context(|| format!("{} is not among the server's files", path.display()))
    }

    /// Looks at it.
    ///
    /// # Errors
    /// When it cannot be read, or the volume is gone.
    pub fn survey(&self, name: &Name) -> Result<Survey> {
        let volume = self.directory.join(&self.volume);
        if !volume.is_dir() {
            let message = format!("the volume of '{name}' is gone: {} is missing", volume.display());
            return Err(Failure::new(Exit::NoServer, message).into());
        }
        Survey::take(&self.directory, &self.members())
    }

    /// The same, but for memory that images without it go ahead of.
    ///
    /// # Errors
    /// As [`Self::survey`].
    pub fn survey_thin(&self, name: &Name) -> Result<Survey> {
        let mut survey = self.survey(name)?;
        survey.leave_out(|path| path.parent() == Some(&self.images) && checkpoint::holds_pages(path));
        Ok(survey)
    }

    /// Looks at what is sent while the server runs ([`Wanted::Root`]).
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn survey_root(&self) -> Result<Survey> {
        Survey::take(&self.directory, &[&self.volume])
    }

    /// The root of the server.
    pub fn root(&self) -> &Path {
        &self.volume
    }

    /// Brings all of it to the disk.
    ///
    /// # Errors
    /// When the disk refuses, also what it was given since this was made; or the volume is missing.
    pub fn sync(&self) -> Result<()> {
        let disk = self.disk.as_ref().with_context(|| format!("there is no volume in {}", self.directory.display()))?;
        Ok(disk.sync()?)
    }
}

/// What is packed.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// The root of a server that runs: of files that change or go away meanwhile comes something.
    Root,
    /// Of that, what was changed at a time or later, and directories.
    Newer {
        /// All that there is, as [`super::changes`] writes it.
        listing: &'a [u8],
        /// In seconds since 1970.
        since_s: i64,
        /// What is left out, by lines.
        but: &'a [u8],
    },
    /// One member with all that is in it, which does not change.
    Member(&'a Path),
    /// Everything of one that does not run.
    All,
    /// Of that, some.
    Names {
        /// As above.
        listing: &'a [u8],
        /// Their paths, each with a NUL behind it.
        names: &'a [u8],
    },
}

/// Sends a server's files, with the listing of all of them where only some are sent. Returns when they have come.
///
/// # Errors
/// When they cannot be packed, or the connection is gone.
pub fn send<R: Read, W: Write>(
    channel: &mut Channel<R, W>,
    site: &Site,
    place: &Place,
    spec: &Spec,
    wanted: Wanted<'_>,
    progress: &mut dyn Progress,
) -> Result<()> {
    let (head, listing) = match wanted {
        Wanted::Newer { listing, .. } => (Message::Again, Some(listing)),
        Wanted::Names { listing, .. } => (Message::Changes, Some(listing)),
        Wanted::Root | Wanted::Member(_) | Wanted::All => (Message::Files, None),
    };
    channel.send(&head)?;
    if let Some(mut listing) = listing {
        send_whole(channel, &mut listing, &mut |_| {})?;
    }
    let mut packing = pack(site, place, spec, wanted)?;
    let sum = stream(channel, &mut packing.output()?, &mut |bytes| progress.advance(bytes))?;
    packing.finish()?;
    channel.send(&Message::End(sum))?;
    channel.expect(&Message::Arrived)
}

/// Begins to pack a server's files.
///
/// # Errors
/// When tar cannot be run.
fn pack(site: &Site, place: &Place, spec: &Spec, wanted: Wanted<'_>) -> Result<Packing> {
    let pack = |members| pack_stream(&place.directory, &sandbox(site), content(spec), members);
    let tar = match wanted {
        Wanted::Root => pack(Members::Whole(&[&place.volume])),
        Wanted::Newer { since_s, but, .. } => pack(Members::Newer(&place.volume, since_s, but)),
        Wanted::Member(member) => pack(Members::Whole(&[member])),
        Wanted::All => {
            let is_there = |file: &&Path| place.directory.join(file).exists();
            pack(Members::Whole(&place.members().into_iter().filter(is_there).collect::<Vec<_>>()))
        }
        Wanted::Names { names, .. } => pack(Members::Listed(names)),
    };
    Ok(Packing::of(tar?, matches!(wanted, Wanted::Root | Wanted::Newer { .. })))
}

/// Begins to pack a template.
///
/// # Errors
/// When tar cannot be run.
pub fn pack_template(site: &Site, held: &Held) -> Result<Packing> {
    Ok(Packing::of(held.pack(&sandbox(site))?, false))
}

/// What tar's place is mounted on, in a namespace of its own: any directory does that is there, and nothing has to be made. This one
/// has the lock that the caller holds.
fn sandbox(site: &Site) -> PathBuf {
    site.run()
}

impl Packing {
    fn of(mut tar: Child, may_change: bool) -> Self {
        let said = Some(listen(&mut tar));
        Self { tar, said, may_change }
    }

    /// Where the archive comes out.
    ///
    /// # Errors
    /// When it has been taken already.
    pub fn output(&mut self) -> Result<ChildStdout> {
        self.tar.stdout.take().context("tar has no output")
    }

    /// Waits for the end, and says whether all is packed.
    ///
    /// # Errors
    /// What tar said.
    pub fn finish(mut self) -> Result<()> {
        let status = self.tar.wait().context("wait for tar")?;
        let said = self.said.take().and_then(|said| said.join().ok()).unwrap_or_default();
        let is_change = || status.code() == Some(CHANGED) || complains_only(status, &said, is_of_a_change);
        if status.success() || self.may_change && is_change() {
            return Ok(());
        }
        let first: String =
            said.lines().next().unwrap_or("it gave no reason").chars().filter(|c| !c.is_control()).collect();
        bail!("tar cannot pack the files: {first}")
    }
}

impl Drop for Packing {
    fn drop(&mut self) {
        // Finished already, or nobody wants its archive any more.
        let _ = self.tar.kill();
        let _ = self.tar.wait();
        let _ = self.said.take().map(JoinHandle::join);
    }
}

/// Unpacks what [`send`] sends. A server that runs may have put something else in the place of a directory since room was made for what comes:
/// then that is `in_the_way`, and both have changed once more, so they come again.
///
/// # Errors
/// When it is damaged or cut, or the disk refuses. What is left then is the caller's to remove.
pub fn unpack(
    site: &Site,
    name: &Name,
    place: &Place,
    spec: &Spec,
    from: &mut (dyn Read + Send),
    in_the_way: InTheWay,
) -> Result<()> {
    let what = format!("the files of '{name}'");
    let said = unpack_stream(from, content(spec), &what, &place.directory, &sandbox(site), in_the_way)?;
    said.iter().for_each(|line| log::warn!("'{name}': {line}"));
    Ok(())
}
