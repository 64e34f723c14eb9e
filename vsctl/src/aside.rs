//! Work that a guest can make wait for ever, in a process of its own that the command can do without.
//!
//! A guest answers when it likes, or a byte now and then. Where it may mount a file system of its own (FUSE), whoever
//! looks up a name there, reads a file of it, or only closes one, waits for the guest in a way that not even SIGKILL
//! ends. So the process is killed when its time is over, and left behind when that does not end it: it then holds nothing
//! of the host's, and goes with the server.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use kernel::channel::{self, Channel, PACKET_BYTES_MAX};
use kernel::process::{self, CloneOptions, Fork, PidFd};
use nix::libc;

use crate::failure::{Exit, Failure, exit_of, hint_of};

/// What the work has found.
#[derive(Debug, Default)]
pub struct Found {
    /// Any bytes.
    pub bytes: Vec<u8>,
    /// Descriptors. What a guest has given is to be looked at before it is put here: closing it may take for ever.
    pub descriptors: Vec<OwnedFd>,
}

/// How packets begin: a piece of the bytes, the end of a success, the end of a failure.
const PIECE: u8 = b'+';
const DONE: u8 = b'.';
const FAILED: u8 = b'!';

/// How long a killed process may take to end before it is left behind.
const LAST_MOMENT_MS: u64 = 100;

/// Does `work` in a child and waits for it, `limit` at most, all in all. In the child no descriptor of the caller is open but `kept`:
/// those may only be of the guest's things, for the child may be left behind with them.
///
/// # Errors
/// What `work` says, or that it took too long.
pub fn fetch(limit: Duration, kept: &[BorrowedFd<'_>], work: impl FnOnce() -> Result<Found>) -> Result<Found> {
    Errand::begin(kept, work)?.end(limit)
}

/// Work under way in a child, which ends with this.
#[derive(Debug)]
pub struct Errand {
    channel: Channel,
    process: PidFd,
}

impl Errand {
    /// Begins `work` as [`fetch`] does. What it tells must not be more than a socket holds.
    ///
    /// # Errors
    /// When there can be no child.
    pub fn begin(kept: &[BorrowedFd<'_>], work: impl FnOnce() -> Result<Found>) -> Result<Self> {
        let (ours, theirs) = channel::pair()?;
        match process::fork(&CloneOptions::default())? {
            Fork::Child => {
                drop(ours);
                let outcome = alone(&theirs, kept).and_then(|()| work());
                let told = tell(&theirs, outcome);
                std::process::exit(i32::from(told.is_err()))
            }
            Fork::Parent { pidfd, .. } => Ok(Self { channel: ours, process: pidfd }),
        }
    }

    /// Waits for it, `limit` at most.
    ///
    /// # Errors
    /// What the work says, or that it took too long.
    pub fn end(self, limit: Duration) -> Result<Found> {
        hear(&self.channel, limit)
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        end(&self.process);
    }
}

/// Lets go of all that the caller has: whoever waits for the end of its output must not wait for this process, too.
fn alone(channel: &Channel, kept: &[BorrowedFd<'_>]) -> Result<()> {
    process::set_parent_death_signal(libc::SIGKILL)?;
    let open: Vec<_> = kept.iter().chain([&channel.as_fd()]).map(AsRawFd::as_raw_fd).collect();
    process::close_from(3, &open)?;
    let_go_of_standard()
}

/// Puts /dev/null in the place of standard input, output and error: in a process that may be left behind.
///
/// # Errors
/// When there is none.
pub fn let_go_of_standard() -> Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?;
    (0..=2).try_for_each(|standard| Ok(process::place_descriptor(&null, standard)?))
}

fn tell(channel: &Channel, outcome: Result<Found>) -> Result<()> {
    match outcome {
        Ok(found) => {
            for piece in found.bytes.chunks(PACKET_BYTES_MAX - 1) {
                channel.send(&[&[PIECE], piece].concat(), &[])?;
            }
            let descriptors: Vec<_> = found.descriptors.iter().map(AsFd::as_fd).collect();
            channel.send(&[DONE], &descriptors)?;
        }
        Err(error) => {
            let words = format!("{} {error:#}\0{}", exit_of(&error) as u8, hint_of(&error).unwrap_or_default());
            channel.send(&[&[FAILED], words.as_bytes()].concat(), &[])?;
        }
    }
    Ok(())
}

fn hear(channel: &Channel, limit: Duration) -> Result<Found> {
    let end = Instant::now() + limit;
    let mut found = Found::default();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let Some((packet, descriptors)) = channel.receive_within(left.as_millis() as u64)? else {
            let message = format!("no answer within {} s", limit.as_secs());
            return Err(Failure::new(Exit::Failed, message).into());
        };
        match packet.split_first() {
            Some((&PIECE, piece)) => found.bytes.extend_from_slice(piece),
            Some((&DONE, _)) => return Ok(Found { descriptors, ..found }),
            Some((_, words)) => return Err(failure(&String::from_utf8_lossy(words))),
            None => return Err(anyhow!("the process that asked was killed")),
        }
    }
}

/// `CODE why`, and after NUL a hint, as an error.
fn failure(words: &str) -> anyhow::Error {
    let (code, why) = words.split_once(' ').unwrap_or(("1", words));
    let (why, hint) = why.split_once('\0').unwrap_or((why, ""));
    let failure = Failure::new(Exit::from_code(code.parse().unwrap_or(1)), why);
    if hint.is_empty() { failure.into() } else { failure.hint(hint).into() }
}

/// Ends the process, and takes its status if it does end.
pub fn end(process: &PidFd) {
    // Refused only when it has ended, as it mostly has.
    let _ = process.signal(libc::SIGKILL);
    if process.wait_exit(Some(LAST_MOMENT_MS)).unwrap_or(false) {
        let _ = process.reap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_whole() {
        let (ours, theirs) = channel::pair().unwrap();
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        // More than one packet holds, and less than the socket's buffer.
        let bytes: Vec<u8> = (0..100_000_u32).map(|number| number as u8).collect();
        tell(&theirs, Ok(Found { bytes: bytes.clone(), descriptors: vec![null] })).unwrap();
        let found = hear(&ours, Duration::from_secs(5)).unwrap();
        assert_eq!((found.bytes, found.descriptors.len()), (bytes, 1));
        let refused = Failure::new(Exit::NotRunning, "'web1' is frozen").hint("thaw it");
        tell(&theirs, Err(anyhow::Error::from(refused).context("cannot ask"))).unwrap();
        let error = hear(&ours, Duration::from_secs(5)).unwrap_err();
        assert_eq!((exit_of(&error), hint_of(&error)), (Exit::NotRunning, Some("thaw it")));
        assert_eq!(error.to_string(), "cannot ask: 'web1' is frozen");
        drop(theirs);
        assert!(hear(&ours, Duration::from_secs(5)).unwrap_err().to_string().contains("killed"));
    }

    #[test]
    fn a_dribble_is_no_answer() {
        let (ours, theirs) = channel::pair().unwrap();
        // Each piece comes in time; all of them do not.
        let dribble = std::thread::spawn(move || {
            for _ in 0..60 {
                std::thread::sleep(Duration::from_millis(50));
                if theirs.send(&[PIECE, 0], &[]).is_err() {
                    return;
                }
            }
            let _ = theirs.send(&[DONE], &[]);
        });
        assert!(hear(&ours, Duration::from_millis(300)).unwrap_err().to_string().contains("no answer"));
        drop(ours);
        dribble.join().unwrap();
    }
}
