//! The one error of this crate: what failed, on which object, and the kernel's reason.
//!
//! Limit: no hints. A caller knows what the user wanted and can say what to do; the kernel crate cannot.

use std::fmt::Display;
use std::io;

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed operation. `Display` is `operation object` and never contains the source: print the chain once.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {object}")]
pub struct Error {
    /// What was tried, as an imperative: `open`, `mount`, `attach to cgroup`.
    pub operation: &'static str,
    /// What it was tried on: a path, `pid 17`, a file system with what the kernel said about it.
    pub object: String,
    /// The kernel's reason.
    #[source]
    pub source: io::Error,
}

impl Error {
    /// An error of `operation` on `object` because of `source`.
    pub fn new(operation: &'static str, object: impl Display, source: impl Into<io::Error>) -> Self {
        Self { operation, object: object.to_string(), source: source.into() }
    }

    /// An error whose reason is ours and not the kernel's: a sentence.
    pub(crate) fn refused(operation: &'static str, object: impl Display, kind: io::ErrorKind, why: &str) -> Self {
        Self::new(operation, object, io::Error::new(kind, why))
    }

    /// The errno of the kernel's reason, where it was the kernel who refused.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// The kind of the reason, for callers that treat "not found" and the like as an answer.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

/// Adds the operation and its object to a bare system error.
pub(crate) trait During<T> {
    /// Turns a bare error into [`Error`]; the object is rendered only on failure.
    fn during(self, operation: &'static str, object: impl Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> During<T> for std::result::Result<T, E> {
    fn during(self, operation: &'static str, object: impl Display) -> Result<T> {
        self.map_err(|source| Error::new(operation, object, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn the_message_never_contains_its_source() {
        let error = Error::new("open", "/etc/shadow", io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(error.to_string(), "open /etc/shadow");
        assert_eq!(error.source().unwrap().to_string(), "Permission denied (os error 13)");
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
