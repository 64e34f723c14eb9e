//! Service files: `/etc/vsinit/NAME.toml`, as text and as values.
//!
//! Pure: reads no file, knows no process. Defaults live here, so that the rest of the program
//! never asks "and if it is not given?".

mod limit;
mod nearest;
pub mod signal_name;
mod words;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

pub use limit::{Limit, Resource};
pub use signal_name::SignalName;
pub use words::Words;

/// The longest name of a service; it becomes part of file names.
const MAX_NAME_BYTES: usize = 64;

/// One service file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceFile {
    /// Program and arguments.
    pub exec: Words,
    /// Whether it stays.
    #[serde(default)]
    pub kind: Kind,
    /// Wait until these have settled, whatever came of them.
    #[serde(default)]
    pub after: Vec<String>,
    /// Wait until these are up; if one fails, fail too.
    #[serde(default)]
    pub requires: Vec<String>,
    /// What to do when the process ends by itself; see [`ServiceFile::restart_policy`].
    pub restart: Option<Restart>,
    /// The first pause before a restart; doubles with each further one.
    #[serde(default = "defaults::restart_delay_ms")]
    pub restart_delay_ms: u64,
    /// The longest pause.
    #[serde(default = "defaults::restart_delay_max_ms")]
    pub restart_delay_max_ms: u64,
    /// A run as long as this makes the next pause the first one again.
    #[serde(default = "defaults::stable_ms")]
    pub stable_ms: u64,
    /// Name or number; root when it is not given.
    pub user: Option<String>,
    /// Name or number; the user's own group when it is not given.
    pub group: Option<String>,
    /// Further variables of the environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The working directory.
    #[serde(default = "defaults::dir")]
    pub dir: PathBuf,
    /// Resource limits, see setrlimit(2).
    #[serde(default)]
    pub limits: BTreeMap<Resource, Limit>,
    /// The program says by sd_notify(3) when it is ready.
    #[serde(default)]
    pub notify: bool,
    /// How long a program may take to get ready (with `notify`) or done (oneshot); 0 = for ever.
    /// See [`ServiceFile::start_timeout`].
    pub start_timeout_ms: Option<u64>,
    /// Where standard output and error go.
    #[serde(default)]
    pub log: Log,
    /// The log file is rotated when it is longer.
    #[serde(default = "defaults::log_size_bytes")]
    pub log_size_bytes: u64,
    /// A terminal that becomes standard input, output and error, and the controlling terminal.
    pub console: Option<PathBuf>,
    /// Asks the program to end.
    #[serde(default)]
    pub stop_signal: SignalName,
    /// SIGKILL follows after this.
    #[serde(default = "defaults::stop_timeout_ms")]
    pub stop_timeout_ms: u64,
}

mod defaults {
    use std::path::PathBuf;

    pub fn restart_delay_ms() -> u64 {
        100
    }
    pub fn restart_delay_max_ms() -> u64 {
        30_000
    }
    pub fn stable_ms() -> u64 {
        10_000
    }
    pub fn stop_timeout_ms() -> u64 {
        10_000
    }
    pub fn log_size_bytes() -> u64 {
        256 * 1024
    }
    pub fn dir() -> PathBuf {
        PathBuf::from("/")
    }
}

/// Whether a service's process is meant to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Up while its process runs.
    #[default]
    Daemon,
    /// Up when its process has ended well.
    Oneshot,
}

/// What to do when a process ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Start it again.
    Always,
    /// Start it again unless it ended with exit status 0.
    OnFailure,
    /// Leave it.
    Never,
}

/// Where standard output and error go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Log {
    /// To `/var/log/vsinit/NAME.log`, bounded.
    #[default]
    File,
    /// To `/dev/console`.
    Console,
    /// Nowhere.
    None,
}

/// What is wrong with a service file, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    /// The file as the user knows it.
    pub file: String,
    /// From 1; 0 when it concerns the file as a whole.
    pub line: usize,
    /// From 1.
    pub column: usize,
    /// One sentence.
    pub message: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.message),
            line => write!(f, "{}:{line}:{}: {}", self.file, self.column, self.message),
        }
    }
}

impl ServiceFile {
    /// Reads the text of a service file; `file` is only for messages.
    pub fn parse(file: &str, text: &str) -> Result<ServiceFile, Error> {
        let service: ServiceFile = toml::from_str(text).map_err(|error| {
            let (line, column) = error.span().map_or((0, 0), |span| position(text, &span));
            Error { file: file.into(), line, column, message: explain(error.message()) }
        })?;
        let whole = |message: &str| Error { file: file.into(), line: 0, column: 0, message: message.into() };
        if service.kind == Kind::Oneshot && service.notify {
            return Err(whole("a oneshot is up when it has ended, so it cannot have notify = true"));
        }
        if service.kind == Kind::Oneshot && service.restart == Some(Restart::Always) {
            return Err(whole("a oneshot with restart = \"always\" would never be up"));
        }
        if service.restart_delay_ms > service.restart_delay_max_ms {
            return Err(whole("restart_delay_ms is longer than restart_delay_max_ms"));
        }
        if !service.dir.is_absolute() {
            return Err(whole("dir is not an absolute path"));
        }
        Ok(service)
    }

    /// `restart`, or what suits the kind: a daemon is kept up, a oneshot runs once.
    pub fn restart_policy(&self) -> Restart {
        self.restart.unwrap_or(match self.kind {
            Kind::Daemon => Restart::Always,
            Kind::Oneshot => Restart::Never,
        })
    }

    /// `start_timeout_ms`, or a minute for getting ready. A oneshot may have much to do: it has
    /// all the time that it wants unless the file says otherwise.
    pub fn start_timeout(&self) -> Option<Duration> {
        let default_ms = if self.kind == Kind::Oneshot { 0 } else { 60_000 };
        let timeout_ms = self.start_timeout_ms.unwrap_or(default_ms);
        (timeout_ms > 0).then(|| Duration::from_millis(timeout_ms))
    }

    /// All services that come before this one.
    pub fn dependencies(&self) -> impl Iterator<Item = &str> {
        self.after.iter().chain(&self.requires).map(String::as_str)
    }
}

/// Whether `name` can be a service's name: it becomes a part of file names and of messages.
pub fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._@-".contains(c);
    !name.is_empty() && name.len() <= MAX_NAME_BYTES && !name.starts_with(['.', '-']) && name.chars().all(plain)
}

/// Line and column, from 1, of the start of `span`.
fn position(text: &str, span: &Range<usize>) -> (usize, usize) {
    let before = text.get(..span.start).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// The parser's message, with the nearest known word when it met an unknown one.
fn explain(message: &str) -> String {
    let message = message.trim().replace('\n', ", ");
    let Some(rest) = message.strip_prefix("unknown field `") else {
        return message;
    };
    // serde's words: unknown field `X`, expected one of `A`, `B`, ...
    let mut words = rest.split('`').step_by(2);
    let Some(unknown) = words.next() else {
        return message;
    };
    match nearest::nearest(unknown, words) {
        Some(known) => format!("unknown key '{unknown}', did you mean '{known}'?"),
        None => format!("unknown key '{unknown}'"),
    }
}

#[cfg(test)]
mod tests;
