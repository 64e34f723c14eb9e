//! Images without the memory that can come later, so that they are soon elsewhere.
//!
//! CRIU marks pages that a restore need not have at once, private anonymous ones (criu: `images/pagemap.proto`, `PE_LAZY`). The images that
//! go ahead have holes in their place, and so each other page is where it was. The whole images stay, and the memory is read from them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use prost::Message;

use crate::template::remove_tree;

/// How an image of pages' places begins: what all images have, and that it is this one (criu: `criu/include/magic.h`).
const MAGIC: [u32; 2] = [0x5456_4319, 0x5608_4025];

/// How the names of these images begin, and of those with the pages.
const PLACES: &str = "pagemap-";
const PAGES: &str = "pages-";

/// Bytes of a page in the images.
const PAGE: u64 = 4096;

/// What of memory is copied at once.
const PIECE: usize = 1 << 20;

/// It can come later, and: it is in the image.
const LAZY: u32 = 1 << 1;
const PRESENT: u32 = 1 << 2;

/// `pagemap_head`
#[derive(Clone, PartialEq, Eq, Message)]
struct Head {
    #[prost(uint32, required, tag = "1")]
    pages: u32,
}

/// `pagemap_entry`
#[derive(Clone, PartialEq, Eq, Message)]
struct Entry {
    #[prost(uint64, required, tag = "1")]
    address: u64,
    #[prost(uint32, required, tag = "2")]
    pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    /// From CRIU 4.2 on in the place of the other count, which is 0 then.
    #[prost(uint64, optional, tag = "5")]
    many_pages: Option<u64>,
}

/// What a file with pages holds.
#[derive(Debug, PartialEq, Eq)]
struct Map {
    /// Its number.
    file: u32,
    /// What of it must be there at once, in bytes: from, to.
    needed: Vec<(u64, u64)>,
    /// How long it is.
    length: u64,
}

/// Whether a file of images holds pages, so that one without some of them goes ahead of it.
pub fn holds_pages(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PAGES))
}

/// Puts thin copies of all files with pages of the images in `directory` into the new directory `thin`. Returns how many bytes they lack.
///
/// # Errors
/// When the images cannot be understood, or the disk refuses.
pub fn make(directory: &Path, thin: &Path) -> Result<u64> {
    remove_tree(thin)?;
    fs::create_dir(thin).with_context(|| format!("make {}", thin.display()))?;
    let mut left_out = 0;
    for file in files(directory)? {
        if !file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PLACES)) {
            continue;
        }
        let bytes = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        let map = Map::read(&bytes).with_context(|| format!("{} is no map of pages", file.display()))?;
        let name = format!("{PAGES}{}.img", map.file);
        left_out += map.copy(&directory.join(&name), &thin.join(&name))?;
    }
    Ok(left_out)
}

/// Puts the files in `thin` where the images in `directory` lack them. Returns their names; none when there are no thin ones.
///
/// # Errors
/// When the disk refuses.
pub fn place(thin: &Path, directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    if !thin.exists() {
        return Ok(names);
    }
    for file in files(thin)? {
        let name = file.file_name().unwrap_or_default();
        ensure!(holds_pages(&file), "{} is no image of pages", file.display());
        let target = directory.join(name);
        fs::rename(&file, &target).with_context(|| format!("move {} to {}", file.display(), target.display()))?;
        names.push(name.to_string_lossy().into_owned());
    }
    remove_tree(thin)?;
    Ok(names)
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = || format!("read {}", directory.display());
    let entries = fs::read_dir(directory).with_context(read)?;
    entries.map(|entry| entry.map(|entry| entry.path()).with_context(read)).collect()
}

impl Map {
    fn read(image: &[u8]) -> Result<Self> {
        let word = |at: usize| image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        ensure!([word(0), word(4)] == MAGIC.map(Some), "it begins otherwise");
        let mut at = 8;
        let mut next = || -> Result<Option<&[u8]>> {
            if at == image.len() {
                return Ok(None);
            }
            let length = word(at).context("it is cut")? as usize;
            let body = image.get(at + 4..at + 4 + length).context("it is cut")?;
            at += 4 + length;
            Ok(Some(body))
        };
        let head = Head::decode(next()?.context("it is empty")?)?;
        let (mut needed, mut offset): (Vec<(u64, u64)>, u64) = (Vec::new(), 0);
        while let Some(body) = next()? {
            let entry = Entry::decode(body)?;
            // One of an old layout has none.
            let Some(flags) = entry.flags else { bail!("an entry says nothing of its pages: {entry:?}") };
            if flags & PRESENT == 0 {
                continue;
            }
            let end = offset + entry.many_pages.unwrap_or(u64::from(entry.pages)) * PAGE;
            if flags & LAZY == 0 {
                match needed.last_mut() {
                    Some(last) if last.1 == offset => last.1 = end,
                    _ => needed.push((offset, end)),
                }
            }
            offset = end;
        }
        Ok(Self { file: head.pages, needed, length: offset })
    }

