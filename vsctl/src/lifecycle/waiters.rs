//! Processes that were killed and do not end, because they wait for a file system that the guest itself serves (FUSE).
//!
//! The kernel lets such a waiter go only when the connection ends, and that may never be: the waiter itself, or another one, may
//! hold the last descriptor of it. So the connection is ended from here. Not those that anybody outside the server sees as well: a
//! FUSE mount of the host's that the spec binds into the server, and the overlay of `/proc`.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};
use kernel::cgroup::Group;
use kernel::fuse::Connections;
use kernel::mount::{MountInfo, parse_mountinfo};
use nix::libc;

/// Ends the FUSE connections that only the processes of `group` see. How many.
///
/// # Errors
/// When the kernel tells of no mounts, or refuses.
pub fn let_go(group: &Group) -> Result<usize> {
    let mut outside = connections_seen_by("self")?;
    // This command may be in a mount namespace of its own.
    outside.extend(connections_seen_by("1")?);
    let mut inside = BTreeSet::new();
    for pid in group.processes()? {
        inside.extend(connections_seen_by(&pid.to_string())?);
    }
    let own: Vec<u32> = inside.difference(&outside).copied().collect();
    if own.is_empty() {
        return Ok(0);
    }
    let connections = Connections::open()?;
    for connection in &own {
        connections.abort(*connection)?;
    }
    Ok(own.len())
}

/// The FUSE connections mounted where process `pid` is; none when it has ended.
fn connections_seen_by(pid: &str) -> Result<BTreeSet<u32>> {
    let table = format!("/proc/{pid}/mountinfo");
    match fs::read_to_string(&table) {
        Ok(text) => Ok(connections(&parse_mountinfo(&text))),
        // EINVAL: it has left its namespaces already.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::EINVAL)) => {
            Ok(BTreeSet::new())
        }
        Err(error) => Err(error).with_context(|| format!("read {table}")),
    }
}

/// By the minor numbers of their anonymous devices, which are also the names of the control files.
fn connections(mounts: &[MountInfo]) -> BTreeSet<u32> {
    mounts.iter().filter(|mount| mount.major == 0 && mount.is_fuse()).map(|mount| mount.minor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_those_of_fuse_on_anonymous_devices() {
        let text = "30 1 0:44 / /a rw - fuse.sshfs host rw\n31 1 0:45 / /b rw - fuse test rw\n\
                    32 1 0:46 / /c rw - fusectl none rw\n33 1 8:1 / /d rw - fuseblk /dev/sda1 rw\n34 1 0:44 /x /e rw - fuse.sshfs host rw\n";
        assert_eq!(connections(&parse_mountinfo(text)), BTreeSet::from([44, 45]));
    }
}
