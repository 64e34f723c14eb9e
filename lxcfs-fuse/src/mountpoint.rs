//! The mount at `DIR/mount`: making it, finding it, taking it away.
//!
//! Limit: never looks into the mount. Only `/proc/self/mountinfo` is asked, which answers for a dead or hung file
//! system too.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use kernel::fuse::Connections;
use kernel::mount::{Attributes, FileSystem, MountInfo, parse_mountinfo};
use rustix::fs::{Mode, OFlags};

/// Mounts stacked on one path are taken away up to this many; more is somebody else's loop.
const STACK_MAX: usize = 32;

/// Opens `/dev/fuse` and mounts it at `target`, private and read-only. The descriptor is the connection: the kernel's
/// INIT message can be read from it.
pub fn mount(target: &Path) -> Result<OwnedFd, kernel::Error> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let connection = rustix::fs::open("/dev/fuse", flags, Mode::empty())
        .map_err(|error| kernel::Error::new("open", "/dev/fuse", error))?;
    keep_private(target)?;
    let mut fuse = FileSystem::new("fuse")?;
    fuse.option("source", "lxcfs-fuse")?.option("subtype", "lxcfs-fuse")?;
    fuse.option("fd", connection.as_raw_fd().to_string())?.option("rootmode", "40000")?;
    fuse.option("user_id", "0")?.option("group_id", "0")?;
    // Guests have ids of their own and must be let in; the kernel checks modes, so no question costs us a request.
    fuse.flag("allow_other")?.flag("default_permissions")?;
    // Read-only as a whole: else each direct read makes the kernel forget the cached attributes (its access time).
    fuse.flag("ro")?;
    let restricted = Attributes::READ_ONLY | Attributes::NOSUID | Attributes::NODEV | Attributes::NOEXEC;
    fuse.mount(restricted)?.attach(target)?;
    Ok(connection)
}

/// Makes `target` a private mount of its own if the mount it is in would pass what is mounted there on to others.
fn keep_private(target: &Path) -> Result<(), kernel::Error> {
    let mounts = mounts()?;
    let around = mounts.iter().filter(|mount| target.starts_with(&mount.mount_point));
    // Of several on one path the last one is on top, and that is the one max_by_key gives.
    let nearest = around.max_by_key(|mount| mount.mount_point.components().count());
    let shared = nearest.is_some_and(|mount| mount.propagation.iter().any(|tag| tag.starts_with("shared:")));
    if shared { kernel::mount::bind_private(target) } else { Ok(()) }
}

/// What is mounted exactly at `target`, bottom first.
pub fn mounted_at(target: &Path) -> Result<Vec<MountInfo>, kernel::Error> {
    let mut mounts = mounts()?;
    mounts.retain(|mount| mount.mount_point == target);
    Ok(mounts)
}

/// Takes away all that is mounted at `target`; what is still used there goes with its last user.
pub fn clear(target: &Path) -> Result<(), kernel::Error> {
    for _ in 0..STACK_MAX {
        if mounted_at(target)?.is_empty() {
            return Ok(());
        }
        // Whole if nobody is in it, lazily otherwise.
        if kernel::mount::unmount(target).is_err() {
            kernel::mount::detach(target)?;
        }
    }
    let still = std::io::Error::from_raw_os_error(libc::EBUSY);
    Err(kernel::Error::new("unmount", target.display(), still))
}

/// Ends the connection of the FUSE file system at `target` for all who wait for it, whoever still holds descriptors of it.
pub fn abort(target: &Path) -> Result<(), kernel::Error> {
    let mounts = mounted_at(target)?;
    let mut fuse = mounts.iter().filter(|mount| mount.kind.starts_with("fuse")).peekable();
    if fuse.peek().is_none() {
        return Ok(());
    }
    let connections = Connections::open()?;
    fuse.try_for_each(|mount| connections.abort(mount.minor).map(drop))
}

fn mounts() -> Result<Vec<MountInfo>, kernel::Error> {
    let path = "/proc/self/mountinfo";
    let text = std::fs::read(path).map_err(|error| kernel::Error::new("read", path, error))?;
    Ok(parse_mountinfo(&String::from_utf8_lossy(&text)))
}
