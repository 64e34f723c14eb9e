//! Large files that change while their server is on its way: of these only the blocks that changed are sent.
//!
//! The target sums the blocks of what it has of them, while the server runs, and the source keeps these sums. From then on it knows what
//! is there, since nothing but what it sends changes it: it reads a file, and sends the blocks whose sums are others. That they are
//! alike by chance is as good as impossible; a guest that wanted them to be would harm its own file.
//!
//! ```text
//! question   traits (16 bytes) · path · NUL
//! answer     count of blocks (8 bytes, big endian; all ones: not to be had by blocks) · 16 bytes for each
//! patch      length of the path (4 bytes) · path · length of the file (8 bytes) · its time (8 bytes, 4 bytes) · blocks · NONE
//! block      its number (8 bytes) · its length (4 bytes) · what is in it; or its number · 0: it is a hole now
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::vec;

use anyhow::{Context, Result, bail, ensure};
use kernel::file;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, Timespec, Timestamps, UTIME_OMIT, fgetxattr, flistxattr};

use super::changes::{NAMES_MAX_BYTES, brought};
use crate::checksum::of_piece as sum;
use crate::interrupt;

/// Small enough that a page of a database does not drag much along, and large enough that the sums of a file are little beside it.
const BLOCK: usize = 64 << 10;

/// Of all files together: 64 MiB of sums. A guest makes a file as long as it likes at no cost.
const BLOCKS_MAX: u64 = 4 << 20;

/// The answer for a file that has to come whole, and the number behind the last block of a patch.
const NONE: u64 = u64::MAX;

/// Of a capability the kernel takes leave with the first write to its file.
const CAPABILITY: &[u8] = b"security.capability";

/// The longest value of an attribute (`XATTR_SIZE_MAX` of linux/limits.h).
const VALUE_MAX_BYTES: usize = 65_536;

/// The longest path that a patch may name.
const PATH_MAX_BYTES: u32 = 1 << 16;

/// After so many blocks without any that changed somebody looks whether all is over.
const LOOK_EVERY: u64 = 1024;

/// Where an overlay has a file from: a handle of the file system below, which is not sent.
const ORIGINS: [&[u8]; 2] = [b"user.overlay.origin", b"trusted.overlay.origin"];

/// What the target has of files, by their paths below the server's directory.
#[derive(Debug, Default)]
pub struct Known {
    files: BTreeMap<PathBuf, Blocks>,
}

#[derive(Debug)]
struct Blocks {
    traits: u128,
    sums: Vec<u128>,
}

impl Blocks {
    /// Whether the file can be patched, when there are so many `blocks` of all files so far.
    fn fits(&self, reading: &Reading, blocks: &mut u64) -> bool {
        let together = *blocks - self.sums.len() as u64 + reading.count();
        // Whatever keeps its traits from being read, it can come whole.
        let fits = together <= BLOCKS_MAX && traits(&reading.file).is_ok_and(|now| now == Some(self.traits));
        if fits {
            *blocks = together;
        }
        fits
    }
}

/// What the target is asked about.
#[derive(Debug)]
pub struct Question {
    files: Vec<(PathBuf, u128)>,
}

/// Opens the directory that all paths are below.
fn open_directory(directory: &Path) -> Result<File> {
    File::open(directory).with_context(|| format!("open {}", directory.display()))
}

