//! What the guest may not read or change in proc and sysfs although its mounts show it.
//!
//! Runs inside the new root, where /proc and /sys are the kernel's and no link leads elsewhere.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use kernel::mount::{Attributes, Tree};
use rustix::fs::{Access, CWD, Mode, OFlags};

use super::file_systems;
use crate::failure::{During, Result};

/// What covers a masked file or directory: empty, and mounted read-only. systemd-nspawn has the
/// same place for it.
const EMPTY_FILE: &str = "/run/host/inaccessible/reg";
const EMPTY_DIRECTORY: &str = "/run/host/inaccessible/dir";

/// Settings below /proc/sys that belong to the server's own namespaces (network, IPC, user,
/// UTS): they stay writable when /proc/sys becomes read-only, where the kernel lets the server
/// write them at all.
const OWN_SETTINGS: [&str; 17] = [
    "/proc/sys/net",
    "/proc/sys/user",
    "/proc/sys/fs/mqueue",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/domainname",
    "/proc/sys/kernel/msgmax",
    "/proc/sys/kernel/msgmnb",
    "/proc/sys/kernel/msgmni",
    "/proc/sys/kernel/msg_next_id",
    "/proc/sys/kernel/sem",
    "/proc/sys/kernel/sem_next_id",
    "/proc/sys/kernel/shmall",
    "/proc/sys/kernel/shmmax",
    "/proc/sys/kernel/shmmni",
    "/proc/sys/kernel/shm_next_id",
    "/proc/sys/kernel/shm_rmid_forced",
    "/proc/sys/kernel/pid_max",
];

/// Covers `masked` and makes `read_only` so; what does not exist is passed over.
pub fn hide(masked: &[PathBuf], read_only: &[PathBuf]) -> Result<()> {
    file_systems::directory("/run/host/inaccessible", 0o755)?;
    file_systems::directory(EMPTY_DIRECTORY, 0o000)?;
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::open(EMPTY_FILE, flags, Mode::empty()).during(|| format!("make {EMPTY_FILE}"))?;
    // Read-only first: a mask inside a read-only tree lies on top of it.
    for path in read_only.iter().filter(|path| exists(path)) {
        make_read_only(path).during(|| format!("make {} read-only", path.display()))?;
    }
    for path in masked {
        let found = match path.metadata() {
            Ok(found) => found,
            // What cannot be looked at here, nobody inside can look at either.
            Err(error) if is_out_of_sight(&error) => continue,
            Err(error) => return Err(error).during(|| format!("look at {}", path.display())),
        };
        mask(path, found.is_dir()).during(|| format!("mask {}", path.display()))?;
    }
    Ok(())
}

fn is_out_of_sight(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::PermissionDenied)
}

fn exists(path: &Path) -> bool {
    rustix::fs::access(path, Access::EXISTS).is_ok()
}

fn mask(path: &Path, is_directory: bool) -> kernel::Result<()> {
    let cover = if is_directory { EMPTY_DIRECTORY } else { EMPTY_FILE };
    let tree = Tree::clone_of(Path::new(cover))?;
    tree.set_attributes(Attributes::READ_ONLY | Attributes::NOSUID | Attributes::NODEV | Attributes::NOEXEC, false)?;
    tree.attach(path)
}

fn make_read_only(path: &Path) -> kernel::Result<()> {
    // Taken before the tree above them becomes read-only, shown on top of it after.
    let own = own_settings_below(path)?;
    // Recursive, so that what lies mounted below (FUSE files) stays visible.
    let tree = Tree::clone_recursive(path)?;
    tree.set_attributes(Attributes::READ_ONLY, true)?;
    tree.attach(path)?;
    own.into_iter().try_for_each(|(path, tree)| tree.attach(path))
}

fn own_settings_below(path: &Path) -> kernel::Result<Vec<(&'static Path, Tree)>> {
    let own = OWN_SETTINGS.iter().map(Path::new).filter(|own| own.starts_with(path));
    // A file that the host's root owns could not be written anyway: one mount less.
    let writable = |own: &&Path| {
        let flags = rustix::fs::AtFlags::EACCESS;
        own.is_dir() || rustix::fs::accessat(CWD, *own, Access::WRITE_OK, flags).is_ok()
    };
    own.filter(|own| exists(own)).filter(writable).map(|own| Ok((own, Tree::clone_recursive(own)?))).collect()
}
