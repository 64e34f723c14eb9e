//! The root of one program: busybox, a link for each of its words.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::edit::{Access, Edit};
use super::root::Root;
use crate::failure::{Exit, Failure};

/// Words that the template gives to others: vsinit is the init.
const NOT_OURS: [&str; 6] = ["sbin/init", "sbin/halt", "sbin/poweroff", "sbin/reboot", "linuxrc", "bin/busybox"];

/// Fills the empty `root` from the host's `busybox`; returns what it calls itself.
pub fn fill(root: &Path, busybox: &Path) -> Result<String> {
    let package = "busybox-static";
    let missing =
        |message: String| Failure::new(Exit::Unsupported, message).hint(format!("install the package {package}"));
    match is_static(busybox) {
        Ok(true) => {}
        Ok(false) => {
            let message = format!("{} needs the host's libraries: it is not the static busybox", busybox.display());
            return Err(missing(message).into());
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(missing(format!("{} does not exist", busybox.display())).into());
        }
        Err(error) => return Err(error).with_context(|| format!("read {}", busybox.display())),
    }
    let words = ask(busybox, &["--list-full"])?;
    let target = root.join("bin/busybox");
    std::fs::create_dir_all(root.join("bin"))
        .with_context(|| format!("make directory {}", root.join("bin").display()))?;
    std::fs::copy(busybox, &target).with_context(|| format!("copy {} to {}", busybox.display(), target.display()))?;
    let root = Root::directory(root)?;
    root.apply(&edits(&words))?;
    Ok(ask(busybox, &[])?.lines().next().unwrap_or("BusyBox").to_owned())
}

/// A link for each word of `busybox --list-full`, and the directories they are in.
fn edits(words: &str) -> Vec<Edit> {
    let directories =
        ["bin", "sbin", "usr", "usr/bin", "usr/sbin", "usr/local", "usr/local/bin", "usr/local/sbin", "lib"];
    let ours = |word: &&str| !word.is_empty() && !NOT_OURS.contains(word) && !word.contains("..");
    directories
        .iter()
        .map(|path| Edit::directory(*path, Access::root(0o755)))
        .chain(words.lines().map(str::trim).filter(ours).map(|word| Edit::link(word, "/bin/busybox")))
        .collect()
}

fn ask(busybox: &Path, arguments: &[&str]) -> Result<String> {
    let output = Command::new(busybox).args(arguments).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("run {}", busybox.display()))?;
    if !output.status.success() {
        bail!("{} {} failed: {}", busybox.display(), arguments.join(" "), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether an ELF program runs without a loader (elf(5): no `PT_INTERP`). What is no ELF file is not static either.
fn is_static(path: &Path) -> std::io::Result<bool> {
    let mut head = Vec::new();
    std::fs::File::open(path)?.take(4096).read_to_end(&mut head)?;
    Ok(program_headers(&head).is_some_and(|mut kinds| !kinds.any(|kind| kind == 3)))
}

/// The kinds of a 64-bit little-endian file's program headers; `None` when `head` is no start of such a file.
fn program_headers(head: &[u8]) -> Option<impl Iterator<Item = u32> + '_> {
    let number = |at: usize, size: usize| -> Option<u64> {
        let mut bytes = [0u8; 8];
        bytes[..size].copy_from_slice(head.get(at..at + size)?);
        Some(u64::from_le_bytes(bytes))
    };
    if head.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (start, size, count) = (number(32, 8)? as usize, number(54, 2)? as usize, number(56, 2)? as usize);
    let last = start.checked_add(size.checked_mul(count)?)?;
    if size < 4 || head.len() < last {
        return None;
    }
    Some((0..count).filter_map(move |index| number(start + index * size, 4).map(|kind| kind as u32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(kinds: &[u32]) -> Vec<u8> {
        let mut file = vec![0u8; 64 + kinds.len() * 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32] = 64;
        file[54] = 56;
        file[56] = kinds.len() as u8;
        for (index, kind) in kinds.iter().enumerate() {
            file[64 + index * 56] = *kind as u8;
        }
        file
    }

    #[test]
    fn a_loader_is_seen() {
        let kinds = |file: &[u8]| program_headers(file).map(|kinds| kinds.collect::<Vec<_>>());
        assert_eq!(kinds(&elf(&[6, 3, 1])), Some(vec![6, 3, 1]));
        assert_eq!(kinds(b"#!/bin/sh\n"), None);
        assert_eq!(kinds(&elf(&[1])[..100]), None);
        assert!(!is_static(Path::new("/proc/self/cmdline")).unwrap());
    }

    #[test]
    fn inits_words_are_left_out() {
        let edits = edits("bin/sh\nsbin/init\nlinuxrc\nusr/sbin/crond\n../evil\n");
        let links: Vec<String> = edits.iter().map(Edit::to_string).filter(|edit| edit.starts_with("link")).collect();
        assert_eq!(links, ["link /bin/sh to /bin/busybox", "link /usr/sbin/crond to /bin/busybox"]);
    }

    #[test]
    fn a_host_without_it_is_told_the_package() {
        let root = tempfile::tempdir().unwrap();
        let error = fill(root.path(), Path::new("/nonexistent/busybox")).unwrap_err();
        assert_eq!(crate::failure::hint_of(&error), Some("install the package busybox-static"));
    }
}
