//! Whether the other side is still there. A host that has lost its current says no goodbye, nor does a program that somebody stops.
//!
//! Who works long says meanwhile that it does, from a thread beside the work. So silence means something: a side from which nothing comes
//! for as long as was agreed is lost, whether one waits for its word, or for it to listen.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::wire::{ALIVE, Channel, Hello, Lost, write_frame};
use crate::interrupt;

/// The connection of two hosts.
pub type Connection = Channel<Heard, Said>;

/// How often who works speaks, within the limit of silence: a busy machine may lose some of it.
const TIMES: u32 = 8;

/// What a pipe or socket that takes anything takes without making us wait (`PIPE_BUF`, pipe(7)).
const AT_ONCE: usize = 4096;

/// How long one who waits looks away: who waits to be listened to does not hear that the other side has spoken until then, and nobody hears
/// of a signal.
pub const LOOK: Duration = Duration::from_secs(1);

/// How long the other side may be silent, and why nothing is said or heard any more. Both halves of a connection have the same.
#[derive(Debug, Clone)]
pub struct Limit(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    silence_ms: AtomicU64,
    was_silent: AtomicBool,
    is_given_up: AtomicBool,
}

impl Limit {
    /// At most so long.
    pub fn new(silence: Duration) -> Self {
        Self(Arc::new(Shared {
            silence_ms: AtomicU64::new(silence.as_millis() as u64),
            was_silent: AtomicBool::new(false),
            is_given_up: AtomicBool::new(false),
        }))
    }

    fn get(&self) -> Duration {
        Duration::from_millis(self.0.silence_ms.load(Ordering::Relaxed))
    }

    fn in_seconds(&self) -> u64 {
        self.get().as_secs()
    }

    /// The shorter one counts for both sides. One that says none is of a version that has none.
    fn agree(&self, theirs_s: u64) {
        if theirs_s > 0 {
            self.0.silence_ms.fetch_min(theirs_s.saturating_mul(1000), Ordering::Relaxed);
        }
    }

    /// Whether the other side was silent for longer.
    pub fn is_over(&self) -> bool {
        self.0.was_silent.load(Ordering::Relaxed)
    }

    fn over(&self) -> io::Error {
        self.0.was_silent.store(true, Ordering::Relaxed);
        io::Error::new(io::ErrorKind::TimedOut, Lost::Silent(self.get()))
    }

    /// Whether a wait was given up because of a signal: something may be half said.
    pub fn is_given_up(&self) -> bool {
        self.0.is_given_up.load(Ordering::Relaxed)
    }

    /// Goes on with a wait, unless a signal has come, to this thread or to one that waited for the same.
    fn check(&self) -> io::Result<()> {
        if self.is_given_up() {
            return Err(io::Error::other("the connection was given up"));
        }
        interrupt::check().map_err(|interrupted| {
            self.0.is_given_up.store(true, Ordering::Relaxed);
            io::Error::other(interrupted)
        })
    }
}

/// What comes from the other side.
#[derive(Debug)]
pub struct Heard {
    from: File,
    limit: Limit,
}

/// What goes to it.
#[derive(Debug)]
pub struct Said {
    to: File,
    /// The other direction: only looked at.
    from: File,
    limit: Limit,
}

fn wait(file: &File, flags: PollFlags, limit: Duration) -> io::Result<bool> {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    Ok(poll(&mut [PollFd::new(file, flags)], Some(&limit))? > 0)
}

