//! The step that makes a server's device nodes: they belong to its root, which the host's own nodes do not.
//!
//! A user namespace may not make nodes, and a node of the host shows as nobody's inside, so that only what everybody may
//! open can be opened. So the host makes them, on a file system of its own that the server gets file by file.
//! Which may be opened, and how, is for the cgroup's device program to say.

use std::fmt;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kernel::bpf::DeviceKind;
use kernel::mount::{Attributes, FileSystem, Tree};
use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid};
use serde::{Deserialize, Serialize};

use super::group;
use super::step::Step;
use crate::site::Site;
use crate::store::Server;

/// Nodes that every server has, where the host has them; everybody inside may open them.
const COMMON: &[&str] =
    &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/net/tun", "/dev/fuse"];

/// A change to a server's device nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodesStep {
    /// A file system with the nodes, numbered.
    Mount {
        /// Where the host sees it.
        target: PathBuf,
        /// The guest's root on the host.
        owner: u32,
        /// The nodes that the server's owner asked for; the common ones come before them.
        granted: Vec<PathBuf>,
    },
}

/// The step that makes the nodes of `server`.
pub fn plan(site: &Site, server: &Server) -> Step {
    let owner = server.first_id(site).unwrap_or(0);
    let granted = server.spec.device.iter().map(|device| device.path.clone()).collect();
    Step::Nodes(NodesStep::Mount { target: directory(site, server), owner, granted })
}

/// Where the host sees the nodes of a running server.
pub fn directory(site: &Site, server: &Server) -> PathBuf {
    site.server_run(&server.name).join("nodes")
}

/// Each node's path inside, in the order of their numbers.
pub fn paths(server: &Server) -> Vec<PathBuf> {
    nodes(server.spec.device.iter().map(|device| device.path.as_path())).into_iter().map(|(path, _)| path).collect()
}

/// The nodes and their modes.
fn nodes<'a>(granted: impl Iterator<Item = &'a Path>) -> Vec<(PathBuf, u32)> {
    let common = COMMON.iter().map(PathBuf::from).filter(|path| path.exists()).map(|path| (path, 0o666));
    common.chain(granted.map(|path| (path.to_owned(), 0o660))).collect()
}

impl NodesStep {
    /// Makes the change.
    ///
    /// # Errors
    /// When a device is not on the host, or the kernel refuses.
    pub fn apply(&self) -> Result<()> {
        let Self::Mount { target, owner, granted } = self;
        let mut memory = FileSystem::new("tmpfs")?;
        memory.option("mode", "0755")?.option("size", "16k")?;
        let tree = memory.mount(Attributes::NOSUID | Attributes::NOEXEC)?;
        for (number, (path, mode)) in nodes(granted.iter().map(PathBuf::as_path)).iter().enumerate() {
            make(&tree, &number.to_string(), path, *mode, *owner)
                .with_context(|| format!("make {}", path.display()))?;
        }
        // Complete before it is seen: one effect.
        Ok(tree.attach(target)?)
    }

    /// Takes the change back.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn undo(&self) -> Result<()> {
        let Self::Mount { target, .. } = self;
        Ok(kernel::mount::detach(target)?)
    }
}

fn make(tree: &Tree, name: &str, like: &Path, mode: u32, owner: u32) -> Result<()> {
    let (kind, number) = group::node(like)?;
    let kind = if kind == DeviceKind::Block { FileType::BlockDevice } else { FileType::CharacterDevice };
    rustix::fs::mknodat(tree.as_fd(), name, kind, Mode::empty(), number)?;
    let (uid, gid) = (Uid::from_raw(owner), Gid::from_raw(owner));
    rustix::fs::chownat(tree.as_fd(), name, Some(uid), Some(gid), AtFlags::empty())?;
    // Not by mknod: the caller's umask would have its say.
    Ok(rustix::fs::chmodat(tree.as_fd(), name, Mode::from_raw_mode(mode), AtFlags::empty())?)
}

impl fmt::Display for NodesStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Mount { target, granted, .. } = self;
        write!(out, "make device nodes at {}", target.display())?;
        for path in granted {
            write!(out, ", {}", path.display())?;
        }
        Ok(())
    }
}
