//! Small files of a running guest, read as a stranger's: no links out of its root, no pipes, a bounded part, and without a wait
//! that only the guest can end.

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;

use crate::aside::{self, Found};

/// A longer file is cut: it is the guest's to write.
const MOST_BYTES: u64 = 4 << 20;

/// The guest may have a file system of its own on the way.
const LIMIT: Duration = Duration::from_secs(5);

/// What is in no UTF-8, and so in no text.
const SEPARATOR: u8 = 0xff;

/// The texts of the files at `paths` below `root`; empty for what is no file. Bytes that are not UTF-8 are replaced.
///
/// # Errors
/// When the guest keeps us waiting.
pub fn read<const COUNT: usize>(root: BorrowedFd<'_>, paths: [&str; COUNT]) -> Result<[String; COUNT]> {
    let found = aside::fetch(LIMIT, &[root], || Ok(Found { bytes: joined(root, paths), ..Found::default() }));
    Ok(apart(&found.with_context(|| format!("read {} of the guest", paths.join(" and ")))?.bytes))
}

fn joined<const COUNT: usize>(root: BorrowedFd<'_>, paths: [&str; COUNT]) -> Vec<u8> {
    // Guests without these files are guests all the same.
    paths.map(|path| read_one(root, path).unwrap_or_default().into_bytes()).join(&SEPARATOR)
}

fn apart<const COUNT: usize>(bytes: &[u8]) -> [String; COUNT] {
    let mut texts = bytes.split(|byte| *byte == SEPARATOR).map(|text| String::from_utf8_lossy(text).into_owned());
    std::array::from_fn(|_| texts.next().unwrap_or_default())
}

fn read_one(root: BorrowedFd<'_>, path: &str) -> Result<String> {
    // Non-blocking: it may be a FIFO.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(kernel::file::open_beneath_with(root, Path::new(path), flags, 0)?);
    if !file.metadata().with_context(|| format!("look at {path}"))?.is_file() {
        bail!("{path} is no file");
    }
    let mut bytes = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut bytes).with_context(|| format!("read {path}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn files_are_told_apart_and_what_is_none_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("one"), b"a\xffb\0\n").unwrap();
        std::fs::create_dir(directory.path().join("directory")).unwrap();
        std::os::unix::fs::symlink("/one", directory.path().join("link")).unwrap();
        let root = File::open(directory.path()).unwrap();
        let texts: [String; 4] = apart(&joined(root.as_fd(), ["one", "directory", "none", "link"]));
        assert_eq!(texts, ["a\u{fffd}b\0\n", "", "", "a\u{fffd}b\0\n"]);
    }
}
