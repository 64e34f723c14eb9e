//! What has changed in a server's files since they were sent, so that only that is sent while it stands still.
//!
//! A file has changed when its inode, kind, length or time of change (`st_ctime`) is another. A program that writes through a mapping
//! changes that time at its first write to a page that is clean, so the order is: survey, everything to the disk, and then the reading.
//! What was written before that is read, and what is written after it has another time.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use kernel::file;
use rustix::fs::{AtFlags, Dir, FileType, OFlags, Stat, fstat, llistxattr, lremovexattr, statat};
use rustix::io::Errno;

use super::wire::Size;

/// What has changed so shortly before a survey may change once more and keep its time: times are those of the kernel's last tick, on
/// some file systems of the last second, and a long write has the time of its beginning.
const SETTLED_NS: i128 = 5_000_000_000;

/// The same of a large file, and of one that was looked at again because it is written to: a single write(2) to it may take long.
const LARGE_SETTLED_NS: i128 = 60_000_000_000;

/// What has rested so long may do so until it is settled.
const RESTS_NS: i128 = 1_000_000_000;

/// How much has to rest for somebody to wait for it, in bytes.
const WORTH_WAITING: u64 = 4 << 20;

/// What may be worth the sums of its blocks, in bytes.
const LARGE: u64 = 1 << 20;

/// What has changed since may be a file that does so all the time: a day.
const LATELY_NS: i128 = 86_400_000_000_000;

/// So much is read for that at both sides at most, in bytes on the disk.
const LIKELY_MAX: u64 = 64 << 30;

/// What a file has as long as it is not changed, and its space, which comes and goes while it is brought to the disk.
#[derive(Debug, Clone, Copy)]
struct Stamp {
    inode: u64,
    mode: u32,
    links: u64,
    length: u64,
    changed_ns: i128,
    disk_bytes: u64,
}

impl Stamp {
    fn is_same(self, other: &Self) -> bool {
        let key = |stamp: &Self| (stamp.inode, stamp.mode, stamp.length, stamp.changed_ns);
        key(&self) == key(other)
    }

    fn is_directory(self) -> bool {
        self.mode & nix::libc::S_IFMT == nix::libc::S_IFDIR
    }

    /// Whether it has several names.
    fn has_names(self) -> bool {
        !self.is_directory() && self.links > 1
    }

    /// Whether it is worth the sums of its blocks.
    fn may_have_blocks(self) -> bool {
        self.is_file() && self.links == 1 && self.length >= LARGE
    }

    fn is_file(self) -> bool {
        self.mode & nix::libc::S_IFMT == nix::libc::S_IFREG
    }
}

/// The files of a server at one time, by their paths below its directory.
#[derive(Debug, Default)]
pub struct Survey {
    files: BTreeMap<PathBuf, Stamp>,
    began_ns: i128,
    /// Those that will not change any more, however young they are.
    settled: BTreeSet<PathBuf>,
    /// Those that were looked at again, and when that began.
    renewed: BTreeMap<PathBuf, i128>,
}

/// How a file of a listing is told, before its path: it stays as it is, it is patched, it comes anew, it is a directory that comes anew.
const SAME: u8 = b'=';
const PATCHED: u8 = b'~';
const ANEW: u8 = b'+';
const DIRECTORY: u8 = b'/';

/// What has changed from one survey to another.
#[derive(Debug)]
pub struct Changes {
    /// All files that there are now, each with what is to happen to it; what is not listed is gone.
    pub listing: Vec<u8>,
    /// The paths of those to be sent, each with a NUL behind it.
    pub names: Vec<u8>,
    /// What these take on the disk, a file with several names each time.
    pub size: Size,
    /// How much of that a pass by [times](Survey::again_since_s) sends.
    pub again_bytes: u64,
    /// How much of that need not be sent again as a whole then: what rests, and large files, of which blocks can be sent from then on.
    pub lasting_bytes: u64,
    /// Those that have changed, and are not to be sent but patched.
    pub patched: Vec<PathBuf>,
}