/// Opens a file that may be patched, without being led elsewhere by who is in the server.
fn open(directory: &File, path: &Path, writable: bool) -> io::Result<File> {
    let found = File::from(file::open_without_links(directory, path, OFlags::PATH)?);
    let meta = found.metadata()?;
    // Opening what is no file may have effects, or wait.
    if !meta.is_file() || meta.nlink() != 1 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "it is no file with one name"));
    }
    // Nor is somebody's lease on it waited for.
    let mut options = File::options();
    options.read(true).write(writable).custom_flags(nix::libc::O_NONBLOCK);
    options.open(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

/// A sum of what a file is beside its content, its times aside. None: it cannot be patched.
fn traits(file: &File) -> io::Result<Option<u128>> {
    let meta = file.metadata()?;
    let mut names = vec![0_u8; NAMES_MAX_BYTES];
    let length = flistxattr(file, &mut names[..])?;
    let mut names: Vec<&[u8]> = brought(&names[..length]).filter(|name| !ORIGINS.contains(name)).collect();
    names.sort_unstable();
    if names.contains(&CAPABILITY) {
        return Ok(None);
    }
    let mut told = [meta.mode(), meta.uid(), meta.gid()].map(u32::to_be_bytes).concat();
    let mut value = vec![0_u8; VALUE_MAX_BYTES];
    for name in names {
        let length = fgetxattr(file, name, &mut value[..])?;
        told.extend((name.len() as u64).to_be_bytes());
        told.extend(name);
        told.extend((length as u64).to_be_bytes());
        told.extend(&value[..length]);
    }
    Ok(Some(sum(&told)))
}

/// How many blocks a file of this length has.
fn count(length: u64) -> u64 {
    length.div_ceil(BLOCK as u64)
}

/// A file by blocks, in their order.
struct Reading {
    file: File,
    length: u64,
    number: u64,
    /// Up to here there is nothing but a hole.
    hole_until: u64,
    block: Vec<u8>,
}

/// A block that was read.
enum Piece<'a> {
    Bytes(&'a [u8]),
    /// So many zeros, of which no disk was asked.
    Hole(usize),
    /// The file was cut short meanwhile.
    Cut,
}

impl Reading {
    fn of(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file, length, number: 0, hole_until: 0, block: vec![0; BLOCK] })
    }

    fn count(&self) -> u64 {
        count(self.length)
    }

    /// The next block, if there is one, and its number.
    fn next(&mut self) -> io::Result<Option<(u64, Piece<'_>)>> {
        if self.number == self.count() {
            return Ok(None);
        }
        let (number, at) = (self.number, self.number * BLOCK as u64);
        let size = usize::try_from(self.length - at).map_or(BLOCK, |rest| rest.min(BLOCK));
        self.number += 1;
        if at >= self.hole_until {
            self.hole_until = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                // Nothing but a hole to its end, as long as that is where it was.
                Err(rustix::io::Errno::NXIO) => self.length,
                // This file system knows none.
                Err(rustix::io::Errno::INVAL) => at,
                Err(error) => return Err(error.into()),
            };
        }
        if self.hole_until >= at + size as u64 {
            return Ok(Some((number, Piece::Hole(size))));
        }
        // What data begins in this block is read with it, and the next is asked for anew.
        self.hole_until = 0;
        let piece = match self.file.read_exact_at(&mut self.block[..size], at) {
            Ok(()) => Piece::Bytes(&self.block[..size]),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Piece::Cut,
            Err(error) => return Err(error),
        };
        Ok(Some((number, piece)))
    }
}

/// The sums of blocks of zeros: a whole one, and any shorter.
struct Zeros(u128);

impl Zeros {
    fn new() -> Self {
        Self(sum(&[0; BLOCK]))
    }

    fn of(&self, size: usize) -> u128 {
        if size == BLOCK { self.0 } else { sum(&vec![0; size]) }
    }
}

impl Question {
    /// About those of `paths` below `directory` that can be had by blocks.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn about(directory: &Path, paths: Vec<PathBuf>) -> Result<Self> {
        let below = open_directory(directory)?;
        let told = |path: &Path| open(&below, path, false).and_then(|file| traits(&file)).ok().flatten();
        let files = paths.into_iter().filter_map(|path| told(&path).map(|traits| (path, traits))).collect();
        Ok(Self { files })
    }

    /// How long an answer can be; 0: there is nothing to be asked.
    pub fn longest_answer(&self) -> u64 {
        if self.files.is_empty() { 0 } else { self.files.len() as u64 * 8 + BLOCKS_MAX * 16 }
    }

    /// As it is sent.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut told = Vec::new();
        for (path, traits) in &self.files {
            told.extend(traits.to_be_bytes());
            told.extend(path.as_os_str().as_bytes());
            told.push(0);
        }
        told
    }
}

