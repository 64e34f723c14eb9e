//! Memory: private, shared, of files with and without names, and of huge pages.

use std::{
    fs::{self, File, OpenOptions},
    io::ErrorKind,
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
};

use anyhow::{Context, Result};
use memmap2::{MmapOptions, MmapRaw};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

use super::{
    Check, Kind,
    limb::{Limb, field},
    same,
};
use crate::promise::skip;

pub const KINDS: &[Kind] = &[
    ("memory", private),
    ("memory-locked", locked),
    ("memory-shared-anonymous", shared_anonymous),
    ("memory-of-a-file", of_a_file),
    ("memory-of-a-removed-file", of_a_removed_file),
    ("memory-of-huge-pages", huge),
    ("memfd", memfd),
    ("memfd-of-huge-pages", huge_memfd),
    ("posix-shared-memory", posix_shared),
];

const LENGTH: usize = 3 << 20;
/// The size of a huge page on x86-64, in bytes and as a power of two.
const HUGE: (usize, u8) = (2 << 20, 21);

/// Bytes of which no two pages are alike.
fn pattern(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// A mapping of a file that is shared with whoever else maps it. Read and written at its addresses, but as a file: a slice of memory that
/// others write would not be safe.
pub struct Shared {
    map: MmapRaw,
}

impl Shared {
    pub fn of(file: impl memmap2::MmapAsRawDesc, length: usize) -> Result<Self> {
        Ok(Self { map: MmapOptions::new().len(length).map_raw(file).context("map it")? })
    }

    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        let memory = OpenOptions::new().write(true).open("/proc/self/mem").context("open the memory")?;
        memory.write_all_at(bytes, self.map.as_ptr() as u64).context("write the mapping")
    }

    pub fn read(&self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let memory = File::open("/proc/self/mem").context("open the memory")?;
        memory.read_exact_at(&mut bytes, self.map.as_ptr() as u64).context("read the mapping")?;
        Ok(bytes)
    }
}

fn equal(what: &str, now: &[u8], before: &[u8]) -> Result<()> {
    let differs = now.iter().zip(before).position(|(now, before)| now != before);
    same(what, (now.len(), differs), (before.len(), None))
}

fn private(_: &Path) -> Result<Check> {
    let mut bytes = pattern(1, LENGTH);
    let mut round = 1;
    Ok(Box::new(move || {
        equal("the memory", &bytes, &pattern(round, LENGTH))?;
        round += 1;
        bytes.copy_from_slice(&pattern(round, LENGTH));
        Ok(())
    }))
}

fn locked(_: &Path) -> Result<Check> {
    let mut map = MmapOptions::new().len(64 << 10).map_anon().context("map memory")?;
    map.copy_from_slice(&pattern(2, 64 << 10));
    map.lock().context("lock the memory")?;
    let kib = || field("/proc/self/status", "VmLck");
    let before = kib()?;
    Ok(Box::new(move || {
        equal("the memory", &map, &pattern(2, 64 << 10))?;
        same("what is locked", kib()?, before.clone())
    }))
}

fn shared_anonymous(_: &Path) -> Result<Check> {
    let zero = OpenOptions::new().read(true).write(true).open("/dev/zero").context("open /dev/zero")?;
    let map = Shared::of(&zero, LENGTH)?;
    map.write(&pattern(3, LENGTH))?;
    Ok(Box::new(move || equal("the memory", &map.read(LENGTH)?, &pattern(3, LENGTH))))
}

fn file_of(path: &Path, seed: u32) -> Result<(File, Shared)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(path).with_context(|| format!("make {}", path.display()))?;
    file.set_len(LENGTH as u64).context("make the file longer")?;
    let map = Shared::of(&file, LENGTH)?;
    map.write(&pattern(seed, LENGTH))?;
    Ok((file, map))
}

fn of_a_file(place: &Path) -> Result<Check> {
    let path = place.join("file");
    let (_, map) = file_of(&path, 4)?;
    Ok(Box::new(move || {
        equal("the memory", &map.read(LENGTH)?, &pattern(4, LENGTH))?;
        // It is the file still, and not a copy.
        map.write(b"through")?;
        same("the file", std::fs::read(&path)?.starts_with(b"through"), true)?;
        map.write(&pattern(4, LENGTH))
    }))
}

