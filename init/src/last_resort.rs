//! What is left of PID 1 after a bug: a panic must not end the server.
//!
//! The services run on, orphans are still collected, and the server can still be stopped. No
//! service is started again and the control socket is silent.

use nix::sys::signal::SigSet;
use nix::sys::signalfd::SignalFd;

use crate::power::{self, Wish};
use crate::supervise::reap;

/// From here on a panic ends in the loop below instead of in an exit.
pub fn set_up() {
    std::panic::set_hook(Box::new(|panic| {
        // A forked child has the hook too; it may die.
        if std::process::id() != 1 {
            return;
        }
        log::error!("{panic}; services are no longer supervised");
        collect_and_wait()
    }));
}

fn collect_and_wait() -> ! {
    // The supervisor's own is out of reach. The signals are blocked already.
    let signals = SignalFd::new(&SigSet::all());
    loop {
        let signal = signals.as_ref().ok().and_then(|signals| signals.read_signal().ok()?);
        match signal.and_then(|signal| power::wish(signal.ssi_signo as i32)) {
            Some(Wish::Power(power)) => power::finish(power),
            Some(Wish::Reload) => {}
            Some(Wish::Reap) => {
                reap::collect(|_, _| {});
            }
            // Without a descriptor this is the only pace there is.
            None => std::thread::sleep(std::time::Duration::from_millis(100)),
        }
    }
}
