//! The caller's side of a session: how its descriptors reach the program, and what happens until the program ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;

use anyhow::{Context, Result};
use kernel::pty::{Master, Size};
use nix::libc;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::account::Account;
use super::joiner::Child;
use super::relay::{AtEnd, Event, Relay, Route, Signals};
use super::target::Target;
use super::{Terminal, pty, terminal};

/// How standard input, output and error reach the program.
#[derive(Debug)]
pub enum Wiring {
    /// By a terminal of the server's own.
    Terminal {
        /// Our side.
        master: Master,
        /// The guest's side.
        peer: OwnedFd,
    },
    /// As they are; but for each that is a terminal of the host's, a pipe: no such terminal goes in.
    Plain {
        /// Our end and the guest's.
        pipes: [Option<(OwnedFd, OwnedFd)>; 3],
    },
}

impl Wiring {
    /// The wiring for this process's own descriptors.
    ///
    /// # Errors
    /// When the server has no terminal to give.
    pub fn new(target: &Target, account: &Account, wanted: Terminal) -> Result<Self> {
        let ours = terminal::which();
        let is_terminal = match wanted {
            Terminal::Always => true,
            Terminal::Never => false,
            Terminal::AsCaller => ours[0] && ours[1],
        };
        if is_terminal {
            let (master, peer) = pty::open(target, account)?;
            terminal::lend_modes(&peer);
            // Programs take a window without a size for a broken one.
            master.set_size(terminal::size().unwrap_or(Size { rows: 24, columns: 80 }))?;
            return Ok(Self::Terminal { master, peer });
        }
        let mut pipes = [None, None, None];
        for number in (0..3).filter(|number| ours[*number]) {
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("make a pipe")?;
            let (our_end, theirs) = if number == 0 { (write, read) } else { (read, write) };
            rustix::io::ioctl_fionbio(&our_end, true).context("use a pipe without waiting")?;
            pipes[number] = Some((our_end, theirs));
        }
        Ok(Self::Plain { pipes })
    }

    /// Whether the program has a terminal.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// What the program's standard input, output and error become; none: they stay.
    pub fn inside(&self) -> [Option<BorrowedFd<'_>>; 3] {
        match self {
            Self::Terminal { peer, .. } => [Some(peer.as_fd()); 3],
            Self::Plain { pipes } => pipes.each_ref().map(|pipe| pipe.as_ref().map(|(_, theirs)| theirs.as_fd())),
        }
    }

    /// Carries bytes and signals until the program ends; returns its exit code, 128+N after signal N.
    pub(super) fn carry(self, child: Child, signals: &Signals) -> Result<i32> {
        match self {
            Self::Terminal { master, peer } => {
                // Ours would keep the terminal open after the last process that uses it.
                drop(peer);
                carry_terminal(master, &child, signals)
            }
            Self::Plain { pipes } => carry_plain(pipes, &child, signals),
        }
    }
}

fn carry_terminal(master: Master, child: &Child, signals: &Signals) -> Result<i32> {
    let copy = || terminal::copy(master.as_fd());
    let [input, output, _] = terminal::standard();
    let typed = Route::new(terminal::copy(input)?, copy()?, AtEnd::Type);
    let shown = Route::new(copy()?, terminal::copy(output)?, AtEnd::Leave);
    let mut relay = Relay::new(vec![typed, shown], signals);
    let _raw = terminal::raw()?;
    loop {
        match relay.wait(Some(child.pidfd.as_fd()))? {
            Event::Signal(libc::SIGWINCH) => {
                if let Some(size) = terminal::size() {
                    master.set_size(size)?;
                }
            }
            // The master goes with us: the session is hung up.
            Event::Signal(signal) => return Ok(128 + signal),
            Event::Broken(1) => return Ok(128 + libc::SIGPIPE),
            Event::Ended => break,
            Event::Broken(_) | Event::Left(_) | Event::Done(_) => {}
        }
    }
    relay.drain(1)?;
    code(child)
}

fn carry_plain(pipes: [Option<(OwnedFd, OwnedFd)>; 3], child: &Child, signals: &Signals) -> Result<i32> {
    let mut routes = Vec::new();
    let mut inputs = 0;
    for (number, (pipe, ours)) in pipes.into_iter().zip(terminal::standard()).enumerate() {
        let Some((end, _theirs)) = pipe else { continue };
        let ours = terminal::copy(ours)?;
        if number == 0 {
            inputs = 1;
            routes.push(Route::new(ours, end, AtEnd::Close));
        } else {
            routes.push(Route::new(end, ours, AtEnd::Leave));
        }
    }
    let mut relay = Relay::new(routes, signals);
    loop {
        match relay.wait(Some(child.pidfd.as_fd()))? {
            Event::Signal(signal) => {
                // To all of its process group, as a terminal would; its pid is not reaped and so still its own.
                let signal = Signal::try_from(signal).context("pass a signal on")?;
                let _ = killpg(Pid::from_raw(child.pid), signal);
            }
            Event::Ended => break,
            Event::Broken(_) | Event::Left(_) | Event::Done(_) => {}
        }
    }
    relay.drain(inputs)?;
    code(child)
}

/// As shells have it.
fn code(child: &Child) -> Result<i32> {
    let status = child.pidfd.reap()?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}
