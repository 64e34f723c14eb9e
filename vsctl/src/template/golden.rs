//! Golden trees: `templates/NAME/golden/before` becomes `after` by the edits in `edits.txt`, and a second time nothing.
//!
//! Each is done to a directory and to a layer over it. `GOLDEN=write cargo test -p vsctl golden` writes what is
//! computed; look at the difference before you commit it.
//!
//! Limit: git keeps neither owners nor modes, so the trees begin with 0644 and 0755 and the tester's own ids, which
//! are written as 0; owners and modes that edits ask for are in `edits.txt`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::adapt;
use super::edit::{Access, Change, Edit};
use super::family::{Distribution, Family};
use super::host_keys::HostKey;
use super::personalise::{self, Identity};
use super::resolver::Resolver;
use super::root::{Entry, Root};

fn identity() -> Identity {
    let key = |algorithm: &str| HostKey {
        algorithm: algorithm.into(),
        private: format!("private {algorithm}\n"),
        public: format!("public {algorithm}\n"),
    };
    Identity {
        hostname: Some("web1.example.org".into()),
        resolver: Some(Resolver::choose("nameserver 192.0.2.1\nsearch example.org\n", None)),
        machine_id: Some("0123456789abcdef0123456789abcdef".into()),
        host_keys: Some(vec![key("ed25519"), key("ecdsa")]),
        password_hash: Some("$6$salt$hash".into()),
        authorized_keys: vec!["ssh-ed25519 AAAAnew admin@example.org".into()],
    }
}

/// What a step computes from a tree.
type Plan = fn(&Root) -> Vec<Edit>;

fn adapted(root: &Root) -> Vec<Edit> {
    adapt::plan(root, family(root)).unwrap()
}

fn personalised(root: &Root) -> Vec<Edit> {
    personalise::plan(root, family(root), &identity()).unwrap()
}

fn family(root: &Root) -> &'static Family {
    Family::of(&Distribution::detect(root).unwrap())
}

/// The tester may not be root, and may give files only to itself.
fn by_tester(edit: &Edit) -> Edit {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let own = |access: &Access| Access { mode: access.mode, uid, gid };
    let change = match &edit.change {
        Change::File { content, access } => Change::File { content: content.clone(), access: own(access) },
        Change::Directory(access) => Change::Directory(own(access)),
        other => other.clone(),
    };
    Edit { path: edit.path.clone(), change }
}

/// The sentence with the tester's ids as root's.
fn sentence(edit: &Edit) -> String {
    let mut edit = edit.clone();
    if let Change::File { access, .. } | Change::Directory(access) = &mut edit.change {
        *access = Access::root(access.mode);
    }
    edit.to_string()
}

/// Paths with what is there, of a merged view; directories only if they are empty.
fn tree(root: &Root) -> BTreeMap<String, String> {
    fn below(root: &Root, directory: &str, tree: &mut BTreeMap<String, String>) {
        for name in root.names(directory).unwrap() {
            let path = format!("{directory}/{name}");
            match root.entry(&path).unwrap().unwrap() {
                Entry::Directory => below(root, &path, tree),
                Entry::Link(target) => drop(tree.insert(path, format!("link to {target}"))),
                Entry::File => drop(tree.insert(path.clone(), root.text(&path).unwrap().unwrap())),
                Entry::Other => panic!("{path}"),
            }
        }
    }
    let mut found = BTreeMap::new();
    below(root, "", &mut found);
    found
}

/// Inode and times of everything: what a step that does nothing leaves alone.
fn stamps(directory: &Path) -> Vec<(PathBuf, u64, i64, i64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        let meta = fs::symlink_metadata(&entry).unwrap();
        found.push((entry.clone(), meta.ino(), meta.ctime(), meta.ctime_nsec()));
        if meta.is_dir() {
            found.extend(stamps(&entry));
        }
    }
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
        let target = to.join(entry.file_name().unwrap());
        let meta = fs::symlink_metadata(&entry).unwrap();
        if meta.is_dir() {
            copy(&entry, &target);
        } else if meta.is_symlink() {
            symlink(fs::read_link(&entry).unwrap(), &target).unwrap();
        } else {
            fs::write(&target, fs::read(&entry).unwrap()).unwrap();
            fs::set_permissions(&target, fs::Permissions::from_mode(0o644)).unwrap();
        }
    }
}

/// Does a step twice; the second time must touch nothing below `written`.
fn twice(root: &Root, written: &Path, plan: Plan) -> Vec<String> {
    let edits = plan(root);
    let ours: Vec<Edit> = edits.iter().map(by_tester).collect();
    root.apply(&ours).unwrap();
    let before = stamps(written);
    let again: Vec<Edit> = plan(root).iter().map(by_tester).collect();
    root.apply(&again).unwrap();
    assert_eq!(stamps(written), before, "the second time changed something");
    edits.iter().map(sentence).collect()
}

/// The tree and the sentences after both steps, done to one directory.
fn in_place(before: &Path, scratch: &Path) -> (BTreeMap<String, String>, String) {
    let directory = scratch.join("directory");
    copy(before, &directory);
    let root = Root::directory(&directory).unwrap();
    let mut sentences = format!("family {}\n", family(&root).name);
    for (title, plan) in [("adapt", adapted as Plan), ("personalise", personalised)] {
        writeln!(sentences, "\n{title}").unwrap();
        twice(&root, &directory, plan).iter().for_each(|line| writeln!(sentences, "    {line}").unwrap());
    }
    (tree(&root), sentences)
}

/// The same, with the second step in a layer of its own; the layer below must stay as it was.
fn in_a_layer(before: &Path, scratch: &Path) -> BTreeMap<String, String> {
    let (lower, upper) = (scratch.join("lower"), scratch.join("upper"));
    copy(before, &lower);
    twice(&Root::directory(&lower).unwrap(), &lower, adapted);
    fs::create_dir(&upper).unwrap();
    let below = stamps(&lower);
    let root = Root::overlay(&upper, &lower).unwrap();
    twice(&root, &upper, personalised);
    assert_eq!(stamps(&lower), below, "the template was written");
    tree(&root)
}

fn write(golden: &Path, tree: &BTreeMap<String, String>, sentences: &str) {
    let after = golden.join("after");
    let _ = fs::remove_dir_all(&after);
    for (path, content) in tree {
        let path = after.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content.strip_prefix("link to ") {
            Some(target) => symlink(target, path).unwrap(),
            None => fs::write(path, content).unwrap(),
        }
    }
    fs::write(golden.join("edits.txt"), sentences).unwrap();
}

fn check(name: &str) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../templates").join(name).join("golden");
    let scratch = tempfile::tempdir().unwrap();
    let (found, sentences) = in_place(&golden.join("before"), scratch.path());
    if std::env::var_os("GOLDEN").is_some_and(|value| value == "write") {
        write(&golden, &found, &sentences);
    }
    assert_eq!(sentences, fs::read_to_string(golden.join("edits.txt")).unwrap(), "{name}");
    assert_eq!(found, tree(&Root::directory(&golden.join("after")).unwrap()), "{name}");
    assert_eq!(found, in_a_layer(&golden.join("before"), scratch.path()), "{name}, in a layer");
}

#[test]
fn alpine() {
    check("alpine");
}

#[test]
fn arch() {
    check("arch");
}

#[test]
fn busybox() {
    check("busybox");
}

#[test]
fn debian_12() {
    check("debian-12");
}

#[test]
fn debian_13() {
    check("debian-13");
}

#[test]
fn generic() {
    check("generic");
}

#[test]
fn redhat() {
    check("redhat");
}
