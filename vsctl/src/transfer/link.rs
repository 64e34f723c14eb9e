//! One side's hold on the other: packets, and the bytes of files through a pipe. The host's patience has an end.
//!
//! A file's descriptor never crosses: reading one of a guest's FUSE mount, or only closing it, can take for ever, and
//! then it is the process inside that hangs, which the host can do without.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kernel::channel::Channel;
use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::packet::Packet;
use super::{told, vanished};
use crate::failure::{Exit, Failure};

/// How long the host waits for a guest that neither takes nor gives anything.
pub(super) const STANDSTILL: Duration = Duration::from_secs(30);

/// Bytes of a file at a time: what a pipe holds.
const PIECE_BYTES: usize = 64 << 10;

/// One end.
#[derive(Debug)]
pub(super) struct Link {
    channel: Channel,
    patience: Option<Duration>,
}

impl Link {
    /// The host's.
    pub fn of_host(channel: Channel) -> Self {
        Self { channel, patience: Some(STANDSTILL) }
    }

    /// The one inside: it ends with the host's.
    pub fn of_guest(channel: Channel) -> Self {
        Self { channel, patience: None }
    }

    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Sends a packet. When the other side has gone, its reason is the error.
    pub fn send(&self, packet: &Packet) -> Result<()> {
        self.send_with(packet, &[])
    }

    fn send_with(&self, packet: &Packet, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        self.ready(self.channel.as_fd(), PollFlags::OUT)?;
        match self.channel.send(&packet.to_bytes(), descriptors) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET)) => self.last_words(),
            other => Ok(other?),
        }
    }

    /// Waits for the next packet. The other side's failure is the error, and its notes are passed on.
    pub fn receive(&self) -> Result<Packet> {
        self.receive_with().map(|(packet, _)| packet)
    }

    /// The same, with the pipe that comes with a file.
    pub fn receive_with(&self) -> Result<(Packet, Option<File>)> {
        loop {
            self.ready(self.channel.as_fd(), PollFlags::IN)?;
            let (mut bytes, mut descriptors) = self.channel.receive()?;
            if bytes.is_empty() {
                // One that went with packets of ours unread is seen to be gone before its last words are.
                (bytes, descriptors) = self.channel.receive()?;
            }
            if bytes.is_empty() {
                return Err(vanished());
            }
            match Packet::from_bytes(&bytes).context("the other side is not understood")? {
                Packet::Failed { code, why } => return Err(told(code, &why)),
                Packet::Note(text) => log::warn!("{text}"),
                packet => return Ok((packet, descriptors.pop().map(File::from))),
            }
        }
    }

    /// Sends a file: its packet, its bytes, and the word that they are all.
    pub fn send_file(&self, packet: &Packet, source: &mut File) -> Result<()> {
        let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC).context("make a pipe")?;
        // Each end has its own: theirs stays as it is.
        rustix::fs::fcntl_setfl(&ours, rustix::fs::OFlags::NONBLOCK).context("use a pipe without waiting")?;
        self.send_with(packet, &[theirs.as_fd()])?;
        drop(theirs);
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let length = match source.read(&mut piece) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).context("read it"),
            };
            self.put(&ours, &piece[..length])?;
        }
        drop(ours);
        self.send(&Packet::Whole)
    }

    fn put(&self, pipe: impl AsFd, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            self.ready(pipe.as_fd(), PollFlags::OUT)?;
            match rustix::io::write(&pipe, bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::PIPE) => return self.last_words(),
                Err(errno) => return Err(errno).context("pass it on"),
            }
        }
        Ok(())
    }

    /// Takes a file's bytes from its pipe, to the word that they are all.
    pub fn receive_file(&self, pipe: &mut File, target: &mut dyn Write) -> Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            self.ready(pipe.as_fd(), PollFlags::IN)?;
            match pipe.read(&mut piece) {
                Ok(0) => break,
                Ok(length) => target.write_all(&piece[..length])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("take it"),
            }
        }
        target.flush()?;
        match self.receive()? {
            Packet::Whole => Ok(()),
            other => bail!("unexpected {other:?}"),
        }
    }

    /// The other side has gone: it said why before.
    fn last_words(&self) -> Result<()> {
        let packet = self.receive()?;
        bail!("unexpected {packet:?}")
    }

    /// Waits until a descriptor can be used, or has been closed at its other end.
    fn ready(&self, fd: BorrowedFd<'_>, wanted: PollFlags) -> Result<()> {
        let end = self.patience.map(|patience| Instant::now() + patience);
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
            match rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, wanted)], left.as_ref()) {
                Ok(0) => return Err(stands_still()),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).context("wait for the other side"),
            }
        }
    }
}

fn stands_still() -> anyhow::Error {
    let message = format!("nothing moved for {} s: a file system inside does not answer", STANDSTILL.as_secs());
    Failure::new(Exit::Failed, message).hint("a FUSE mount whose program hangs is the usual reason").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(patience: Duration) -> (Link, Link) {
        let (one, other) = kernel::channel::pair().unwrap();
        (Link { channel: one, patience: Some(patience) }, Link::of_guest(other))
    }

    fn content(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        io::Seek::rewind(&mut file).unwrap();
        file
    }

    fn packet() -> Packet {
        Packet::File { path: "x".into(), mode: None }
    }

    #[test]
    fn a_file_arrives_whole() {
        let (host, guest) = pair(STANDSTILL);
        // More than a pipe holds.
        let bytes: Vec<u8> = (0..300_000_u32).map(|number| number as u8).collect();
        let mut source = content(&bytes);
        let sender = std::thread::spawn(move || guest.send_file(&packet(), &mut source));
        let (found, pipe) = host.receive_with().unwrap();
        let mut taken = Vec::new();
        host.receive_file(&mut pipe.unwrap(), &mut taken).unwrap();
        assert_eq!((found, taken), (packet(), bytes));
        sender.join().unwrap().unwrap();
    }

    #[test]
    fn half_a_file_is_not_taken_for_a_whole_one() {
        let (host, guest) = pair(STANDSTILL);
        let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        rustix::io::write(&ours, b"half").unwrap();
        drop(ours);
        guest.send(&Packet::Failed { code: 3, why: "read it: Input/output error".into() }).unwrap();
        let error = host.receive_file(&mut File::from(theirs), &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "read it: Input/output error");
    }

    #[test]
    fn the_hosts_patience_ends_both_ways() {
        let (host, _guest) = pair(Duration::from_millis(100));
        assert!(host.receive().unwrap_err().to_string().contains("nothing moved"));
        // Nobody takes it: the pipe is full before the end.
        let error = host.send_file(&packet(), &mut content(&vec![0; 1 << 20])).unwrap_err();
        assert!(error.to_string().contains("nothing moved"), "{error:#}");
    }
}
