//! The user's terminal at a server's console, by way of its monitor.
//!
//! Unlike a session it enters nothing: it is the serial line of a machine, there before anybody has logged in.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

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
/// How often a new monitor is asked until it answers: two seconds.
const ADOPTION_TRIES: u32 = 40;

/// How soon the monitor tells what it has logged.
const TOLD_WITHIN: Duration = Duration::from_millis(20);
/// Most bytes that are compared with the log.
const MOST_TOLD_BYTES: usize = 64 << 10;

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
        let (stream, missed) = match attach(site, name, options, &signals)? {
            Waited::Attached { stream, logged_bytes } => (stream, logged_bytes),
            Waited::Signal(signal) => return Ok(128 + signal),
        };
        eprintln!("vsctl: {} of '{name}'; ^a q detaches", called(options.number));
        if let Some(from) = missed.filter(|_| options.number == 0) {
            catch_up(&monitor::log_file(site, name), from, &stream)?;
        }
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

/// What came of waiting for a console.
enum Waited {
    /// The connection; and when it had to be waited for, how long the log was before.
    Attached {
        stream: Attached,
        logged_bytes: Option<u64>,
    },
    Signal(i32),
}

fn attach(site: &Site, name: &Name, options: Options, signals: &Signals) -> Result<Waited> {
    let mut logged_bytes = None;
    let mut left = None;
    loop {
        let refused = match monitor::attach(site, name, options.number) {
            Ok(stream) => return Ok(Waited::Attached { stream, logged_bytes }),
            Err(error) if exit_of(&error) == Exit::NotRunning => error,
            Err(error) => return Err(error),
        };
        if orphaned(site, name) && left.is_none() {
            monitor::adopt(site, name)?;
            left = Some(ADOPTION_TRIES);
        }
        match &mut left {
            Some(tries @ 1..) => *tries -= 1,
            _ if !options.wait => return Err(refused),
            _ => left = None,
        }
        if options.wait && left.is_none() && logged_bytes.is_none() {
            eprintln!("vsctl: waiting for '{name}'");
            let log = fs::metadata(monitor::log_file(site, name));
            logged_bytes = Some(log.map_or(0, |found| found.len()));
        }
        if let Some(signal) = signals.within(LOOK_AGAIN_MS).filter(|signal| *signal != libc::SIGWINCH) {
            return Ok(Waited::Signal(signal));
        }
    }
}

/// Whether the server runs and its monitor does not.
fn orphaned(site: &Site, name: &Name) -> bool {
    state::status(site, name).is_some() && !monitor::is_alive(site, name)
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

/// Prints what was logged after the first `from` bytes: what the console has shown between the start and the attaching.
///
/// Read after the attaching, so that nothing is lost; what was logged and has come here, too, is printed once.
fn catch_up(log: &Path, from: u64, mut stream: &Attached) -> Result<()> {
    let mut logged = Vec::new();
    if let Ok(mut file) = File::open(log) {
        // A shorter one was begun anew.
        let length = file.metadata().map_or(0, |found| found.len());
        file.seek(SeekFrom::Start(if length < from { 0 } else { from })).context("look into the console's log")?;
        file.read_to_end(&mut logged).context("read the console's log")?;
    }
    // The monitor logs first and then tells: what was read in the log is here in a moment.
    stream.set_read_timeout(Some(TOLD_WITHIN)).context("use the console with a time-out")?;
    let mut told = Vec::new();
    let mut piece = [0u8; 4096];
    while told.len() < MOST_TOLD_BYTES {
        // The end is met again by whoever reads next.
        let Ok(length @ 1..) = stream.read(&mut piece) else { break };
        told.extend(&piece[..length]);
    }
    let mut out = io::stdout().lock();
    let printed = out.write_all(&logged).and_then(|()| out.write_all(&told[overlap(&logged, &told)..]));
    printed.and_then(|()| out.flush()).context("write to standard output")
}

/// How many bytes at the end of `one` are the first of `other`.
fn overlap(one: &[u8], other: &[u8]) -> usize {
    (0..=one.len().min(other.len())).rev().find(|length| one.ends_with(&other[..*length])).unwrap_or(0)
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
    fn what_the_log_had_is_not_shown_again() {
        assert_eq!(overlap(b"boot\nlogin:", b"login: x"), 6);
        assert_eq!(overlap(b"boot", b"boot"), 4);
        assert_eq!(overlap(b"boot", b"login"), 0);
        assert_eq!(overlap(b"", b"login"), 0);
        assert_eq!(overlap(b"boot", b""), 0);
    }

    #[test]
    fn other_keys_go_through() {
        assert_eq!(typed(&["quit a\u{3}"]), ("quit a\u{3}".into(), true));
        assert_eq!(typed(&["\u{1}x\u{1}\u{1}q"]), ("\u{1}x\u{1}\u{1}q".into(), true));
        assert_eq!(typed(&["", "\u{1}"]), (String::new(), true));
    }
}
