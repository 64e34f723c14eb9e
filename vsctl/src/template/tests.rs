//! Templates as their users meet them. What needs root says so; `cargo test -p vsctl template -- --ignored` runs it.

use super::progress::Silent;
use super::*;
use crate::failure::{exit_of, hint_of};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// A template that was made by hand, so that no test needs root or a network.
fn placed(state: &Path, template: &str) -> Templates {
    let templates = Templates::below(state);
    let directory = state.join("templates").join(template);
    fs::create_dir_all(directory.join("root/etc")).unwrap();
    fs::write(directory.join("template.toml"), Definition::shipped("busybox").unwrap().1).unwrap();
    let survey = record::survey(&directory.join("root")).unwrap();
    let record = Record::of(survey, "hand".into(), family::Distribution::parse("ID=busybox\n"), vec![]);
    fs::write(directory.join("record.toml"), toml::to_string(&record).unwrap()).unwrap();
    templates
}

fn names(templates: &Templates) -> Vec<String> {
    templates.list().unwrap().iter().map(|template| template.name.to_string()).collect()
}

#[test]
fn a_state_without_templates_has_none() {
    let state = tempfile::tempdir().unwrap();
    let templates = Templates::below(state.path());
    assert!(templates.list().unwrap().is_empty());
    let error = templates.open(&name("busybox")).unwrap_err();
    assert_eq!(exit_of(&error), Exit::NoTemplate);
    assert_eq!(hint_of(&error), Some("make it: `vsctl template build busybox`"));
    assert!(hint_of(&templates.open(&name("mine")).unwrap_err()).unwrap().contains("list"));
}

#[test]
fn half_made_templates_are_not_listed() {
    let state = tempfile::tempdir().unwrap();
    let templates = placed(state.path(), "whole");
    placed(state.path(), "cut");
    fs::write(state.path().join("templates/cut/record.toml"), "version = ").unwrap();
    fs::create_dir_all(state.path().join("templates/.new-other/root")).unwrap();
    assert_eq!(names(&templates), ["whole"]);
    let error = format!("{:#}", templates.open(&name("cut")).unwrap_err());
    assert!(error.contains("record.toml cannot be used"), "{error}");
}

#[test]
fn a_template_in_use_stays() {
    let state = tempfile::tempdir().unwrap();
    let templates = placed(state.path(), "busybox");
    let used = templates.remove(&name("busybox"), || Ok(vec![name("web1"), name("web2")])).unwrap_err();
    assert_eq!(exit_of(&used), Exit::Locked);
    assert!(used.to_string().ends_with("is used by web1, web2"), "{used}");
    let held = templates.hold(&name("busybox")).unwrap();
    let busy = templates.remove(&name("busybox"), || panic!("asked while a server is made")).unwrap_err();
    assert_eq!(exit_of(&busy), Exit::Locked);
    drop(held);
    templates.remove(&name("busybox"), || Ok(vec![])).unwrap();
    assert!(names(&templates).is_empty());
    assert_eq!(exit_of(&templates.hold(&name("busybox")).unwrap_err()), Exit::NoTemplate);
}

#[test]
fn what_an_interrupted_build_left_goes_with_the_next() {
    let state = tempfile::tempdir().unwrap();
    let templates = placed(state.path(), "busybox");
    for left in [".new-debian-13/root/usr", ".gone-old/root"] {
        fs::create_dir_all(state.path().join("templates").join(left)).unwrap();
    }
    let error = templates.build(&name("busybox"), &BuildOptions::default(), &mut Silent).unwrap_err();
    assert_eq!(exit_of(&error), Exit::Exists);
    let mut left: Vec<_> =
        fs::read_dir(state.path().join("templates")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, [".lock", "busybox"]);
}

#[test]
fn unknown_templates_are_refused_before_anything_is_made() {
    let state = tempfile::tempdir().unwrap();
    let error =
        Templates::below(state.path()).build(&name("plan9"), &BuildOptions::default(), &mut Silent).unwrap_err();
    assert_eq!(exit_of(&error), Exit::NoTemplate);
    assert!(hint_of(&error).unwrap().contains("busybox, debian-12, debian-13"));
    assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0);
}