fn of_a_removed_file(place: &Path) -> Result<Check> {
    let path = place.join("file");
    let (_, map) = file_of(&path, 5)?;
    std::fs::remove_file(&path).context("remove the file")?;
    Ok(Box::new(move || equal("the memory", &map.read(LENGTH)?, &pattern(5, LENGTH))))
}

fn huge(_: &Path) -> Result<Check> {
    let mut map = match MmapOptions::new().len(HUGE.0).huge(Some(HUGE.1)).map_anon() {
        Err(error) if error.kind() == ErrorKind::OutOfMemory => return Err(skip("no huge page is free")),
        map => map.context("map a huge page")?,
    };
    map.copy_from_slice(&pattern(6, HUGE.0));
    Ok(Box::new(move || {
        equal("the memory", &map, &pattern(6, HUGE.0))?;
        same("the size of its pages", page_size(map.as_ptr() as usize)?, "2048 kB".to_owned())
    }))
}

/// The size of the pages of the mapping at `address` (proc_pid_smaps(5)).
fn page_size(address: usize) -> Result<String> {
    let smaps = fs::read_to_string("/proc/self/smaps").context("read about the mappings")?;
    let from = smaps.find(&format!("{address:x}-")).context("the mapping is not listed")?;
    let size = smaps[from..].lines().find_map(|line| line.strip_prefix("KernelPageSize:"));
    Ok(size.context("a mapping without a size of pages")?.trim().to_owned())
}

fn memfd(_: &Path) -> Result<Check> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("survivor", flags).context("make a memfd")?);
    file.write_all_at(&pattern(7, LENGTH), 0).context("fill the memfd")?;
    let map = Shared::of(&file, LENGTH)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals)).context("seal the memfd")?;
    Ok(Box::new(move || {
        equal("the mapping", &map.read(LENGTH)?, &pattern(7, LENGTH))?;
        map.write(b"through")?;
        let mut start = [0; 7];
        file.read_exact_at(&mut start, 0)?;
        same("the file", &start, b"through")?;
        map.write(&pattern(7, LENGTH))?;
        same("the seals", fcntl(file.as_fd(), FcntlArg::F_GET_SEALS)?, seals.bits())?;
        same("growing a sealed file", file.set_len(1 + LENGTH as u64).is_err(), true)
    }))
}

fn huge_memfd(_: &Path) -> Result<Check> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = File::from(memfd_create("survivor-huge", flags).context("make a memfd")?);
    file.set_len(HUGE.0 as u64).context("make the memfd longer")?;
    let map = match Shared::of(&file, HUGE.0) {
        Err(_) => return Err(skip("no huge page is free")),
        map => map?,
    };
    map.write(&pattern(8, HUGE.0))?;
    Ok(Box::new(move || equal("the memory", &map.read(HUGE.0)?, &pattern(8, HUGE.0))))
}

/// A mapping that two processes share; by its name, and after that is gone.
fn posix_shared(_: &Path) -> Result<Check> {
    let path = Path::new("/dev/shm/survivor");
    let (_, map) = file_of(path, 9)?;
    let mut other = Limb::begin(path, "mapped")?;
    let removed = Path::new("/dev/shm/survivor-removed");
    let (_, gone) = file_of(removed, 10)?;
    let mut other_of_gone = Limb::begin(removed, "mapped")?;
    std::fs::remove_file(removed).context("remove the file")?;
    let mut round = 0_u32;
    Ok(Box::new(move || {
        equal("the memory", &map.read(LENGTH)?, &pattern(9, LENGTH))?;
        equal("the memory without a name", &gone.read(LENGTH)?, &pattern(10, LENGTH))?;
        for (map, other, seed) in [(&map, &mut other, 9), (&gone, &mut other_of_gone, 10)] {
            round += 1;
            let said = format!("round {round:>4}");
            map.write(said.as_bytes())?;
            same("what another process sees in it", other.facts()?, vec![said])?;
            map.write(&pattern(seed, LENGTH))?;
        }
        Ok(())
    }))
}