/// What is said to a question, as it is made: who has asked may be gone meanwhile.
pub struct Answer<'a> {
    below: File,
    asked: &'a [u8],
    /// How many blocks there may be yet.
    left: u64,
    at_work: Option<Reading>,
    zeros: Zeros,
    out: VecDeque<u8>,
}

impl<'a> Answer<'a> {
    /// To a question that came: the files are below `directory`.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn to(asked: &'a [u8], directory: &Path) -> Result<Self> {
        let below = open_directory(directory)?;
        Ok(Self { below, asked, left: BLOCKS_MAX, at_work: None, zeros: Zeros::new(), out: VecDeque::new() })
    }

    fn make(&mut self) -> io::Result<()> {
        let Some(mut reading) = self.at_work.take() else {
            return self.next_file();
        };
        for _ in 0..LOOK_EVERY {
            let sum = match reading.next()? {
                None => return Ok(()),
                Some((_, Piece::Bytes(bytes))) => sum(bytes),
                Some((_, Piece::Hole(size))) => self.zeros.of(size),
                Some((_, Piece::Cut)) => return Err(io::Error::other("a file that came is changed by somebody else")),
            };
            self.out.extend(sum.to_be_bytes());
        }
        self.at_work = Some(reading);
        Ok(())
    }

    fn next_file(&mut self) -> io::Result<()> {
        if self.asked.is_empty() {
            return Ok(());
        }
        let cut = || io::Error::other("a question about blocks is cut");
        let (told, behind) = self.asked.split_first_chunk::<16>().ok_or_else(cut)?;
        let end = behind.iter().position(|byte| *byte == 0).ok_or_else(cut)?;
        let path = Path::new(OsStr::from_bytes(&behind[..end]));
        self.asked = &behind[end + 1..];
        let file = open(&self.below, path, false).ok();
        let file = file.filter(|file| traits(file).is_ok_and(|found| found == Some(u128::from_be_bytes(*told))));
        let reading = file.map(Reading::of).transpose()?.filter(|reading| reading.count() <= self.left);
        self.left -= reading.as_ref().map_or(0, Reading::count);
        self.out.extend(reading.as_ref().map_or(NONE, Reading::count).to_be_bytes());
        self.at_work = reading;
        Ok(())
    }
}

impl Read for Answer<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.out.is_empty() && (self.at_work.is_some() || !self.asked.is_empty()) {
            self.make()?;
        }
        self.out.read(into)
    }
}

impl Known {
    /// What the target said to `question`.
    ///
    /// # Errors
    /// When the answer is damaged.
    pub fn from_answer(question: Question, said: &[u8]) -> Result<Self> {
        let (mut files, mut rest) = (BTreeMap::new(), said);
        for (path, traits) in question.files {
            let (count, behind) = rest.split_first_chunk::<8>().context("an answer about blocks is cut")?;
            let count = u64::from_be_bytes(*count);
            rest = behind;
            if count == NONE {
                continue;
            }
            let length = usize::try_from(count).ok().and_then(|count| count.checked_mul(16));
            let (sums, behind) =
                length.and_then(|length| rest.split_at_checked(length)).context("the sums of a file are cut")?;
            let whole = |sum: &[u8]| sum.try_into().map_or(0, u128::from_be_bytes);
            let sums = sums.chunks_exact(16).map(whole).collect();
            files.insert(path, Blocks { traits, sums });
            rest = behind;
        }
        ensure!(rest.is_empty(), "the other side tells of files that it was not asked about");
        Ok(Self { files })
    }