/// A tarball of what `fill` puts into an empty directory, made by tar with `arguments`.
fn tarball(state: &Path, fill: impl FnOnce(&Path), arguments: &[&str]) -> PathBuf {
    let tree = state.join("tree");
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::write(tree.join("etc/os-release"), "ID=busybox\nPRETTY_NAME=Hand\n").unwrap();
    fill(&tree);
    let file = state.join("root.tar");
    let done = Command::new("tar").arg("-cf").arg(&file).arg("-C").arg(&tree).args(arguments).status().unwrap();
    assert!(done.success());
    file
}

/// Imports and returns the error; nothing may be left behind.
fn refused(state: &Path, archive: &Path) -> anyhow::Error {
    let error = Templates::below(state).import(&name("mine"), archive, &mut Silent).unwrap_err();
    let left: Vec<_> = fs::read_dir(state.join("templates")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [".lock"], "{error:#}");
    error
}

#[test]
#[ignore = "needs root: mount namespaces"]
fn an_import_keeps_what_a_root_has() {
    let state = tempfile::tempdir().unwrap();
    let fill = |tree: &Path| {
        fs::write(tree.join("bin/su"), "#!").unwrap();
        fs::hard_link(tree.join("bin/su"), tree.join("bin/same")).unwrap();
        symlink("/etc/os-release", tree.join("etc/absolute")).unwrap();
        std::os::unix::fs::chown(tree.join("bin/su"), Some(12), Some(34)).unwrap();
        fs::set_permissions(tree.join("bin/su"), fs::Permissions::from_mode(0o4755)).unwrap();
    };
    let archive = tarball(state.path(), fill, &["."]);
    let template = Templates::below(state.path()).import(&name("mine"), &archive, &mut Silent).unwrap();
    let meta = fs::metadata(template.root().join("bin/su")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.nlink()), (0o4755, 12, 34, 2));
    assert_eq!(fs::read_link(template.root().join("etc/absolute")).unwrap(), Path::new("/etc/os-release"));
    assert_eq!(template.record.distribution.name, "Hand");
    assert_eq!(fs::metadata(state.path().join("templates")).unwrap().mode() & 0o777, 0o700);
}

#[test]
#[ignore = "needs root: mount namespaces"]
fn devices_are_left_out_and_said() {
    let state = tempfile::tempdir().unwrap();
    let fill = |tree: &Path| {
        fs::create_dir(tree.join("dev")).unwrap();
        for node in ["dev/null", "etc/disk"] {
            let kind = rustix::fs::FileType::BlockDevice;
            let mode = rustix::fs::Mode::from_raw_mode(0o666);
            rustix::fs::mknodat(rustix::fs::CWD, tree.join(node), kind, mode, rustix::fs::makedev(8, 0)).unwrap();
        }
    };
    let archive = tarball(state.path(), fill, &["."]);
    let template = Templates::below(state.path()).import(&name("mine"), &archive, &mut Silent).unwrap();
    assert!(!template.root().join("etc/disk").exists() && !template.root().join("dev/null").exists());
    assert_eq!(template.record.warnings, ["1 device nodes or sockets were left out: /etc/disk"]);
}

#[test]
#[ignore = "needs root: mount namespaces"]
fn names_that_lead_out_reach_nothing() {
    for (transform, accepted) in
        [("s,^etc/evil,../../../../../../outside,", false), ("s,^etc/evil,/tmp/outside,", true)]
    {
        let state = tempfile::tempdir().unwrap();
        let fill = |tree: &Path| fs::write(tree.join("etc/evil"), "x").unwrap();
        let archive = tarball(state.path(), fill, &["--absolute-names", "--transform", transform, "etc", "bin"]);
        if accepted {
            let template = Templates::below(state.path()).import(&name("mine"), &archive, &mut Silent).unwrap();
            assert!(template.root().join("tmp/outside").exists());
            assert!(template.record.warnings[0].starts_with("Removing leading"), "{:?}", template.record.warnings);
        } else {
            let error = refused(state.path(), &archive);
            assert_eq!(exit_of(&error), Exit::BadParameter);
            assert!(error.to_string().contains("'..'"), "{error:#}");
        }
        assert!(!Path::new("/tmp/outside").exists() && !Path::new("/outside").exists());
    }
}

