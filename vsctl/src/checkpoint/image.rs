//! The files of a checkpoint: CRIU's images, and beside them what says whose they are and that they are whole.
//!
//! ```text
//! suspended/checkpoint.toml    written last: what is listed here is complete
//! suspended/*.img              CRIU's
//! suspended/vsinit             the program of their init, if it is ours
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::beside::Begun;
use super::program;
use super::thin::holds_pages;
use crate::checksum::Sum;
use crate::failure::{Exit, Failure};
use crate::lifecycle::guest_groups::GuestGroup;
use crate::lifecycle::state::CpuTime;
use crate::lifecycle::thread_settings::ThreadSettings;

/// The layout that this build writes and reads.
pub const VERSION: u32 = 2;

/// The manifest's name.
const MANIFEST: &str = "checkpoint.toml";

/// What a checkpoint holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Of this file's layout.
    pub version: u32,
    /// The server's name then: it is part of the paths in the images.
    pub name: String,
    /// The server's identity.
    pub uuid: String,
    /// Seconds since 1970.
    pub created_s: u64,
    /// For how long the server had run, in nanoseconds.
    pub age_ns: u64,
    /// Digest of the template below its volume.
    pub template_digest: String,
    /// Whether it is to go on with the host's next boot, whatever `autostart` says: the host was shut down under it.
    pub with_host: bool,
    /// The host's kernel (uname(2), release).
    pub kernel: String,
    /// The CRIU that wrote the images.
    pub criu: String,
    /// What it had used of processors.
    pub cpu: CpuTime,
    /// The control groups that the guest had made.
    pub groups: Vec<GuestGroup>,
    /// What its threads had chosen for themselves and CRIU does not dump.
    pub settings: Vec<ThreadSettings>,
    /// Whether memory is missing in them: it comes from the host that has them whole, when they are restored (post-copy).
    #[serde(default)]
    pub is_thin: bool,
    /// Each image.
    pub files: BTreeMap<String, Sum>,
}

impl Manifest {
    /// Reads the manifest in `directory`.
    ///
    /// # Errors
    /// When it is not there, or not one.
    pub fn read(directory: &Path) -> Result<Self> {
        let file = directory.join(MANIFEST);
        let manifest: Self = read(&file, VERSION)?;
        // They are opened as root: of an own name, or of one in a round of memory.
        let is_plain = |name: &str| !name.contains('/') && name != "..";
        let is_ours = |name: &str| match name.strip_prefix("../memory/").and_then(|rest| rest.split_once('/')) {
            Some((round, name)) => round.parse::<u32>().is_ok() && is_plain(name),
            None => is_plain(name),
        };
        if let Some(name) = manifest.files.keys().find(|name| !is_ours(name)) {
            return Err(bad(&file, format!("'{}' is no image", name.escape_debug())).into());
        }
        Ok(manifest)
    }

    /// Puts all images in `directory`, and then the manifest, on the disk.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn seal(&self, directory: &Path) -> Result<()> {
        seal(directory, self.files.keys(), MANIFEST, self)
    }

    /// Puts the manifest beside the images in `directory`. They count when the caller has brought all of it to the disk: the disk is asked once,
    /// not once for each image.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn write(&self, directory: &Path) -> Result<()> {
        Ok(kernel::file::replace(&directory.join(MANIFEST), text(MANIFEST, self)?.as_bytes(), 0o644)?)
    }

    /// Compares the images in `directory` with what is written down of them. `hint` says what can be done about one that is damaged.
    ///
    /// # Errors
    /// The first that is missing, cut or changed.
    pub fn verify(&self, directory: &Path, hint: &str) -> Result<()> {
        self.verify_but_memory(directory, hint)?;
        self.verify_memory(directory, hint)
    }

    /// The same of all that a restore acts on. Of the others, which hold what is in memory, only the lengths are looked at.
    ///
    /// # Errors
    /// As [`Self::verify`].
    pub fn verify_but_memory(&self, directory: &Path, hint: &str) -> Result<()> {
        for (name, expected) in &self.files {
            let damaged = match holds_pages(Path::new(name)) {
                true => {
                    let (whose, file) = (self.whose(), directory.join(name));
                    let length = length(&file)?;
                    (length != Some(expected.bytes)).then(|| cut(&whose, &file, length, expected))
                }
                false => self.damage(directory, name)?,
            };
            if let Some(damaged) = damaged {
                return Err(damaged.hint(hint).into());
            }
        }
        Ok(())
    }

    /// The same of those that hold what is in memory: most of the bytes.
    ///
    /// # Errors
    /// As [`Self::verify`].
    pub fn verify_memory(&self, directory: &Path, hint: &str) -> Result<()> {
        for name in self.files.keys().filter(|name| holds_pages(Path::new(name))) {
            if let Some(damaged) = self.damage(directory, name)? {
                return Err(damaged.hint(hint).into());
            }
        }
        Ok(())
    }

    fn whose(&self) -> String {
        format!("'{}'", self.name)
    }

    /// What is wrong with the image `name` in `directory`: whether it is missing, cut or changed.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn damage(&self, directory: &Path, name: &str) -> Result<Option<Failure>> {
        damage(&self.whose(), self.files.get(name), &directory.join(name))
    }

    /// Writes down the image `name` in `directory` as it is now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn note(&mut self, directory: &Path, name: &str) -> Result<()> {
        let file = directory.join(name);
        let sum = Sum::of(&file).with_context(|| format!("read {}", file.display()))?;
        self.files.insert(name.to_owned(), sum);
        Ok(())
    }

    /// The length of all images, in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|sum| sum.bytes).sum()
    }

    #[cfg(test)]
    pub(super) fn example() -> Self {
        Self {
            version: VERSION,
            name: "web1".into(),
            uuid: "0".into(),
            created_s: 1,
            age_ns: 2,
            template_digest: "d".into(),
            with_host: false,
            kernel: "6.12".into(),
            criu: "4.1.1".into(),
            cpu: CpuTime::default(),
            groups: Vec::new(),
            settings: Vec::new(),
            is_thin: false,
            files: BTreeMap::new(),
        }
    }
}

