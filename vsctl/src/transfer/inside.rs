//! The server's root as its root sees it, for a process of ours: joined where it runs, mounted where it does not.

use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use anyhow::Result;
use kernel::channel::Channel;
use kernel::lock::Flock;
use kernel::mount::{self, Attributes, FileSystem, Tree};
use kernel::namespace::{self, Kinds};
use kernel::process::{self, CloneOptions, PidFd};

use crate::aside;
use crate::lifecycle::process::Layers;
use crate::lifecycle::state::{self, State};
use crate::lifecycle::stop;
use crate::name::Name;
use crate::site::Site;
use crate::store;
use crate::volume;

/// Where a server's root is.
#[derive(Debug)]
pub(super) enum Place {
    /// In the mount namespace of its init, with all that is mounted there.
    Running {
        init: PidFd,
        /// The namespaces to join: its mounts, and its users where they are not ours.
        kinds: Kinds,
    },
    /// On disk. The lock keeps it from being started meanwhile.
    Stopped { layers: Layers, is_privileged: bool, volume: PathBuf, _lock: Flock },
}

impl Place {
    pub fn of(site: &Site, name: &Name) -> Result<Self> {
        if let Some(running) = running(site, name)? {
            return Ok(running);
        }
        let lock = store::lock(site, name)?;
        let server = store::load(site, name)?;
        // Started while we waited for the lock.
        if let Some(running) = running(site, name)? {
            return Ok(running);
        }
        if state::of(site, name)? == State::Ready {
            // An interrupted start may still hold the layers.
            stop::recover(site, name)?;
        }
        Ok(Self::Stopped {
            layers: Layers::of(site, &server),
            is_privileged: server.spec.privileged,
            volume: volume::directory(site, name),
            _lock: lock,
        })
    }

    /// How the process that is to enter is made.
    pub fn fork_options(&self) -> CloneOptions {
        let namespaces = match self {
            Self::Running { .. } => Kinds::empty(),
            Self::Stopped { .. } => Kinds::MOUNT,
        };
        CloneOptions { namespaces, ..CloneOptions::default() }
    }

    /// Makes the server's root this process's, for good. Of the host it keeps the channel alone: it may have to be left
    /// behind, and nobody shall wait then for the end of its output.
    pub fn enter(&self, channel: &Channel) -> Result<()> {
        aside::let_go_of_standard()?;
        let channel = channel.as_fd().as_raw_fd();
        rustix::process::umask(rustix::fs::Mode::empty());
        match self {
            Self::Running { init, kinds } => {
                process::close_from(3, &[channel, init.as_fd().as_raw_fd()])?;
                namespace::enter(init.as_fd(), *kinds)?;
                process::set_user(0, 0, &[])?;
            }
            Self::Stopped { layers, is_privileged, volume, .. } => {
                // The lock is the other process's too.
                process::close_from(3, &[channel])?;
                // Nothing that is mounted here is seen by anybody, and all of it goes with this process.
                mount::make_private_recursive(Path::new("/"))?;
                let root = mounted(layers, *is_privileged)?;
                root.set_attributes(Attributes::NOSUID | Attributes::NODEV, false)?;
                // Over a directory that is there, whatever the host looks like; the layers are open below it.
                root.attach(volume)?;
                mount::pivot_into(volume)?;
            }
        }
        // After the change of user, which clears it.
        process::set_parent_death_signal(nix::libc::SIGKILL)?;
        Ok(process::set_dumpable(false)?)
    }
}

fn running(site: &Site, name: &Name) -> Result<Option<Place>> {
    let Some(status) = state::status(site, name)? else { return Ok(None) };
    let Some(init) = state::pidfd(&status)? else { return Ok(None) };
    let (theirs, ours) = (namespace::open(status.pid, "user")?, namespace::open_own("user")?);
    let has_ids = !namespace::is_same(theirs.as_fd(), ours.as_fd())?;
    Ok(Some(Place::Running { init, kinds: if has_ids { Kinds::USER | Kinds::MOUNT } else { Kinds::MOUNT } }))
}

/// The root as the host's own root sees it: owners on disk are plain, so they are right without a map.
fn mounted(layers: &Layers, is_privileged: bool) -> Result<Tree> {
    let Layers::Overlay { lower, volume } = layers else {
        let Layers::Directory { root } = layers else { anyhow::bail!("a root of an unknown kind") };
        return Ok(Tree::clone_of(root)?);
    };
    let mut overlay = FileSystem::new("overlay")?;
    overlay
        .option("lowerdir", escaped(lower))?
        .option("upperdir", volume.join("upper"))?
        .option("workdir", volume.join("work"))?;
    // As the server itself has it, or what it has removed would be back.
    if !is_privileged {
        overlay.flag("userxattr")?;
    }
    Ok(overlay.mount(Attributes::empty())?)
}

/// A colon separates layers (Documentation/filesystems/overlayfs.rst).
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace('\\', "\\\\").replace(':', "\\:")
}