/// The classic: a link that leads out, then a file through it.
#[test]
#[ignore = "needs root: mount namespaces"]
fn links_that_lead_out_reach_nothing() {
    for (target, hard) in [("/tmp", false), ("../../../../../../tmp", false), ("/etc/passwd", true)] {
        let state = tempfile::tempdir().unwrap();
        let first = tarball(
            state.path(),
            |tree| {
                if hard {
                    fs::write(tree.join("etc/a"), "").unwrap();
                    fs::hard_link(tree.join("etc/a"), tree.join("etc/evil")).unwrap();
                } else {
                    symlink(target, tree.join("etc/evil")).unwrap();
                }
            },
            if hard {
                &["--transform", "s,^etc/a,/etc/passwd,h", "--absolute-names", "etc", "bin"]
            } else {
                &["etc", "bin"]
            },
        );
        if !hard {
            let second = state.path().join("second");
            fs::create_dir_all(second.join("etc/evil")).unwrap();
            fs::write(second.join("etc/evil/outside"), "x").unwrap();
            let done =
                Command::new("tar").arg("-rf").arg(&first).arg("-C").arg(&second).arg("etc/evil/outside").status();
            assert!(done.unwrap().success());
        }
        let passwd = fs::metadata("/etc/passwd").unwrap().nlink();
        // Refused or kept inside: both are fine, the host must not notice.
        let _ = Templates::below(state.path()).import(&name("mine"), &first, &mut Silent);
        assert!(!Path::new("/tmp/outside").exists(), "{target}");
        assert_eq!(fs::metadata("/etc/passwd").unwrap().nlink(), passwd, "{target}");
    }
}

#[test]
#[ignore = "needs root: mount namespaces"]
fn archives_that_were_cut_are_refused() {
    let state = tempfile::tempdir().unwrap();
    let fill = |tree: &Path| {
        let noise: Vec<u8> = (0..300_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        fs::write(tree.join("bin/big"), noise).unwrap();
    };
    let whole = tarball(state.path(), fill, &["."]);
    for packer in ["", "gzip", "xz", "zstd", "bzip2"] {
        let bytes = match packer {
            "" => fs::read(&whole).unwrap(),
            packer => Command::new(packer).arg("-c").stdin(fs::File::open(&whole).unwrap()).output().unwrap().stdout,
        };
        for length in [0, 1, bytes.len() / 2, bytes.len() * 3 / 4, bytes.len() - 1] {
            // Without packing the last byte is one of many zeros.
            if packer.is_empty() && length == bytes.len() - 1 {
                continue;
            }
            let cut = state.path().join("cut");
            fs::write(&cut, &bytes[..length]).unwrap();
            let error = refused(state.path(), &cut);
            assert_eq!(exit_of(&error), Exit::BadParameter, "{packer} {length}: {error:#}");
            assert!(hint_of(&error).is_some());
        }
    }
}

#[test]
#[ignore = "needs root: mount namespaces"]
fn what_is_no_root_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let text = state.path().join("text");
    fs::write(&text, "hello".repeat(1000)).unwrap();
    assert_eq!(exit_of(&refused(state.path(), &text)), Exit::BadParameter);
    assert_eq!(exit_of(&refused(state.path(), Path::new("/dev/zero"))), Exit::BadParameter);
    let archive = tarball(state.path(), |_| {}, &["bin"]);
    assert!(refused(state.path(), &archive).to_string().contains("no root"));
    assert!(format!("{:#}", refused(state.path(), Path::new("/no/such.tar"))).contains("/no/such.tar"));
}

