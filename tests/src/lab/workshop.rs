//! Where the lab works: `target/lab`, and in it the directory of this run.
//!
//! ```text
//! target/lab/cache/KIND-DIGEST/     finished pieces, shared by all runs: host trees, templates, images
//! target/lab/cache/KIND-DIGEST.lock held while one is made
//! target/lab/runs/PID/              disks, keys and logs of one run; removed at its end, or by the next run
//! target/lab/runs/PID/PART/HOST/    a host of a part of it
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::command::Invocation;

/// What a whole set of images and the disks of a run take, in bytes; less free space is an error at the start.
const ROOM_BYTES: u64 = 6 << 30;

/// The directories of one run.
pub struct Workshop {
    tree: PathBuf,
    cache: PathBuf,
    run: PathBuf,
}

impl Workshop {
    /// Opens the workshop of the checkout `tree` with its build directory `target`, and sweeps up after runs that were
    /// killed.
    ///
    /// # Errors
    /// When there is too little room, or qemu is missing.
    pub fn open(tree: &Path, target: &Path) -> Result<Self> {
        let lab = target.join("lab");
        let run = lab.join("runs").join(std::process::id().to_string());
        fs::create_dir_all(&run).with_context(|| format!("make {}", run.display()))?;
        let lab = lab.canonicalize().context("find target/lab")?;
        let tree = tree.canonicalize().context("find the tree")?;
        let run = lab.join("runs").join(std::process::id().to_string());
        let workshop = Self { tree, cache: lab.join("cache"), run };
        fs::create_dir_all(&workshop.cache).context("make the lab's cache")?;
        sweep(&lab.join("runs"));
        workshop.check()?;
        Ok(workshop)
    }

    fn check(&self) -> Result<()> {
        for (program, package) in [
            ("qemu-system-x86_64", "qemu-system-x86"),
            ("mmdebstrap", "mmdebstrap"),
            ("mke2fs", "e2fsprogs"),
            ("ssh", "openssh-client"),
            ("busybox", "busybox-static"),
        ] {
            let found = std::env::var_os("PATH")
                .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).is_file()));
            ensure!(found, "{program} is not installed: `make setup` installs it (package {package})");
        }
        let room = rustix::fs::statvfs(&self.cache).context("look for room in target/lab")?;
        let free = room.f_bavail * room.f_frsize;
        ensure!(
            free >= ROOM_BYTES,
            "the lab needs {} GiB of room in {}, and {:.1} GiB are free",
            ROOM_BYTES >> 30,
            self.cache.display(),
            free as f64 / f64::from(1 << 30)
        );
        Ok(())
    }

    /// The checkout.
    pub fn tree(&self) -> &Path {
        &self.tree
    }

    /// A part of this run with a directory of its own.
    ///
    /// # Errors
    /// When there is one of that name, or it cannot be made.
    pub fn part(&self, name: &str) -> Result<Self> {
        let run = self.run.join(name);
        fs::create_dir(&run).with_context(|| format!("make {}", run.display()))?;
        Ok(Self { tree: self.tree.clone(), cache: self.cache.clone(), run })
    }

    /// What its hosts have written to their serial lines, each time that they were switched on, by the name of the file.
    pub fn serial_logs(&self) -> BTreeMap<String, String> {
        let mut logs = BTreeMap::new();
        for host in fs::read_dir(&self.run).into_iter().flatten().flatten() {
            for file in fs::read_dir(host.path()).into_iter().flatten().flatten() {
                let name = file.path().strip_prefix(&self.run).unwrap_or(&file.path()).display().to_string();
                if name.contains("/serial-") {
                    let bytes = fs::read(file.path()).unwrap_or_default();
                    logs.insert(name, String::from_utf8_lossy(&bytes).into_owned());
                }
            }
        }
        logs
    }

    /// The directory of this run.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The directory of the piece `kind` that is made from `ingredients`: as it is when it is there, else `make` fills it.
    ///
    /// It is made beside its place and renamed, so a piece is whole or not there. Two runs that need it make it once.
    ///
    /// # Errors
    /// What `make` says.
    pub fn piece(&self, kind: &str, ingredients: &[&str], make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let name = format!("{kind}-{}", digest(ingredients));
        let place = self.cache.join(&name);
        let lock = self.cache.join(format!("{name}.lock"));
        let lock = File::create(&lock).with_context(|| format!("open {}", lock.display()))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| anyhow!("lock {name}: {errno}"))?;
        if place.exists() {
            return Ok(place);
        }
        let part = self.cache.join(format!("{name}.part"));
        remove(&part)?;
        fs::create_dir(&part).with_context(|| format!("make {}", part.display()))?;
        eprintln!("lab: making {kind} (kept for later runs)");
        make(&part).with_context(|| format!("make {kind}"))?;
        self.forget(kind, &name);
        fs::rename(&part, &place).with_context(|| format!("put {name} into its place"))?;
        Ok(place)
    }

    /// Removes older pieces of a kind: the tree has moved on. One that another run still reads keeps its open files.
    fn forget(&self, kind: &str, keep: &str) {
        for entry in fs::read_dir(&self.cache).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let older = name.strip_prefix(kind).is_some_and(|rest| rest.len() == 17 && rest.starts_with('-'));
            if older && name != keep {
                let _ = remove(&entry.path());
                let _ = fs::remove_file(self.cache.join(format!("{name}.lock")));
            }
        }
    }

    /// The digest of files of the tree, by their paths and contents: what is made from them is made anew when they change.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn digest_of(&self, paths: &[&str]) -> Result<String> {
        let mut files = Vec::new();
        for path in paths {
            list(&self.tree.join(path), &mut files)?;
        }
        files.sort();
        let mut parts = Vec::new();
        for file in files {
            parts.push(file.strip_prefix(&self.tree).unwrap_or(&file).display().to_string());
            // A link counts as what it says, whether or not that is there.
            let content = match fs::read_link(&file) {
                Ok(target) => target.as_os_str().as_encoded_bytes().to_vec(),
                Err(_) => fs::read(&file).with_context(|| format!("read {}", file.display()))?,
            };
            parts.push(format!("{:x}", Sha256::digest(&content)));
        }
        Ok(digest(&parts.iter().map(String::as_str).collect::<Vec<_>>()))
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        if std::env::var_os("VSOS_LAB_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.run);
        }
    }
}

