//! What two hosts say of the [blocks](super::blocks) of large files: the source's side.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::blocks::{Known, Question};
use super::files::Place;
use super::wire::{Bulk, Channel, Message, send_whole};
use crate::size::show_bytes;
use crate::template::progress::Progress;

impl Known {
    /// Asks the other side what it has of `paths` below `directory`.
    ///
    /// # Errors
    /// When the connection is gone, or the answer is damaged.
    pub fn ask<R: Read, W: Write>(channel: &mut Channel<R, W>, directory: &Path, paths: Vec<PathBuf>) -> Result<Self> {
        let question = Question::about(directory, paths)?;
        let longest = question.longest_answer();
        if longest == 0 {
            return Ok(Self::default());
        }
        channel.send(&Message::Blocks)?;
        send_whole(channel, &mut &question.to_bytes()[..], &mut |_| {})?;
        channel.expect(&Message::Sums)?;
        let (mut said, mut bulk) = (Vec::new(), Bulk::new(channel));
        (&mut bulk).take(longest + 1).read_to_end(&mut said).context("hear what there is of large files")?;
        ensure!(said.len() as u64 <= longest, "the other side tells more of large files than there can be");
        Self::from_answer(question, &said)
    }

    /// Sends what has changed in `paths`, which nobody changes any more.
    ///
    /// # Errors
    /// As [`Self::send`]; when somebody does.
    pub fn send_at_rest<R: Read, W: Write>(
        &mut self,
        channel: &mut Channel<R, W>,
        place: &Place,
        paths: &[PathBuf],
        progress: &mut dyn Progress,
    ) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        let (sent, read) = self.send(channel, place, paths.to_vec(), progress)?;
        log::info!("{} of blocks in {} files, read in {:.1} s", show_bytes(sent), paths.len(), read.as_secs_f64());
        match paths.iter().find(|path| !self.contains(path)) {
            None => Ok(()),
            Some(path) => bail!("{} changes although its server stands still", place.directory.join(path).display()),
        }
    }

    /// Sends what has changed in `paths`: how much that was, and how long it took to read it. Those that are not what they were are not known
    /// any more.
    ///
    /// # Errors
    /// When the files cannot be read, or the connection is gone.
    pub fn send<R: Read, W: Write>(
        &mut self,
        channel: &mut Channel<R, W>,
        place: &Place,
        paths: Vec<PathBuf>,
        progress: &mut dyn Progress,
    ) -> Result<(u64, Duration)> {
        progress.phase("sending changed blocks", None);
        channel.send(&Message::Patch)?;
        let mut patch = self.patch(&place.directory, paths)?;
        let sent = send_whole(channel, &mut patch, &mut |bytes| progress.advance(bytes))?;
        let read = patch.read;
        channel.expect(&Message::Arrived)?;
        Ok((sent, read))
    }
}