    /// Copies what is needed of the file `from` to another of the same length. Returns how many bytes are not.
    fn copy(&self, from: &Path, to: &Path) -> Result<u64> {
        let copied = || -> Result<u64> {
            let (source, target) = (File::open(from)?, File::create(to)?);
            let length = source.metadata()?.len();
            // Of a layout that is another than ours.
            ensure!(length == self.length, "its map says that it has {} bytes, and it has {length}", self.length);
            target.set_len(length)?;
            let mut piece = vec![0; PIECE];
            for (begin, end) in &self.needed {
                let mut at = *begin;
                while at < *end {
                    let wanted = piece.len().min((end - at) as usize);
                    source.read_exact_at(&mut piece[..wanted], at)?;
                    target.write_all_at(&piece[..wanted], at)?;
                    at += wanted as u64;
                }
            }
            Ok(length - self.needed.iter().map(|(begin, end)| end - begin).sum::<u64>())
        };
        copied().with_context(|| format!("copy of {} to {} what cannot come later", from.display(), to.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As CRIU writes it: a head, and an entry for each stretch of pages alike.
    fn image(pages: u32, entries: &[(u32, u32)]) -> Vec<u8> {
        let mut image: Vec<u8> = MAGIC.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut add = |body: Vec<u8>| {
            image.extend((body.len() as u32).to_le_bytes());
            image.extend(body);
        };
        add(Head { pages }.encode_to_vec());
        let mut address = 0x40_0000;
        for (pages, flags) in entries {
            let entry = Entry { address, pages: *pages, in_parent: None, flags: Some(*flags), many_pages: None };
            // By turns as CRIU 4.1 and 4.2 say it.
            let newer = Entry { pages: 0, many_pages: Some((*pages).into()), ..entry.clone() };
            add(if pages % 2 == 0 { entry } else { newer }.encode_to_vec());
            address += u64::from(*pages) * PAGE;
        }
        image
    }

    #[test]
    fn what_may_come_later_is_a_hole_and_all_else_is_where_it_was() {
        let root = tempfile::tempdir().unwrap();
        let (images, thin) = (root.path().join("suspended"), root.path().join("thin"));
        fs::create_dir(&images).unwrap();
        // Two that cannot come later, three that can, four of an earlier round, which are not there, and one that cannot.
        let places = image(7, &[(2, PRESENT), (3, PRESENT | LAZY), (4, 1), (1, PRESENT)]);
        fs::write(images.join("pagemap-12.img"), places).unwrap();
        let pages: Vec<u8> = (1..=6).flat_map(|page| [page; PAGE as usize]).collect();
        fs::write(images.join("pages-7.img"), &pages).unwrap();
        fs::write(images.join("core-12.img"), "core").unwrap();
        assert_eq!(make(&images, &thin).unwrap(), 3 * PAGE);
        let made = fs::read(thin.join("pages-7.img")).unwrap();
        let first_of_each: Vec<u8> = made.iter().step_by(PAGE as usize).copied().collect();
        assert_eq!((made.len(), first_of_each), (pages.len(), vec![1, 2, 0, 0, 0, 6]));
        assert_eq!(files(&thin).unwrap().len(), 1);

        assert_eq!(place(&thin, &images).unwrap(), ["pages-7.img"]);
        assert!(fs::read(images.join("pages-7.img")).unwrap() == made && !thin.exists());
        assert!(place(&thin, &images).unwrap().is_empty());
        // Only pages come this way.
        fs::create_dir(&thin).unwrap();
        fs::write(thin.join("core-12.img"), "another").unwrap();
        assert!(place(&thin, &images).unwrap_err().to_string().contains("is no image of pages"));
    }

    #[test]
    fn a_map_that_is_cut_or_another_is_refused() {
        let whole = image(1, &[(2, PRESENT)]);
        assert_eq!(Map::read(&whole).unwrap(), Map { file: 1, needed: vec![(0, 2 * PAGE)], length: 2 * PAGE });
        for cut in [0, 4, 8, 10, 13, whole.len() - 1] {
            assert!(Map::read(&whole[..cut]).is_err(), "{cut}");
        }
        let mut other = whole.clone();
        other[5] ^= 1;
        assert!(Map::read(&other).is_err());
        // An old CRIU's, which says in another way what is where.
        let entry =
            Entry { address: 0, pages: 1, in_parent: Some(true), flags: None, many_pages: None }.encode_to_vec();
        let mut old = image(1, &[]);
        old.extend((entry.len() as u32).to_le_bytes());
        old.extend(entry);
        assert!(Map::read(&old).is_err());
        // A file of another length than its map says is not what was understood.
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("pages-1.img"), [1; PAGE as usize]).unwrap();
        fs::write(directory.path().join("pagemap-1.img"), &whole).unwrap();
        let error = format!("{:#}", make(directory.path(), &directory.path().join("thin")).unwrap_err());
        assert!(error.contains("has 8192 bytes, and it has 4096"), "{error}");
    }
}