impl Changes {
    /// The paths of those to be sent.
    pub fn names(&self) -> impl Iterator<Item = &Path> {
        self.names
            .split(|byte| *byte == 0)
            .filter(|path| !path.is_empty())
            .map(|path| Path::new(OsStr::from_bytes(path)))
    }
}

impl Survey {
    /// Looks at everything in `members` of `directory`, as far as it is there. Sockets are left out, as they are when it is packed.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn take(directory: &Path, members: &[&Path]) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut survey = Self { began_ns: now.as_nanos() as i128, ..Self::default() };
        walk(directory, members, &mut |path, told| {
            if FileType::from_raw_mode(told.st_mode) != FileType::Socket {
                let stamp = Stamp {
                    inode: told.st_ino,
                    mode: told.st_mode,
                    links: links(told),
                    length: told.st_size as u64,
                    changed_ns: i128::from(told.st_ctime) * 1_000_000_000 + i128::from(told.st_ctime_nsec),
                    disk_bytes: told.st_blocks as u64 * 512,
                };
                survey.files.insert(path.to_owned(), stamp);
            }
            Ok(())
        })?;
        Ok(survey)
    }

    /// How long it takes until what was written last may be told to rest; none when that is little.
    pub fn time_to_rest(&self) -> Option<Duration> {
        self.time_until(RESTS_NS, i128::MIN)
    }

    /// How long it takes until what was written lately, and rests since, is settled; none when that is little.
    pub fn time_to_settle(&self) -> Option<Duration> {
        self.time_until(SETTLED_NS, RESTS_NS)
    }

    /// How long it takes until all that was changed at least `from_ns` ago, and less than `age_ns`, was so `age_ns` ago.
    fn time_until(&self, age_ns: i128, from_ns: i128) -> Option<Duration> {
        let is_young = |stamp: &&Stamp| (from_ns..age_ns).contains(&(self.began_ns - stamp.changed_ns));
        let young = || self.files.values().filter(is_young);
        let youngest = young().map(|stamp| stamp.changed_ns).max()?.min(self.began_ns);
        let left = u64::try_from(youngest + age_ns - self.began_ns).ok()?;
        let bytes: u64 = young().map(|stamp| stamp.disk_bytes).sum();
        (bytes >= WORTH_WAITING).then(|| Duration::from_nanos(left))
    }

    /// Adds files that will not change any more.
    pub fn include_settled(&mut self, other: Survey) {
        self.settled.extend(other.files.keys().cloned());
        self.files.extend(other.files);
    }

    /// Whether a file was there.
    pub fn contains(&self, path: &Path) -> bool {
        self.files.contains_key(path)
    }

    /// From when on all is sent again by who looks at times only, in seconds since 1970: also what was not settled.
    pub fn again_since_s(&self) -> i64 {
        i64::try_from((self.began_ns - SETTLED_NS).div_euclid(1_000_000_000)).unwrap_or_default()
    }

    fn again_since_ns(&self) -> i128 {
        i128::from(self.again_since_s()) * 1_000_000_000
    }

    /// Takes over from a later survey of the root: of what has changed then, directories and what was changed [since](Self::again_since_s) were
    /// sent after it. What is `left_out` was not.
    pub fn follow(&mut self, later: Survey, changes: &Changes, left_out: impl Fn(&Path) -> bool) {
        let since_ns = self.again_since_ns();
        let before = std::mem::take(self);
        let anew: BTreeSet<&Path> = changes.names().collect();
        let is_there = |path: &PathBuf, stamp: &Stamp| {
            stamp.is_directory() || stamp.changed_ns >= since_ns || !anew.contains(path.as_path())
        };
        self.began_ns = later.began_ns;
        self.files = later.files.into_iter().filter(|(path, stamp)| !left_out(path) && is_there(path, stamp)).collect();
        for (path, stamp) in before.files {
            if left_out(&path) {
                // It was read when it was, and has settled no more since.
                let read_ns = before.renewed.get(&path).copied().unwrap_or(before.began_ns);
                self.renewed.insert(path.clone(), read_ns);
                self.files.insert(path, stamp);
            } else if before.settled.contains(&path) {
                self.files.insert(path, stamp);
            }
        }
        self.settled = before.settled;
    }

    /// Whether what was read after this survey is what has this stamp.
    fn has(&self, path: &Path, stamp: &Stamp) -> bool {
        let renewed = self.renewed.get(path);
        let is_large = stamp.is_file() && stamp.length >= LARGE;
        let settled_ns = renewed.unwrap_or(&self.began_ns)
            - if is_large || renewed.is_some() { LARGE_SETTLED_NS } else { SETTLED_NS };
        let is_settled = |known: &Stamp| known.changed_ns < settled_ns || self.settled.contains(path);
        self.files.get(path).is_some_and(|known| known.is_same(stamp) && is_settled(known))
    }

    /// Passes over files of which `is_left_out` says so, as if they were not there.
    pub fn leave_out(&mut self, is_left_out: impl Fn(&Path) -> bool) {
        self.files.retain(|path, _| !is_left_out(path));
    }

    /// What everything takes on the disk. Hard links take space once.
    pub fn size(&self) -> Size {
        let mut seen = BTreeSet::new();
        let first = |stamp: &&Stamp| stamp.is_directory() || seen.insert(stamp.inode);
        let bytes = self.files.values().filter(first).map(|stamp| stamp.disk_bytes).sum();
        Size { bytes, entries: self.files.len() as u64 }
    }

    /// Files with one name that are large and have changed lately, and so may do again, if they are `wanted`: the latest first, until they are
    /// much, or longer than `room` bytes together.
    pub fn likely(&self, room: u64, wanted: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
        let is_likely = |stamp: &Stamp| stamp.may_have_blocks() && self.began_ns - stamp.changed_ns < LATELY_NS;
        let mut likely: Vec<(&PathBuf, &Stamp)> =
            self.files.iter().filter(|(path, stamp)| is_likely(stamp) && wanted(path)).collect();
        likely.sort_by_key(|(_, stamp)| std::cmp::Reverse(stamp.changed_ns));
        // Holes are not read, and have sums.
        let (mut left, mut left_with_holes) = (LIKELY_MAX, room);
        let fits = |(_, stamp): &&(&PathBuf, &Stamp)| {
            match (left.checked_sub(stamp.disk_bytes), left_with_holes.checked_sub(stamp.length)) {
                (Some(bytes), Some(length)) => (left, left_with_holes) = (bytes, length),
                _ => return false,
            }
            true
        };
        likely.iter().filter(fits).map(|(path, _)| (*path).clone()).collect()
    }

    /// Takes over from a later survey, after which they were read once more, those of `paths` that are in it.
    pub fn renew(&mut self, later: &Survey, paths: impl Iterator<Item = PathBuf>) {
        for path in paths {
            if let Some(stamp) = later.files.get(&path) {
                self.files.insert(path.clone(), *stamp);
                self.renewed.insert(path, later.began_ns);
            }
        }
    }

    /// What has to be sent to somebody who has everything that was read after the survey `before`. Files that `can_be_patched` are not sent.
    pub fn since(&self, before: &Survey, mut can_be_patched: impl FnMut(&Path) -> bool) -> Changes {
        let changed =
            |path: &Path| self.files.get_key_value(path).is_some_and(|(path, stamp)| !before.has(path, stamp));
        let mut anew: BTreeSet<&Path> = BTreeSet::new();
        // A directory that was moved away and back may have been another's place when it was read. Both have changed then, it and what it
        // lies in; in the order of paths, what is in it follows.
        let mut moved: Option<&Path> = None;
        for (path, stamp) in &self.files {
            let is_below = moved.is_some_and(|moved| path.starts_with(moved));
            if !is_below && !changed(path) {
                continue;
            }
            if !is_below && stamp.is_directory() && path.parent().is_some_and(changed) {
                moved = Some(path);
            }
            anew.insert(path);
            // Putting a file into a directory gives that another time than it had.
            anew.extend(path.parent().filter(|parent| self.files.contains_key(*parent)));
        }
        // Moved with its directory, a file is not told to have changed; its other names elsewhere would be files by themselves.
        let linked: BTreeSet<u64> = anew
            .iter()
            .filter_map(|path| self.files.get(*path))
            .filter(|stamp| stamp.has_names())
            .map(|stamp| stamp.inode)
            .collect();
        for (path, _) in self.files.iter().filter(|(_, stamp)| stamp.has_names() && linked.contains(&stamp.inode)) {
            anew.insert(path);
            anew.extend(path.parent().filter(|parent| self.files.contains_key(*parent)));
        }
        let (mut listing, mut names, mut size, mut patched) = (Vec::new(), Vec::new(), Size::default(), Vec::new());
        let (since_ns, mut again_bytes, mut lasting_bytes) = (before.again_since_ns(), 0, 0);
        for (path, stamp) in &self.files {
            let mut kind = SAME;
            let bytes = path.as_os_str().as_bytes();
            if anew.contains(path.as_path()) && stamp.is_file() && can_be_patched(path) {
                kind = PATCHED;
                patched.push(path.clone());
            } else if anew.contains(path.as_path()) {
                kind = if stamp.is_directory() { DIRECTORY } else { ANEW };
                names.extend(bytes);
                names.push(0);
                size.bytes += stamp.disk_bytes;
                size.entries += 1;
                if stamp.changed_ns >= since_ns {
                    again_bytes += stamp.disk_bytes;
                    let is_lasting = stamp.may_have_blocks() || stamp.changed_ns < self.began_ns - SETTLED_NS;
                    lasting_bytes += if is_lasting { stamp.disk_bytes } else { 0 };
                }
            }
            listing.push(kind);
            listing.extend(bytes);
            listing.push(0);
        }
        Changes { listing, names, size, again_bytes, lasting_bytes, patched }
    }
}

