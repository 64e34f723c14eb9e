//! Memory that comes when its programs run already (post-copy): what CRIU's two programs say to each other, through the connection of the
//! two hosts. What that is, is theirs alone.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};

use super::alive::{Connection, LOOK};
use super::wire::{Frame, Lost, Message, PIECE, unexpected};
use crate::criu::Pages;
use crate::interrupt;

/// One side's end.
#[derive(Debug)]
pub struct Relay {
    pages: Pages,
    /// It says something still.
    speaks: bool,
    /// It has done its work.
    is_done: bool,
    /// What it has said so far, in bytes.
    bytes: u64,
    /// The other side has said that all of it is there.
    has_arrived: bool,
}

/// What happens beside the pages.
#[derive(Debug)]
pub enum Event {
    /// The other side says something.
    Message(Message),
    /// Pages have gone, so many bytes by now.
    Moved(u64),
    /// What was waited for can be read.
    Ready,
    /// CRIU's program has done its work.
    Done,
}

impl Relay {
    /// Of what CRIU's program on this side says.
    pub fn of(pages: Pages) -> Self {
        Self { pages, speaks: true, is_done: false, bytes: 0, has_arrived: false }
    }

    /// See [`Pages::leave`].
    pub fn leave(&mut self) {
        self.pages.leave();
    }

    /// Carries pages until the other side says something else than that all of them are there.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn message(&mut self, channel: &mut Connection) -> Result<Message> {
        loop {
            match self.next(channel, None)? {
                Event::Message(Message::PagesArrived) => self.has_arrived = true,
                Event::Message(message) => return Ok(message),
                Event::Moved(_) | Event::Ready | Event::Done => {}
            }
        }
    }

    /// Carries pages until all of them are there. `moved` hears how many bytes have gone.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn rest(&mut self, channel: &mut Connection, moved: &mut dyn FnMut(u64)) -> Result<()> {
        let (mut last, mut at) = (0, Instant::now());
        while !self.has_arrived {
            match self.next(channel, None)? {
                Event::Message(Message::PagesArrived) => self.has_arrived = true,
                Event::Message(other) => return Err(unexpected(&other)),
                Event::Moved(bytes) if bytes != last => {
                    (last, at) = (bytes, Instant::now());
                    moved(bytes);
                }
                Event::Moved(_) if at.elapsed() > channel.silence() => {
                    bail!("no memory has been asked for in {} s", channel.silence().as_secs_f64())
                }
                Event::Moved(_) | Event::Ready | Event::Done => {}
            }
        }
        Ok(())
    }

    /// Carries pages until something else happens, or `other` can be read.
    ///
    /// # Errors
    /// When the connection is lost, the other side has failed, or CRIU's program has not done its work.
    pub fn next(&mut self, channel: &mut Connection, other: Option<BorrowedFd<'_>>) -> Result<Event> {
        loop {
            let [heard, said, ended, other_ready] = self.wait(channel, other)?;
            if other_ready {
                return Ok(Event::Ready);
            }
            // First: its end is behind its last word.
            if said {
                return self.pass_on(channel).map(Event::Moved);
            }
            if ended {
                self.is_done = true;
                return self.pages.finish().map(|()| Event::Done);
            }
            if heard {
                match channel.anything_in()? {
                    // Somebody works there; who waits for pages looks whether any have come.
                    None => return Ok(Event::Moved(self.bytes)),
                    Some(Frame::Data(piece)) => {
                        self.pages.socket().write_all(&piece).context("hand memory to criu")?;
                    }
                    Some(Frame::Message(Message::Failed(problem))) => return Err(problem.into_failure().into()),
                    Some(Frame::Message(message)) => return Ok(Event::Message(message)),
                }
            }
        }
    }

    /// Waits, as long as the other side may be silent and nobody interrupts it, and says what can be read: the connection, CRIU's word, its end, the other thing.
    fn wait(&self, channel: &mut Connection, other: Option<BorrowedFd<'_>>) -> Result<[bool; 4]> {
        let limit = channel.silence();
        let mut polled = vec![PollFd::from_borrowed_fd(channel.incoming(), PollFlags::IN)];
        let mut which = vec![0];
        let mut add = |index, fd| {
            polled.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
            which.push(index);
        };
        if self.speaks {
            add(1, self.pages.socket().as_fd());
        }
        if !self.is_done {
            add(2, self.pages.ending());
        }
        if let Some(other) = other {
            add(3, other);
        }
        let (began, look) = (Instant::now(), limit.min(LOOK));
        let look = rustix::event::Timespec { tv_sec: look.as_secs() as i64, tv_nsec: i64::from(look.subsec_nanos()) };
        while poll(&mut polled, Some(&look)).context("wait for memory")? == 0 {
            interrupt::check()?;
            if began.elapsed() >= limit {
                return Err(channel.is_silent());
            }
        }
        let mut happened = [false; 4];
        for (polled, index) in polled.iter().zip(which) {
            happened[index] = !polled.revents().is_empty();
        }
        Ok(happened)
    }

    /// Sends what CRIU's program says, and tells how much that is by now.
    fn pass_on(&mut self, channel: &mut Connection) -> Result<u64> {
        let mut piece = vec![0; PIECE];
        let length = self.pages.socket().read(&mut piece).context("listen to criu")?;
        self.speaks = length > 0;
        self.bytes += length as u64;
        if length > 0 {
            channel.send_data(&piece[..length]).map_err(|error| last_word(channel, error))?;
        }
        Ok(self.bytes)
    }
}

/// Why the other side has ended, to which nothing can be said any more: it has said that before.
fn last_word(channel: &mut Connection, error: anyhow::Error) -> anyhow::Error {
    if !matches!(error.downcast_ref(), Some(Lost::Ended)) {
        return error;
    }
    loop {
        match channel.frame_in() {
            Ok(Frame::Message(Message::Failed(problem))) => return problem.into_failure().into(),
            Ok(_) => {}
            Err(_) => return error,
        }
    }
}
