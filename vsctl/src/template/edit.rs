//! Changes to a root, as data: computed from a tree, printed as sentences, applied by [`super::root`].

use std::fmt;

/// One change to a server's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// Where, from the root; a leading `/` is allowed and means nothing.
    pub path: String,
    /// What is there afterwards.
    pub change: Change,
}

/// What an [`Edit`] leaves at its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A regular file; what was there (a link too) is replaced.
    File {
        /// The whole content.
        content: Vec<u8>,
        /// Permissions and owner.
        access: Access,
    },
    /// A symbolic link.
    Link {
        /// What it says, as it is written into the link.
        target: String,
    },
    /// A directory; one that exists keeps its content.
    Directory(Access),
    /// Nothing; gone already is fine. Never a directory.
    Absent,
}

/// Permissions and owner, as seen inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// User id inside.
    pub uid: u32,
    /// Group id inside.
    pub gid: u32,
}

impl Access {
    /// Root's own, with `mode`.
    pub const fn root(mode: u32) -> Self {
        Self { mode, uid: 0, gid: 0 }
    }
}

impl Edit {
    /// A file with all that is in it.
    pub fn file(path: impl Into<String>, access: Access, content: impl Into<Vec<u8>>) -> Self {
        Self { path: path.into(), change: Change::File { content: content.into(), access } }
    }

    /// A symbolic link.
    pub fn link(path: impl Into<String>, target: impl Into<String>) -> Self {
        Self { path: path.into(), change: Change::Link { target: target.into() } }
    }

    /// A directory.
    pub fn directory(path: impl Into<String>, access: Access) -> Self {
        Self { path: path.into(), change: Change::Directory(access) }
    }

    /// Nothing there.
    pub fn absent(path: impl Into<String>) -> Self {
        Self { path: path.into(), change: Change::Absent }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:04o} {}:{}", self.mode, self.uid, self.gid)
    }
}

/// The sentence of the edit. It never shows content: a hash or a private key may be in it.
impl fmt::Display for Edit {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.trim_start_matches('/');
        match &self.change {
            Change::File { access, .. } => write!(out, "write /{path} ({access})"),
            Change::Link { target } => write!(out, "link /{path} to {target}"),
            Change::Directory(access) => write!(out, "make directory /{path} ({access})"),
            Change::Absent => write!(out, "remove /{path}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_shows_no_secret() {
        let edit = Edit::file("etc/shadow", Access { mode: 0o640, uid: 0, gid: 42 }, "root:$6$secret:");
        assert_eq!(edit.to_string(), "write /etc/shadow (0640 0:42)");
        assert_eq!(Edit::link("/a", "b").to_string(), "link /a to b");
        assert_eq!(Edit::absent("/a").to_string(), "remove /a");
    }
}
