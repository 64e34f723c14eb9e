//! Carries bytes between descriptors, one piece at a time in each direction, and notices signals.
//!
//! One thread and one poll(2): a side that does not take its bytes delays its own direction only.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::io::Errno;

/// Bytes carried at a time: what a pipe that says "ready" takes without waiting (`PIPE_BUF`), and a tty's buffer.
const PIECE_BYTES: usize = 4096;
/// Most bytes that are still carried after the end: more than pipes and ttys hold.
const DRAIN_BYTES: usize = 4 << 20;

/// What becomes of the receiving side when the bytes have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtEnd {
    /// It is closed.
    Close,
    /// It is a terminal: the end is typed (^D).
    Type,
    /// Nothing.
    Leave,
}

/// Looks at what passes, and may change it. `false`: nothing of it or after it is wanted any more.
pub type Filter = Box<dyn FnMut(&mut Vec<u8>) -> bool>;

/// One direction.
pub struct Route {
    from: Option<OwnedFd>,
    to: Option<OwnedFd>,
    at_end: AtEnd,
    filter: Option<Filter>,
    pending: Vec<u8>,
}

/// What a step of a route came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moved {
    Bytes(usize),
    Nothing,
    /// Its receiver is gone.
    Broken,
    /// The filter wants no more.
    Left,
}

impl Route {
    /// Carries from `from` to `to`.
    pub fn new(from: OwnedFd, to: OwnedFd, at_end: AtEnd) -> Self {
        Self { from: Some(from), to: Some(to), at_end, filter: None, pending: Vec::new() }
    }

    /// Has everything pass through `filter`.
    #[must_use]
    pub fn filtered(mut self, filter: Filter) -> Self {
        self.filter = Some(filter);
        self
    }

    /// What to wait for now.
    fn wanted(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match (&self.from, &self.to) {
            (_, Some(to)) if !self.pending.is_empty() => Some((to.as_fd(), PollFlags::POLLOUT)),
            (Some(from), _) => Some((from.as_fd(), PollFlags::POLLIN)),
            _ => None,
        }
    }

    /// One step, when what it waited for is ready.
    fn step(&mut self) -> Moved {
        if !self.pending.is_empty() {
            return self.write();
        }
        let Some(from) = &self.from else { return Moved::Nothing };
        let mut piece = vec![0u8; PIECE_BYTES];
        match rustix::io::read(from, &mut piece) {
            Ok(length @ 1..) => {
                piece.truncate(length);
                let goes_on = self.filter.as_mut().is_none_or(|filter| filter(&mut piece));
                self.pending = piece;
                if !goes_on {
                    self.write();
                    return Moved::Left;
                }
                if self.pending.is_empty() { Moved::Bytes(length) } else { self.write() }
            }
            Err(Errno::INTR | Errno::AGAIN) => Moved::Nothing,
            // EIO: the other side of a terminal is closed, which is its end.
            Ok(0) | Err(_) => {
                self.end();
                Moved::Nothing
            }
        }
    }

    fn write(&mut self) -> Moved {
        let Some(to) = &self.to else { return Moved::Broken };
        match rustix::io::write(to, &self.pending) {
            Ok(length) => {
                self.pending.drain(..length);
                Moved::Bytes(length)
            }
            Err(Errno::INTR | Errno::AGAIN) => Moved::Nothing,
            Err(_) => {
                self.pending.clear();
                self.from = None;
                self.to = None;
                Moved::Broken
            }
        }
    }

    /// The bytes have ended; nothing is pending.
    fn end(&mut self) {
        self.from = None;
        match self.at_end {
            AtEnd::Close => self.to = None,
            AtEnd::Type => self.pending = vec![0x04],
            AtEnd::Leave => {}
        }
        // Typed once.
        self.at_end = AtEnd::Leave;
    }
}

