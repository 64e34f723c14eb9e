//! The process between the host and a server's init: it enters the new namespaces one after the other, so that each
//! belongs to the server's user namespace, and then becomes the parent of nothing: init is the monitor's child.
//!
//! ```text
//! monitor                      stage                                    init
//!    │ fork: new user namespace, server's cgroup
//!    ├─────────────────────────►│ into its v1 cgroups
//!    │◄──────────────── "here"  │
//!    │ id maps; "mapped" ──────►│ root of it; mount, net, uts, ipc, cgroup, time
//!    │◄─────────────── "apart"  │ (the monitor can now reach the network namespace)
//!    │ "overlay" + layers ─────►│ mounts the overlay in the server's user namespace
//!    │◄──────── "root" + mount  │
//!    │ "boot" + descriptors ───►│ fork: new pid namespace, sibling
//!    │◄──── "init PID" + pidfd  ├───────────────────────────────────────►│ executes vsinit
//!    │ reaps it                 ✕                                        │ "prepared" …
//! ```
//!
//! The time namespace must be made by a process of the new user namespace: CRIU refuses one that is not
//! (criu's "doesn't belong to the target user namespace").

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use init::handover;
use kernel::cgroup::Group;
use kernel::channel::{self, Channel};
use kernel::idmap::IdMap;
use kernel::mount::{Attributes, FileSystem, Tree};
use kernel::namespace::{self, Kinds};
use kernel::process::{self, CloneOptions, Fork, PidFd};

use crate::site::IDS_PER_SERVER;

/// Where the stage keeps its mounts, in its own mount namespace: a directory that every host has.
const PLACE: &str = "/run";
/// Where vsinit attaches the root before it turns to it, in the same namespace.
pub const ROOT: &str = "/run/root";
/// The number at which vsinit finds its channel: above every descriptor that it inherits.
pub const CHANNEL: RawFd = 500;
/// The number of the first descriptor that is handed over; 3 is the channel's, and later the handover's.
const FIRST: RawFd = 4;
/// Descriptors that go with "boot" before the mounts: handover, vsinit, root.
const BEFORE_MOUNTS: usize = 3;

/// The number at which vsinit finds the root.
pub const ROOT_DESCRIPTOR: RawFd = FIRST + 2;

/// The number at which vsinit finds mount number `index`.
pub fn mount_descriptor(index: usize) -> RawFd {
    FIRST + (BEFORE_MOUNTS + index) as RawFd
}

/// The monitor's hold on the stage.
#[derive(Debug)]
pub struct Stage {
    pid: i32,
    channel: Channel,
    has_ids: bool,
}

/// A server's init as the stage leaves it.
#[derive(Debug)]
pub struct Init {
    /// Its pid on the host.
    pub pid: i32,
    /// Its pidfd.
    pub pidfd: PidFd,
    /// The channel to vsinit.
    pub channel: Channel,
    stage: i32,
}

impl Init {
    /// Reaps the stage, whose work is done. Late, since its end takes the kernel milliseconds and init need not wait for it.
    pub fn reap_stage(&self) {
        end(self.stage);
    }
}

impl Stage {
    /// Makes the stage in `group`, with ids from `first_id` on, or without a user namespace when there is none.
    ///
    /// # Errors
    /// When the kernel refuses a namespace; the stage is gone then.
    pub fn enter(group: &Group, first_id: Option<u32>) -> Result<Self> {
        let (ours, theirs) = channel::pair()?;
        let namespaces = if first_id.is_some() { Kinds::USER } else { Kinds::empty() };
        match process::fork(&CloneOptions { namespaces, cgroup: group.open_unified()?, sibling: false })? {
            Fork::Child => {
                drop(ours);
                run(theirs, group)
            }
            Fork::Parent { pid, .. } => {
                let stage = Self { pid, channel: ours, has_ids: first_id.is_some() };
                stage.begin(first_id).inspect_err(|_| stage.end())?;
                Ok(stage)
            }
        }
    }

    fn begin(&self, first_id: Option<u32>) -> Result<()> {
        self.expect("here")?;
        if let Some(outside) = first_id {
            IdMap { inside: 0, outside, count: IDS_PER_SERVER }.write_for(self.pid)?;
        }
        self.channel.send(b"mapped", &[])?;
        self.expect("apart").map(drop)
    }

    /// Waits for `word` and the descriptors that come with it.
    fn expect(&self, word: &str) -> Result<Vec<OwnedFd>> {
        let (text, descriptors) = self.channel.receive()?;
        match text.strip_prefix(word.as_bytes()) {
            Some(_) => Ok(descriptors),
            None if text.is_empty() => bail!("the process in the new namespaces ended"),
            None => Err(anyhow!("{}", String::from_utf8_lossy(&text))),
        }
    }

