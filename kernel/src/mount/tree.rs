//! A mount that has no place in the name space yet.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use bitflags::bitflags;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use crate::error::During;
use crate::{Result, sys};

bitflags! {
    /// What a mount forbids; the bits are the kernel's `MOUNT_ATTR_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Attributes: u32 {
        /// No writes.
        const READ_ONLY = 0x1;
        /// Set-user-id bits and file capabilities have no effect.
        const NOSUID = 0x2;
        /// Device nodes cannot be opened.
        const NODEV = 0x4;
        /// Nothing can be executed.
        const NOEXEC = 0x8;
    }
}

/// A detached mount, held by its descriptor; dropping it unattached unmounts it.
///
/// A mount has one place: to show the same files at a second one, or in a second mount namespace, attach a clone.
/// A clone is private, whatever the mount that it was made from: what is mounted on one is never seen on the other.
/// Once attached the descriptor still names the mount, and keeps it busy for `unmount`.
#[derive(Debug)]
pub struct Tree(OwnedFd);

impl Tree {
    /// A new mount of what is at `path`, without the mounts below it.
    pub fn clone_of(path: &Path) -> Result<Tree> {
        let tree = Self::open(path, OpenTreeFlags::OPEN_TREE_CLONE)?;
        tree.set_private(false)?;
        Ok(tree)
    }

    /// A new mount of what is at `path`, with copies of the mounts below it.
    pub fn clone_recursive(path: &Path) -> Result<Tree> {
        let tree = Self::open(path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE)?;
        tree.set_private(true)?;
        Ok(tree)
    }

    /// A new mount of what `descriptor` names, for example a directory that was opened below an untrusted root.
    pub fn clone_of_descriptor(descriptor: BorrowedFd<'_>) -> Result<Tree> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(descriptor, "", flags).map(Tree);
        let tree = tree.during("clone mount of", "open descriptor")?;
        tree.set_private(false)?;
        Ok(tree)
    }

    /// Not a clone: the attached mount at `path` itself, for changing its attributes.
    pub fn existing(path: &Path) -> Result<Tree> {
        Self::open(path, OpenTreeFlags::empty())
    }

    fn open(path: &Path, flags: OpenTreeFlags) -> Result<Tree> {
        rustix::mount::open_tree(CWD, path, flags | OpenTreeFlags::OPEN_TREE_CLOEXEC)
            .map(Tree)
            .during("clone mount of", path.display())
    }

    /// Ids on this mount are seen through the map of `user_namespace` (`MOUNT_ATTR_IDMAP`): the owner 0 on disk is
    /// the namespace's root. Only on a detached mount, once; EINVAL when the file system cannot do it.
    pub fn set_idmap(&self, user_namespace: BorrowedFd<'_>) -> Result<()> {
        use std::os::fd::AsRawFd;
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: user_namespace.as_raw_fd() as u64,
        };
        sys::mount_setattr(self.0.as_fd(), false, &attributes).during("set id map of", "mount")
    }

    /// Adds attributes; none is taken away. With `recursive` to the mounts below it too, all or nothing.
    pub fn set_attributes(&self, set: Attributes, recursive: bool) -> Result<()> {
        let attributes =
            libc::mount_attr { attr_set: u64::from(set.bits()), attr_clr: 0, propagation: 0, userns_fd: 0 };
        sys::mount_setattr(self.0.as_fd(), recursive, &attributes)
            .during("set attributes of mount", format_args!("{set:?}"))
    }

    /// Makes this mount (and with `recursive` those below it) private before it is attached.
    fn set_private(&self, recursive: bool) -> Result<()> {
        let attributes = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
        sys::mount_setattr(self.0.as_fd(), recursive, &attributes).during("make private", "mount")
    }

    /// Shows the mount at `target`, which must be there; a final symbolic link is not followed.
    pub fn attach(&self, target: &Path) -> Result<()> {
        rustix::mount::move_mount(&self.0, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .during("attach mount at", target.display())
    }

    /// Shows the mount over what `target` names: for places that were opened with care (see `file::open_beneath`).
    pub fn attach_over(&self, target: BorrowedFd<'_>) -> Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(&self.0, "", target, "", flags).during("attach mount over", "open descriptor")
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Tree {
    fn from(fd: OwnedFd) -> Self {
        Tree(fd)
    }
}

impl From<Tree> for OwnedFd {
    fn from(tree: Tree) -> Self {
        tree.0
    }
}
