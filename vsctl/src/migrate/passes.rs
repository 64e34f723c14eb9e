//! Passes over the files of a server that runs, each of what has changed since the one before, so that little is left for when it stands
//! still: the source's side.
//!
//! The first pass is all of the root. Those after it go by the times of files, and not by their names: what a name leads to may be exchanged
//! meanwhile, and tar goes from directory to directory. Files that can be had by [blocks](super::blocks) are left out of them. What was only
//! moved, with a directory that it is in, keeps its time: it is sent when the server stands still.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::Result;

use super::blocks::Known;
use super::changes::{Changes, Survey};
use super::files::{self, Place, Wanted};
use super::wire::Channel;
use crate::lifecycle::execute;
use crate::site::Site;
use crate::size::show_bytes;
use crate::spec::Spec;
use crate::template::progress::Progress;

/// Less than this is not worth another look while the server runs, in bytes.
const LITTLE: u64 = 1 << 20;

/// Nor is what is not so many times the listing of all files, which comes before it.
const WORTH_A_LISTING: u64 = 4;

/// What has changed in files while their server ran.
#[derive(Debug, Clone, Copy)]
pub struct Changed {
    /// How much, in bytes: of files that come whole, and in blocks of others.
    pub bytes: u64,
    /// How much of it was sent.
    pub sent_bytes: u64,
    /// How long it took to read the files of which blocks are sent.
    pub read: Duration,
}

/// What the target has of the files of a server that runs.
#[derive(Debug)]
pub struct Passes<'a> {
    site: &'a Site,
    spec: &'a Spec,
    place: &'a Place,
    /// Everything that was read after it is there.
    survey: Survey,
    known: Known,
    passes: usize,
}

impl<'a> Passes<'a> {
    /// Sends all of the root.
    ///
    /// # Errors
    /// When it cannot be read, or the connection is gone.
    pub fn begin<R: Read, W: Write>(
        (site, spec, place): (&'a Site, &'a Spec, &'a Place),
        channel: &mut Channel<R, W>,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        let survey = rested(place)?;
        // In this order: see `changes`.
        place.sync()?;
        files::send(channel, site, place, spec, Wanted::Root, progress)?;
        let mut passes = Self { site, spec, place, survey, known: Known::default(), passes: 0 };
        passes.moment()?;
        passes.ask(&place.survey_root()?, |_| true, channel)?;
        Ok(passes)
    }

    /// Asks what has come of large files that were there, those of them that `came`.
    fn ask<R: Read, W: Write>(
        &mut self,
        survey: &Survey,
        came: impl Fn(&Path) -> bool,
        channel: &mut Channel<R, W>,
    ) -> Result<()> {
        let paths = survey.likely(self.known.room(), |path| fits_a_line(path) && came(path));
        self.known.extend(Known::ask(channel, &self.place.directory, paths)?);
        Ok(())
    }

    /// For tests of crashes: see [`execute::fault`].
    fn moment(&mut self) -> Result<()> {
        self.passes += 1;
        execute::fault("pass", self.passes)
    }

    /// Sends what has changed since the last pass, again and again, until that does not become much less.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn while_less_is_left<R: Read, W: Write>(
        &mut self,
        channel: &mut Channel<R, W>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let mut last = u64::MAX;
        loop {
            let sent = self.pass(rested(self.place)?, channel, progress)?.sent_bytes;
            if sent < LITTLE || sent > last / 2 {
                return Ok(());
            }
            last = sent;
        }
    }

    /// The same once.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn again<R: Read, W: Write>(
        &mut self,
        channel: &mut Channel<R, W>,
        progress: &mut dyn Progress,
    ) -> Result<Changed> {
        self.pass(self.place.survey_root()?, channel, progress)
    }

    fn pass<R: Read, W: Write>(
        &mut self,
        now: Survey,
        channel: &mut Channel<R, W>,
        progress: &mut dyn Progress,
    ) -> Result<Changed> {
        let changes = self.since(&now)?;
        let is_worth_it = changes.lasting_bytes >= LITTLE.max(WORTH_A_LISTING * changes.listing.len() as u64);
        if is_worth_it || !changes.patched.is_empty() {
            // In this order: see `changes`.
            self.place.sync()?;
        }
        let mut changed = Changed { bytes: changes.size.bytes, sent_bytes: 0, read: Duration::ZERO };
        if !changes.patched.is_empty() {
            let (bytes, read) = self.known.send(channel, self.place, changes.patched.clone(), progress)?;
            (changed.bytes, changed.sent_bytes, changed.read) = (changed.bytes + bytes, bytes, read);
            self.survey.renew(&now, changes.patched.iter().filter(|path| self.known.contains(path)).cloned());
        }
        if is_worth_it {
            let patched = changes.patched.iter().map(PathBuf::as_path);
            log::info!("{} of files in pass {}, while it runs", show_bytes(changes.again_bytes), self.passes + 1);
            progress.phase("sending changed files", Some(changes.again_bytes));
            let came: BTreeSet<&Path> = changes.names().collect();
            self.known.retain(|path| now.contains(path) && !came.contains(path));
            self.send_newer(&changes.listing, channel, progress)?;
            changed.sent_bytes += changes.again_bytes;
            self.moment()?;
            let left_out: BTreeSet<PathBuf> = self.known.paths().chain(patched).map(Path::to_path_buf).collect();
            self.ask(&now, |path| came.contains(path), channel)?;
            self.survey.follow(now, &changes, |path| left_out.contains(path));
        }
        Ok(changed)
    }

    fn send_newer<R: Read, W: Write>(
        &self,
        listing: &[u8],
        channel: &mut Channel<R, W>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let lines = self.known.paths().flat_map(|path| [path.as_os_str().as_bytes(), b"\n"]);
        let but = lines.collect::<Vec<_>>().concat();
        let wanted = Wanted::Newer { listing, since_s: self.survey.again_since_s(), but: &but };
        files::send(channel, self.site, self.place, self.spec, wanted, progress)
    }

    /// Notes files that came by another way, and will not change any more.
    pub fn include_settled(&mut self, other: Survey) {
        self.survey.include_settled(other);
    }

    /// What is there `now`, and not at the target.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn since(&self, now: &Survey) -> Result<Changes> {
        Ok(now.since(&self.survey, self.known.fitting(&self.place.directory)?))
    }

    /// Sends what has changed in `paths`, which nobody changes any more.
    ///
    /// # Errors
    /// As [`Self::begin`]; when somebody does.
    pub fn send_at_rest<R: Read, W: Write>(
        &mut self,
        channel: &mut Channel<R, W>,
        paths: &[PathBuf],
        progress: &mut dyn Progress,
    ) -> Result<()> {
        self.known.send_at_rest(channel, self.place, paths, progress)
    }
}

/// The root as it is, when what was written last has rested for long enough, if it does rest: it would be sent twice.
fn rested(place: &Place) -> Result<Survey> {
    let mut survey = place.survey_root()?;
    for time in [Survey::time_to_rest, Survey::time_to_settle] {
        if let Some(time) = time(&survey) {
            thread::sleep(time);
            survey = place.survey_root()?;
        }
    }
    Ok(survey)
}

/// Whether a list of paths by lines can have this one: tar takes what is white at the end of a line for nothing.
fn fits_a_line(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    !bytes.contains(&b'\n') && !bytes.last().is_some_and(|last| last.is_ascii_whitespace() || *last == 0x0b)
}