    /// Whether files below `directory`, one after the other, can be patched as they are now: all that it says so of, together.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn fitting(&self, directory: &Path) -> Result<impl FnMut(&Path) -> bool> {
        let below = open_directory(directory)?;
        let mut blocks = self.blocks();
        Ok(move |path: &Path| {
            let Some(known) = self.files.get(path) else { return false };
            let reading = open(&below, path, false).and_then(Reading::of);
            reading.is_ok_and(|reading| known.fits(&reading, &mut blocks))
        })
    }

    /// How long files may be that are asked about yet, all together, in bytes.
    pub fn room(&self) -> u64 {
        BLOCKS_MAX.saturating_sub(self.blocks()) * BLOCK as u64
    }

    /// Whether the blocks of a file are known.
    pub fn contains(&self, path: &Path) -> bool {
        self.files.contains_key(path)
    }

    /// Their paths.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.keys().map(PathBuf::as_path)
    }

    /// What the target has of others, too.
    pub fn extend(&mut self, others: Self) {
        self.files.extend(others.files);
    }

    /// Only those of which `is_there` says so are still there as they were.
    pub fn retain(&mut self, mut is_there: impl FnMut(&Path) -> bool) {
        self.files.retain(|path, _| is_there(path));
    }

    fn blocks(&self) -> u64 {
        self.files.values().map(|known| known.sums.len() as u64).sum()
    }

    /// What has changed in `paths`, as a stream. Those that are not what they were are left out, and not known any more.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn patch(&mut self, directory: &Path, paths: Vec<PathBuf>) -> Result<Patch<'_>> {
        let below = open_directory(directory)?;
        Ok(Patch {
            below,
            blocks: self.blocks(),
            known: self,
            left: paths.into_iter(),
            read: Duration::ZERO,
            at_work: None,
            zeros: Zeros::new(),
            out: VecDeque::new(),
        })
    }
}

/// A patch that is read as it is made.
pub struct Patch<'a> {
    below: File,
    known: &'a mut Known,
    /// Of all files, those that are left out since aside.
    blocks: u64,
    left: vec::IntoIter<PathBuf>,
    /// How long it took so far to make it.
    pub(super) read: Duration,
    at_work: Option<(PathBuf, Blocks, Reading)>,
    zeros: Zeros,
    out: VecDeque<u8>,
}

impl Patch<'_> {
    /// Makes what comes next; nothing when all is there.
    fn make(&mut self) -> io::Result<()> {
        if let Some((path, mut known, mut reading)) = self.at_work.take() {
            let is_done = self.next_block(&mut known, &mut reading)?;
            match is_done {
                Some(is_whole) => {
                    self.out.extend(NONE.to_be_bytes());
                    if is_whole {
                        self.known.files.insert(path, known);
                    }
                }
                None => self.at_work = Some((path, known, reading)),
            }
            return Ok(());
        }
        for path in self.left.by_ref() {
            let Some(known) = self.known.files.remove(&path) else { continue };
            let reading = open(&self.below, &path, false).and_then(Reading::of).ok();
            let Some(reading) = reading.filter(|reading| known.fits(reading, &mut self.blocks)) else {
                self.blocks -= known.sums.len() as u64;
                continue;
            };
            let meta = reading.file.metadata()?;
            let bytes = path.as_os_str().as_bytes();
            self.out.extend((bytes.len() as u32).to_be_bytes());
            self.out.extend(bytes);
            self.out.extend(reading.length.to_be_bytes());
            self.out.extend(meta.mtime().to_be_bytes());
            self.out.extend((meta.mtime_nsec() as u32).to_be_bytes());
            self.at_work = Some((path, known, reading));
            return Ok(());
        }
        Ok(())
    }

    /// Goes on to a block that is another there. Else the file is over, and known in whole or not.
    fn next_block(&mut self, known: &mut Blocks, reading: &mut Reading) -> io::Result<Option<bool>> {
        while let Some((number, piece)) = reading.next()? {
            let (now, size, bytes) = match piece {
                Piece::Bytes(bytes) => (sum(bytes), bytes.len(), Some(bytes)),
                Piece::Hole(size) => (self.zeros.of(size), size, None),
                Piece::Cut => return Ok(Some(false)),
            };
            let at = number as usize;
            // Where it was shorter the target puts zeros.
            let there = known.sums.get(at).copied().unwrap_or_else(|| self.zeros.of(size));
            match known.sums.get_mut(at) {
                Some(sum) => *sum = now,
                None => known.sums.push(now),
            }
            if now != there {
                self.out.extend(number.to_be_bytes());
                self.out.extend(bytes.map_or(0, |bytes| bytes.len() as u32).to_be_bytes());
                self.out.extend(bytes.unwrap_or_default());
                return Ok(None);
            }
            if number % LOOK_EVERY == 0 {
                interrupt::check().map_err(io::Error::other)?;
            }
        }
        known.sums.truncate(reading.count() as usize);
        Ok(Some(true))
    }
}

