//! Full copies of a root, for volumes that are plain directories.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::remove_tree;
use crate::failure::{Exit, Failure};

/// Copies the tree `from` to the new directory `to`: reflinks where the file system can, else copies that stay
/// sparse; hard links, owners, times, ACLs and attributes are kept. GNU cp(1) does all of it. On failure `to` is gone.
pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    if to.symlink_metadata().is_ok() {
        return Err(Failure::new(Exit::Exists, format!("{} exists already", to.display())).into());
    }
    let mut cp = Command::new("cp");
    cp.args(["--archive", "--reflink=auto", "--sparse=auto", "--no-target-directory", "--"]).arg(from).arg(to);
    let output = cp.env("LC_ALL", "C").stdin(Stdio::null()).output().context("run cp")?;
    if output.status.success() {
        // Before anybody counts on it: cp leaves all of it to be written some time.
        let copied = File::open(to).with_context(|| format!("open {}", to.display()))?;
        return rustix::fs::syncfs(&copied).with_context(|| format!("bring {} to the disk", to.display()));
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let failure = if said.contains("No space left on device") || said.contains("Disk quota exceeded") {
        Failure::new(Exit::NoSpace, format!("the disk is full while copying to {}", to.display()))
    } else {
        let first = said.lines().next().unwrap_or("cp gave no reason");
        Failure::new(Exit::Failed, format!("cannot copy {} to {}: {first}", from.display(), to.display()))
    };
    match remove_tree(to) {
        Ok(()) => Err(failure.into()),
        Err(error) => Err(anyhow::Error::from(failure).context(format!("{} is left behind ({error:#})", to.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn links_holes_and_times_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir(&from).unwrap();
        fs::write(from.join("a"), "x").unwrap();
        fs::hard_link(from.join("a"), from.join("b")).unwrap();
        symlink("/etc/a", from.join("link")).unwrap();
        fs::File::create(from.join("hole")).unwrap().set_len(8 << 20).unwrap();
        let meta = |path: &Path| fs::symlink_metadata(path).unwrap();
        copy_tree(&from, &to).unwrap();
        assert_eq!(meta(&to.join("a")).ino(), meta(&to.join("b")).ino());
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/etc/a"));
        assert!(meta(&to.join("hole")).blocks() * 512 < 1 << 20);
        assert_eq!(meta(&to.join("a")).mtime_nsec(), meta(&from.join("a")).mtime_nsec());
        assert!(copy_tree(&from, &to).is_err());
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("to");
        assert!(copy_tree(&directory.path().join("missing"), &to).is_err());
        assert!(!to.exists());
    }
}
