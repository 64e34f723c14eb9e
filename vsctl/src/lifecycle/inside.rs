//! Who stands in a server's new namespaces before its init runs: the stage of a start, or a CRIU that restores.

use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::Result;
use kernel::mount::Tree;
use kernel::namespace;

use super::restore::Restore;
use super::stage::Stage;

/// The process in the new namespaces.
#[derive(Debug)]
pub enum Inside {
    /// Of a start.
    Stage(Stage),
    /// Of a restore.
    Restore(Restore),
}

impl Inside {
    fn pid(&self) -> i32 {
        match self {
            Self::Stage(stage) => stage.pid(),
            Self::Restore(restore) => restore.pid(),
        }
    }

    /// The server's network namespace.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn network_namespace(&self) -> Result<OwnedFd> {
        Ok(namespace::open(self.pid(), "net")?)
    }

    /// The server's user namespace.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn user_namespace(&self) -> Result<OwnedFd> {
        Ok(namespace::open(self.pid(), "user")?)
    }

    /// Whether the server has ids of its own, in a user namespace.
    pub fn has_ids(&self) -> bool {
        match self {
            Self::Stage(stage) => stage.has_ids(),
            Self::Restore(restore) => restore.has_ids(),
        }
    }

    /// Has the overlay of `lower` and `volume` mounted in the server's user namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mount_overlay(&self, lower: &Tree, volume: &Tree) -> Result<Tree> {
        match self {
            Self::Stage(stage) => stage.mount_overlay(lower, volume),
            Self::Restore(restore) => restore.mount_overlay(lower, volume),
        }
    }

    /// Tells that the root is now attached at `target` on the host. A stage's init gets it by descriptor.
    ///
    /// # Errors
    /// When it cannot be shown inside.
    pub fn show_root(&self, target: &Path) -> Result<()> {
        match self {
            Self::Stage(_) => Ok(()),
            Self::Restore(restore) => restore.show_root(&Tree::clone_of(target)?, target),
        }
    }

    /// Ends the process.
    pub fn end(&self) {
        match self {
            Self::Stage(stage) => stage.end(),
            Self::Restore(restore) => restore.end(),
        }
    }
}