impl Read for Patch<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.out.is_empty() {
            let began = Instant::now();
            // A bulk stream has frames of several blocks.
            while self.out.len() < into.len() {
                let before = self.out.len();
                self.make()?;
                if self.out.len() == before && self.at_work.is_none() {
                    break;
                }
            }
            self.read += began.elapsed();
        }
        self.out.read(into)
    }
}

/// Does to the files below `directory` what a patch says.
///
/// # Errors
/// When it is damaged, or the disk refuses.
pub fn apply(directory: &Path, from: &mut dyn Read) -> Result<()> {
    let below = open_directory(directory)?;
    let mut block = vec![0; BLOCK];
    while let Some(length) = first_of(from)? {
        ensure!((1..=PATH_MAX_BYTES).contains(&length), "a patch is damaged: a path of {length} bytes");
        let mut path = vec![0; length as usize];
        from.read_exact(&mut path).context("hear which file changed")?;
        let path = Path::new(OsStr::from_bytes(&path));
        let what = || format!("patch {}", path.display());
        let length = u64::from_be_bytes(take(from)?);
        let seconds = i64::from_be_bytes(take(from)?);
        let nanoseconds = u32::from_be_bytes(take(from)?);
        let file = open(&below, path, true).with_context(what)?;
        file.set_len(length).with_context(what)?;
        loop {
            let number = u64::from_be_bytes(take(from)?);
            if number == NONE {
                break;
            }
            let size = u32::from_be_bytes(take(from)?) as usize;
            let at = number.checked_mul(BLOCK as u64).filter(|at| *at < length && size <= BLOCK);
            let Some(at) = at else { bail!("a patch of {} is damaged", path.display()) };
            from.read_exact(&mut block[..size]).context("hear what changed")?;
            match size {
                0 => dig(&file, at, length).with_context(what)?,
                _ => file.write_all_at(&block[..size], at).with_context(what)?,
            }
        }
        let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let modified = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
        rustix::fs::futimens(&file, &Timestamps { last_access: omit, last_modification: modified })
            .with_context(what)?;
    }
    Ok(())
}

/// Makes a hole of the block at `at` of a file of that length; zeros where its file system knows no holes.
fn dig(file: &File, at: u64, length: u64) -> io::Result<()> {
    let size = (length - at).min(BLOCK as u64);
    match rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, size) {
        Err(rustix::io::Errno::OPNOTSUPP) => file.write_all_at(&vec![0; size as usize], at),
        dug => Ok(dug?),
    }
}

/// The first word of the next file's patch, if there is one.
fn first_of(from: &mut dyn Read) -> Result<Option<u32>> {
    let mut word = [0; 4];
    let length = from.read(&mut word[..1]).context("hear which file changed")?;
    if length == 0 {
        return Ok(None);
    }
    from.read_exact(&mut word[1..]).context("hear which file changed")?;
    Ok(Some(u32::from_be_bytes(word)))
}

