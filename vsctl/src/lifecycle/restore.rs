//! The process between the host and a server that comes back from a checkpoint: CRIU, which makes the namespaces itself and
//! then waits until the server's root and link are there.
//!
//! ```text
//! monitor                        CRIU                                   init
//!    │ restore, images ─────────►│ user namespace with the ids of the images; mount, net, uts, ipc, cgroup, pid, time
//!    │◄─ "setup-namespaces", pid │──────────────────────────────────────►│ waits
//!    │ overlay: mounted by a process that joined the namespaces; seen by the host and by init at the same path
//!    │ link: one end on the bridge, the other waiting in the host's network
//!    │ go on ───────────────────►│ mounts, link moved inside, processes  │
//!    │◄──────────"post-restore"  │ all images are read; what CRIU has left in the volume for itself goes behind this
//!    │ memory compared ─────────►│
//!    │◄───────────"pre-resume"   │                                       │ goes on
//!    │◄──────────────── done     ✕
//! ```
//!
//! So each step of a start has its counterpart here under the same name, with the same undo.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use init::handover::NOTIFY_SOCKET;
use kernel::mount::Tree;
use kernel::namespace::{self, Kinds};
use kernel::process::{self, PidFd};

use super::guest_groups::GuestGroup;
use super::stage;
use super::state::CpuTime;
use super::thread_settings::ThreadSettings;
use crate::aside::{self, Errand, Found};
use crate::criu::message::{CGROUPS_SOFT, Kind, NETWORK_LOCK_SKIP, Options};
use crate::criu::{Criu, Event, Session};
use crate::name::Name;
use crate::site::Site;

/// How long a mount may take; nothing of a guest is met on the way.
const MOUNT_LIMIT: Duration = Duration::from_secs(30);

/// How long a killed init may take to end.
const END_MS: u64 = 10_000;

/// Deleted files that are open and up to this long go into the images.
pub const GHOST_BYTES_MAX: u32 = 64 << 20;

/// How long CRIU may take to stop a tree and look at it, in seconds: emulated machines are slow.
pub const DUMP_LIMIT_S: u32 = 120;

/// Where names of watched files are looked for in any case: file handles of an overlay cannot be opened.
pub const WATCHED: &[&str] =
    &["/etc", "/run", "/usr/lib/systemd", "/usr/share/dbus-1", "/usr/local/share", "/var/spool/cron"];

/// What CRIU is told alike for dump and restore.
pub fn common(root: &Path, external: Vec<String>) -> Options {
    Options {
        root: Some(root.display().to_string()),
        external,
        tcp_established: Some(true),
        file_locks: Some(true),
        link_remap: Some(true),
        force_irmap: Some(true),
        irmap_scan_paths: WATCHED.iter().map(|path| (*path).to_owned()).collect(),
        manage_cgroups: Some(true),
        manage_cgroups_mode: Some(CGROUPS_SOFT),
        ext_sharing: Some(true),
        ext_masters: Some(true),
        enable_fs: ["hugetlbfs", "tracefs"].map(str::to_owned).to_vec(),
        ghost_limit: Some(GHOST_BYTES_MAX),
        timeout: Some(DUMP_LIMIT_S),
        network_lock: Some(NETWORK_LOCK_SKIP),
        notify_scripts: Some(true),
        orphan_pts_master: Some(true),
        ..Options::default()
    }
}

/// Looks whether images are whole that a restore copies to where nothing runs yet, as it does with memory. So it goes on beside the restore,
/// in a process that nothing else is in.
#[derive(Clone)]
pub struct Check(pub Rc<dyn Fn() -> Result<()>>);

impl Check {
    /// Begins.
    ///
    /// # Errors
    /// When there can be no process.
    pub fn begin(&self) -> Result<Errand> {
        Errand::begin(&[], || (self.0)().map(|()| Found::default()))
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Check")
    }
}