/// What is wrong with the image `file` of `whose` checkpoint: whether it is missing, cut or changed. None `expected`: it is not listed.
///
/// # Errors
/// When it cannot be read.
pub fn damage(whose: &str, expected: Option<&Sum>, file: &Path) -> Result<Option<Failure>> {
    let Some(expected) = expected else { return Ok(Some(damaged(whose, file, "is not listed"))) };
    let found = match Sum::of(file) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
    };
    let length = found.as_ref().map(|found| found.bytes);
    if length != Some(expected.bytes) {
        return Ok(Some(cut(whose, file, length, expected)));
    }
    Ok((found.as_ref() != Some(expected)).then(|| damaged(whose, file, "has other contents than it had")))
}

fn damaged(whose: &str, file: &Path, how: &str) -> Failure {
    Failure::new(Exit::Failed, format!("the checkpoint of {whose} is damaged: {} {how}", file.display()))
}

/// Of a file that has another `length`, or is not there.
fn cut(whose: &str, file: &Path, length: Option<u64>, expected: &Sum) -> Failure {
    match length {
        None => damaged(whose, file, "is missing"),
        Some(length) => damaged(whose, file, &format!("has {length} bytes and had {}", expected.bytes)),
    }
}

/// How long a file is, if it is there.
fn length(file: &Path) -> Result<Option<u64>> {
    match fs::metadata(file) {
        Ok(found) => Ok(Some(found.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("look at {}", file.display())),
    }
}

/// Reads what is written down beside images in a layout of `version`.
///
/// # Errors
/// When it is not there, or of another layout.
pub fn read<T: DeserializeOwned>(file: &Path, version: u32) -> Result<T> {
    #[derive(Deserialize)]
    struct Layout {
        version: u32,
    }
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let wrong = |error: toml::de::Error| bad(file, error.message().to_owned());
    // First, since another layout has other fields.
    let layout: Layout = toml::from_str(&text).map_err(wrong)?;
    if layout.version != version {
        let why = format!("it has version {} of its layout, and this vsctl knows {version}", layout.version);
        let hint =
            "the vsctl that made it restores it; a suspended server can be booted anew with `vsctl start --discard`";
        return Err(bad(file, why).hint(hint).into());
    }
    Ok(toml::from_str(&text).map_err(wrong)?)
}

/// What is written down in `file` cannot be used.
pub fn bad(file: &Path, why: String) -> Failure {
    Failure::new(Exit::BadConfiguration, format!("{}: {why}", file.display()))
}

/// Puts images in `directory` on the disk, and then what is written down of them, under `name`.
///
/// # Errors
/// When the disk refuses.
pub fn seal<'n>(
    directory: &Path,
    images: impl Iterator<Item = &'n String>,
    name: &str,
    record: &impl Serialize,
) -> Result<()> {
    for image in images {
        let file = directory.join(image);
        File::open(&file).and_then(|file| file.sync_all()).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(kernel::file::write_atomic(&directory.join(name), text(name, record)?.as_bytes())?)
}

fn text(name: &str, record: &impl Serialize) -> Result<String> {
    toml::to_string(record).with_context(|| format!("write {name} as TOML"))
}

/// The images in `directory`, and the program beside them. While they are read they begin to come to the disk.
///
/// # Errors
/// When they cannot be read.
pub fn survey(directory: &Path) -> Result<BTreeMap<String, Sum>> {
    survey_rest(directory, Begun::new())
}

/// The same, when some of it has been summed while it was written.
///
/// # Errors
/// When they cannot be read.
pub fn survey_rest(directory: &Path, mut begun: Begun) -> Result<BTreeMap<String, Sum>> {
    let mut images = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))? {
        let path = entry.with_context(|| format!("read {}", directory.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.extension().is_some_and(|extension| extension == "img") || program::is_program(&name) {
            let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
            // What fails is told to whoever waits for it.
            let _ = kernel::file::begin_writing(&file, 0..u64::MAX);
            images.push((name, path));
        }
    }
    let sum = |(name, path): (String, PathBuf)| {
        let front = begun.remove(&name).unwrap_or_default();
        Ok((name, Sum::of_rest(&path, front).with_context(|| format!("read {}", path.display()))?))
    };
    images.into_iter().map(sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed() -> (tempfile::TempDir, Manifest) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("pages-1.img"), [7_u8; 5000]).unwrap();
        fs::write(directory.path().join("core-1.img"), "core").unwrap();
        fs::write(directory.path().join("stats-dump"), "no image").unwrap();
        let manifest = Manifest { files: survey(directory.path()).unwrap(), ..Manifest::example() };
        manifest.seal(directory.path()).unwrap();
        (directory, manifest)
    }

    #[test]
    fn what_was_sealed_is_whole() {
        let (directory, manifest) = sealed();
        assert_eq!(Manifest::read(directory.path()).unwrap(), manifest);
        assert_eq!(manifest.files.keys().collect::<Vec<_>>(), ["core-1.img", "pages-1.img"]);
        assert_eq!(manifest.bytes(), 5004);
        manifest.verify(directory.path(), "").unwrap();
    }

    #[test]
    fn lists_of_groups_and_settings_are_read_as_they_were_written() {
        let (directory, manifest) = sealed();
        let group = GuestGroup {
            path: "a".into(),
            controllers: String::new(),
            uid: 1,
            gid: 2,
            values: BTreeMap::from([("pids.max".into(), "3".into())]),
        };
        let one = ThreadSettings { thread: 7, timer_slack_ns: Some(9), ..ThreadSettings::default() };
        for groups in [vec![], vec![group]] {
            for settings in [vec![], vec![one.clone(), one.clone()]] {
                let manifest = Manifest { groups: groups.clone(), settings, ..manifest.clone() };
                manifest.seal(directory.path()).unwrap();
                assert_eq!(Manifest::read(directory.path()).unwrap(), manifest);
            }
        }
    }

    #[test]
    fn a_flipped_bit_a_cut_and_a_missing_file_are_found() {
        let (directory, manifest) = sealed();
        let file = directory.path().join("pages-1.img");
        let refused = || manifest.verify(directory.path(), "").unwrap_err().to_string();
        let mut bytes = fs::read(&file).unwrap();
        bytes[4321] ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert!(refused().contains("other contents"), "{}", refused());
        fs::write(&file, &bytes[..2500]).unwrap();
        assert!(refused().contains("has 2500 bytes and had 5000"), "{}", refused());
        fs::remove_file(&file).unwrap();
        assert!(refused().contains("is missing"), "{}", refused());
    }

    /// What a restore reads to know what to do is whole before it begins; memory may be compared beside it.
    #[test]
    fn of_memory_only_the_length_is_looked_at_first() {
        let (directory, manifest) = sealed();
        let first = || manifest.verify_but_memory(directory.path(), "").map_err(|error| error.to_string());
        let then = || manifest.verify_memory(directory.path(), "").map_err(|error| error.to_string());
        let [memory, other] = ["pages-1.img", "core-1.img"].map(|name| directory.path().join(name));
        fs::write(&memory, [8_u8; 5000]).unwrap();
        first().unwrap();
        assert!(then().unwrap_err().contains("other contents"));
        fs::write(&memory, [7_u8; 4999]).unwrap();
        assert!(first().unwrap_err().contains("has 4999 bytes and had 5000"));
        fs::remove_file(&memory).unwrap();
        assert!(first().unwrap_err().contains("is missing"));
        fs::write(&memory, [7_u8; 5000]).unwrap();
        fs::write(&other, "cork").unwrap();
        then().unwrap();
        assert!(first().unwrap_err().contains("core-1.img has other contents"));
    }

    #[test]
    fn images_lie_beside_their_manifest_or_in_a_round_of_memory() {
        let (directory, manifest) = sealed();
        let sum = manifest.files["core-1.img"].clone();
        let read = |name: &str| {
            let files = BTreeMap::from([(name.to_owned(), sum.clone())]);
            fs::write(
                directory.path().join("checkpoint.toml"),
                toml::to_string(&Manifest { files, ..manifest.clone() }).unwrap(),
            )
            .unwrap();
            Manifest::read(directory.path())
        };
        read("../memory/2/pages-1.img").unwrap();
        for name in ["../core-1.img", "/etc/passwd", "..", "../memory/../x", "../memory/1/../../x", "a/b"] {
            assert!(read(name).unwrap_err().to_string().contains("is no image"), "{name}");
        }
    }

    #[test]
    fn a_manifest_of_another_version_is_refused() {
        let (directory, mut manifest) = sealed();
        manifest.version = 9;
        manifest.seal(directory.path()).unwrap();
        let error = Manifest::read(directory.path()).unwrap_err();
        assert!(error.to_string().contains("version 9 of"), "{error}");
        assert!(crate::failure::hint_of(&error).unwrap().contains("vsctl start --discard"));
    }
}
