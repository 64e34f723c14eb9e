//! Consoles: what the guest writes goes to everybody who is attached and, for the first one, to a bounded log.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result};
use kernel::pty::{Master, Size};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::request::{Request, ask};
use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::site::Site;

/// Most bytes of a log file; the one before it is kept as well.
const LOG_BYTES: u64 = 1 << 20;

/// Most bytes of a console that a new viewer is shown: a screen or two.
const BACKLOG_BYTES: usize = 4 << 10;

/// Most pieces of 4 KiB that are read from a console after its server has ended.
const DRAIN_PIECES_MAX: usize = 256;

/// The log of a server's console; lasts over restarts.
pub fn log_file(site: &Site, name: &Name) -> PathBuf {
    site.server(name).join("console.log")
}

struct Console {
    master: Master,
    /// Our own hold on the other side: without one the master says "hung up" for ever while nobody in the guest has it open.
    _slave: OwnedFd,
    viewers: Vec<UnixStream>,
    /// The last of what the guest wrote, for who comes later: a login prompt is written once.
    backlog: Vec<u8>,
}

pub(super) struct Consoles {
    consoles: Vec<Console>,
    log: Log,
}

impl Consoles {
    pub(super) fn new(masters: &[OwnedFd], log: PathBuf) -> Result<Self> {
        let mut consoles = Vec::with_capacity(masters.len());
        for master in masters {
            let master = Master::from(master.try_clone().context("hold a console")?);
            let slave = master.peer()?;
            let flags = rustix::fs::fcntl_getfl(&master).context("look at a console")?;
            rustix::fs::fcntl_setfl(&master, flags | rustix::fs::OFlags::NONBLOCK)
                .context("use a console without waiting")?;
            consoles.push(Console { master, _slave: slave, viewers: Vec::new(), backlog: Vec::new() });
        }
        Ok(Self { consoles, log: Log { path: log, file: None } })
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.consoles
            .iter()
            .flat_map(|console| std::iter::once(console.master.as_fd()).chain(console.viewers.iter().map(AsFd::as_fd)))
    }

    pub(super) fn attach(&mut self, number: usize, mut viewer: UnixStream) {
        if let Some(console) = self.consoles.get_mut(number) {
            // A new socket's buffer takes it all; one that is gone is found at the next word.
            let _ = viewer.write_all(&console.backlog);
            console.viewers.push(viewer);
        }
    }

    pub(super) fn resize(&mut self, number: usize, size: Size) {
        if let Some(console) = self.consoles.get(number) {
            let _ = console.master.set_size(size);
        }
    }

    /// Carries bytes both ways for those that are ready.
    pub(super) fn serve(&mut self, ready: &[RawFd]) {
        for (number, console) in self.consoles.iter_mut().enumerate() {
            if ready.contains(&console.master.as_fd().as_raw_fd()) {
                console.show(if number == 0 { Some(&mut self.log) } else { None });
            }
            console.hear(ready);
        }
    }

    /// What the guest wrote before it ended.
    pub(super) fn drain(&mut self) {
        for (number, console) in self.consoles.iter_mut().enumerate() {
            // Bounded: something outside the server's life could go on writing.
            for _ in 0..DRAIN_PIECES_MAX {
                if !console.show(if number == 0 { Some(&mut self.log) } else { None }) {
                    break;
                }
            }
        }
    }
}

impl Console {
    /// Passes on one piece of what the guest wrote; false when there is none.
    fn show(&mut self, log: Option<&mut Log>) -> bool {
        let mut bytes = [0u8; 4096];
        // Asked first: a guest can reach the same description, and make reading wait.
        let mut polled = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        if !matches!(nix::poll::poll(&mut polled, PollTimeout::ZERO), Ok(1)) {
            return false;
        }
        let Ok(length @ 1..) = rustix::io::read(&self.master, &mut bytes) else { return false };
        let bytes = &bytes[..length];
        if let Some(log) = log {
            log.append(bytes);
        }
        self.remember(bytes);
        // A viewer that does not read misses something; the guest never waits for one.
        self.viewers.retain_mut(|viewer| match viewer.write(bytes) {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        });
        true
    }

    fn remember(&mut self, bytes: &[u8]) {
        self.backlog.extend_from_slice(bytes);
        let excess = self.backlog.len().saturating_sub(BACKLOG_BYTES);
        self.backlog.drain(..excess);
    }

    /// Passes on what the viewers typed.
    fn hear(&mut self, ready: &[RawFd]) {
        let master = &self.master;
        self.viewers.retain_mut(|viewer| {
            if !ready.contains(&viewer.as_raw_fd()) {
                return true;
            }
            let mut bytes = [0u8; 1024];
            match viewer.read(&mut bytes) {
                Ok(0) => false,
                // A guest that reads nothing loses what is typed, as a serial line does.
                Ok(length) => {
                    let _ = rustix::io::write(master, &bytes[..length]);
                    true
                }
                Err(error) => error.kind() == io::ErrorKind::WouldBlock,
            }
        });
    }
}

/// `console.log` and `console.log.1`.
struct Log {
    path: PathBuf,
    file: Option<(File, u64)>,
}

impl Log {
    /// A full disk loses the log and nothing else.
    fn append(&mut self, bytes: &[u8]) {
        if self.open().is_err() {
            return;
        }
        if let Some((file, length)) = &mut self.file {
            if file.write_all(bytes).is_ok() {
                *length += bytes.len() as u64;
            }
            if *length > LOG_BYTES {
                self.file = None;
                let _ = fs::rename(&self.path, self.path.with_extension("log.1"));
            }
        }
    }

    fn open(&mut self) -> io::Result<()> {
        if self.file.is_none() {
            let file = File::options().create(true).append(true).open(&self.path)?;
            let length = file.metadata()?.len();
            self.file = Some((file, length));
        }
        Ok(())
    }
}

/// A command's end of a console.
pub type Attached = UnixStream;

/// Attaches to console `number` (0 is `/dev/console`, N is `ttyN`).
///
/// # Errors
/// When the server has no monitor, or its monitor no consoles.
pub fn attach(site: &Site, name: &Name, number: usize) -> Result<Attached> {
    ask(site, name, Request::Console(number))?.ok_or_else(|| {
        Failure::new(Exit::NotRunning, format!("'{name}' has no console now"))
            .hint("`vsctl console --wait` waits until it runs")
            .into()
    })
}

/// Tells the console's new window size.
///
/// # Errors
/// When the monitor cannot be talked to.
pub fn resize(site: &Site, name: &Name, number: usize, size: Size) -> Result<()> {
    ask(site, name, Request::Resize { console: number, size }).map(drop)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_log_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut log = Log { path: path.clone(), file: None };
        let piece = vec![b'x'; 64 << 10];
        for _ in 0..100 {
            log.append(&piece);
        }
        let length = |path: &Path| fs::metadata(path).map_or(0, |found| found.len());
        let total = length(&path) + length(&path.with_extension("log.1"));
        assert!((LOG_BYTES..=2 * LOG_BYTES + piece.len() as u64).contains(&total), "{total}");
    }
}
