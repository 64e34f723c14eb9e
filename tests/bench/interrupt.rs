//! ^C ends the bench in order: between two measurements, with all that it made removed.

use anyhow::{Context, Result, bail};
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};

/// Signals that ask the bench to end, held back until it asks for them. Commands that it runs get none of this:
/// they have a process group and a signal mask of their own.
pub struct Interrupt(SignalFd);

impl Interrupt {
    /// Holds the signals back from now on.
    pub fn catch() -> Result<Self> {
        let set = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        set.thread_block().context("hold back signals")?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(Self(SignalFd::with_flags(&set, flags).context("watch for signals")?))
    }

    /// An error as soon as one has come.
    pub fn check(&self) -> Result<()> {
        if self.0.read_signal().context("look for signals")?.is_some() {
            bail!("interrupted; what was made is removed");
        }
        Ok(())
    }
}
