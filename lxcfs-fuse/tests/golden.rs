//! Every file of every golden case, from captured trees to text. `BLESS=1` writes what is expected anew.

use std::path::{Path, PathBuf};

use lxcfs_fuse::clock::Now;
use lxcfs_fuse::filesystem::Filesystem;
use lxcfs_fuse::inode::{PLACES, paths};

const ID: u64 = 1;

#[derive(serde::Deserialize)]
struct Clocks {
    boottime_ns: u64,
    realtime_ns: u64,
}

fn case(name: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let registrations = tempfile::tempdir().unwrap();
    let registration = read(&folder.join("server.toml")).replace("@CASE@", folder.to_str().unwrap());
    std::fs::write(registrations.path().join(format!("{ID}.toml")), registration).unwrap();
    let clocks: Clocks = toml::from_str(&read(&folder.join("now.toml"))).unwrap();
    let now = Now { boottime_ns: clocks.boottime_ns, realtime_ns: clocks.realtime_ns };

    let filesystem = Filesystem::at(&folder.join("host"), registrations.path());
    let kinds = PLACES.iter().filter_map(|place| place.kind);
    let mut wrong = Vec::new();
    for (path, kind) in paths().zip(kinds) {
        let mut text = String::new();
        let made = filesystem.text(ID, kind, 0, now, &mut text);
        made.unwrap_or_else(|error| panic!("{name} {path}: {error:?}"));
        let expected = folder.join("expected").join(&path);
        if std::env::var_os("BLESS").is_some() {
            std::fs::create_dir_all(expected.parent().unwrap()).unwrap();
            std::fs::write(&expected, &text).unwrap();
        } else if read(&expected) != text {
            wrong.push(format!("{}:\n{text}", expected.display()));
        }
    }
    assert!(wrong.is_empty(), "not as expected:\n{}", wrong.join("\n"));
}

fn read(path: &PathBuf) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
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