/// What a restore needs to know beside the plan.
#[derive(Clone, Debug)]
pub struct Image {
    /// The program.
    pub criu: Criu,
    /// The directory of the images.
    pub directory: PathBuf,
    /// The vsinit that comes with them, if this host's is another: it goes to [`program`].
    pub program: Option<PathBuf>,
    /// Where CRIU's log goes.
    pub logs: PathBuf,
    /// How CRIU is to restore them.
    pub options: Options,
    /// For how long the server had run, in nanoseconds.
    pub age_ns: u64,
    /// What it had used of processors.
    pub cpu: CpuTime,
    /// The control groups that the guest had made.
    pub groups: Vec<GuestGroup>,
    /// What its threads had chosen for themselves and CRIU does not restore.
    pub settings: Vec<ThreadSettings>,
    /// What is not known yet to be whole, when it runs on.
    pub unread: Option<Check>,
    /// Whether it waits at a [gate](super::gate) when it is whole: it is not this host's to run yet.
    pub waits: bool,
    /// As long as this is open, who brings its memory does not end; none when it has all of it.
    pub pages: Option<Rc<OwnedFd>>,
}

/// Where a running server has the vsinit that came with its images.
pub fn program(site: &Site, name: &Name) -> PathBuf {
    site.server_run(name).join("vsinit")
}

/// A CRIU that has made the server's namespaces and waits.
#[derive(Debug)]
pub struct Restore {
    session: Session,
    pid: i32,
    pidfd: PidFd,
    has_ids: bool,
}

/// Does `work` as root of the server in the user and mount namespaces of `pid`.
fn inside(pid: i32, has_ids: bool, kept: &[BorrowedFd<'_>], work: impl FnOnce() -> Result<Found>) -> Result<Found> {
    aside::fetch(MOUNT_LIMIT, kept, || {
        let mounts = namespace::open(pid, "mnt")?;
        if has_ids {
            namespace::enter(namespace::open(pid, "user")?.as_fd(), Kinds::USER)?;
            process::set_user(0, 0, &[])?;
        }
        namespace::enter(mounts.as_fd(), Kinds::MOUNT)?;
        work()
    })
}

/// The socket on which the restored init `pid` says how it is, in the place of the one that ended with the former monitor.
///
/// # Errors
/// When it cannot be bound, or the guest keeps us waiting.
pub fn notify_socket(pid: i32, has_ids: bool) -> Result<OwnedFd> {
    let mut found = inside(pid, has_ids, &[], || {
        match fs::remove_file(NOTIFY_SOCKET) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {NOTIFY_SOCKET}"));
            }
            _ => {}
        }
        let socket = UnixDatagram::bind(NOTIFY_SOCKET).with_context(|| format!("bind {NOTIFY_SOCKET}"))?;
        Ok(Found { descriptors: vec![socket.into()], ..Found::default() })
    })?;
    found.descriptors.pop().context("the notify socket did not arrive")
}

/// A moment of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Init has its namespaces and its control group; no other process is there.
    Apart,
    /// CRIU has read all images, and taken away nothing yet that another restore of them would need.
    Read,
    /// All processes are there, and none has run yet.
    Complete,
}

/// What has come back.
#[derive(Debug)]
pub struct Restored {
    /// Init's pid on the host.
    pub pid: i32,
    /// Its pidfd.
    pub pidfd: PidFd,
    /// Masters of terminals that nobody inside holds.
    pub masters: Vec<OwnedFd>,
}

impl Image {
    /// Puts the vsinit of its own where the server `name` executes it from now on; the directory goes with the server's run.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn place_program(&self, site: &Site, name: &Name) -> Result<()> {
        let Some(kept) = &self.program else { return Ok(()) };
        let target = program(site, name);
        let copied = fs::read(kept).map_err(anyhow::Error::from).and_then(|bytes| {
            // Its root is nobody's on the host, and reads it.
            Ok(kernel::file::replace(&target, &bytes, 0o755)?)
        });
        copied.with_context(|| format!("copy {} to {}", kept.display(), target.display()))
    }
}

