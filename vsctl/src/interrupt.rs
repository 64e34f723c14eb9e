//! ^C, a hang-up of the terminal and SIGTERM, where an end in the midst would leave something half done: they are held back, and looked at
//! wherever the work can be given up in order. Programs that are run meanwhile do not hear them either.
//!
//! SIGQUIT and SIGKILL end it at once, as ever; what that leaves behind is found by the next command.

use std::cell::Cell;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::failure::{Exit, Failure, exit_of};
use crate::processes::field;

const HELD: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];

/// They are held back as long as this lives.
#[derive(Debug)]
pub struct Hold {
    set: SigSet,
    signals: SignalFd,
    before: SigSet,
    heard: Cell<Option<Signal>>,
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
        let signals =
            SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("read signals")?;
        let before = set.thread_swap_mask(SigmaskHow::SIG_BLOCK).context("hold back signals")?;
        Ok(Self { set, signals, before, heard: Cell::new(None) })
    }

    /// Goes on only if none has come.
    ///
    /// # Errors
    /// Exit 130 from the first on.
    pub fn check(&self) -> Result<()> {
        if self.heard.get().is_none() {
            self.heard.set(self.next());
        }
        let Some(signal) = self.heard.get() else { return Ok(()) };
        Err(Failure::new(Exit::Interrupted, format!("interrupted ({signal})")).into())
    }

    fn next(&self) -> Option<Signal> {
        let heard = self.signals.read_signal().ok().flatten()?;
        Signal::try_from(heard.ssi_signo as i32).ok()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // What came too late to change anything changes nothing.
        let is_outermost = self.set.iter().any(|signal| !self.before.contains(signal));
        while is_outermost && self.next().is_some() {}
        let _ = self.before.thread_set_mask();
    }
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

/// Whether work was given up because somebody wanted it.
pub fn is_interrupt(error: &anyhow::Error) -> bool {
    exit_of(error) == Exit::Interrupted
}

#[cfg(test)]
mod tests {
    // To the calling thread alone: other tests go on.
    use nix::sys::signal::raise;

    use super::*;

    #[test]
    fn a_signal_is_heard_where_it_is_asked_for_and_ends_nothing_else() {
        let held = Hold::begin().unwrap();
        held.check().unwrap();
        raise(Signal::SIGINT).unwrap();
        for _ in 0..2 {
            let error = held.check().unwrap_err();
            assert!(is_interrupt(&error) && error.to_string() == "interrupted (SIGINT)", "{error}");
        }
    }

    #[test]
    fn ignored_signals_are_known() {
        // Rust's start-up ignores it.
        assert_ne!(ignored().unwrap() & bit(Signal::SIGPIPE), 0);
        assert_eq!(ignored().unwrap() & bit(Signal::SIGTERM), 0);
    }

    #[test]
    fn one_that_comes_too_late_is_let_go_with_the_outermost() {
        let outer = Hold::begin().unwrap();
        let inner = Hold::begin().unwrap();
        raise(Signal::SIGTERM).unwrap();
        drop(inner);
        assert!(is_interrupt(&outer.check().unwrap_err()));
        raise(Signal::SIGTERM).unwrap();
        // The thread would end the process now if it were still there.
        drop(outer);
        let mask = SigSet::thread_get_mask().unwrap();
        assert!(HELD.iter().all(|signal| !mask.contains(*signal)));
    }
}