/// A listing as it is understood.
fn parse(listing: &[u8]) -> Result<BTreeMap<&Path, u8>> {
    let mut files = BTreeMap::new();
    for line in listing.split_inclusive(|byte| *byte == 0) {
        match line {
            [kind @ (SAME | PATCHED | ANEW | DIRECTORY), path @ .., 0] if !path.is_empty() => {
                files.insert(Path::new(OsStr::from_bytes(path)), *kind)
            }
            _ => bail!("a line of the files' listing is damaged: {:?}", String::from_utf8_lossy(line)),
        };
    }
    Ok(files)
}

/// Takes away, of what is in `members` of `directory`, everything that is not in `listing` or comes anew.
///
/// # Errors
/// When the listing is damaged, or the disk refuses.
pub fn make_room(directory: &Path, members: &[&Path], listing: &[u8]) -> Result<()> {
    let listed = parse(listing)?;
    walk(directory, members, &mut |path, told| {
        let full = directory.join(path);
        match listed.get(path) {
            Some(&(SAME | PATCHED)) => Ok(()),
            // What it has of attributes is added to what it had.
            Some(&DIRECTORY) if is_directory(told) => clear_attributes(&full),
            _ if is_directory(told) => fs::remove_dir_all(&full),
            _ => fs::remove_file(&full),
        }
        .with_context(|| format!("make room for {}", full.display()))
    })
}

