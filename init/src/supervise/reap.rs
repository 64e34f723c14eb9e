//! Collecting ended processes: services, and every orphan that the kernel gives to PID 1.

use std::fmt;

use rustix::process::{WaitOptions, WaitStatus, wait};

use crate::service::signal_name;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its exit status.
    Exit(i32),
    /// The signal that killed it.
    Signal(i32),
}

impl End {
    /// Whether it ended as a program does that has done its work.
    pub fn is_success(self) -> bool {
        self == End::Exit(0)
    }

    fn from_status(status: WaitStatus) -> End {
        match status.terminating_signal() {
            Some(signal) => End::Signal(signal),
            None => End::Exit(status.exit_status().unwrap_or(0)),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            End::Exit(status) => write!(f, "exit {status}"),
            End::Signal(number) => write!(f, "killed by {}", signal_name::name_of(*number)),
        }
    }
}

/// What is left of this process's children after a round of collecting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Children {
    /// Some run.
    Some,
    /// There are none.
    None,
}

/// Collects every process that has ended, however many one SIGCHLD stands for.
pub fn collect(mut ended: impl FnMut(i32, End)) -> Children {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => ended(pid.as_raw_nonzero().get(), End::from_status(status)),
            Ok(None) => return Children::Some,
            Err(rustix::io::Errno::INTR) => {}
            // ECHILD; nothing else is possible.
            Err(_) => return Children::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_in_words() {
        assert_eq!(End::Exit(3).to_string(), "exit 3");
        assert_eq!(End::Signal(9).to_string(), "killed by SIGKILL");
        assert_eq!(End::Signal(37).to_string(), "killed by SIGRTMIN+3");
        assert!(End::Exit(0).is_success() && !End::Signal(15).is_success());
    }
}
