//! What went wrong, for the person who typed the command: exit code and hint.
//!
//! Errors travel as `anyhow::Error`; a [`Failure`] somewhere in the chain gives the exit code and the hint.
//! Nothing here prints.

use std::fmt;
use std::io;

/// Exit codes of `vsctl`; vzctl's numbers where the condition is the same (vzctl(8)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Anything that has no number of its own.
    Failed = 1,
    /// The kernel refused something that should have worked.
    System = 3,
    /// The kernel or a needed program lacks a feature.
    Unsupported = 5,
    /// Another command works on this server.
    Locked = 9,
    /// `vsos.toml` or a `server.toml` cannot be used.
    BadConfiguration = 14,
    /// A value on the command line cannot be used.
    BadParameter = 20,
    /// The server is not running.
    NotRunning = 31,
    /// The server is running already.
    AlreadyRunning = 32,
    /// The name is taken.
    Exists = 43,
    /// No such server or checkpoint, or its files are gone.
    NoServer = 44,
    /// The disk is full.
    NoSpace = 46,
    /// No such template.
    NoTemplate = 91,
    /// Given up because of ^C, a hang-up or SIGTERM: as a shell tells of the first.
    Interrupted = 130,
}

impl Exit {
    /// Every code with its meaning, in the order of the manual.
    pub const TABLE: &[(Exit, &str)] = &[
        (Exit::Failed, "failure that has no number of its own"),
        (Exit::System, "the kernel refused a system call"),
        (Exit::Unsupported, "the kernel or a needed program lacks a feature"),
        (Exit::Locked, "another command works on this server"),
        (Exit::BadConfiguration, "a configuration file cannot be used"),
        (Exit::BadParameter, "a value on the command line cannot be used"),
        (Exit::NotRunning, "the server is not running"),
        (Exit::AlreadyRunning, "the server is running already"),
        (Exit::Exists, "the name is taken"),
        (Exit::NoServer, "no such server or checkpoint, or its files are gone"),
        (Exit::NoSpace, "the disk is full"),
        (Exit::NoTemplate, "no such template"),
        (Exit::Interrupted, "given up because of SIGINT, SIGHUP or SIGTERM"),
    ];

    /// The condition with number `code`; [`Exit::Failed`] for one that has none.
    pub fn from_code(code: u8) -> Self {
        Self::TABLE.iter().map(|(exit, _)| *exit).find(|exit| *exit as u8 == code).unwrap_or(Self::Failed)
    }
}

/// A condition that the user can act upon.
#[derive(Debug)]
pub struct Failure {
    /// The exit code of the command.
    pub exit: Exit,
    message: String,
    hint: Option<String>,
}

impl Failure {
    /// A failure with its message: what, and on which object.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: None }
    }

    /// Adds what the user can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What the user can do about it.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The exit code that `error` asks for.
pub fn exit_of(error: &anyhow::Error) -> Exit {
    for cause in error.chain() {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return failure.exit;
        }
        if let Some(io) = cause.downcast_ref::<io::Error>() {
            return match io.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Exit::NoSpace,
                _ if io.raw_os_error().is_some() => Exit::System,
                _ => Exit::Failed,
            };
        }
    }
    Exit::Failed
}

/// The hint that goes with `error`, if any.
pub fn hint_of(error: &anyhow::Error) -> Option<&str> {
    error.chain().find_map(|cause| cause.downcast_ref::<Failure>()?.hint_text())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_code_and_the_hint_survive_context() {
        let error = anyhow::Error::new(Failure::new(Exit::NotRunning, "'web1' is not running").hint("start it"))
            .context("cannot freeze 'web1'");
        assert_eq!(exit_of(&error), Exit::NotRunning);
        assert_eq!(hint_of(&error), Some("start it"));
        assert_eq!(format!("{error:#}"), "cannot freeze 'web1': 'web1' is not running");
    }

    #[test]
    fn a_full_disk_has_its_own_code() {
        let full = Err::<(), _>(io::Error::from(io::ErrorKind::StorageFull)).context("write record").unwrap_err();
        assert_eq!(exit_of(&full), Exit::NoSpace);
    }
}
