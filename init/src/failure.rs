//! The program's error: one sentence, and the reason under it.

use std::error::Error;

/// What could not be done, and why. Display is the sentence alone; [`chain`] prints all.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Failure {
    what: String,
    source: Option<Box<dyn Error>>,
}

/// The program's result.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure whose sentence says it all.
    pub fn new(what: impl Into<String>) -> Failure {
        Failure { what: what.into(), source: None }
    }
}

/// The kernel crate's errors are sentences already.
impl From<kernel::Error> for Failure {
    fn from(error: kernel::Error) -> Failure {
        Failure { what: error.to_string(), source: Some(Box::new(error.source)) }
    }
}

/// Adds the sentence to a foreign error.
pub trait During<T> {
    /// `what` was being done; it is made only on failure.
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Error + 'static> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Failure { what: what(), source: Some(Box::new(source)) })
    }
}

/// The whole chain on one line: `cannot A: cannot B: reason`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(cause.to_string().trim_end());
        next = cause.source();
    }
    text.replace('\n', "; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_printed_once_and_on_one_line() {
        let inner: std::result::Result<(), _> = Err(std::io::Error::from_raw_os_error(2));
        let error = inner.during(|| "read x".into()).during(|| "cannot start".into()).unwrap_err();
        assert_eq!(chain(&error), "cannot start: read x: No such file or directory (os error 2)");
        assert_eq!(error.to_string(), "cannot start");
    }
}
