//! `record.toml`: what was found out about a template when it was made, and the digest that names its content.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::family::Distribution;

/// The version that this program writes.
const VERSION: u32 = 1;
/// The highest id that a server has: one of 65,536.
const LAST_ID: u32 = 65_535;

/// What is known of a template besides its definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Of this file's form.
    pub version: u32,
    /// Where it came from, for people.
    pub origin: String,
    /// When, in seconds since 1970.
    pub built_s: u64,
    /// Files, directories and links.
    pub entries: u64,
    /// Space on disk.
    pub size_bytes: u64,
    /// SHA-256 over the sorted list of all paths with kind, mode, owner, size and time of change of content.
    pub digest: String,
    /// What was left out or changed while it was made.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// From os-release.
    pub distribution: Distribution,
}

/// What a walk over a root finds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Files, directories and links.
    pub entries: u64,
    /// Space on disk.
    pub size_bytes: u64,
    /// See [`Record::digest`].
    pub digest: String,
    /// Device nodes and sockets, which no template has.
    pub devices: Vec<PathBuf>,
    /// How many things belong to ids that no server has.
    pub foreign_owners: u64,
}

impl Record {
    /// The record of a root that is ready.
    pub fn of(survey: Survey, origin: String, distribution: Distribution, warnings: Vec<String>) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            version: VERSION,
            origin,
            built_s: now.map(|elapsed| elapsed.as_secs()).unwrap_or_default(),
            entries: survey.entries,
            size_bytes: survey.size_bytes,
            digest: survey.digest,
            warnings,
            distribution,
        }
    }
}

/// Walks `root`. Links are counted and not followed; hard links take space once.
///
/// The digest holds no content: reading all of it would take longer than making a server. A changed file has
/// another time or size, and that is what the digest is to tell.
pub fn survey(root: &Path) -> Result<Survey> {
    let mut survey = Survey::default();
    let mut hash = Sha256::new();
    let mut seen = BTreeMap::new();
    walk(root, Path::new(""), &mut |path, meta| {
        note(&mut survey, &mut seen, path, meta);
        hash.update(line(root, path, meta)?);
        Ok(())
    })?;
    survey.digest = format!("{:x}", hash.finalize());
    Ok(survey)
}

fn note(survey: &mut Survey, seen: &mut BTreeMap<u64, ()>, path: &Path, meta: &fs::Metadata) {
    survey.entries += 1;
    if meta.nlink() == 1 || meta.is_dir() || seen.insert(meta.ino(), ()).is_none() {
        survey.size_bytes += meta.blocks() * 512;
    }
    let kind = meta.file_type();
    if kind.is_block_device() || kind.is_char_device() || kind.is_socket() {
        survey.devices.push(path.to_owned());
    }
    survey.foreign_owners += u64::from(meta.uid() > LAST_ID || meta.gid() > LAST_ID);
}

/// One line of the manifest. A directory's size and time are left out: they depend on the file system below.
fn line(root: &Path, path: &Path, meta: &fs::Metadata) -> Result<Vec<u8>> {
    let mut line = path.as_os_str().as_bytes().to_vec();
    line.extend(format!("\0{:o} {}:{} ", meta.mode(), meta.uid(), meta.gid()).bytes());
    if meta.is_symlink() {
        let target = fs::read_link(root.join(path)).with_context(|| format!("read link {}", path.display()))?;
        line.extend(target.as_os_str().as_bytes());
    } else if !meta.is_dir() {
        line.extend(format!("{} {} {}.{}", meta.rdev(), meta.size(), meta.mtime(), meta.mtime_nsec()).bytes());
    }
    line.push(b'\n');
    Ok(line)
}

/// Calls `visit` for everything below `root`, sorted, a directory before what is in it.
fn walk(root: &Path, below: &Path, visit: &mut impl FnMut(&Path, &fs::Metadata) -> Result<()>) -> Result<()> {
    let directory = root.join(below);
    let context = || format!("list {}", directory.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).with_context(context)? {
        names.push(entry.with_context(context)?.file_name());
    }
    names.sort();
    for name in names {
        let path = below.join(&name);
        let full = root.join(&path);
        let meta = fs::symlink_metadata(&full).with_context(|| format!("stat {}", full.display()))?;
        visit(&path, &meta)?;
        if meta.is_dir() {
            walk(root, &path, visit)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/name"), "x").unwrap();
        symlink("/etc/name", root.path().join("link")).unwrap();
        root
    }

    #[test]
    fn the_digest_sees_every_kind_of_change() {
        let root = tree();
        let path = |name: &str| root.path().join(name);
        let mut digests = vec![survey(root.path()).unwrap().digest];
        assert_eq!(survey(root.path()).unwrap().digest, digests[0]);
        let changes: [&dyn Fn(); 4] = [
            &|| fs::write(path("etc/name"), "longer").unwrap(),
            &|| fs::set_permissions(path("etc/name"), fs::Permissions::from_mode(0o4755)).unwrap(),
            &|| fs::rename(path("etc/name"), path("etc/nome")).unwrap(),
            &|| {
                fs::remove_file(path("link")).unwrap();
                symlink("/etc/nome", path("link")).unwrap();
            },
        ];
        for change in changes {
            change();
            let digest = survey(root.path()).unwrap().digest;
            assert!(!digests.contains(&digest));
            digests.push(digest);
        }
    }

    #[test]
    fn hard_links_take_space_once() {
        let root = tree();
        fs::write(root.path().join("big"), vec![1u8; 1 << 16]).unwrap();
        let before = survey(root.path()).unwrap();
        fs::hard_link(root.path().join("big"), root.path().join("same")).unwrap();
        let after = survey(root.path()).unwrap();
        assert_eq!((after.entries, after.size_bytes), (before.entries + 1, before.size_bytes));
    }
}