/// Whether there is in `members` of `directory` what is in `listing`, and nothing else.
///
/// # Errors
/// The first file that is missing or too many; when they cannot be read.
pub fn check_whole(directory: &Path, members: &[&Path], listing: &[u8]) -> Result<()> {
    let mut missing = parse(listing)?;
    walk(directory, members, &mut |path, _| match missing.remove(path) {
        Some(_) => Ok(()),
        None => bail!("{} came, and is not among the files that there are", path.display()),
    })?;
    match missing.into_keys().next() {
        None => Ok(()),
        Some(path) => bail!("{} did not come", path.display()),
    }
}

/// The kernel lists no more (`XATTR_LIST_MAX` of linux/limits.h).
pub(super) const NAMES_MAX_BYTES: usize = 65_536;

/// What an archive brings of attributes; others are this host's own, as SELinux's.
const BROUGHT: [&[u8]; 4] = [b"user.", b"security.capability", b"trusted.overlay.", b"system.posix_acl_"];

/// Those of a list of names, each with a NUL behind it.
pub(super) fn brought(names: &[u8]) -> impl Iterator<Item = &[u8]> {
    let is_brought = |name: &&[u8]| BROUGHT.iter().any(|kind| name.starts_with(kind));
    names.split(|byte| *byte == 0).filter(is_brought)
}

