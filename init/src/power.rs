//! The end of the server: what the signals mean, and the way down to reboot(2).

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use init::control::Request;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::system::{RebootCommand, reboot};

use crate::prepare::NOTIFY_SOCKET;
use crate::supervise::reap::{self, Children};

/// How the server ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Off. The kernel kills init with SIGINT; so the monitor knows.
    Poweroff,
    /// Again. The kernel kills init with SIGHUP.
    Reboot,
    /// The same as off for a virtual server.
    Halt,
}

/// What a signal asks of a supervising PID 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// End the server.
    Power(Power),
    /// Read the service files again.
    Reload,
    /// Children have ended.
    Reap,
}

/// How long what is no service may take to end before it is killed.
const STRANGERS_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the kernel may take to take killed processes away.
const KILLED_TIMEOUT: Duration = Duration::from_secs(2);

/// What `signal` asks, or nothing.
///
/// The standard ones as busybox's halt, poweroff and reboot send them; SIGPWR and the real-time
/// ones as managers of systemd and sysvinit guests do; SIGINT is ctrl-alt-del.
pub fn wish(signal: i32) -> Option<Wish> {
    const RTMIN: i32 = crate::service::signal_name::RTMIN;
    const HALT: i32 = RTMIN + 3;
    const POWEROFF: i32 = RTMIN + 4;
    const REBOOT: i32 = RTMIN + 5;
    Some(match signal {
        libc::SIGPWR | libc::SIGUSR2 | POWEROFF => Wish::Power(Power::Poweroff),
        libc::SIGUSR1 | HALT => Wish::Power(Power::Halt),
        libc::SIGTERM | libc::SIGINT | REBOOT => Wish::Power(Power::Reboot),
        libc::SIGHUP => Wish::Reload,
        libc::SIGCHLD => Wish::Reap,
        _ => return None,
    })
}

impl Power {
    /// The power request among the control requests.
    pub fn from_request(request: &Request) -> Option<Power> {
        match request {
            Request::Poweroff => Some(Power::Poweroff),
            Request::Reboot => Some(Power::Reboot),
            Request::Halt => Some(Power::Halt),
            _ => None,
        }
    }

    /// What is going on, for the console.
    pub fn as_str(self) -> &'static str {
        match self {
            Power::Poweroff => "power off",
            Power::Reboot => "reboot",
            Power::Halt => "halt",
        }
    }
}

/// Ends what still runs, saves what is not on disk yet, and ends the server. The services are
/// down when this is called.
pub fn finish(power: Power) -> ! {
    end_all(Signal::SIGTERM, STRANGERS_TIMEOUT);
    end_all(Signal::SIGKILL, KILLED_TIMEOUT);
    sync_root();
    log::info!("{}", power.as_str());
    now(power)
}

/// Ends the server at once.
pub fn now(power: Power) -> ! {
    let command = match power {
        Power::Poweroff => RebootCommand::PowerOff,
        Power::Reboot => RebootCommand::Restart,
        Power::Halt => RebootCommand::Halt,
    };
    tell(power);
    // In a pid namespace this kills init: it returns only on failure.
    if let Err(error) = reboot(command) {
        log::error!("cannot {}: {error}", power.as_str());
    }
    // The server is down; without CAP_SYS_BOOT this is the only way left to say so.
    std::process::exit(0)
}

/// Tells the monitor what comes, as systemd does (`X_SYSTEMD_SHUTDOWN` in systemd(1)): a monitor that has adopted the server
/// is not its parent, and no kernel before 6.15 says to anybody else how a process ended.
fn tell(power: Power) {
    let word = match power {
        Power::Poweroff => "poweroff",
        Power::Reboot => "reboot",
        Power::Halt => "halt",
    };
    let said = UnixDatagram::unbound().and_then(|socket| {
        socket.set_nonblocking(true)?;
        socket.send_to(format!("X_SYSTEMD_SHUTDOWN={word}\n").as_bytes(), NOTIFY_SOCKET)
    });
    // The kernel says the same to the parent; only an adopted server needs this.
    if let Err(error) = said {
        log::debug!("cannot tell the monitor: {error}");
    }
}

/// Saves the server's own file system.
///
/// Not sync(2): that one writes back every file system of the host and waits for all servers'
/// disks.
pub fn sync_root() {
    let saved = std::fs::File::open("/").and_then(|root| Ok(rustix::fs::syncfs(root)?));
    if let Err(error) = saved {
        log::warn!("what is not on disk yet may be lost: {error}");
    }
}

/// Sends `signal` to every process but this one and waits until none is left.
fn end_all(signal: Signal, timeout: Duration) {
    // ESRCH: there is none.
    if kill(Pid::from_raw(-1), signal).is_err() {
        return;
    }
    let deadline = Instant::now() + timeout;
    while reap::collect(|_, _| {}) == Children::Some && Instant::now() < deadline {
        // SIGCHLD is blocked, and its descriptor belongs to the loop that is over: look often.
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_mean_what_distributions_expect() {
        let power = |signal| match wish(signal) {
            Some(Wish::Power(power)) => Some(power),
            _ => None,
        };
        assert_eq!(power(libc::SIGPWR), Some(Power::Poweroff));
        assert_eq!(power(libc::SIGUSR2), Some(Power::Poweroff));
        assert_eq!(power(libc::SIGRTMIN() + 4), Some(Power::Poweroff));
        assert_eq!(power(libc::SIGUSR1), Some(Power::Halt));
        assert_eq!(power(libc::SIGRTMIN() + 3), Some(Power::Halt));
        assert_eq!(power(libc::SIGTERM), Some(Power::Reboot));
        assert_eq!(power(libc::SIGINT), Some(Power::Reboot));
        assert_eq!(wish(libc::SIGHUP), Some(Wish::Reload));
        assert_eq!(wish(libc::SIGCHLD), Some(Wish::Reap));
        assert_eq!(wish(libc::SIGWINCH), None);
    }
}
