//! Names of servers and templates: safe as a file name, a cgroup, and most of a host name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::failure::{Exit, Failure};

/// The longest name in bytes: a host name label (RFC 1035).
pub const LONGEST: usize = 63;

/// A checked name: ASCII letters, digits, `-`, `_` and `.`, beginning with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let bad = |why: String| {
            Err(Failure::new(Exit::BadParameter, format!("'{}' is no name: {why}", text.escape_debug()))
                .hint(format!("use 1 to {LONGEST} of a-z, A-Z, 0-9, '-', '_' and '.', a letter or digit first")))
        };
        if text.is_empty() {
            return bad("it is empty".into());
        }
        if text.len() > LONGEST {
            return Err(Failure::new(Exit::BadParameter, format!("a name of {} bytes is too long", text.len()))
                .hint(format!("use at most {LONGEST}")));
        }
        if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return bad("it must begin with a letter or a digit".into());
        }
        match text.chars().find(|c| !c.is_ascii_alphanumeric() && !"-_.".contains(*c)) {
            Some(c) => bad(format!("'{}' may not be in it", c.escape_debug())),
            None => Ok(Self(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Name {
    type Error = Failure;
    fn try_from(text: String) -> Result<Self, Failure> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_leave_a_directory_is_refused() {
        let long = "x".repeat(256);
        for text in ["", ".", "..", "a/b", "/etc", "-a", "a\0b", "a b", "ä", "a\n", &long] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
        for text in ["a", "web1", "1", "debian-13", "a.b_c-D", &"x".repeat(63)] {
            assert_eq!(text.parse::<Name>().unwrap().as_str(), text);
        }
    }
}
