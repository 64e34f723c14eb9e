//! From a copy of the host's mounts to a guest: the root, its own file systems, devices, consoles.
//!
//! The order is the point of this file; each step that must stand where it stands says why. A
//! guest's root disk is hostile: until `pivot_root` every place below it is opened by [`target`],
//! which no symbolic link leads out.

mod confine;
mod consoles;
mod file_systems;
mod hide;
mod target;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use init::handover::{Handover, HostMount, MountKind};
use kernel::mount::{self, Tree};
use kernel::process::adopt_descriptor;

use crate::failure::{During, Result};

pub use confine::confine;
pub use consoles::take_console;

pub use init::handover::NOTIFY_SOCKET;

/// What the prepared server shares with its monitor.
pub struct Prepared {
    /// The masters of the console and of tty1 … ttyN.
    pub masters: Vec<OwnedFd>,
    /// The receiving end of [`NOTIFY_SOCKET`].
    pub notify: OwnedFd,
}

impl Prepared {
    /// The descriptors in the order of the contract: console, tty1 … ttyN, notify socket.
    pub fn descriptors(&self) -> Vec<std::os::fd::BorrowedFd<'_>> {
        self.masters.iter().chain([&self.notify]).map(|fd| fd.as_fd()).collect()
    }
}

/// Makes the guest around this process, and makes this process a part of it.
pub fn prepare(handover: &Handover) -> Result<Prepared> {
    let mounts = adopt(&handover.mounts)?;
    attach_root(handover)?;
    let root = target::open_root(&handover.stage)?;
    // While the host's proc and sysfs are still in this mount namespace: the kernel gives a user
    // namespace new ones only where it sees full ones (mount_too_revealing in fs/namespace.c).
    file_systems::mount_all(&root)?;
    // After /dev and /proc are there, because that is where most of them go.
    for (mount, tree) in handover.mounts.iter().zip(&mounts) {
        attach_host_mount(&root, mount, tree)?;
    }
    drop(mounts);
    drop(root);
    mount::pivot_into(&handover.stage).during(|| "enter the server's root".into())?;
    // From here on `/` is the guest's and no path leads to the host.
    file_systems::fill_run(handover)?;
    hide::hide(&handover.masked, &handover.read_only)?;
    set_hostname(&handover.hostname)?;
    let masters = consoles::open(handover.ttys)?;
    Ok(Prepared { masters, notify: bind_notify()? })
}

/// Takes the inherited descriptors of the host's mounts, before anything else gets such a number.
fn adopt(mounts: &[HostMount]) -> Result<Vec<Tree>> {
    let adopt = |mount: &HostMount| {
        let descriptor = adopt_descriptor(mount.fd);
        descriptor.map(Tree::from).during(|| format!("take the mount for {}", mount.target.display()))
    };
    mounts.iter().map(adopt).collect()
}

fn attach_root(handover: &Handover) -> Result<()> {
    let failed = || "attach the server's root".to_string();
    let root = adopt_descriptor(handover.root).map(Tree::from).during(failed)?;
    // A privileged server's mount namespace is still in the host's peer groups: nothing that is
    // mounted here may show up there. In a user namespace they are slaves, and pivot_root wants
    // them private too.
    mount::make_private_recursive(Path::new("/")).during(failed)?;
    root.attach(&handover.stage).during(failed)
}

fn attach_host_mount(root: &OwnedFd, mount: &HostMount, tree: &Tree) -> Result<()> {
    let failed = || format!("attach the host's mount at {}", mount.target.display());
    let place = match mount.kind {
        MountKind::File => target::file(root, &mount.target),
        MountKind::Directory => target::directory(root, &mount.target),
    };
    let place = match place {
        // Nothing can be made in proc and sysfs; this kernel does not have the file, and then
        // there is nothing to cover.
        Err(error) if is_kernels(&mount.target) => {
            log::debug!("not covered: {}: {error}", mount.target.display());
            return Ok(());
        }
        place => place.during(failed)?,
    };
    tree.attach_over(place.as_fd()).during(failed)
}

fn is_kernels(path: &Path) -> bool {
    path.starts_with("/proc") || path.starts_with("/sys")
}

fn set_hostname(name: &str) -> Result<()> {
    rustix::system::sethostname(name.as_bytes()).during(|| format!("set the host name '{name}'"))
}

fn bind_notify() -> Result<OwnedFd> {
    let socket = UnixDatagram::bind(NOTIFY_SOCKET).during(|| format!("bind {NOTIFY_SOCKET}"))?;
    Ok(socket.into())
}
