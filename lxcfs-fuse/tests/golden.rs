//! Every file of every golden case, from captured trees to text. `BLESS=1` writes what is expected anew.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use lxcfs_fuse::clock::Now;
use lxcfs_fuse::filesystem::Filesystem;
use lxcfs_fuse::inode::At;

const ID: u64 = 1;

#[derive(serde::Deserialize)]
struct Clocks {
    boottime_ns: u64,
    realtime_ns: u64,
}

fn case(name: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let scratch = tempfile::tempdir().unwrap();
    let registration = read(&folder.join("server.toml")).replace("@CASE@", folder.to_str().unwrap());
    std::fs::write(scratch.path().join(format!("{ID}.toml")), registration).unwrap();
    let clocks: Clocks = toml::from_str(&read(&folder.join("now.toml"))).unwrap();
    let now = Now { boottime_ns: clocks.boottime_ns, realtime_ns: clocks.realtime_ns };
    let host = scratch.path().join("host");
    unfold(&read(&folder.join("host/sysfs")), &host);
    std::os::unix::fs::symlink(folder.join("host/proc"), host.join("proc")).unwrap();

    let filesystem = Filesystem::at(&host, scratch.path());
    let (mut made, mut sysfs) = (BTreeMap::new(), BTreeMap::new());
    let mut left = vec![At::default()];
    while let Some(at) = left.pop() {
        let path = at.path(at.cpu);
        if at.kind().is_none() {
            let children = filesystem.children(ID, at, now);
            left.extend(children.unwrap_or_else(|error| panic!("{name} {path}: {error:?}")));
            continue;
        }
        let mut text = String::new();
        let read = filesystem.text(ID, at, 0, now, &mut text);
        read.unwrap_or_else(|error| panic!("{name} {path}: {error:?}"));
        // Many are small: links, and all of sysfs.
        let files = if path.starts_with("sys/") || at.is_link() { &mut sysfs } else { &mut made };
        files.insert(path, text);
    }
    made.insert("sysfs".to_owned(), fold(&sysfs));
    compare(&folder.join("expected"), &made);
}

/// Compares the files made with those below `expected`, which has no others.
fn compare(expected: &Path, made: &BTreeMap<String, String>) {
    let mut wrong = Vec::new();
    for (path, text) in made {
        let path = expected.join(path);
        if std::env::var_os("BLESS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
        } else if read(&path) != *text {
            wrong.push(format!("{}:\n{text}", path.display()));
        }
    }
    // What is no longer served.
    for path in files_below(expected) {
        if !made.contains_key(path.strip_prefix(expected).unwrap().to_str().unwrap()) {
            wrong.push(format!("{} is not served", path.display()));
        }
    }
    assert!(wrong.is_empty(), "not as expected:\n{}", wrong.join("\n"));
}

/// One text of many small files, as `grep -r ''` prints them; a link, whose text has no end of line, as `ls` does.
fn fold(files: &BTreeMap<String, String>) -> String {
    let mut folded = String::new();
    for (path, text) in files {
        match text.strip_suffix('\n') {
            Some(lines) => lines.split('\n').for_each(|line| writeln!(folded, "{path}:{line}").unwrap()),
            None => writeln!(folded, "{path} -> {text}").unwrap(),
        }
    }
    folded
}

/// Makes the files of such a text below `directory`.
fn unfold(folded: &str, directory: &Path) {
    let mut files: BTreeMap<&str, String> = BTreeMap::new();
    for line in folded.lines() {
        let (path, text) = line.split_once(':').unwrap();
        files.entry(path).or_default().extend([text, "\n"]);
    }
    for (path, text) in files {
        let path = directory.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
}

fn files_below(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn v1_limited() {
    case("v1-limited");
}

#[test]
fn v1_unlimited() {
    case("v1-unlimited");
}

#[test]
fn v2_limited() {
    case("v2-limited");
}

#[test]
fn v2_unlimited() {
    case("v2-unlimited");
}
