//! The user's terminal at a server's console, by way of its monitor.
//!
//! Unlike a session it enters nothing: it is the serial line of a machine, there before anybody has logged in.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use nix::libc;

use super::relay::{AtEnd, Event, Relay, Route, Signals};
use super::terminal;
use crate::failure::{Exit, Failure, exit_of};
use crate::lifecycle::boot::TTYS;
use crate::lifecycle::state;
use crate::monitor::{self, Attached};
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// How often a server that does not run is looked at.
const LOOK_AGAIN_MS: u16 = 50;
/// How often a new monitor is asked until it answers: six seconds, for it asks the guest for five at most.
const ADOPTION_TRIES: u32 = 120;

/// The key before a command of ours: ^a.
const ESCAPE: u8 = 0x01;

/// Which console, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// 0 is `/dev/console`, N is `ttyN`.
    pub number: usize,
    /// Wait until the server runs, and again whenever it has ended.
    pub wait: bool,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Detached,
    ServerEnded,
    Signal(i32),
}

/// Attaches the user's terminal until it is detached or the server ends. Returns the exit code.
///
/// # Errors
/// Exit 31 when the server does not run and nobody wants to wait, 20 for a console that it does not have.
pub fn run(site: &Site, name: &Name, options: Options) -> Result<i32> {
    store::load(site, name)?;
    if options.number > usize::from(TTYS) {
        let message = format!("'{name}' has no tty{}", options.number);
        return Err(Failure::new(Exit::BadParameter, message).hint(format!("it has tty1 to tty{TTYS}")).into());
    }
    let signals = Signals::block(true)?;
    loop {
        let stream = match attach(site, name, options, &signals)? {
            Ok(stream) => stream,
            Err(signal) => return Ok(128 + signal),
        };
        eprintln!("vsctl: {} of '{name}'; ^a q detaches", called(options.number));
        let end = talk(site, name, options.number, stream, &signals)?;
        match end {
            End::Detached => eprintln!("\nvsctl: detached from '{name}'"),
            End::ServerEnded => eprintln!("\nvsctl: '{name}' has ended"),
            End::Signal(signal) => return Ok(128 + signal),
        }
        if end == End::Detached || !options.wait {
            return Ok(0);
        }
    }
}

fn called(number: usize) -> String {
    match number {
        0 => "console".into(),
        number => format!("tty{number}"),
    }
}

/// The connection, or the signal that ended the waiting for it.
fn attach(site: &Site, name: &Name, options: Options, signals: &Signals) -> Result<std::result::Result<Attached, i32>> {
    let mut is_told = false;
    let mut left = None;
    loop {
        let refused = match monitor::attach(site, name, options.number) {
            Ok(stream) => return Ok(Ok(stream)),
            Err(error) if exit_of(&error) == Exit::NotRunning => error,
            Err(error) => return Err(error),
        };
        if orphaned(site, name)? && left.is_none() {
            monitor::adopt(site, name)?;
            left = Some(ADOPTION_TRIES);
        }
        match &mut left {
            Some(tries @ 1..) => *tries -= 1,
            _ if !options.wait => return Err(refused),
            _ => left = None,
        }
        if options.wait && left.is_none() && !is_told {
            eprintln!("vsctl: waiting for '{name}'");
            is_told = true;
        }
        if let Some(signal) = signals.within(LOOK_AGAIN_MS).filter(|signal| *signal != libc::SIGWINCH) {
            return Ok(Err(signal));
        }
    }
}

/// Whether the server runs and its monitor does not.
fn orphaned(site: &Site, name: &Name) -> Result<bool> {
    Ok(state::status(site, name)?.is_some() && !monitor::is_alive(site, name)?)
}

