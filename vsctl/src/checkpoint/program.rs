//! vsinit, kept with the images of a server that it is the init of.
//!
//! Its processes go on in the midst of that very program, and by the time they do the host may have another build: vsos was upgraded
//! while they were on the disk, or they have come to another host. A distribution's init lies in the server's own root.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::image::Manifest;
use crate::aside::{self, Found};
use crate::checksum::Sum;
use crate::site::Site;

/// What it is called among the images.
pub const NAME: &str = "vsinit";

/// How long it may take to read. Only a guest that has put another program in its place is slow.
const READ_LIMIT: Duration = Duration::from_secs(30);

/// How large it is at most, in bytes; a guest's own may be as large as it likes.
const BYTES_MAX: u64 = 64 << 20;

/// What the process `init` executes.
///
/// # Errors
/// When it cannot be read.
pub fn of(init: i32) -> Result<Vec<u8>> {
    let program = PathBuf::from(format!("/proc/{init}/exe"));
    aside::fetch(READ_LIMIT, &[], || Ok(Found { bytes: read(&program)?, ..Found::default() }))
        .map(|found| found.bytes)
        .with_context(|| format!("read {}", program.display()))
}

fn read(program: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(program)?.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= BYTES_MAX, "it is longer than {} MiB", BYTES_MAX >> 20);
    Ok(bytes)
}

/// The copy among the images in `directory`, if this host has none that is alike.
///
/// # Errors
/// When this host's cannot be read.
pub fn other_than_here(site: &Site, directory: &Path, manifest: &Manifest) -> Result<Option<PathBuf>> {
    let Some((name, kept)) = manifest.files.iter().find(|(name, _)| is_program(name)) else { return Ok(None) };
    // Its pages are shared with all servers here that have it too. One that is not installed at all is like none.
    let same = match site.program(NAME).map(|here| Sum::of(&here)) {
        Ok(Ok(here)) => here == *kept,
        Ok(Err(error)) if error.kind() != io::ErrorKind::NotFound => return Err(error).context("read vsinit"),
        _ => false,
    };
    Ok((!same).then(|| directory.join(name)))
}

/// Whether an image is no image of CRIU's, but the program.
pub fn is_program(name: &str) -> bool {
    name.rsplit('/').next() == Some(NAME)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn it_is_read_whole_and_no_more_than_that() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        fs::write(&program, "contents").unwrap();
        assert_eq!(read(&program).unwrap(), b"contents");
        File::options().write(true).open(&program).unwrap().set_len(BYTES_MAX + 1).unwrap();
        assert!(read(&program).unwrap_err().to_string().contains("longer than 64 MiB"));
    }

    #[test]
    fn the_host_s_own_is_used_where_it_is_the_same() {
        let root = tempfile::tempdir().unwrap();
        let programs = root.path().join("programs");
        fs::create_dir_all(&programs).unwrap();
        fs::create_dir_all(root.path().join("etc/vsos")).unwrap();
        fs::write(root.path().join("etc/vsos/vsos.toml"), format!("programs = \"{}\"\n", programs.display())).unwrap();
        let site = Site::at(root.path()).unwrap();
        let images = root.path().join("suspended");
        fs::create_dir_all(&images).unwrap();
        fs::write(images.join(NAME), "old").unwrap();
        let mut manifest = Manifest::example();
        assert_eq!(other_than_here(&site, &images, &manifest).unwrap(), None, "one of a distribution's init");
        manifest.note(&images, NAME).unwrap();
        fs::write(programs.join(NAME), "old").unwrap();
        assert_eq!(other_than_here(&site, &images, &manifest).unwrap(), None);
        fs::write(programs.join(NAME), "new").unwrap();
        assert_eq!(other_than_here(&site, &images, &manifest).unwrap(), Some(images.join(NAME)));
    }

    #[test]
    fn it_is_told_from_images() {
        assert!(is_program("vsinit") && is_program("../memory/1/vsinit"));
        assert!(!is_program("pages-1.img") && !is_program("vsinit.img"));
    }
}