/// The signals that this process answers itself: blocked while this lives, and read like bytes.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks them; those of the window too when there is one.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn block(with_window: bool) -> Result<Self> {
        let mut set = SigSet::empty();
        [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM].into_iter().for_each(|one| set.add(one));
        if with_window {
            set.add(Signal::SIGWINCH);
        }
        set.thread_block().context("block signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&set, flags).context("read signals")?))
    }

    /// Waits for one, at most `timeout_ms`.
    pub fn within(&self, timeout_ms: u16) -> Option<i32> {
        let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let _ = nix::poll::poll(&mut polled, timeout_ms);
        self.next()
    }

    /// Waits until `watched` can be read, or a signal comes first.
    ///
    /// # Errors
    /// When the kernel does not wait.
    pub fn or(&self, watched: BorrowedFd<'_>) -> Result<Option<i32>> {
        loop {
            let mut polled = [PollFd::new(watched, PollFlags::POLLIN), PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match nix::poll::poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error).context("wait"),
            }
            if polled[0].any() == Some(true) {
                return Ok(None);
            }
            if let Some(signal) = self.next().filter(|signal| *signal != Signal::SIGWINCH as i32) {
                return Ok(Some(signal));
            }
        }
    }

    fn next(&self) -> Option<i32> {
        Some(self.0.read_signal().ok()??.ssi_signo as i32)
    }
}

/// Why a relay stopped for a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A signal came.
    Signal(i32),
    /// What was watched has ended.
    Ended,
    /// Route number N lost its receiver.
    Broken(usize),
    /// The filter of route number N wants no more.
    Left(usize),
    /// Route number N has nothing more to carry.
    Done(usize),
}

/// Routes and signals, served together.
pub struct Relay<'a> {
    routes: Vec<Route>,
    signals: &'a Signals,
}

impl<'a> Relay<'a> {
    /// Serves `routes`.
    pub fn new(routes: Vec<Route>, signals: &'a Signals) -> Self {
        Self { routes, signals }
    }

    /// Carries until something happens; `watched` is readable at the end (a pidfd).
    ///
    /// # Errors
    /// When the kernel does not wait.
    pub fn wait(&mut self, watched: Option<BorrowedFd<'_>>) -> Result<Event> {
        loop {
            let ready = self.poll(watched, PollTimeout::NONE)?;
            if let Some(signal) = ready.signal.then(|| self.signals.next()).flatten() {
                return Ok(Event::Signal(signal));
            }
            for index in ready.routes {
                let route = &mut self.routes[index];
                match route.step() {
                    Moved::Broken => return Ok(Event::Broken(index)),
                    Moved::Left => return Ok(Event::Left(index)),
                    _ if route.wanted().is_none() => return Ok(Event::Done(index)),
                    _ => {}
                }
            }
            if ready.watched {
                return Ok(Event::Ended);
            }
        }
    }

    /// Carries what is already there on all routes from number `first` on.
    ///
    /// # Errors
    /// When the kernel does not wait.
    pub fn drain(&mut self, first: usize) -> Result<()> {
        self.routes.drain(..first.min(self.routes.len()));
        let mut left = DRAIN_BYTES;
        loop {
            // Bytes that were read must be written; for others nobody waits.
            let pending = self.routes.iter().any(|route| !route.pending.is_empty());
            let ready = self.poll(None, if pending { PollTimeout::NONE } else { PollTimeout::ZERO })?;
            if ready.signal && self.signals.next().is_some() || ready.routes.is_empty() && !pending {
                return Ok(());
            }
            for index in ready.routes {
                if let Moved::Bytes(length) = self.routes[index].step() {
                    left = left.saturating_sub(length);
                }
            }
            if left == 0 {
                return Ok(());
            }
        }
    }

