//! Tidy: promises of the tree about itself that are cheap to check, so that they do not rot.
//!
//! Reads files only; runs with `cargo test`.

#![forbid(unsafe_code)]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Who may use whom among our crates; what is not listed is an arrow that must not be.
const ARROWS: [(&str, &[&str]); 6] = [
    ("kernel", &[]),
    ("net", &[]),
    ("init", &["kernel", "net"]),
    ("lxcfs-fuse", &["kernel"]),
    ("vsctl", &["init", "kernel", "net"]),
    // The harness sees the programs from outside only; it asks the kernel what is loaded, and the bench joins servers.
    ("tests", &["kernel"]),
];
/// The one file that may contain unsafe code.
const UNSAFE_FILE: &str = "kernel/src/sys.rs";
/// Drawers without a label fill up.
const UNLABELLED: [&str; 6] = ["utils.rs", "util.rs", "common.rs", "helpers.rs", "misc.rs", "types.rs"];
/// A file that is longer cannot be read at one sitting.
const LINES_MAX: usize = 800;

fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the tree").to_owned()
}

/// All files of the tree but what is built, fetched or git's own, relative to it.
fn files() -> Vec<PathBuf> {
    let tree = tree();
    let mut found = Vec::new();
    let mut open = vec![tree.clone()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).expect("a directory of the tree can be read") {
            let path = entry.expect("an entry can be read").path();
            let relative = path.strip_prefix(&tree).expect("below the tree").to_owned();
            if relative == Path::new("target") || relative == Path::new(".git") {
                continue;
            }
            match fs::symlink_metadata(&path).expect("metadata") {
                kind if kind.is_dir() => open.push(path),
                kind if kind.is_file() => found.push(relative),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<(PathBuf, String)> {
    let rust = files().into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "rs"));
    rust.map(|path| (path.clone(), fs::read_to_string(tree().join(path)).expect("a source is text"))).collect()
}

/// Fails with all complaints at once.
fn none(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn each_source_opens_with_its_job() {
    let bare = sources().into_iter().filter(|(_, text)| !text.starts_with("//!"));
    none(bare.map(|(path, _)| format!("{}: does not begin with //! and its job", path.display())).collect());
}

#[test]
fn unsafe_code_has_one_address() {
    let forbidding = |text: &str| text.contains("#![forbid(unsafe_code)]");
    let mut complaints = Vec::new();
    for (path, text) in sources() {
        let shown = path.display();
        let is_root = ["src/lib.rs", "src/main.rs"].iter().any(|root| path.ends_with(root))
            || path.parent().is_some_and(|directory| directory.ends_with("src/bin"));
        if is_root && !path.starts_with("kernel") && !forbidding(&text) {
            complaints.push(format!("{shown}: a crate root without #![forbid(unsafe_code)]"));
        }
        let uses = |line: &str| {
            let code = line.split("//").next().unwrap_or_default();
            ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"].iter().any(|word| code.contains(word))
        };
        if path != Path::new(UNSAFE_FILE) && !path.starts_with("tests") && text.lines().any(uses) {
            complaints.push(format!("{shown}: unsafe code; it belongs into {UNSAFE_FILE}"));
        }
    }
    none(complaints);
}

#[test]
fn crates_use_only_what_stands_below_them() {
    let mut complaints = Vec::new();
    for (name, allowed) in ARROWS {
        let manifest = fs::read_to_string(tree().join(name).join("Cargo.toml")).expect("each crate has a manifest");
        let ours = ARROWS.iter().map(|(other, _)| *other).filter(|other| manifest_names(&manifest, other));
        let wrong = ours.filter(|other| *other != name && !allowed.contains(other));
        complaints.extend(wrong.map(|other| format!("{name} must not use {other}")));
    }
    none(complaints);
}

/// Whether a manifest has `name` among its dependencies, in either way of writing it.
fn manifest_names(manifest: &str, name: &str) -> bool {
    manifest.lines().map(|line| line.split('#').next().unwrap_or_default()).any(|line| {
        let key = line.split(['=', '.']).next().unwrap_or_default().trim().trim_matches('"');
        key == name && line.contains('=') && !line.trim_start().starts_with("name")
    })
}

#[test]
fn files_are_short_and_have_a_label() {
    let mut complaints = Vec::new();
    for (path, text) in sources() {
        let lines = text.lines().count();
        if lines > LINES_MAX {
            complaints.push(format!("{}: {lines} lines; {LINES_MAX} is the most", path.display()));
        }
        if path.file_name().is_some_and(|name| UNLABELLED.iter().any(|word| name == *word)) {
            complaints.push(format!("{}: what is in it? the name does not say", path.display()));
        }
    }
    none(complaints);
}

#[test]
fn nothing_names_the_machine_it_was_written_on() {
    // In pieces, so that this file does not name them either.
    let hosts =
        [["crates", ".io/"], ["deb.debian", ".org"], ["pypi", ".org"], ["npmjs", ".org"], ["proxy.golang", ".org"]];
    let places = [["/wor", "k/"], ["/root/.car", "go"]];
    let banned: Vec<String> = hosts.iter().chain(&places).map(|pieces| pieces.concat()).collect();
    let mut complaints = Vec::new();
    for path in files() {
        // The lock file names the registry, as cargo writes it.
        let Ok(text) = fs::read_to_string(tree().join(&path)) else {
            continue;
        };
        if path == Path::new("Cargo.lock") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let found = banned.iter().filter(|word| line.contains(word.as_str()));
            complaints.extend(found.map(|word| format!("{}:{}: names {word}", path.display(), number + 1)));
        }
    }
    none(complaints);
}

#[test]
fn each_manual_page_that_is_promised_is_there() {
    let pages = ["vsinit.8", "server.toml.5"];
    let all = files();
    let missing =
        pages.iter().filter(|page| !all.iter().any(|path| path.file_name().is_some_and(|name| name == **page)));
    // vsctl.8 is made from the command's own help: `vsctl man DIR`.
    none(missing.map(|page| format!("no manual page {page}")).collect());
}

#[test]
fn scripts_stop_at_the_first_error() {
    let scripts = files().into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "sh"));
    let mut complaints = Vec::new();
    for path in scripts.filter(|path| path.starts_with("tests")) {
        let text = fs::read_to_string(tree().join(&path)).expect("a script is text");
        if !text.starts_with("#!/bin/sh\n#") || !text.contains("\nset -eu\n") {
            complaints.push(format!("{}: wants #!/bin/sh, a comment with its job, and set -eu", path.display()));
        }
    }
    none(complaints);
}

#[test]
fn each_package_to_install_has_a_reason() {
    let list = fs::read_to_string(tree().join("tests/packages")).expect("the list of packages");
    let lines = list.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let bare = lines.filter(|line| line.split_whitespace().count() < 5);
    none(bare.map(|line| format!("no reason: {line}")).collect());
}