/// Sixteen digits of SHA-256 over the parts, each ended so that no two lists read alike.
fn digest(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    format!("{:x}", hash.finalize())[..16].to_owned()
}

fn list(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
            list(&entry?.path(), files)?;
        }
    } else {
        files.push(path.to_owned());
    }
    Ok(())
}

/// Removes a tree that may be half made. mmdebstrap mounts only in a mount namespace of its own, so it leads nowhere else.
fn remove(path: &Path) -> Result<()> {
    if path.exists() {
        Invocation::new("rm").args(["-rf", "--one-file-system"]).args([path]).succeed()?;
    }
    Ok(())
}

/// Removes the directories of runs that are over.
fn sweep(runs: &Path) {
    for entry in fs::read_dir(runs).into_iter().flatten().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !Path::new("/proc").join(&pid).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workshop(directory: &Path) -> Workshop {
        let cache = directory.join("cache");
        fs::create_dir_all(&cache).unwrap();
        Workshop { tree: directory.to_owned(), cache, run: directory.join("run") }
    }

    #[test]
    fn a_piece_is_made_once_and_anew_when_its_ingredients_change() {
        let directory = tempfile::tempdir().unwrap();
        let workshop = workshop(directory.path());
        let make = |text: &'static str| move |place: &Path| Ok(fs::write(place.join("file"), text)?);
        let first = workshop.piece("thing", &["a"], make("one")).unwrap();
        let again = workshop.piece("thing", &["a"], make("two")).unwrap();
        assert_eq!(first, again);
        assert_eq!(fs::read_to_string(again.join("file")).unwrap(), "one");
        let other = workshop.piece("thing", &["b"], make("two")).unwrap();
        assert_eq!(fs::read_to_string(other.join("file")).unwrap(), "two");
        assert!(!first.exists(), "the older piece is still there");
    }

    #[test]
    fn a_piece_that_failed_half_way_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let workshop = workshop(directory.path());
        let broken = |place: &Path| {
            fs::write(place.join("half"), "")?;
            anyhow::bail!("the disk is full")
        };
        let error = workshop.piece("thing", &["a"], broken).unwrap_err();
        assert!(format!("{error:#}").contains("the disk is full"));
        let whole = workshop.piece("thing", &["a"], |place| Ok(fs::write(place.join("whole"), "")?)).unwrap();
        assert!(whole.join("whole").exists() && !whole.join("half").exists());
    }

    #[test]
    fn a_digest_follows_names_and_contents() {
        let directory = tempfile::tempdir().unwrap();
        let workshop = workshop(directory.path());
        fs::create_dir(directory.path().join("src")).unwrap();
        fs::write(directory.path().join("src/a"), "1").unwrap();
        let before = workshop.digest_of(&["src"]).unwrap();
        assert_eq!(before, workshop.digest_of(&["src"]).unwrap());
        fs::write(directory.path().join("src/a"), "2").unwrap();
        let changed = workshop.digest_of(&["src"]).unwrap();
        fs::rename(directory.path().join("src/a"), directory.path().join("src/b")).unwrap();
        let renamed = workshop.digest_of(&["src"]).unwrap();
        assert!(before != changed && changed != renamed);
    }
}