    fn poll(&self, watched: Option<BorrowedFd<'_>>, timeout: PollTimeout) -> Result<Ready> {
        let mut polled = vec![PollFd::new(self.signals.0.as_fd(), PollFlags::POLLIN)];
        let mut indices = Vec::with_capacity(self.routes.len());
        for (index, route) in self.routes.iter().enumerate() {
            if let Some((descriptor, flags)) = route.wanted() {
                polled.push(PollFd::new(descriptor, flags));
                indices.push(index);
            }
        }
        polled.extend(watched.map(|watched| PollFd::new(watched, PollFlags::POLLIN)));
        match nix::poll::poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for input and output"),
        }
        let is_ready = |polled: &PollFd| polled.revents().is_some_and(|events| !events.is_empty());
        Ok(Ready {
            signal: is_ready(&polled[0]),
            routes: indices.iter().zip(&polled[1..]).filter(|(_, polled)| is_ready(polled)).map(|(i, _)| *i).collect(),
            watched: watched.is_some() && polled.last().is_some_and(is_ready),
        })
    }
}

struct Ready {
    signal: bool,
    routes: Vec<usize>,
    watched: bool,
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    #[test]
    fn bytes_are_carried_and_the_end_is_passed_on() {
        let signals = Signals::block(false).unwrap();
        let ((mut source, from), (to, mut sink)) = (pair(), pair());
        let route = Route::new(from.into(), to.into(), AtEnd::Close);
        let mut relay = Relay::new(vec![route], &signals);
        source.write_all(&[7u8; 10_000]).unwrap();
        drop(source);
        assert_eq!(relay.wait(None).unwrap(), Event::Done(0));
        let mut all = Vec::new();
        sink.read_to_end(&mut all).unwrap();
        assert_eq!(all, [7u8; 10_000]);
    }

    #[test]
    fn the_end_is_typed_to_a_terminal() {
        let signals = Signals::block(false).unwrap();
        let ((source, from), (to, mut sink)) = (pair(), pair());
        let mut relay = Relay::new(vec![Route::new(from.into(), to.into(), AtEnd::Type)], &signals);
        drop(source);
        assert_eq!(relay.wait(None).unwrap(), Event::Done(0));
        drop(relay);
        let mut all = Vec::new();
        sink.read_to_end(&mut all).unwrap();
        assert_eq!(all, [4]);
    }

    #[test]
    fn a_lost_receiver_is_told() {
        let signals = Signals::block(false).unwrap();
        let ((mut source, from), (to, sink)) = (pair(), pair());
        let mut relay = Relay::new(vec![Route::new(from.into(), to.into(), AtEnd::Close)], &signals);
        drop(sink);
        source.write_all(b"x").unwrap();
        assert_eq!(relay.wait(None).unwrap(), Event::Broken(0));
    }

    #[test]
    fn what_is_there_at_the_end_still_arrives() {
        let signals = Signals::block(false).unwrap();
        let ((mut source, from), (to, mut sink)) = (pair(), pair());
        let route = Route::new(from.into(), to.into(), AtEnd::Leave);
        let mut relay = Relay::new(vec![route], &signals);
        source.write_all(b"late words").unwrap();
        relay.drain(0).unwrap();
        let mut all = [0u8; 10];
        sink.read_exact(&mut all).unwrap();
        assert_eq!(&all, b"late words");
    }

    #[test]
    fn a_filter_changes_and_ends() {
        let signals = Signals::block(false).unwrap();
        let ((mut source, from), (to, mut sink)) = (pair(), pair());
        let filter = |bytes: &mut Vec<u8>| {
            bytes.truncate(2);
            false
        };
        let route = Route::new(from.into(), to.into(), AtEnd::Leave).filtered(Box::new(filter));
        let mut relay = Relay::new(vec![route], &signals);
        source.write_all(b"abcd").unwrap();
        assert_eq!(relay.wait(None).unwrap(), Event::Left(0));
        drop(relay);
        let mut all = String::new();
        sink.read_to_string(&mut all).unwrap();
        assert_eq!(all, "ab");
    }
}
