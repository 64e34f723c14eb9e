//! The guest's own init takes over as the same PID 1.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::path::Path;

use init::handover::Handover;
use kernel::process;
use nix::sys::signal::{SigSet, Signal};

use crate::failure::{During, Failure, Result};
use crate::prepare::{NOTIFY_SOCKET, Prepared};
use crate::supervise::spawn::PATH;

/// Executes the guest's init; `running` is called when nothing is left to fail but the exec.
pub fn take_over(
    argv: &[String],
    handover: &Handover,
    prepared: Prepared,
    running: impl FnOnce() -> Result<()>,
) -> Result<Infallible> {
    let program = argv.first().map_or("", String::as_str);
    let environment = environment(handover);
    let strings = environment.iter().map(|(key, value)| format!("{key}={value}"));
    let environment = strings.map(c_string).collect::<Result<Vec<_>>>()?;
    let argv = argv.iter().cloned().map(c_string).collect::<Result<Vec<_>>>()?;
    let path = c_string(program.into())?;
    // Before `running`, so that a missing init is a failed start and not a server that dies.
    std::fs::metadata(program).during(|| format!("find the server's init {program}"))?;
    process::reset_signals()?;
    if keeps_pending_signals(program) {
        stop_signals().thread_set_mask().during(|| "block the stop signals".into())?;
    }
    running()?;
    // The masters are the monitor's alone now: with the last one closed the guest sees a hang-up.
    drop(prepared);
    let error = process::exec_path(&path, &argv, &environment);
    Err(Failure::from(error))
}

/// Only what systemd's CONTAINER_INTERFACE and every init expect, and what the manager asked for.
///
/// No `container_ttys`: with it systemd starts gettys on ptys of which /dev/ttyN are other names,
/// beside those that a distribution starts on /dev/ttyN itself. A template that has none can ask
/// for it (`pts/1 pts/2`: ttyN is always pts/N).
fn environment(handover: &Handover) -> BTreeMap<String, String> {
    let mut environment = BTreeMap::from([
        ("PATH".into(), PATH.into()),
        ("TERM".into(), "linux".into()),
        ("container".into(), "vsos".into()),
        ("container_uuid".into(), handover.uuid.clone()),
        ("NOTIFY_SOCKET".into(), NOTIFY_SOCKET.into()),
    ]);
    environment.extend(handover.environment.clone());
    environment
}

/// Whether an init reads signals that came before it was ready.
///
/// A stop that comes between the start and the init's signal handlers is lost: the kernel drops
/// what PID 1 has no handler for. Blocked, it stays pending; but exec hands the mask on. systemd
/// sets a mask of its own and reads the signals from a signalfd, so an early stop is carried out
/// (seen with 257). busybox's init of 1.35 unblocks the usual ones and gives its children
/// an empty mask, but older ones, sysvinit, OpenRC and runit go on with what they inherit: they
/// would never see a stop signal and would pass the mask on to every program of the guest. So
/// only systemd gets it; for the others the monitor can watch `SigCgt` in `/proc/PID/status`.
fn keeps_pending_signals(program: &str) -> bool {
    let real = std::fs::canonicalize(program);
    real.is_ok_and(|path| path.file_name() == Path::new("systemd").file_name())
}

/// The signals that ask an init to end: the usual ones and every real-time one.
fn stop_signals() -> SigSet {
    let stops = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR];
    let mut signals = SigSet::all();
    for signal in Signal::iterator().filter(|signal| !stops.contains(signal)) {
        signals.remove(signal);
    }
    signals
}

fn c_string(text: String) -> Result<CString> {
    CString::new(text).during(|| "an argument or variable of the init holds a NUL".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_systemd_gets_blocked_signals() {
        let directory = tempfile::tempdir().unwrap();
        let systemd = directory.path().join("systemd");
        std::fs::write(&systemd, "").unwrap();
        let init = directory.path().join("init");
        std::os::unix::fs::symlink("systemd", &init).unwrap();
        assert!(keeps_pending_signals(init.to_str().unwrap()));
        assert!(!keeps_pending_signals("/bin/sh") && !keeps_pending_signals("/nonexistent"));
    }

    #[test]
    fn stop_signals_leave_the_rest_alone() {
        let signals = stop_signals();
        assert!(signals.contains(Signal::SIGTERM) && signals.contains(Signal::SIGPWR));
        assert!(!signals.contains(Signal::SIGCHLD) && !signals.contains(Signal::SIGSEGV));
    }
}
