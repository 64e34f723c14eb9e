//! Removing whole trees, and nothing of what is mounted in them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::failure::{Exit, Failure};

/// Removes the tree `path`; gone already is fine.
///
/// # Errors
/// When something is mounted in it: a program that was killed may have left the host's /proc or /sys there, and
/// `remove_dir_all` would go into it.
pub fn remove_tree(path: &Path) -> Result<()> {
    let full = match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("look at {}", path.display()))?,
    };
    let table = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    if let Some(mounted) = mounted_in(&table, &full) {
        let message = format!("{} stays: something is mounted on {}", path.display(), mounted.display());
        return Err(Failure::new(Exit::System, message).hint(format!("umount {}", mounted.display())).into());
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The last mount at or below `path`, which is the one to unmount first.
fn mounted_in(mountinfo: &str, path: &Path) -> Option<PathBuf> {
    let mounts = kernel::mount::parse_mountinfo(mountinfo);
    mounts.into_iter().map(|mount| mount.mount_point).rfind(|point| point.starts_with(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_in_the_tree_are_seen_and_others_not() {
        let table = "22 1 254:0 / / rw - ext4 /dev/vda rw\n\
                     30 22 0:5 / /var/lib/vsos/.new-a/root/proc rw - proc proc rw\n\
                     31 30 0:6 / /var/lib/vsos/.new-a/root/proc/x\\040y rw - tmpfs tmpfs rw\n\
                     32 22 0:7 / /var/lib/vsos/.new-ab rw - tmpfs tmpfs rw\n";
        let mounted = |path: &str| mounted_in(table, Path::new(path)).map(|point| point.display().to_string());
        assert_eq!(mounted("/var/lib/vsos/.new-a").unwrap(), "/var/lib/vsos/.new-a/root/proc/x y");
        assert_eq!(mounted("/var/lib/vsos/.new-ab").unwrap(), "/var/lib/vsos/.new-ab");
        assert_eq!(mounted("/var/lib/vsos/b"), None);
    }

    #[test]
    fn a_tree_goes_and_may_be_gone() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        std::os::unix::fs::symlink(directory.path(), tree.join("a/up")).unwrap();
        remove_tree(&tree).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && directory.path().exists());
    }
}