fn take<const N: usize>(from: &mut dyn Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).context("hear what changed in a file")?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use proptest::prelude::*;
    use rustix::fs::{XattrFlags, setxattr};

    use super::*;

    const FILE: &str = "volume/file";

    /// Two directories with the same file in them.
    fn pair(content: &[u8]) -> [tempfile::TempDir; 2] {
        [0, 1].map(|_| {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("volume")).unwrap();
            fs::write(directory.path().join(FILE), content).unwrap();
            directory
        })
    }

    fn known(source: &Path, target: &Path) -> Known {
        let question = Question::about(source, vec![FILE.into(), "volume/none".into()]).unwrap();
        let said = answer(target, &question.to_bytes()).unwrap();
        Known::from_answer(question, &said).unwrap()
    }

    fn answer(target: &Path, asked: &[u8]) -> Result<Vec<u8>> {
        let mut said = Vec::new();
        Answer::to(asked, target)?.read_to_end(&mut said)?;
        Ok(said)
    }

    fn fits(known: &Known, source: &Path) -> bool {
        known.fitting(source).unwrap()(FILE.as_ref())
    }

    /// Patches the target, and says how many bytes that took.
    fn patch(known: &mut Known, source: &Path, target: &Path) -> usize {
        let mut told = Vec::new();
        known.patch(source, vec![FILE.into()]).unwrap().read_to_end(&mut told).unwrap();
        apply(target, &mut &told[..]).unwrap();
        told.len()
    }

    fn random(length: usize, seed: u8) -> Vec<u8> {
        (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed) ^ (at >> 8) as u8).collect()
    }

    #[derive(Debug, Clone)]
    enum Edit {
        Write(u64, Vec<u8>),
        Length(u64),
    }

    fn edits() -> impl Strategy<Value = Vec<Edit>> {
        let at = 0..5 * BLOCK as u64;
        let bytes = prop_oneof![proptest::collection::vec(any::<u8>(), 1..9), Just(vec![0; BLOCK + 7])];
        let edit =
            prop_oneof![(at.clone(), bytes).prop_map(|(at, bytes)| Edit::Write(at, bytes)), at.prop_map(Edit::Length)];
        proptest::collection::vec(edit, 0..5)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_patched_file_is_the_file(length in 0..4 * BLOCK, rounds in proptest::collection::vec(edits(), 1..4)) {
            let [source, target] = pair(&random(length, 1));
            let mut known = known(source.path(), target.path());
            prop_assert_eq!(known.files.len(), 1);
            for round in rounds {
                let file = File::options().write(true).open(source.path().join(FILE)).unwrap();
                for edit in round {
                    match edit {
                        Edit::Write(at, bytes) => file.write_all_at(&bytes, at).unwrap(),
                        Edit::Length(length) => file.set_len(length).unwrap(),
                    }
                }
                patch(&mut known, source.path(), target.path());
                let [now, there] = [&source, &target].map(|at| fs::read(at.path().join(FILE)).unwrap());
                prop_assert!(now == there);
                let [now, there] = [&source, &target].map(|at| fs::metadata(at.path().join(FILE)).unwrap());
                prop_assert_eq!(now.modified().unwrap(), there.modified().unwrap());
                prop_assert!(fits(&known, source.path()));
            }
        }
    }

    #[test]
    fn only_blocks_that_changed_are_sent_and_once() {
        let [source, target] = pair(&random(64 * BLOCK, 1));
        let mut known = known(source.path(), target.path());
        let file = File::options().write(true).open(source.path().join(FILE)).unwrap();
        for block in [3, 40] {
            file.write_all_at(b"new", block * BLOCK as u64 + 5).unwrap();
        }
        // A long way behind, with a hole between.
        file.write_all_at(b"end", 900 * BLOCK as u64).unwrap();
        let sent = patch(&mut known, source.path(), target.path());
        assert!((2 * BLOCK..2 * BLOCK + 200).contains(&sent), "{sent}");
        assert!(patch(&mut known, source.path(), target.path()) < 100);
        assert!(fs::metadata(target.path().join(FILE)).unwrap().blocks() * 512 < 100 * BLOCK as u64);
    }

    #[test]
    fn a_file_that_is_another_beside_its_content_is_not_patched() {
        let make = || {
            let [source, target] = pair(&random(3 * BLOCK, 1));
            (known(source.path(), target.path()), source, target)
        };
        type Do = fn(&Path);
        let ways: [Do; 5] = [
            |file| fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap(),
            |file| setxattr(file, "user.more", b"1", XattrFlags::empty()).unwrap(),
            |file| fs::hard_link(file, file.with_extension("too")).unwrap(),
            |file| fs::remove_file(file).unwrap(),
            |file| {
                fs::rename(file, file.with_extension("away")).unwrap();
                symlink(file.with_extension("away"), file).unwrap();
            },
        ];
        for (number, way) in ways.into_iter().enumerate() {
            let (mut known, source, target) = make();
            assert!(fits(&known, source.path()));
            way(&source.path().join(FILE));
            assert!(!fits(&known, source.path()), "{number}");
            assert_eq!(patch(&mut known, source.path(), target.path()), 0, "{number}");
            assert_eq!(known.files.len(), 0);
            // The same at the target, when it is asked.
            let [source, target] = pair(&random(3 * BLOCK, 1));
            way(&target.path().join(FILE));
            assert_eq!(super::tests::known(source.path(), target.path()).files.len(), 0, "{number}");
        }
    }

    #[test]
    fn what_becomes_a_hole_is_one_there() {
        let [source, target] = pair(&random(64 * BLOCK, 1));
        let mut known = known(source.path(), target.path());
        let file = File::options().write(true).open(source.path().join(FILE)).unwrap();
        file.set_len(0).unwrap();
        file.set_len(64 * BLOCK as u64 - 5).unwrap();
        assert!(patch(&mut known, source.path(), target.path()) < 2000);
        assert!(fs::read(target.path().join(FILE)).unwrap() == vec![0; 64 * BLOCK - 5]);
        assert!(fs::metadata(target.path().join(FILE)).unwrap().blocks() * 512 < BLOCK as u64);
    }

    #[test]
    fn a_file_that_becomes_too_long_comes_whole() {
        let [source, target] = pair(&random(3 * BLOCK, 1));
        let mut known = known(source.path(), target.path());
        let file = File::options().write(true).open(source.path().join(FILE)).unwrap();
        file.set_len(Known::default().room()).unwrap();
        assert!(fits(&known, source.path()));
        file.set_len(Known::default().room() + 1).unwrap();
        assert!(!fits(&known, source.path()));
        assert_eq!(patch(&mut known, source.path(), target.path()), 0);
        assert!(known.files.is_empty());
        // And so where it was before anybody asked.
        let file = File::options().write(true).open(target.path().join(FILE)).unwrap();
        file.set_len(Known::default().room() + 1).unwrap();
        let asked = Question::about(source.path(), vec![FILE.into()]).unwrap().to_bytes();
        assert_eq!(answer(target.path(), &asked).unwrap(), NONE.to_be_bytes());
    }

    #[test]
    fn where_an_overlay_has_it_from_does_not_matter() {
        let [source, target] = pair(&random(3 * BLOCK, 1));
        setxattr(source.path().join(FILE), "user.overlay.origin", b"", XattrFlags::empty()).unwrap();
        assert_eq!(known(source.path(), target.path()).files.len(), 1);
    }

    #[test]
    fn what_is_damaged_is_refused() {
        let [source, target] = pair(&random(3 * BLOCK, 1));
        let question = Question::about(source.path(), vec![FILE.into()]).unwrap();
        let asked = question.to_bytes();
        assert!(answer(target.path(), &asked[..asked.len() - 1]).is_err());
        let said = answer(target.path(), &asked).unwrap();
        assert!(Known::from_answer(question, &said[..said.len() - 1]).is_err());
        let mut known = known(source.path(), target.path());
        fs::write(source.path().join(FILE), random(3 * BLOCK, 2)).unwrap();
        let mut told = Vec::new();
        known.patch(source.path(), vec![FILE.into()]).unwrap().read_to_end(&mut told).unwrap();
        assert!(apply(target.path(), &mut &told[..told.len() - 9]).is_err());
        // A block behind the end, and a path that leads out.
        let number = 4 + FILE.len() + 8 + 8 + 4;
        let mut behind = told.clone();
        behind[number + 7] = 9;
        assert!(apply(target.path(), &mut &behind[..]).unwrap_err().to_string().contains("is damaged"));
        symlink(source.path().join("volume"), target.path().join("along")).unwrap();
        let mut out = told.clone();
        out[4..4 + FILE.len()].copy_from_slice(b"along//file");
        assert!(apply(target.path(), &mut &out[..]).is_err());
    }
}
