//! Steps on files: directories, reservations, volumes, the spec and the record.

use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::template::family::Family;
use crate::template::host_keys;
use crate::template::personalise::{self, Identity};
use crate::template::root::Root;
use crate::template::{copy_tree, remove_tree};

/// A change to files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FilesStep {
    /// A new directory; its undo removes the whole tree.
    MakeDirectory {
        /// Where.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// A new small file that says who has the thing it is named after.
    Reserve {
        /// The file.
        path: PathBuf,
        /// Who has it.
        owner: String,
    },
    /// A full copy of a tree, owners, links and attributes kept; shared blocks where the file system can.
    CopyTree {
        /// What is copied.
        from: PathBuf,
        /// The copy, which does not exist yet.
        to: PathBuf,
    },
    /// The files of a root that differ from server to server.
    Personalise {
        /// The layer below an overlay's; none for a full copy.
        lower: Option<PathBuf>,
        /// Where the changed files go: an overlay's upper directory, or the copy itself.
        writable: PathBuf,
        /// The template's distribution family.
        family: String,
        /// What is written. Passwords are not for the journal, and the undo does not need them.
        #[serde(skip)]
        identity: Option<Box<Identity>>,
    },
    /// A file with its whole content.
    WriteFile {
        /// Where.
        path: PathBuf,
        /// The content.
        text: String,
    },
}

impl FilesStep {
    /// Makes the change.
    ///
    /// # Errors
    /// When the file system refuses, or the thing exists.
    pub fn apply(&self) -> Result<()> {
        match self {
            Self::MakeDirectory { path, mode } => Ok(DirBuilder::new().mode(*mode).create(path)?),
            // On the disk before anybody hears of it: a number that was lost would be given to a second server.
            Self::Reserve { path, owner } => Ok(kernel::file::create_exclusive(path, owner.as_bytes())?),
            Self::CopyTree { from, to } => {
                let copied = copy_tree(from, to);
                if copied.is_err() {
                    // A copy that stopped half way is not left for the undo: the step failed, so it left nothing.
                    remove_tree(to)?;
                }
                Ok(copied?)
            }
            Self::Personalise { lower, writable, family, identity } => {
                let identity = identity.as_deref().context("a plan read from a journal is only taken back")?;
                personalise(lower.as_deref(), writable, family, identity)
            }
            Self::WriteFile { path, text } => Ok(kernel::file::write_atomic(path, text.as_bytes())?),
        }
    }

    /// Takes the change back.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn undo(&self) -> Result<()> {
        match self {
            Self::MakeDirectory { path, .. } | Self::CopyTree { to: path, .. } => remove_tree(path),
            Self::Reserve { path, owner } => match fs::read_to_string(path) {
                // Empty: the crash came between making and writing. Another's text: not ours to remove.
                Ok(text) if text == *owner || text.is_empty() => remove_file(path),
                Ok(_) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error.into()),
            },
            // The directory that holds it goes as a whole.
            Self::Personalise { .. } => Ok(()),
            Self::WriteFile { path, .. } => remove_file(path),
        }
    }
}

/// Writes what makes the root the server's own.
fn personalise(lower: Option<&Path>, writable: &Path, family: &str, identity: &Identity) -> Result<()> {
    let root = match lower {
        Some(lower) => Root::overlay(writable, lower)?,
        None => Root::directory(writable)?,
    };
    let mut identity = identity.clone();
    let mut edits = Vec::new();
    if identity.host_keys.is_none() && host_keys::wanted(&root)? {
        let hostname = identity.hostname.as_deref().unwrap_or("localhost");
        match host_keys::generate(hostname, writable.parent().unwrap_or(writable))? {
            Some(keys) => identity.host_keys = Some(keys),
            None => edits.extend(host_keys::at_first_boot()),
        }
    }
    edits.extend(personalise::plan(&root, Family::named(family), &identity)?);
    root.apply(&edits)
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

impl fmt::Display for FilesStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeDirectory { path, .. } => write!(out, "make directory {}", path.display()),
            Self::Reserve { path, owner } => write!(out, "reserve {} for {owner}", path.display()),
            Self::CopyTree { from, to } => write!(out, "copy {} to {}", from.display(), to.display()),
            Self::Personalise { writable, .. } => write!(out, "personalise {}", writable.display()),
            Self::WriteFile { path, .. } => write!(out, "write {}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservation_is_exclusive_and_only_its_owner_undoes_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("7");
        let of = |owner: &str| FilesStep::Reserve { path: path.clone(), owner: owner.into() };
        of("web1").apply().unwrap();
        assert!(of("web2").apply().is_err());
        of("web2").undo().unwrap();
        assert!(path.exists());
        of("web1").undo().unwrap();
        of("web1").undo().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn undoing_a_directory_does_not_follow_links_out_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let outside = directory.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "").unwrap();
        let step = FilesStep::MakeDirectory { path: directory.path().join("volume"), mode: 0o700 };
        step.apply().unwrap();
        std::os::unix::fs::symlink(&outside, directory.path().join("volume/link")).unwrap();
        step.undo().unwrap();
        assert!(outside.join("kept").exists() && !directory.path().join("volume").exists());
    }
}