    /// Its pid on the host.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The server's user namespace.
    ///
    /// # Errors
    /// When the stage is gone.
    pub fn user_namespace(&self) -> Result<OwnedFd> {
        Ok(namespace::open(self.pid, "user")?)
    }

    /// Whether the server has ids of its own, in a user namespace.
    pub fn has_ids(&self) -> bool {
        self.has_ids
    }

    /// Has the overlay of `lower` and `volume` (with `upper/` and `work/` in it) mounted inside; the mount belongs to the
    /// server's user namespace, so files keep plain owners on disk (`userxattr`, Documentation/filesystems/overlayfs.rst).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mount_overlay(&self, lower: &Tree, volume: &Tree) -> Result<Tree> {
        let word: &[u8] = if self.has_ids { b"overlay" } else { b"overlay-trusted" };
        self.channel.send(word, &[lower.as_fd(), volume.as_fd()])?;
        let mut descriptors = self.expect("root")?;
        descriptors.pop().map(Tree::from).context("the overlay's mount did not arrive")
    }

    /// Starts init: `descriptors` are the handover, vsinit, the root and the mounts.
    ///
    /// # Errors
    /// When the stage cannot.
    pub fn boot(self, descriptors: &[std::os::fd::BorrowedFd<'_>]) -> Result<Init> {
        self.channel.send(b"boot", descriptors)?;
        let (text, mut received) = self.channel.receive()?;
        let answer = String::from_utf8_lossy(&text).into_owned();
        let pid = answer.strip_prefix("init ").and_then(|pid| pid.parse().ok());
        let pid = pid.ok_or_else(|| anyhow!("{answer}"))?;
        let pidfd = received.pop().map(PidFd::from).context("init's pidfd did not arrive")?;
        Ok(Init { pid, pidfd, channel: self.channel, stage: self.pid })
    }

    /// Ends and reaps the stage.
    pub fn end(&self) {
        end(self.pid);
    }
}

fn end(stage: i32) {
    let pid = nix::unistd::Pid::from_raw(stage);
    // It may just have ended by itself; SIGKILL on a zombie is harmless.
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    let _ = nix::sys::wait::waitpid(pid, None);
}

/// The stage's life. Never returns; what goes wrong is told on the channel.
fn run(channel: Channel, group: &Group) -> ! {
    let code = match work(channel, group) {
        Ok(()) => 0,
        Err((channel, error)) => {
            let _ = channel.send(format!("{error:#}").as_bytes(), &[]);
            1
        }
    };
    std::process::exit(code)
}

fn work(channel: Channel, group: &Group) -> std::result::Result<(), (Channel, anyhow::Error)> {
    // By itself, and before its ids change: moving another process waits for a grace period of the kernel (v1 only).
    if let Err(error) = group.attach_self_v1() {
        return Err((channel, error.into()));
    }
    let channel = alone(channel)?;
    talk(&channel).map_err(|error| (channel, error))
}

/// Nothing of the host stays open but the channel, at number 3: what is received then has known numbers.
fn alone(channel: Channel) -> std::result::Result<Channel, (Channel, anyhow::Error)> {
    let number = channel.as_fd().as_raw_fd();
    let quiet = || -> Result<Option<OwnedFd>> {
        process::close_from(3, &[number])?;
        let null = std::fs::File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?;
        for standard in 0..=2 {
            process::place_descriptor(&null, standard)?;
        }
        drop(null);
        // The lowest free number: 3.
        Ok(if number == 3 { None } else { Some(channel.as_fd().try_clone_to_owned().context("copy the channel")?) })
    };
    match quiet() {
        Ok(None) => Ok(channel),
        Ok(Some(copy)) => Ok(Channel::from(copy)),
        Err(error) => Err((channel, error)),
    }
}

fn talk(channel: &Channel) -> Result<()> {
    channel.send(b"here", &[])?;
    await_word(channel, "mapped")?;
    process::set_user(0, 0, &[])?;
    // A change of user made it undumpable, and then its /proc files are the host root's: it could not write its offsets.
    process::set_dumpable(true)?;
    namespace::unshare(Kinds::MOUNT | Kinds::NET | Kinds::UTS | Kinds::IPC | Kinds::CGROUP)?;
    // What the host mounts from now on is not the server's business.
    kernel::mount::make_private_recursive(Path::new("/"))?;
    namespace::unshare(Kinds::TIME)?;
    own_clock()?;
    place()?;
    channel.send(b"apart", &[])?;
    loop {
        let (word, descriptors) = channel.receive()?;
        match word.as_slice() {
            b"overlay" | b"overlay-trusted" => {
                let root = overlay(descriptors, word == b"overlay")?;
                channel.send(b"root", &[root.as_fd()])?;
            }
            b"boot" => return boot(channel, descriptors),
            b"" => bail!("the monitor ended"),
            other => bail!("unexpected word '{}'", String::from_utf8_lossy(other)),
        }
    }
}