fn clear_attributes(directory: &Path) -> io::Result<()> {
    let mut names = vec![0_u8; NAMES_MAX_BYTES];
    let length = llistxattr(directory, &mut names[..])?;
    for name in brought(&names[..length]) {
        lremovexattr(directory, name)?;
    }
    Ok(())
}

/// Calls `see` for everything in `members` of `directory`, with its path below that: directories before what is in them, and what is
/// no directory any more after that is not gone into. What goes away meanwhile is passed over. No link is followed: whoever is in there could
/// lead elsewhere by one.
fn walk(directory: &Path, members: &[&Path], see: &mut dyn FnMut(&Path, &Stat) -> Result<()>) -> Result<()> {
    let is_gone = |error: Errno| matches!(error, Errno::NOENT | Errno::NOTDIR);
    let below = File::open(directory).with_context(|| format!("open {}", directory.display()))?;
    let open = |path: &Path, flags| {
        match file::open_without_links(&below, path, flags | OFlags::NOFOLLOW) {
            Err(error) if is_gone(error) => Ok(None),
            // Not of a member, which the host's administrator would have replaced: nobody may take it for gone.
            Err(Errno::LOOP) if !members.contains(&path) => Ok(None),
            opened => opened.map(Some).with_context(|| format!("open {}", directory.join(path).display())),
        }
    };
    let mut left = Vec::new();
    for member in members {
        let Some(found) = open(member, OFlags::PATH)? else { continue };
        let told = fstat(&found).with_context(|| format!("stat {}", directory.join(member).display()))?;
        see(member, &told)?;
        left.extend(is_directory(&told).then(|| member.to_path_buf()));
    }
    while let Some(path) = left.pop() {
        let Some(opened) = open(&path, OFlags::RDONLY | OFlags::DIRECTORY)? else { continue };
        let read = || format!("read {}", directory.join(&path).display());
        for entry in Dir::read_from(&opened).with_context(read)? {
            let entry = entry.with_context(read)?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let path = path.join(OsStr::from_bytes(name.to_bytes()));
            let told = match statat(&opened, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(error) if is_gone(error) => continue,
                told => told.with_context(|| format!("stat {}", directory.join(&path).display()))?,
            };
            see(&path, &told)?;
            left.extend(is_directory(&told).then_some(path));
        }
    }
    Ok(())
}

#[allow(clippy::useless_conversion, reason = "narrower on other architectures")]
fn links(told: &Stat) -> u64 {
    u64::from(told.st_nlink)
}