impl Restore {
    /// Has CRIU make the namespaces of `image`.
    ///
    /// # Errors
    /// What CRIU says.
    pub fn enter(image: &Image, has_ids: bool) -> Result<Self> {
        let options = Options { rst_sibling: Some(true), ..image.options.clone() };
        let mut session = image.criu.begin(Kind::Restore, &image.directory, &image.logs, options, None)?;
        loop {
            match session.listen()? {
                Event::Stage { name, pid: Some(pid), .. } if name == "setup-namespaces" => {
                    return Ok(Self { session, pid, pidfd: PidFd::open(pid)?, has_ids });
                }
                Event::Stage { .. } => session.go_on()?,
                Event::Done => bail!("criu restored the server without asking for its root"),
            }
        }
    }

    /// The pid of its init on the host.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether the server has ids of its own.
    pub fn has_ids(&self) -> bool {
        self.has_ids
    }

    /// Mounts the overlay of `lower` and `volume` for the server's user namespace; nobody sees it yet.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mount_overlay(&self, lower: &Tree, volume: &Tree) -> Result<Tree> {
        let kept = [lower.as_fd(), volume.as_fd()];
        let mut found = self.inside(&kept, || {
            // A place to put the layers, which neither init nor the host shall see.
            namespace::unshare(Kinds::MOUNT)?;
            kernel::mount::make_private_recursive(Path::new("/"))?;
            stage::place()?;
            let layers = [lower, volume].map(|tree| tree.as_fd().try_clone_to_owned());
            let layers = layers.into_iter().collect::<Result<Vec<_>, _>>().context("copy the layers")?;
            Ok(Found { descriptors: vec![stage::overlay(layers, self.has_ids)?.into()], ..Found::default() })
        })?;
        found.descriptors.pop().map(Tree::from).context("the overlay's mount did not arrive")
    }

    /// Shows init the mount `tree` at `target`, where the host sees it too: CRIU looks for the root there, as init.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn show_root(&self, tree: &Tree, target: &Path) -> Result<()> {
        self.inside(&[tree.as_fd()], || tree.attach(target).map(|()| Found::default()).map_err(Into::into)).map(drop)
    }

    /// Does `work` as root of the server in init's user and mount namespaces.
    fn inside(&self, kept: &[BorrowedFd<'_>], work: impl FnOnce() -> Result<Found>) -> Result<Found> {
        inside(self.pid, self.has_ids, kept, work)
    }

    /// Lets CRIU finish, and calls `at` at the moments on the way.
    ///
    /// # Errors
    /// What CRIU or `at` says; CRIU has ended what it had brought back then, unless that was complete.
    pub fn finish(mut self, at: impl Fn(Moment) -> Result<()>) -> Result<Restored> {
        self.session.go_on()?;
        let mut masters = Vec::new();
        loop {
            match self.session.listen()? {
                Event::Stage { name, descriptors, .. } => {
                    match name.as_str() {
                        "orphan-pts-master" => masters.extend(descriptors),
                        "post-setup-namespaces" => at(Moment::Apart).inspect_err(|_| self.end())?,
                        "post-restore" => {
                            if let Err(error) = at(Moment::Read) {
                                // It ends all that it has made, and what it has made for itself on the way.
                                self.session.take_back();
                                end_init(&self.pidfd);
                                return Err(error);
                            }
                        }
                        "pre-resume" => at(Moment::Complete).inspect_err(|_| self.end())?,
                        _ => {}
                    }
                    self.session.go_on()?;
                }
                Event::Done => return Ok(Restored { pid: self.pid, pidfd: self.pidfd, masters }),
            }
        }
    }

    /// Has CRIU give up, and ends init, which is in no control group of the server's yet.
    pub fn end(&self) {
        // Gone already is as good.
        let _ = self.session.give_up();
        end_init(&self.pidfd);
    }
}

fn end_init(init: &PidFd) {
    // Gone already is as good.
    let _ = init.signal(nix::libc::SIGKILL);
    let _ = init.wait_exit(Some(END_MS));
}
