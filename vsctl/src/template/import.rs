//! What an unpacked tarball is: where its root begins, and who boots it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::definition::{Additions, Definition, Init, Source};
use super::family::{Distribution, Family};
use super::root::{Entry, Root};
use crate::failure::{Exit, Failure};

/// Some tarballs have the root in their one top directory: then that directory becomes `root`, by way of the empty
/// directory `scratch`.
pub fn lift(root: &Path, scratch: &Path) -> Result<()> {
    let context = || format!("list {}", root.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(root).with_context(context)? {
        names.push(entry.with_context(context)?.file_name());
    }
    if looks_like_root(root) {
        return Ok(());
    }
    let has = |name: &str| names.iter().any(|found| found == name);
    if has("oci-layout") || (has("manifest.json") && (has("repositories") || has("blobs") || names.len() > 1)) {
        return Err(Failure::new(Exit::BadParameter, "this is a container image in layers, and not a root")
            .hint("unpack it first: `docker export` or `podman export` of a container writes a tarball of its root")
            .into());
    }
    if let [only] = names.as_slice() {
        let inner = root.join(only);
        if inner.symlink_metadata().is_ok_and(|meta| meta.is_dir()) && looks_like_root(&inner) {
            let lifted = scratch.join("root");
            fs::rename(&inner, &lifted).with_context(|| format!("rename {}", inner.display()))?;
            fs::remove_dir(root).with_context(|| format!("remove {}", root.display()))?;
            return fs::rename(&lifted, root).with_context(|| format!("rename {}", lifted.display()));
        }
    }
    Err(Failure::new(Exit::BadParameter, "this is no root of a Linux system: it has no /etc, or neither /bin nor /usr")
        .hint("the tarball must hold one whole root, at its top or in one directory")
        .into())
}

/// `bin` may be a link; `etc` never is one.
fn looks_like_root(path: &Path) -> bool {
    let is_directory = |name: &str| path.join(name).symlink_metadata().is_ok_and(|meta| meta.is_dir());
    is_directory("etc") && (is_directory("usr") || path.join("bin").symlink_metadata().is_ok())
}

/// The definition of an imported root.
pub fn describe(root: &Root, file: &str) -> Result<Definition> {
    let distribution = Distribution::detect(root)?;
    let family = Family::of(&distribution);
    let boot = boot_of(root)?;
    let name = if distribution.name.is_empty() { &distribution.id } else { &distribution.name };
    Ok(Definition {
        description: format!("{name}, imported"),
        family: family.name.clone(),
        init: boot.init,
        stop_signal: boot.stop_signal.into(),
        include: if boot.systemd { vec!["systemd".into()] } else { Vec::new() },
        source: Source::Import { file: file.chars().filter(|c| !c.is_control()).collect() },
        additions: Additions::default(),
    })
}

/// Who is PID 1, and how it is told to power off.
struct Boot {
    init: Init,
    stop_signal: &'static str,
    systemd: bool,
}

fn boot_of(root: &Root) -> Result<Boot> {
    let vsinit = || Boot { init: Init::Vsinit, stop_signal: "SIGPWR", systemd: false };
    let boot = |init: &str, stop_signal| Boot { init: Init::Path(init.into()), stop_signal, systemd: false };
    let systemd = |init: &str| Boot { systemd: true, ..boot(init, "SIGRTMIN+4") };
    if !root.exists("sbin/init")? {
        return Ok(match root.exists("lib/systemd/systemd")? {
            true => systemd("/lib/systemd/systemd"),
            // Nobody there to boot it: vsinit is an init for any root.
            false => vsinit(),
        });
    }
    let target = match root.entry("sbin/init")? {
        Some(Entry::Link(target)) => target,
        _ => String::new(),
    };
    Ok(match target.rsplit('/').next().unwrap_or_default() {
        "vsinit" => vsinit(),
        "systemd" => systemd("/sbin/init"),
        // busybox-init(8): SIGUSR2 powers off, SIGTERM reboots.
        "busybox" => boot("/sbin/init", "SIGUSR2"),
        // runit-init(8) looks at /etc/runit/stopit on SIGCONT.
        "runit-init" | "runit" => boot("/sbin/init", "SIGCONT"),
        "openrc-init" => boot("/sbin/init", "SIGTERM"),
        // The inits of System V: their line for a power failure.
        _ => boot("/sbin/init", "SIGPWR"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn tree(files: &[&str], links: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let place = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        files.iter().for_each(|path| fs::write(place(path), "").unwrap());
        links.iter().for_each(|(path, target)| symlink(target, place(path)).unwrap());
        root
    }

    #[test]
    fn inits_are_told_apart() {
        let init = |files: &[&str], links: &[(&str, &str)]| {
            let root = tree(files, links);
            let definition = describe(&Root::directory(root.path()).unwrap(), "x.tar").unwrap();
            (String::from(definition.init), definition.stop_signal, definition.include.len())
        };
        let is = |init: &str, signal: &str, includes| (init.to_owned(), signal.to_owned(), includes);
        let systemd = ["usr/lib/systemd/systemd"];
        assert_eq!(
            init(&systemd, &[("usr/sbin/init", "../lib/systemd/systemd"), ("sbin", "usr/sbin")]),
            is("/sbin/init", "SIGRTMIN+4", 1)
        );
        assert_eq!(init(&systemd, &[("lib", "usr/lib")]), is("/lib/systemd/systemd", "SIGRTMIN+4", 1));
        assert_eq!(init(&["bin/busybox"], &[("sbin/init", "/bin/busybox")]), is("/sbin/init", "SIGUSR2", 0));
        assert_eq!(init(&["sbin/init"], &[]), is("/sbin/init", "SIGPWR", 0));
        assert_eq!(init(&["bin/sh"], &[]), is("vsinit", "SIGPWR", 0));
        // A root of our own, packed and imported again.
        assert_eq!(init(&["sbin/vsinit"], &[("sbin/init", "vsinit")]), is("vsinit", "SIGPWR", 0));
        // A link to nothing boots nothing.
        assert_eq!(init(&["bin/sh"], &[("sbin/init", "/bin/busybox")]), is("vsinit", "SIGPWR", 0));
    }

    #[test]
    fn a_root_one_level_down_is_lifted() {
        let root = tree(&["rootfs/etc/passwd", "rootfs/usr/bin/sh"], &[]);
        let scratch = tempfile::tempdir().unwrap();
        lift(root.path(), scratch.path()).unwrap();
        assert!(root.path().join("etc/passwd").exists());
        // Already at the top: nothing moves.
        lift(root.path(), scratch.path()).unwrap();
        assert!(root.path().join("etc/passwd").exists());
    }

    #[test]
    fn what_is_no_root_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        for (files, word) in [
            (&["oci-layout", "index.json", "blobs/x"][..], "layers"),
            (&["manifest.json", "repositories", "abc/layer.tar"], "layers"),
            (&["README", "src/main.c"], "no root"),
            (&["a/b/etc/passwd"], "no root"),
            (&[], "no root"),
        ] {
            let error = lift(tree(files, &[]).path(), scratch.path()).unwrap_err();
            assert!(error.to_string().contains(word), "{files:?}: {error}");
        }
    }
}