fn talk(site: &Site, name: &Name, number: usize, stream: Attached, signals: &Signals) -> Result<End> {
    let resize = || match terminal::size() {
        Some(size) => monitor::resize(site, name, number, size),
        None => Ok(()),
    };
    stream.set_nonblocking(true).context("use the console without waiting")?;
    let stream = OwnedFd::from(stream);
    let copy = stream.try_clone().context("copy a descriptor")?;
    let [input, output, _] = terminal::standard();
    let mut keys = Keys::default();
    let typed =
        Route::new(terminal::copy(input)?, copy, AtEnd::Leave).filtered(Box::new(move |typed| keys.pass(typed)));
    let shown = Route::new(stream, terminal::copy(output)?, AtEnd::Leave);
    let mut relay = Relay::new(vec![typed, shown], signals);
    resize()?;
    let _raw = terminal::raw()?;
    loop {
        match relay.wait(None)? {
            Event::Signal(libc::SIGWINCH) => resize()?,
            Event::Signal(signal) => return Ok(End::Signal(signal)),
            Event::Left(_) => return Ok(End::Detached),
            Event::Done(1) => return Ok(End::ServerEnded),
            Event::Broken(1) => return Ok(End::Signal(libc::SIGPIPE)),
            // Without input it goes on showing.
            Event::Done(_) | Event::Broken(_) | Event::Ended => {}
        }
    }
}

/// Finds our commands among the keys: ^a q detaches, ^a a is ^a.
#[derive(Debug, Default)]
struct Keys {
    is_escaped: bool,
}

impl Keys {
    /// Takes the commands out of `typed`; `false` after the one that detaches.
    fn pass(&mut self, typed: &mut Vec<u8>) -> bool {
        let mut passed = Vec::with_capacity(typed.len());
        let mut stays = true;
        for byte in typed.drain(..) {
            match (std::mem::take(&mut self.is_escaped), byte) {
                (false, ESCAPE) => self.is_escaped = true,
                (false, byte) => passed.push(byte),
                (true, b'q') => {
                    stays = false;
                    break;
                }
                (true, b'a') => passed.push(ESCAPE),
                // Not ours: both keys are the guest's.
                (true, byte) => passed.extend([ESCAPE, byte]),
            }
        }
        *typed = passed;
        stays
    }
}

/// Prints what the console's log holds, the older file first.
///
/// # Errors
/// When a log cannot be read.
pub fn print_log(site: &Site, name: &Name) -> Result<()> {
    store::load(site, name)?;
    let log = monitor::log_file(site, name);
    for path in [log.with_extension("log.1"), log] {
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("open {}", path.display())),
        };
        io::copy(&mut file, &mut io::stdout().lock()).with_context(|| format!("print {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What of `pieces` reaches the guest, and whether the user stays.
    fn typed(pieces: &[&str]) -> (String, bool) {
        let mut keys = Keys::default();
        let mut all = Vec::new();
        let mut stays = true;
        for piece in pieces {
            let mut piece = piece.as_bytes().to_vec();
            stays = keys.pass(&mut piece);
            all.extend(piece);
            if !stays {
                break;
            }
        }
        (String::from_utf8(all).unwrap(), stays)
    }

    #[test]
    fn escape_q_detaches() {
        assert_eq!(typed(&["ls\r\u{1}qrest"]), ("ls\r".into(), false));
        assert_eq!(typed(&["ls\r\u{1}", "q"]), ("ls\r".into(), false));
    }

    #[test]
    fn escape_a_is_the_escape_itself() {
        assert_eq!(typed(&["\u{1}aq"]), ("\u{1}q".into(), true));
        assert_eq!(typed(&["\u{1}", "a", "q"]), ("\u{1}q".into(), true));
    }

    #[test]
    fn other_keys_go_through() {
        assert_eq!(typed(&["quit a\u{3}"]), ("quit a\u{3}".into(), true));
        assert_eq!(typed(&["\u{1}x\u{1}\u{1}q"]), ("\u{1}x\u{1}\u{1}q".into(), true));
        assert_eq!(typed(&["", "\u{1}"]), (String::new(), true));
    }
}