impl Read for Heard {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (began, limit) = (Instant::now(), self.limit.get());
        while !wait(&self.from, PollFlags::IN, LOOK.min(limit))? {
            self.limit.check()?;
            if began.elapsed() >= limit {
                return Err(self.limit.over());
            }
        }
        self.from.read(into)
    }
}

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let arrived = || rustix::io::ioctl_fionread(&self.from);
        let (mut before, mut heard) = (arrived()?, Instant::now());
        while !wait(&self.to, PollFlags::OUT, LOOK.min(self.limit.get() / TIMES))? {
            self.limit.check()?;
            let now = arrived()?;
            if now != before {
                (before, heard) = (now, Instant::now());
            }
            if heard.elapsed() >= self.limit.get() {
                return Err(self.limit.over());
            }
        }
        self.to.write(&bytes[..bytes.len().min(AT_ONCE)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Connection {
    /// Over two pipes or sockets.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn over(from: OwnedFd, to: OwnedFd, limit: &Limit) -> Result<Self> {
        let from = File::from(from);
        let looked_at = from.try_clone().context("copy the descriptor of the connection")?;
        let said = Said { to: to.into(), from: looked_at, limit: limit.clone() };
        Ok(Self::new(Heard { from, limit: limit.clone() }, said))
    }

    /// Can be read when something has come.
    pub fn incoming(&self) -> BorrowedFd<'_> {
        self.from.from.as_fd()
    }

    /// How long the other side may be silent.
    pub fn silence(&self) -> Duration {
        self.from.limit.get()
    }

    /// It was for longer.
    pub fn is_silent(&mut self) -> anyhow::Error {
        self.from.limit.over();
        Lost::Silent(self.silence()).into()
    }

    /// Says hello, listens to who is there, and agrees on how long a silence means that nobody is.
    ///
    /// # Errors
    /// When the two cannot talk.
    pub fn greet(&mut self) -> Result<Hello> {
        let limit = self.from.limit.clone();
        let hello = self.exchange(Hello::own(limit.in_seconds()))?;
        limit.agree(hello.silence_s);
        Ok(hello)
    }

    /// Says that somebody works here, until what is returned is dropped; so hold it while you do. It is a thread: there is none to be when
    /// the process forks.
    pub fn alive(&self) -> Alive {
        let (end, ended) = mpsc::channel::<()>();
        let (to, every) = (Arc::clone(&self.to), self.from.limit.get() / TIMES);
        let beat = move || {
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(every) {
                // That nobody listens is found by the work, with its next word.
                if write_frame(&mut *to.lock().unwrap_or_else(PoisonError::into_inner), ALIVE, &[]).is_err() {
                    return;
                }
            }
        };
        Alive { end: Some(end), thread: Some(std::thread::spawn(beat)) }
    }
}

/// Somebody works, and the other side is told.
#[derive(Debug)]
pub struct Alive {
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.end = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::wire::{Message, is_lost};

    const LIMIT: Duration = Duration::from_millis(400);

    /// Both ends of a connection.
    fn both() -> (Connection, Connection) {
        let pipe = || rustix::pipe::pipe().unwrap();
        let ((here_from, there_to), (there_from, here_to)) = (pipe(), pipe());
        let end = |from, to| Connection::over(from, to, &Limit::new(LIMIT)).unwrap();
        (end(here_from, here_to), end(there_from, there_to))
    }

    fn silent(error: &anyhow::Error) -> bool {
        is_lost(error) && error.to_string().contains("has said nothing for")
    }

    #[test]
    fn who_says_nothing_is_lost_and_who_works_long_is_not() {
        let (mut here, there) = both();
        assert!(silent(&here.receive().unwrap_err()) && here.from.limit.is_over());
        let (mut here, mut there) = (here, there);
        let working = there.alive();
        let told = std::thread::spawn(move || {
            std::thread::sleep(3 * LIMIT);
            there.send(&Message::Arrived).unwrap();
            there
        });
        assert_eq!(here.receive().unwrap(), Message::Arrived);
        drop((working, told.join().unwrap()));
        // Behind the end of the work nobody speaks for it; and the other side's end is an end.
        assert!(!silent(&here.receive().unwrap_err()));
    }

    #[test]
    fn who_does_not_listen_is_lost_unless_it_works() {
        let piece = vec![7; 300_000];
        let (mut here, there) = both();
        assert!(silent(&here.send_data(&piece).unwrap_err()));
        drop(there);
        let (mut here, mut there) = both();
        let working = there.alive();
        let listening = std::thread::spawn(move || {
            std::thread::sleep(3 * LIMIT);
            there.frame_in().unwrap()
        });
        here.send_data(&piece).unwrap();
        assert!(matches!(listening.join().unwrap(), crate::migrate::wire::Frame::Data(came) if came == piece));
        drop(working);
    }

    #[test]
    fn the_shorter_silence_counts_for_both() {
        let (mut here, mut there) = both();
        here.from.limit = Limit::new(Duration::from_secs(9));
        there.from.limit = Limit::new(Duration::from_secs(4));
        let answering = std::thread::spawn(move || there.greet().map(|_| there.from.limit.in_seconds()));
        here.greet().unwrap();
        assert_eq!((here.from.limit.in_seconds(), answering.join().unwrap().unwrap()), (4, 4));
        here.from.limit.agree(0);
        assert_eq!(here.from.limit.in_seconds(), 4);
    }
}
