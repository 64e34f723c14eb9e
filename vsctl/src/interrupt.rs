//! ^C, a hang-up of the terminal and SIGTERM, where an end in the midst would leave something half done: they are held back, and asked for
//! wherever the work can be given up in order. Programs that are run meanwhile do not hear them either.
//!
//! SIGQUIT and SIGKILL end it at once, as ever; what that leaves behind is found by the next command.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::failure::{Exit, Failure, exit_of};
use crate::lifecycle::execute::Outcome;
use crate::processes::field;

const HELD: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];

// Of the thread that does the work: others that it starts hold them back, and do not ask.
thread_local! {
    /// Where they are read, while they are listened to.
    static EAR: RefCell<Option<Rc<SignalFd>>> = const { RefCell::new(None) };
    /// The first that came: what is done after it is done for nobody.
    static HEARD: Cell<Option<Signal>> = const { Cell::new(None) };
}

/// They are held back as long as this lives.
#[derive(Debug)]
pub struct Hold {
    signals: Rc<SignalFd>,
    before: SigSet,
    is_outermost: bool,
}

impl Hold {
    /// Begins. The calling thread is the only one, or the others hold them back, too. What somebody has told this process to ignore
    /// (nohup(1)) is ignored.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn begin() -> Result<Self> {
        let ignored = ignored()?;
        // To the kernel one that is held back is not ignored any more.
        let set: SigSet = HELD.into_iter().filter(|signal| ignored & bit(*signal) == 0).collect();
        // First, so that nothing is held back when there is nobody to hear it.
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = Rc::new(SignalFd::with_flags(&set, flags).context("read signals")?);
        let before = set.thread_swap_mask(SigmaskHow::SIG_BLOCK).context("hold back signals")?;
        let is_outermost = EAR.with_borrow_mut(|ear| {
            let is_first = ear.is_none();
            ear.get_or_insert_with(|| Rc::clone(&signals));
            is_first
        });
        Ok(Self { signals, before, is_outermost })
    }

    /// Does not listen any more: the work cannot be given up from here on. They are held back still.
    pub fn ignore(&self) {
        if self.is_outermost {
            EAR.take();
        }
    }
}

/// Readable when one has come that nobody has asked for.
impl AsFd for Hold {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.is_outermost {
            EAR.take();
            // What came too late to change anything ends nothing; who begins something else asks whether there was any.
            while let Some(signal) = next(&self.signals) {
                HEARD.set(HEARD.get().or(Some(signal)));
            }
        }
        let _ = self.before.thread_set_mask();
    }
}

fn next(signals: &SignalFd) -> Option<Signal> {
    let heard = signals.read_signal().ok().flatten()?;
    Signal::try_from(heard.ssi_signo as i32).ok()
}

/// Goes on only if none has come since the first [`Hold`], as far as somebody listens.
///
/// # Errors
/// Exit 130 from the first on.
pub fn check() -> Result<()> {
    let Some(ear) = EAR.with_borrow(Clone::clone) else { return Ok(()) };
    if HEARD.get().is_none() {
        HEARD.set(next(&ear));
    }
    before_more()
}

/// The same, of those that have been heard, whoever listens now: for who is about to begin something else.
///
/// # Errors
/// Exit 130.
pub fn before_more() -> Result<()> {
    let Some(signal) = HEARD.get() else { return Ok(()) };
    Err(Failure::new(Exit::Interrupted, format!("interrupted ({signal})")).into())
}

/// What is said of work that failed: when it was given up because of a signal, or one has come, that.
pub fn instead_of(error: anyhow::Error) -> anyhow::Error {
    match check().and_then(|()| before_more()) {
        Err(interrupted) if !is_interrupt(&error) => {
            log::info!("{error:#}");
            Outcome::beside(interrupted, Outcome::apart(&error).1)
        }
        _ => error,
    }
}

/// Whether work was given up because somebody wanted it.
pub fn is_interrupt(error: &anyhow::Error) -> bool {
    exit_of(error) == Exit::Interrupted
}

/// The signals that this process was told to ignore, signal N as bit N-1 (proc(5)).
///
/// # Errors
/// When /proc does not say it.
pub fn ignored() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let mask = field(&status, "SigIgn:").and_then(|mask| u64::from_str_radix(mask, 16).ok());
    mask.context("find the ignored signals")
}

fn bit(signal: Signal) -> u64 {
    1 << (signal as u32 - 1)
}

#[cfg(test)]
mod tests {
    // To the calling thread alone, of which each test has one: other tests go on.
    use nix::sys::signal::raise;

    use super::*;

    #[test]
    fn a_signal_is_heard_where_it_is_asked_for_and_ends_nothing_else() {
        raise_nothing();
        let hold = Hold::begin().unwrap();
        check().unwrap();
        raise(Signal::SIGTERM).unwrap();
        for _ in 0..2 {
            let error = check().unwrap_err();
            assert!(is_interrupt(&error) && error.to_string() == "interrupted (SIGTERM)", "{error}");
        }
        let error = anyhow::anyhow!("the other side has ended").context(Outcome("it stands still".into()));
        let said = instead_of(error);
        assert!(is_interrupt(&said));
        assert_eq!(Outcome::apart(&said), ("interrupted (SIGTERM)".into(), Some("it stands still".into())));
        drop(hold);
        assert!(before_more().is_err());
    }

    fn raise_nothing() {
        check().unwrap();
        before_more().unwrap();
        assert_eq!(instead_of(anyhow::anyhow!("why")).to_string(), "why");
    }

    #[test]
    fn one_that_comes_too_late_is_known_to_who_begins_something_else() {
        let outer = Hold::begin().unwrap();
        let inner = Hold::begin().unwrap();
        raise(Signal::SIGTERM).unwrap();
        inner.ignore();
        drop(inner);
        outer.ignore();
        check().unwrap();
        // The thread would end the process now if it were still there.
        drop(outer);
        check().unwrap();
        assert!(is_interrupt(&before_more().unwrap_err()));
        let mask = SigSet::thread_get_mask().unwrap();
        assert!(HELD.iter().all(|signal| !mask.contains(*signal)));
    }

    #[test]
    fn ignored_signals_are_known() {
        // Rust's start-up ignores it.
        assert_ne!(ignored().unwrap() & bit(Signal::SIGPIPE), 0);
        assert_eq!(ignored().unwrap() & bit(Signal::SIGTERM), 0);
    }
}