fn await_word(channel: &Channel, word: &str) -> Result<()> {
    let (text, _) = channel.receive()?;
    if text == word.as_bytes() { Ok(()) } else { bail!("the monitor ended") }
}

/// The server's clocks begin at zero now (time_namespaces(7)).
fn own_clock() -> Result<()> {
    let offset = |clock| {
        let now = rustix::time::clock_gettime(clock);
        -(now.tv_sec as i64 * 1_000_000_000 + now.tv_nsec as i64)
    };
    let (monotonic, boottime) = (offset(rustix::time::ClockId::Monotonic), offset(rustix::time::ClockId::Boottime));
    Ok(namespace::set_clock_offsets(monotonic, boottime)?)
}

/// A place of the stage's own to mount things on.
///
/// # Errors
/// When the kernel refuses.
pub fn place() -> Result<()> {
    let mut memory = FileSystem::new("tmpfs")?;
    memory.option("mode", "0755")?.option("size", "64k")?;
    memory.mount(Attributes::NOSUID | Attributes::NODEV)?.attach(Path::new(PLACE))?;
    for name in ["root", "lower", "volume"] {
        std::fs::create_dir(Path::new(PLACE).join(name)).with_context(|| format!("make {PLACE}/{name}"))?;
    }
    Ok(())
}

/// Mounts the overlay of the layers that `descriptors` are, lower and volume, in a mount namespace that has [`place`].
///
/// # Errors
/// When the kernel refuses.
pub fn overlay(descriptors: Vec<OwnedFd>, has_ids: bool) -> Result<Tree> {
    let mut layers = descriptors.into_iter().map(Tree::from);
    let (Some(lower), Some(volume)) = (layers.next(), layers.next()) else { bail!("the layers did not arrive") };
    // Attached first: kernels before 6.15 take no detached mount as a layer.
    lower.attach(&Path::new(PLACE).join("lower"))?;
    volume.attach(&Path::new(PLACE).join("volume"))?;
    let mut overlay = FileSystem::new("overlay")?;
    overlay
        .option("lowerdir", format!("{PLACE}/lower"))?
        .option("upperdir", format!("{PLACE}/volume/upper"))?
        .option("workdir", format!("{PLACE}/volume/work"))?;
    // Only the host's user namespace may use trusted.* attributes.
    if has_ids {
        overlay.flag("userxattr")?;
    }
    Ok(overlay.mount(Attributes::empty())?)
}

fn boot(channel: &Channel, descriptors: Vec<OwnedFd>) -> Result<()> {
    let expected = descriptors.iter().enumerate().all(|(index, fd)| fd.as_raw_fd() == FIRST + index as RawFd);
    if !expected || descriptors.len() < BEFORE_MOUNTS {
        bail!("the descriptors for init did not arrive as sent");
    }
    // Init speaks on the same channel, and must not be heard before the monitor knows who it is.
    let (told, telling) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("make a pipe")?;
    match process::fork(&CloneOptions { namespaces: Kinds::PID, cgroup: None, sibling: true })? {
        // The stage ends with this, and its end of the pipe too.
        Fork::Parent { pid, pidfd } => Ok(channel.send(format!("init {pid}").as_bytes(), &[pidfd.as_fd()])?),
        Fork::Child => {
            drop(telling);
            // Its end is all that is ever read from it; whatever else happens, init begins.
            let _ = rustix::io::retry_on_intr(|| rustix::io::read(&told, &mut [0_u8; 1]));
            let error = become_init(channel, &descriptors);
            let text = format!("{}{error:#}", handover::word::FAILED_PREFIX);
            let _ = channel.send(text.as_bytes(), &[]);
            std::process::exit(1)
        }
    }
}

/// Executes vsinit with its descriptors at the agreed numbers; returns only when it cannot.
fn become_init(channel: &Channel, descriptors: &[OwnedFd]) -> anyhow::Error {
    let arranged = || -> Result<()> {
        // The host's session has no number inside, and CRIU dumps nobody of such a one.
        process::new_session()?;
        process::place_descriptor(channel, CHANNEL)?;
        process::place_descriptor(&descriptors[0], handover::DESCRIPTOR)?;
        for inherited in &descriptors[BEFORE_MOUNTS - 1..] {
            process::keep_across_exec(inherited)?;
        }
        Ok(())
    };
    if let Err(error) = arranged() {
        return error;
    }
    let name = CString::from(c"vsinit");
    process::exec_descriptor(descriptors[1].as_fd(), &[name], &[process::SPARING.to_owned()]).into()
}
