//! What a run brings into its hosts: the installed programs, the test binary, keys. A bare tar archive, which a host
//! unpacks over its root before its init begins.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::workshop::Workshop;
use crate::command::Invocation;

/// Where a host has the test binary.
pub const TESTS_IN_HOST: &str = "/usr/lib/vsos-lab/system";
/// Where a host has the three programs beside each other, as the tests want them.
pub const PROGRAMS_IN_HOST: &str = "/usr/lib/vsos-lab/programs";

/// The archive, and the key that opens the hosts.
#[derive(Clone, Debug)]
pub struct Payload {
    archive: PathBuf,
    key: PathBuf,
    tree: PathBuf,
}

impl Payload {
    /// Installs the programs of the tree, as `make install` does on any host, and packs them with the test binary.
    ///
    /// # Errors
    /// When a part is missing or cannot be packed.
    pub fn pack(workshop: &Workshop, tests: &Path) -> Result<Self> {
        let tree = workshop.run().join("payload");
        let install = ["--no-print-directory", "install", "PREFIX=/usr/local"];
        let destination = format!("DESTDIR={}", tree.display());
        Invocation::new("make").args(install).args([destination]).directory(workshop.tree()).succeed()?;
        let beside = tree.join(PROGRAMS_IN_HOST.trim_start_matches('/'));
        fs::create_dir_all(&beside)?;
        for program in ["bin/vsctl", "libexec/vsos/vsinit", "libexec/vsos/lxcfs-fuse"] {
            let name = Path::new(program).file_name().context("a program has a name")?;
            std::os::unix::fs::symlink(format!("../../../local/{program}"), beside.join(name))?;
        }
        let place = |path: &str, from: &Path, mode: u32| put(&tree, path, from, mode);
        place(TESTS_IN_HOST, tests, 0o755)?;
        // One key pair for the hosts among themselves and for the lab: it exists only for this run.
        let key = workshop.run().join("key");
        make_key(&key)?;
        let public = key.with_extension("pub");
        place("/root/.ssh/authorized_keys", &public, 0o600)?;
        place("/root/.ssh/id_ed25519", &key, 0o600)?;
        let known = format!("* {}", fs::read_to_string(&public)?);
        place("/etc/ssh/ssh_host_ed25519_key", &key, 0o600)?;
        let directory = |path: &str| fs::set_permissions(tree.join(path), fs::Permissions::from_mode(0o700));
        directory("root/.ssh").context("close the keys' directory")?;
        let archive = workshop.run().join("payload.tar");
        let payload = Self { archive, key, tree };
        fs::write(payload.known_hosts(), &known)?;
        put(&payload.tree, "/root/.ssh/known_hosts", &payload.known_hosts(), 0o600)?;
        payload.pack_anew()?;
        Ok(payload)
    }

    /// Adds a file for all hosts that boot from now on.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&self, path: &str, text: &str) -> Result<()> {
        let target = self.tree.join(path.trim_start_matches('/'));
        fs::create_dir_all(target.parent().context("a file lies in a directory")?)?;
        fs::write(&target, text).with_context(|| format!("write {}", target.display()))?;
        self.pack_anew()
    }

    /// Adds a program for all hosts that boot from now on.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn bring(&self, path: &str, from: &Path) -> Result<()> {
        put(&self.tree, path, from, 0o755)?;
        self.pack_anew()
    }

    fn pack_anew(&self) -> Result<()> {
        // A new file: a host that is running has the old one open as its disk.
        let new = self.archive.with_extension("new");
        let tar = ["--create", "--owner=0", "--group=0", "--numeric-owner", "--directory"];
        // Directories of the host keep their modes: only what lies in ours is named.
        let list = "find . -mindepth 1 -not -type d; find ./root/.ssh -maxdepth 0";
        let list =
            Invocation::new("sh").args(["-c", &format!("cd \"$1\" && ({list})"), "sh"]).args([&self.tree]).succeed()?;
        Invocation::new("tar")
            .args(tar)
            .args([&self.tree])
            .args(["--file"])
            .args([&new])
            .args(["--no-recursion", "--files-from=-"])
            .input(list.stdout)
            .succeed()?;
        fs::rename(&new, &self.archive).context("put the payload into its place")
    }

    /// The archive: the second disk of a host.
    pub fn archive(&self) -> &Path {
        &self.archive
    }

    /// The programs on this machine, beside each other, as long as the run lasts.
    pub fn programs(&self) -> PathBuf {
        self.tree.join(PROGRAMS_IN_HOST.trim_start_matches('/'))
    }

    /// The manager on this machine: it builds the templates.
    pub fn vsctl(&self) -> PathBuf {
        self.tree.join("usr/local/bin/vsctl")
    }

    /// The test binary on this machine.
    pub fn tests(&self) -> PathBuf {
        self.tree.join(TESTS_IN_HOST.trim_start_matches('/'))
    }

    /// The hosts' public key, as a file of known hosts: it goes for every name.
    pub fn known_hosts(&self) -> PathBuf {
        self.key.with_file_name("known_hosts")
    }

    /// The private key that the hosts accept.
    pub fn key(&self) -> &Path {
        &self.key
    }
}

fn put(tree: &Path, path: &str, from: &Path, mode: u32) -> Result<()> {
    let target = tree.join(path.trim_start_matches('/'));
    fs::create_dir_all(target.parent().context("a file lies in a directory")?)?;
    fs::copy(from, &target).with_context(|| format!("bring {}", from.display()))?;
    fs::set_permissions(&target, fs::Permissions::from_mode(mode)).with_context(|| format!("open {}", target.display()))
}

fn make_key(path: &Path) -> Result<()> {
    Invocation::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "vsos-lab", "-f"])
        .args([path])
        .succeed()
        .map(drop)
}