fn is_directory(told: &Stat) -> bool {
    FileType::from_raw_mode(told.st_mode) == FileType::Directory
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{XattrFlags, lsetxattr};

    use super::*;

    /// For all that is asked about.
    const ROOM: u64 = 1 << 38;

    const VOLUME: &str = "volume";

    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("volume/etc/deep")).unwrap();
        fs::create_dir(root.path().join("beside")).unwrap();
        for (file, text) in [("etc/a", "one"), ("etc/b", "two"), ("etc/deep/c", "three")] {
            fs::write(root.path().join(VOLUME).join(file), text).unwrap();
        }
        fs::hard_link(root.path().join("volume/etc/a"), root.path().join("volume/also-a")).unwrap();
        root
    }

    fn survey(root: &Path) -> Survey {
        Survey::take(root, &[VOLUME.as_ref(), "not-there".as_ref()]).unwrap()
    }

    /// A survey that lies so far behind that every time of change in it counts.
    fn settled(root: &Path) -> Survey {
        let survey = survey(root);
        let later = survey.files.values().map(|stamp| stamp.changed_ns).max().unwrap() + SETTLED_NS + 1;
        // Nothing changes in the tick in which it was taken.
        std::thread::sleep(std::time::Duration::from_millis(30));
        Survey { began_ns: later, ..survey }
    }

    fn lines(listing: &[u8]) -> Vec<String> {
        let lines = listing.split(|byte| *byte == 0).filter(|line| !line.is_empty());
        lines.map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }

    #[test]
    fn hard_links_take_space_once() {
        let root = tree();
        fs::write(root.path().join("volume/etc/a"), vec![1; 1 << 16]).unwrap();
        let before = survey(root.path()).size();
        assert!(before.bytes >= 1 << 16 && before.entries == 7, "{before:?}");
        fs::remove_file(root.path().join("volume/also-a")).unwrap();
        assert_eq!(survey(root.path()).size(), Size { entries: 6, ..before });
    }

    #[test]
    fn nothing_changed_nothing_is_sent() {
        let root = tree();
        let before = settled(root.path());
        let changes = survey(root.path()).since(&before, |_| false);
        assert!(changes.names.is_empty() && changes.size == Size::default());
        assert_eq!(lines(&changes.listing).len(), 7);
    }

    #[test]
    fn what_changed_is_sent_by_all_its_names_with_its_directories() {
        let root = tree();
        let before = settled(root.path());
        fs::write(root.path().join("volume/etc/a"), "ONE").unwrap();
        fs::remove_file(root.path().join("volume/etc/b")).unwrap();
        let changes = survey(root.path()).since(&before, |_| false);
        assert_eq!(
            lines(&changes.listing),
            ["/volume", "+volume/also-a", "/volume/etc", "+volume/etc/a", "=volume/etc/deep", "=volume/etc/deep/c"]
        );
        assert_eq!(lines(&changes.names), ["volume", "volume/also-a", "volume/etc", "volume/etc/a"]);
    }

    #[test]
    fn a_name_that_was_moved_with_its_directory_brings_the_others_along() {
        let root = tree();
        fs::hard_link(root.path().join("volume/etc/deep/c"), root.path().join("volume/also-c")).unwrap();
        let before = settled(root.path());
        fs::rename(root.path().join("volume/etc/deep"), root.path().join("volume/deep")).unwrap();
        let changes = survey(root.path()).since(&before, |_| false);
        // As said above, `etc` may have been moved itself.
        let names = lines(&changes.names);
        assert!(["volume/deep/c", "volume/also-c"].iter().all(|name| names.contains(&(*name).to_owned())), "{names:?}");
    }

    #[test]
    fn a_pass_by_times_leaves_what_kept_its_time() {
        let root = tree();
        let settled = |root: &Path| {
            let mut survey = settled(root);
            // This one was there long before.
            let old = survey.files.iter_mut().filter(|(path, _)| path.ends_with("c"));
            old.for_each(|(_, stamp)| stamp.changed_ns -= 100_000_000_000);
            survey
        };
        let mut before = settled(root.path());
        fs::write(root.path().join("volume/etc/a"), "ONE").unwrap();
        fs::write(root.path().join("volume/etc/b"), "TWO").unwrap();
        fs::rename(root.path().join("volume/etc/deep"), root.path().join("volume/elsewhere")).unwrap();
        let now = settled(root.path());
        let changes = now.since(&before, |_| false);
        before.follow(now, &changes, |path| path.ends_with("etc/b"));
        let left = settled(root.path()).since(&before, |_| false);
        let names = ["volume/elsewhere", "volume/elsewhere/c", "volume/etc", "volume/etc/b"];
        assert_eq!(lines(&left.names), names);
        // What came by another way is not of the root.
        let mut before = settled(root.path());
        before.include_settled(Survey::take(root.path(), &["beside".as_ref()]).unwrap());
        let now = settled(root.path());
        let changes = now.since(&before, |_| false);
        before.follow(now, &changes, |_| false);
        let both = Survey::take(root.path(), &[VOLUME.as_ref(), "beside".as_ref()]).unwrap();
        assert!(
            both.since(&before, |_| false)
                .names()
                .all(|path| path.ends_with("c") || path.ends_with("deep") || path.ends_with("elsewhere"))
        );
    }

    #[test]
    fn what_was_renamed_or_has_another_mode_has_changed() {
        let root = tree();
        let before = settled(root.path());
        fs::rename(root.path().join("volume/etc/deep"), root.path().join("volume/elsewhere")).unwrap();
        let sent = lines(&survey(root.path()).since(&before, |_| false).names);
        // Its old directory lies in its new one, and may have been moved itself; a file in it has a name elsewhere.
        let all = [
            "volume",
            "volume/also-a",
            "volume/elsewhere",
            "volume/elsewhere/c",
            "volume/etc",
            "volume/etc/a",
            "volume/etc/b",
        ];
        assert_eq!(sent, all);
    }

    #[test]
    fn what_changed_just_before_a_survey_is_sent_again() {
        let root = tree();
        let before = survey(root.path());
        assert_eq!(lines(&survey(root.path()).since(&before, |_| false).names).len(), 7);
    }

    #[test]
    fn what_rests_is_waited_for_if_it_is_much() {
        let root = tree();
        fs::write(root.path().join("volume/etc/a"), vec![1; 5 << 20]).unwrap();
        let later = |seconds: f64| {
            let mut survey = survey(root.path());
            survey.began_ns += (seconds * 1e9) as i128;
            let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
            (seconds(survey.time_to_rest()), seconds(survey.time_to_settle()))
        };
        // It may still be being written.
        let (rest, settle) = later(0.2);
        assert!(settle.is_none() && (0.5..=0.8).contains(&rest.unwrap()), "{rest:?} {settle:?}");
        let (rest, settle) = later(1.5);
        assert!(rest.is_none() && (3.0..=3.5).contains(&settle.unwrap()), "{rest:?} {settle:?}");
        assert_eq!(later(9.0), (None, None));
        fs::write(root.path().join("volume/etc/a"), "little").unwrap();
        assert_eq!((later(0.2), later(1.5)), ((None, None), (None, None)));
    }

    #[test]
    fn directories_that_changed_places_and_back_are_sent_whole() {
        let root = tree();
        let etc = root.path().join("volume/etc");
        fs::create_dir(etc.join("green")).unwrap();
        fs::write(etc.join("green/c"), "green").unwrap();
        let before = settled(root.path());
        let rename = |from: &str, to: &str| fs::rename(etc.join(from), etc.join(to)).unwrap();
        for (from, to) in [("deep", "t"), ("green", "deep"), ("t", "green")] {
            rename(from, to);
        }
        for (from, to) in [("deep", "t"), ("green", "deep"), ("t", "green")] {
            rename(from, to);
        }
        let sent = lines(&survey(root.path()).since(&before, |_| false).names);
        assert!(
            ["volume/etc/deep/c", "volume/etc/green/c"].iter().all(|name| sent.iter().any(|sent| sent == name)),
            "{sent:?}"
        );
        assert!(!sent.iter().any(|sent| sent == "volume/etc/a"), "{sent:?}");
    }

    #[test]
    fn what_will_not_change_any_more_is_sent_once() {
        let root = tree();
        let mut before = settled(root.path());
        fs::create_dir(root.path().join("volume/memory")).unwrap();
        fs::write(root.path().join("volume/memory/pages"), "pages").unwrap();
        before.include_settled(Survey::take(root.path(), &["volume/memory".as_ref()]).unwrap());
        assert_eq!(lines(&survey(root.path()).since(&before, |_| false).names), ["volume"]);
    }

    #[test]
    fn what_can_be_patched_is_listed_and_stays() {
        let root = tree();
        let file = root.path().join("volume/etc/b");
        let mut before = settled(root.path());
        fs::write(&file, "TWO").unwrap();
        let is_file = |path: &Path| path.ends_with("etc/b");
        let changes = survey(root.path()).since(&before, is_file);
        assert_eq!(changes.patched, [Path::new("volume/etc/b")]);
        assert_eq!(lines(&changes.names), ["volume/etc"]);
        make_room(root.path(), &[VOLUME.as_ref()], &changes.listing).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "TWO");
        check_whole(root.path(), &[VOLUME.as_ref()], &changes.listing).unwrap();
        // Looked at again it has not changed, but for what may have changed in the same tick.
        let patched = || [PathBuf::from("volume/etc/b")].into_iter();
        before.renew(&survey(root.path()), patched());
        assert_eq!(survey(root.path()).since(&before, is_file).patched.len(), 1);
        before.renew(&Survey { began_ns: before.began_ns + 120_000_000_000, ..survey(root.path()) }, patched());
        assert!(survey(root.path()).since(&before, is_file).patched.is_empty());
        fs::write(&file, "THREE").unwrap();
        assert_eq!(survey(root.path()).since(&before, is_file).patched.len(), 1);
    }

    #[test]
    fn likely_to_change_is_what_is_large_and_did_so_lately() {
        let root = tree();
        for (name, length) in [("large", 2 << 20), ("larger", 3 << 20), ("small", 4096)] {
            fs::write(root.path().join("volume").join(name), vec![1; length]).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let mut seen = survey(root.path());
        assert_eq!(seen.likely(ROOM, |_| true), [Path::new("volume/larger"), Path::new("volume/large")]);
        seen.files.get_mut(Path::new("volume/larger")).unwrap().disk_bytes = LIKELY_MAX + 1;
        assert_eq!(seen.likely(ROOM, |_| true), [Path::new("volume/large")]);
        fs::hard_link(root.path().join("volume/large"), root.path().join("volume/too")).unwrap();
        assert_eq!(survey(root.path()).likely(ROOM, |_| true), [Path::new("volume/larger")]);
        seen.began_ns += 2 * LATELY_NS;
        assert!(seen.likely(ROOM, |_| true).is_empty());
    }

    #[test]
    fn room_is_made_for_what_comes_and_nothing_else_is_touched() {
        let (source, target) = (tree(), tree());
        let at = |path: &str| target.path().join(path);
        // It was made while the first of it was sent, and is gone again.
        fs::create_dir(at("volume/passing")).unwrap();
        fs::write(at("volume/passing/file"), "").unwrap();
        lsetxattr(at("volume/etc"), "user.old", b"1", XattrFlags::empty()).unwrap();
        symlink(at("beside"), at("volume/link")).unwrap();
        fs::write(at("beside/kept"), "kept").unwrap();
        let before = settled(source.path());
        fs::write(source.path().join("volume/etc/b"), "TWO").unwrap();
        // A directory that was a file.
        fs::remove_file(source.path().join("volume/etc/deep/c")).unwrap();
        fs::create_dir(source.path().join("volume/etc/deep/c")).unwrap();
        let changes = survey(source.path()).since(&before, |_| false);
        make_room(target.path(), &[VOLUME.as_ref()], &changes.listing).unwrap();
        assert_eq!(
            lines(&survey(target.path()).since(&Survey::default(), |_| false).names),
            ["volume", "volume/also-a", "volume/etc", "volume/etc/a", "volume/etc/deep"]
        );
        assert_eq!(llistxattr(at("volume/etc"), &mut [0_u8; 64][..]).unwrap(), 0);
        assert_eq!(fs::read_to_string(at("beside/kept")).unwrap(), "kept");
        let whole = || check_whole(target.path(), &[VOLUME.as_ref()], &changes.listing);
        assert!(whole().unwrap_err().to_string().contains("did not come"));
        fs::write(at("volume/etc/b"), "TWO").unwrap();
        fs::create_dir(at("volume/etc/deep/c")).unwrap();
        whole().unwrap();
        fs::write(at("volume/more"), "").unwrap();
        assert!(whole().unwrap_err().to_string().contains("volume/more came"));
    }

    #[test]
    fn a_damaged_listing_takes_nothing_away() {
        let root = tree();
        for listing in [&b"?volume\0"[..], b"=volume", b"=\0"] {
            assert!(make_room(root.path(), &[VOLUME.as_ref()], listing).is_err());
        }
        assert_eq!(survey(root.path()).files.len(), 7);
    }
}