/// A file system of a few megabytes, gone with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn at(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        rustix::mount::mount("tmpfs", path, "tmpfs", rustix::mount::MountFlags::empty(), c"size=4m").unwrap();
        Self(path.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
#[ignore = "needs root: mounts a small file system"]
fn a_full_disk_is_said_and_left_clean() {
    let state = tempfile::tempdir().unwrap();
    let archive = tarball(state.path(), |tree| fs::write(tree.join("bin/big"), vec![7u8; 8 << 20]).unwrap(), &["."]);
    let disk = SmallDisk::at(&state.path().join("disk"));
    let error = refused(&disk.0, &archive);
    assert_eq!(exit_of(&error), Exit::NoSpace, "{error:#}");
    let (from, to) = (state.path().join("tree"), disk.0.join("copy"));
    assert_eq!(exit_of(&copy_tree(&from, &to).unwrap_err()), Exit::NoSpace);
    assert!(!to.exists());
    let filler = vec![0u8; 8 << 20];
    let _ = fs::write(disk.0.join("filler"), filler);
    let root = disk.0.join("root");
    fs::create_dir(&root).unwrap();
    let edit = edit::Edit::file("etc/hostname", edit::Access::root(0o644), "x".repeat(9000));
    assert_eq!(exit_of(&Root::directory(&root).unwrap().apply(&[edit]).unwrap_err()), Exit::NoSpace);
}

#[test]
#[ignore = "needs root, and the package busybox-static"]
fn busybox_is_built_and_has_its_words() {
    let state = tempfile::tempdir().unwrap();
    let template =
        Templates::below(state.path()).build(&name("busybox"), &BuildOptions::default(), &mut Silent).unwrap();
    let root = template.root();
    let link = |path: &str| fs::read_link(root.join(path)).unwrap().display().to_string();
    assert_eq!(
        (link("bin/sh"), link("sbin/init"), link("sbin/poweroff")),
        ("/bin/busybox".into(), "vsinit".into(), "vsinit".into())
    );
    assert_eq!(fs::metadata(root.join("sbin/vsinit")).unwrap().len(), 0);
    assert_eq!(fs::metadata(root.join("etc/shadow")).unwrap().mode() & 0o777, 0o600);
    for service in fs::read_dir(root.join("etc/vsinit")).unwrap() {
        let text = fs::read_to_string(service.unwrap().path()).unwrap();
        let program = text
            .lines()
            .find_map(|line| line.strip_prefix("exec = [\"")?.split('"').next().map(str::to_owned))
            .unwrap();
        assert!(root.join(program.trim_start_matches('/')).symlink_metadata().is_ok(), "{program}");
    }
}

#[test]
#[ignore = "needs root: mount namespaces"]
fn what_is_in_the_way_is_refused_or_stays() {
    let [from, to, sandbox] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    fs::create_dir_all(to.path().join("root/replaced/by")).unwrap();
    fs::create_dir(from.path().join("root")).unwrap();
    for file in ["left-out", "replaced", "sent"] {
        fs::write(from.path().join("root").join(file), file).unwrap();
    }
    let old = fs::File::options().write(true).open(from.path().join("root/left-out")).unwrap();
    old.set_modified(std::time::UNIX_EPOCH).unwrap();
    let unpack = |in_the_way, since_s, but: &[u8]| {
        let members = Members::Newer(Path::new("root"), since_s, but);
        let mut tar = pack_stream(from.path(), sandbox.path(), Content::Layer, members).unwrap();
        let mut archive = tar.stdout.take().unwrap();
        let said = unpack_stream(&mut archive, Content::Layer, "files", to.path(), sandbox.path(), in_the_way);
        assert!(tar.wait().unwrap().success());
        said
    };
    let refused = unpack(InTheWay::Refused, 0, b"root/left-out\n").unwrap_err();
    assert!(refused.to_string().contains("root/replaced: Cannot open: File exists"), "{refused:#}");
    assert!(!to.path().join("root/left-out").exists());
    // By its time of change, which nobody can choose, what was written long ago is as young as the others.
    let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    unpack(InTheWay::Stays, now_s - 60, b"").unwrap();
    assert!(to.path().join("root/replaced/by").is_dir() && to.path().join("root/left-out").is_file());
    assert_eq!(fs::read(to.path().join("root/sent")).unwrap(), b"sent");
    fs::remove_file(to.path().join("root/sent")).unwrap();
    unpack(InTheWay::Stays, now_s + 60, b"").unwrap();
    assert!(!to.path().join("root/sent").exists());
}
