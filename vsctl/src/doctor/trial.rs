//! Trying out what the kernel can do, in a child whose namespaces go with it: the host sees nothing of it.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use kernel::mount::{Attributes, FileSystem};
use kernel::namespace::{self, Kinds};
use net::{Netlink, Veth};
use rustix::fs::OFlags;

use crate::aside::{self, Found};

/// A kernel that does not answer in this time hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs `work` in a child, and gives its error.
///
/// # Errors
/// What `work` says, or that it took too long: then the child is killed.
pub fn in_child(work: impl FnOnce() -> Result<()>) -> Result<()> {
    aside::fetch(PATIENCE, &[], || work().map(|()| Found::default())).map(drop)
}

/// Whether bridges and pairs of links can be made.
pub fn links() -> Result<()> {
    in_child(|| {
        namespace::unshare(Kinds::NET)?;
        let own = namespace::open(std::process::id() as i32, "net")?;
        let netlink = Netlink::open()?;
        netlink.create_bridge("trial", None)?;
        Ok(netlink.create_veth(&Veth {
            name: "one",
            mac: None,
            mtu: None,
            bridge: Some("trial"),
            peer_name: "two",
            peer_mac: None,
            peer_namespace: own.as_fd(),
            up: true,
        })?)
    })
}

/// Whether an overlay can be mounted in a new user namespace.
pub fn overlay() -> Result<()> {
    in_child(|| {
        namespace::unshare(Kinds::USER | Kinds::MOUNT)?;
        // One's own ids may be mapped without help, the group's after giving up setgroups (user_namespaces(7)).
        for (file, text) in [("uid_map", "0 0 1"), ("setgroups", "deny"), ("gid_map", "0 0 1")] {
            let path = format!("/proc/self/{file}");
            std::fs::write(&path, text).with_context(|| format!("write {path}"))?;
        }
        let scratch = Path::new("/tmp");
        FileSystem::new("tmpfs")?.mount(Attributes::empty())?.attach(scratch)?;
        let mut overlay = FileSystem::new("overlay")?;
        for (option, name) in [("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")] {
            let path = scratch.join(name);
            std::fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
            overlay.option(option, path.to_str().unwrap_or_default())?;
        }
        overlay.flag("userxattr")?;
        overlay.mount(Attributes::empty())?;
        Ok(())
    })
}

/// Whether a file of the server with init `pid` can be read, and in time. Its root is hostile: no link leads out of it, only
/// a regular file is read, and not more than any file of /proc has.
pub fn read_inside(pid: i32, path: &Path) -> Result<()> {
    in_child(|| {
        let root = std::fs::File::open(format!("/proc/{pid}/root")).context("open its root")?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = std::fs::File::from(kernel::file::open_beneath_with(&root, path, flags, 0)?);
        anyhow::ensure!(file.metadata().context("look at it")?.is_file(), "{} is no file", path.display());
        let read = file.take(64 << 10).read_to_end(&mut Vec::new());
        read.map(drop).with_context(|| format!("read {}", path.display()))
    })
}

/// Whether the FUSE server of the mount at `path` answers: a dead one gives an error, a hanging one no answer.
pub fn fuse(path: &Path) -> Result<()> {
    in_child(|| {
        // A name that nobody asked for yet, so that no cache answers.
        let name = path.join(format!("trial-{}", std::process::id()));
        match std::fs::symlink_metadata(&name) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("look below {}", path.display()))
            }
            _ => Ok(()),
        }
    })
}
