//! Mounts: detached trees, new file systems, propagation, pivoting into a new root, and what is mounted where.
//!
//! Everything goes by descriptors and the new mount API (fsopen, open_tree, move_mount; Linux ≥ 5.2, mount_setattr ≥ 5.12):
//! a mount is made and dressed where no path leads to it, and shown at its place in one call.

mod filesystem;
mod mountinfo;
mod tree;

use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};

pub use filesystem::FileSystem;
pub use mountinfo::{MountInfo, parse_mountinfo};
pub use tree::{Attributes, Tree};

use crate::Result;
use crate::error::During;

/// Unmounts `target`; EBUSY when something is open there. A final symbolic link is not followed.
pub fn unmount(target: &Path) -> Result<()> {
    rustix::mount::unmount(target, UnmountFlags::NOFOLLOW).during("unmount", target.display())
}

/// Takes `target` and what is mounted below it out of the name space at once; it goes when its last user does
/// (`MNT_DETACH`). Not mounted, or not there, is fine: it is gone.
pub fn detach(target: &Path) -> Result<()> {
    match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        other => other.during("detach mount", target.display()),
    }
}

/// Makes `directory` a mount point of its own, private: what is mounted below it stays out of every other namespace.
pub fn bind_private(directory: &Path) -> Result<()> {
    Tree::clone_recursive(directory)?.attach(directory)?;
    change(directory, MountPropagationFlags::PRIVATE, "make mount private")
}

/// No mount event crosses `path` or anything below, in either direction.
pub fn make_private_recursive(path: &Path) -> Result<()> {
    change(path, MountPropagationFlags::PRIVATE | MountPropagationFlags::REC, "make mounts private")
}

/// Mount events come in from the peer group and none goes out, for `path` and everything below.
pub fn make_slave_recursive(path: &Path) -> Result<()> {
    // MS_SLAVE; rustix has named this flag by its modern word.
    change(path, MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC, "make mounts slaves")
}

fn change(path: &Path, flags: MountPropagationFlags, operation: &'static str) -> Result<()> {
    rustix::mount::mount_change(path, flags).during(operation, path.display())
}

/// Makes `new_root` (a mount point) the root of the caller's mount namespace and lets the old root go.
///
/// The caller's working directory is the new root after it. EINVAL: `new_root` is no mount point, or the mounts above are
/// shared (pivot_root(2)).
pub fn pivot_into(new_root: &Path) -> Result<()> {
    rustix::process::chdir(new_root).during("enter", new_root.display())?;
    // With both paths the same the old root is stacked on the new one, so no directory is needed to put it in.
    rustix::process::pivot_root(".", ".").during("pivot root into", new_root.display())?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).during("detach", "old root")?;
    rustix::process::chdir("/").during("enter", "new root")
}

/// Whether a mount begins at `path` (statx(2) `STATX_ATTR_MOUNT_ROOT`); a final symbolic link is not followed.
pub fn is_mount_point(path: &Path) -> Result<bool> {
    // Without the automount flag a look would mount what autofs offers there.
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let found = rustix::fs::statx(CWD, path, flags, StatxFlags::TYPE).during("stat", path.display())?;
    Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}
