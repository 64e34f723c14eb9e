//! The guest's own file systems: proc, sysfs, cgroup2, /dev with its devpts, /run.

use std::fs::{DirBuilder, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use init::handover::Handover;
use kernel::mount::{Attributes, FileSystem};

use super::target;
use crate::failure::{During, Result};

/// A file system that every guest has.
struct Mount {
    target: &'static str,
    kind: &'static str,
    /// `key=value`, or a key alone.
    options: &'static [&'static str],
    attributes: Attributes,
}

const KERNEL: Attributes = Attributes::NOSUID.union(Attributes::NODEV).union(Attributes::NOEXEC);

/// In the order of mounting: what lies in another comes after it.
const MOUNTS: [Mount; 8] = [
    Mount { target: "/proc", kind: "proc", options: &[], attributes: KERNEL },
    // Read-only: what can be set there belongs to the host.
    Mount { target: "/sys", kind: "sysfs", options: &[], attributes: KERNEL.union(Attributes::READ_ONLY) },
    // The server's own subtree, because it has a cgroup namespace; writable, systemd needs it.
    Mount { target: "/sys/fs/cgroup", kind: "cgroup2", options: &[], attributes: KERNEL },
    // Only nodes, links and mount points go there. The nodes are mounts of the host's, with
    // attributes of their own.
    Mount {
        target: "/dev",
        kind: "tmpfs",
        options: &["mode=0755", "size=512k", "nr_inodes=2k"],
        attributes: Attributes::NOSUID.union(Attributes::NOEXEC),
    },
    // Every mount is an instance of its own (Linux ≥ 4.7). Group 5 is `tty` everywhere that
    // matters; grantpt(3) expects it so.
    Mount {
        target: "/dev/pts",
        kind: "devpts",
        options: &["ptmxmode=0666", "mode=0620", "gid=5"],
        attributes: Attributes::NOSUID.union(Attributes::NOEXEC),
    },
    Mount {
        target: "/dev/shm",
        kind: "tmpfs",
        options: &["mode=1777"],
        attributes: Attributes::NOSUID.union(Attributes::NODEV),
    },
    Mount { target: "/dev/mqueue", kind: "mqueue", options: &[], attributes: KERNEL },
    Mount {
        target: "/run",
        kind: "tmpfs",
        options: &["mode=0755", "size=20%"],
        attributes: Attributes::NOSUID.union(Attributes::NODEV),
    },
];

/// Links that programs expect in /dev. No `/dev/core`: it would lead to /proc/kcore.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Mounts them all below `root`, which may lack the directories.
pub fn mount_all(root: &OwnedFd) -> Result<()> {
    for mount in &MOUNTS {
        let failed = || format!("mount {} at {}", mount.kind, mount.target);
        let place = target::directory(root, Path::new(mount.target)).during(failed)?;
        let tree = match create(mount) {
            // A kernel without POSIX message queues is no reason to refuse a server.
            Err(error) if mount.kind == "mqueue" => {
                log::warn!("no /dev/mqueue: {}", crate::failure::chain(&error));
                continue;
            }
            tree => tree.during(failed)?,
        };
        tree.attach_over(place.as_fd()).during(failed)?;
    }
    let dev = target::directory(root, Path::new("/dev")).during(|| "open /dev".into())?;
    for (name, to) in LINKS {
        target::link(&dev, name, to).during(|| format!("make /dev/{name}"))?;
    }
    Ok(())
}

fn create(mount: &Mount) -> kernel::Result<kernel::mount::Tree> {
    let mut file_system = FileSystem::new(mount.kind)?;
    // What /proc/mounts shows as the device.
    file_system.option("source", mount.kind)?;
    for option in mount.options {
        match option.split_once('=') {
            Some((key, value)) => file_system.option(key, value)?,
            None => file_system.flag(option)?,
        };
    }
    file_system.mount(mount.attributes)
}

/// What the guest's init looks for in /run (systemd's CONTAINER_INTERFACE), inside the new root.
pub fn fill_run(handover: &Handover) -> Result<()> {
    directory("/run/host", 0o755)?;
    write("/run/host/container-manager", "vsos\n")?;
    write("/run/host/container-uuid", &format!("{}\n", handover.uuid))?;
    directory("/run/lock", 0o1777)?;
    if handover.seccomp.is_some_and(|profile| profile.migratable) {
        without_pressure_triggers()?;
    }
    Ok(())
}

/// Tells systemd (≥ 254) not to wait for memory pressure, for itself or its services: no checkpoint can hold a trigger of the kernel's, and who
/// waits at a file that has lost its own is woken for ever. What the guest says in /etc comes after this, and wins.
fn without_pressure_triggers() -> Result<()> {
    const DIRECTORY: &str = "/run/systemd/system.conf.d";
    directory(DIRECTORY, 0o755)?;
    write(&format!("{DIRECTORY}/10-migratable.conf"), "[Manager]\nDefaultMemoryPressureWatch=off\n")
}

/// Makes a directory with a mode that the umask does not change.
pub fn directory(path: &str, mode: u32) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(mode).create(path);
    made.and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(mode))).during(|| format!("make {path}"))
}

fn write(path: &str, text: &str) -> Result<()> {
    std::fs::write(path, text).during(|| format!("write {path}"))
}
