//! The one error type of this crate: what was tried, on which object, and the kernel's reason.
//!
//! Its text never contains its source; whoever prints it walks the chain.

use std::{fmt, io};

/// Result of everything here that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// A network operation that the kernel, or nft(8), refused.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {object}")]
pub struct Error {
    /// What was tried, as a verb with its kind of object: `create veth`.
    pub operation: &'static str,
    /// On which object: the name of a link, an address, a file.
    pub object: String,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl Error {
    pub(crate) fn new(operation: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        Self { operation, object: object.into(), source }
    }

    /// The kernel's error number, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        errno_of(&self.source)
    }

    /// The kind of the reason; `AlreadyExists` and `NotFound` are the ones that callers ask for.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

/// The error number in `error`, also when the kernel's own words go with it.
pub(crate) fn errno_of(error: &io::Error) -> Option<i32> {
    error.raw_os_error().or_else(|| {
        let explained = error.get_ref()?.downcast_ref::<Explained>()?;
        explained.errno.raw_os_error()
    })
}

/// `errno` together with the kernel's explanation (`NLMSGERR_ATTR_MSG`), if it gave one.
pub(crate) fn explained(errno: i32, text: Option<String>) -> io::Error {
    let plain = io::Error::from_raw_os_error(errno);
    match text {
        None => plain,
        Some(text) => io::Error::new(plain.kind(), Explained { errno: plain, text }),
    }
}

/// An error number that the kernel explained in words.
#[derive(Debug)]
struct Explained {
    errno: io::Error,
    text: String,
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.errno, self.text)
    }
}

impl std::error::Error for Explained {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explained_error_keeps_number_and_kind() {
        let source = explained(17, Some("name is taken".into()));
        let error = Error::new("create veth", "vs-1", source);
        assert_eq!(error.raw_os_error(), Some(17));
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(error.to_string(), "create veth vs-1");
        assert_eq!(error.source.to_string(), "File exists (os error 17): name is taken");
    }
}
