//! Two installations on one host, each the other side of a migration, and what is at each.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use rustix::fs::{lgetxattr, llistxattr};
use sha2::{Digest, Sha256};
use system_tests::{
    command::eventually,
    host::{HostState, Scope},
    server::GUEST_LIMIT,
    site::Site,
};

/// Where a server comes from, and a second installation that it goes to.
pub struct Hosts<'s> {
    pub from: &'s Site,
    pub to: Site,
}

impl Drop for Hosts<'_> {
    fn drop(&mut self) {
        self.to.scrub();
    }
}

/// Two hosts with the same networks, as operators of two hosts have to give them.
pub fn hosts(from: &Site) -> Result<Hosts<'_>> {
    let hosts = Hosts { from, to: Site::new()? };
    let digits = u16::from_str_radix(&from.suffix(), 16)?;
    let [high, low] = digits.to_be_bytes();
    let networks = format!("ipv4 = \"10.{}.{low}.0/24\"\nipv6 = \"fdd1:{digits:x}::/64\"\n", 100 + high % 64);
    for (site, other) in [(from, &hosts.to), (&hosts.to, from)] {
        fs::create_dir_all(site.path("etc/vsos"))?;
        let shell = format!("[migrate]\nshell = [{:?}]\n", site.path("shell"));
        fs::write(site.path("etc/vsos/vsos.toml"), networks.clone() + &shell)?;
        reach(site, other, "exec \"$vsctl\" \"$@\"")?;
        site.template("busybox")?;
    }
    Ok(hosts)
}

/// How `site` reaches `other`: a script in the place of `ssh HOST vsctl …`, which ends with `line`.
pub fn reach(site: &Site, other: &Site, line: &str) -> Result<()> {
    let vsctl = system_tests::site::programs()?.join("vsctl");
    let root = other.root().display();
    let script = format!(
        "#!/bin/sh\ntest \"$1 $2\" = 'there vsctl' || exit 99\nshift 2\nvsctl={vsctl:?}\nexport VSOS_ROOT={root}\n{line}\n"
    );
    let path = site.path("shell");
    // Put into its place whole: the old one may be running.
    let new = site.path("shell.new");
    fs::write(&new, script)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
    fs::rename(new, path).context("put the script into its place")
}

pub const MOVE: [&str; 4] = ["migrate", "web1", "there", "--offline"];

impl Hosts<'_> {
    /// What a site has of the server, once nobody works on it.
    pub fn state(&self, site: &Site) -> Result<String> {
        if site.servers().iter().all(|name| name != "web1") {
            return Ok("gone".into());
        }
        eventually("the server to be left alone", GUEST_LIMIT, || {
            let status = site.vsctl(["status", "web1", "--json"]).succeed().ok()?.json().ok()?;
            let state = status.as_array().map_or(&status, |list| &list[0])["state"].as_str()?.to_owned();
            (state != "ready").then_some(state)
        })
    }

    /// Nothing of a server is here any more, nor of what it needed.
    pub fn nothing_at(&self, site: &Site) -> Result<()> {
        nothing_kept_at(site)?;
        let own = Scope::Site { root: site.root().to_owned(), suffix: site.suffix() };
        Ok(HostState::default().compare_when_settled(&own)?)
    }
}

/// Nothing of a server is in a site's files.
pub fn nothing_kept_at(site: &Site) -> Result<()> {
    ensure!(site.servers().is_empty(), "left are {:?}", site.servers());
    for directory in ["ids", "addresses", "journal"] {
        let left: Vec<_> = entries(&site.path("var/lib/vsos").join(directory));
        ensure!(left.is_empty(), "left in {directory}: {left:?}");
    }
    Ok(())
}

fn entries(directory: &Path) -> Vec<String> {
    let found = fs::read_dir(directory).into_iter().flatten().flatten();
    found.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| !name.starts_with('.')).collect()
}

/// Everything of a tree that a move must keep, by path. What an overlay remembers of the file system below is of no use elsewhere.
pub fn manifest(root: &Path) -> Result<BTreeMap<String, String>> {
    let mut lines = BTreeMap::new();
    let mut links = BTreeMap::<u64, String>::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path)?;
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        let mut line = format!("{:o} {}:{} {:x}", meta.mode(), meta.uid(), meta.gid(), meta.rdev());
        if meta.is_dir() {
            left.extend(fs::read_dir(&path)?.flatten().map(|entry| entry.path()));
        } else {
            // tar keeps the common file of several names for those that hold something; whiteouts, which an overlay makes of one,
            // mean the same apart.
            let holds = meta.is_file() || meta.is_symlink();
            let first = if holds { links.entry(meta.ino()).or_insert_with(|| name.clone()) } else { "itself" };
            line += &format!(" as {first}, {}.{}", meta.mtime(), meta.mtime_nsec());
        }
        if meta.is_symlink() {
            line += &format!(" -> {}", fs::read_link(&path)?.display());
        } else if meta.is_file() {
            // A hole stays one: its blocks are not compared, but that there are fewer than bytes.
            let is_sparse = meta.blocks() * 512 < meta.size();
            line += &format!(" {} {is_sparse} {:x}", meta.size(), Sha256::digest(fs::read(&path)?));
        }
        let mut buffer = vec![0_u8; 4096];
        let length = llistxattr(&path, &mut buffer)?;
        let mut names: Vec<_> = buffer[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
        names.sort_unstable();
        for attribute in names {
            let attribute = String::from_utf8_lossy(attribute).into_owned();
            if attribute.ends_with("overlay.origin") {
                continue;
            }
            let mut value = vec![0_u8; 4096];
            let length = lgetxattr(&path, attribute.as_str(), &mut value)?;
            line += &format!(" {attribute}={:02x?}", &value[..length]);
        }
        lines.insert(name, line);
    }
    Ok(lines)
}

/// What differs, in words.
pub fn same(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Result<()> {
    let lost = before.iter().filter(|(path, line)| after.get(*path) != Some(line));
    let new = after.iter().filter(|(path, line)| before.get(*path) != Some(line));
    let all: Vec<String> = lost
        .map(|(path, line)| format!("- {path}: {line}"))
        .chain(new.map(|(path, line)| format!("+ {path}: {line}")))
        .collect();
    ensure!(all.is_empty(), "the files differ:\n{}", all.join("\n"));
    Ok(())
}
