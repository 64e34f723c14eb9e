//! Boots a server: gathers what its init is handed, and waits until init can take signals.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use init::handover::{self, Handover, HostMount, MountKind, Role, SeccompProfile};
use kernel::channel::Channel;
use kernel::mount::{Attributes, Tree};

use super::calls::{self, Calls};
use super::freeze;
use super::guest_groups;
use super::nodes;
use super::restore::{Moment, Restore, Restored};
use super::stage::{self, Stage};
use super::thread_settings;
use super::view::{self, View};
use super::world::World;
use crate::monitor::Running;
use crate::site::Site;
use crate::spec::{Bind, Device};
use crate::store::Server;

/// How many ttys a server has beside its console.
pub const TTYS: u8 = 4;

/// How long init may take until it can take signals; emulated machines are slow.
const PATIENCE_MS: u64 = 60_000;

/// The program that PID 1 of a small template stays.
pub const OWN_INIT: &str = "vsinit";

/// Where a server with that init sees its program.
const OWN_INIT_PATH: &str = "/sbin/vsinit";

/// What shows as empty: secrets, and what tells of the host's use or of other servers and has no counterpart of a server's own.
/// What has one is a file of `lxcfs-fuse`.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/buddyinfo",
    "/proc/cmdline",
    "/proc/irq",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/key-users",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/pagetypeinfo",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/vmallocinfo",
    // What has a name for each CPU, node or block of memory of the host, or a mask of its CPUs.
    "/sys/bus/clockevents/devices",
    "/sys/bus/cpu/devices",
    "/sys/bus/cpu/drivers",
    "/sys/bus/machinecheck/devices",
    "/sys/bus/memory/devices",
    "/sys/bus/node/devices",
    "/sys/class/cpuid",
    "/sys/class/msr",
    "/sys/devices/system/clockevents",
    "/sys/devices/system/machinecheck",
    "/sys/devices/system/memory",
    "/sys/devices/virtual/cpuid",
    "/sys/devices/virtual/memory_tiering",
    "/sys/devices/virtual/msr",
    "/sys/devices/virtual/powercap",
    "/sys/devices/virtual/workqueue",
    "/sys/firmware",
    "/sys/kernel/debug",
    "/sys/kernel/irq",
    "/sys/kernel/notes",
    "/sys/kernel/security",
    "/sys/kernel/slab",
    "/sys/kernel/tracing",
];

/// Block devices and file systems of the host, by each way to them; what a server reads and writes is in diskstats. A server that
/// is given one, or is trusted with the host, needs them: lsblk, LVM, mdadm and mkfs look there.
const DEVICES: &[&str] = &[
    "/proc/drbd",
    "/proc/fs",
    "/proc/mdstat",
    "/sys/block",
    "/sys/class/bdi",
    "/sys/class/block",
    "/sys/dev/block",
    "/sys/devices/virtual/bdi",
    "/sys/devices/virtual/block",
    "/sys/fs/bcache",
    "/sys/fs/btrfs",
    "/sys/fs/erofs",
    "/sys/fs/ext4",
    "/sys/fs/f2fs",
    "/sys/fs/nilfs2",
    "/sys/fs/xfs",
];

/// What may be read and not written.
const READ_ONLY: &[&str] = &["/proc/bus", "/proc/sys", "/proc/sysrq-trigger"];

/// What a start needs to know beside the plan.
#[derive(Debug, Clone)]
pub struct BootPlan {
    /// The server.
    pub server: Server,
    /// The template's init: `vsinit`, or a program of the guest.
    pub init: String,
    /// The signal that asks it to power off.
    pub stop_signal: i32,
    /// Only a shell on the console.
    pub rescue: bool,
}

/// Starts init from `stage` and waits until it can take signals.
///
/// # Errors
/// What vsinit or the kernel said.
pub fn boot(world: &World, stage: Stage) -> Result<Running> {
    let plan = world.boot.as_ref().ok_or_else(|| anyhow!("nothing to boot"))?;
    let root = Tree::clone_of(world.root.as_deref().context("the root is not mounted")?)?;
    let program = vsinit(world.site)?;
    // Before its files are taken: should it end from now on, the monitor knows that they must be replaced.
    let keeper = Some(calls::supervisor(world.site)?);
    let mounts = host_mounts(world.site, plan, &stage, &program)?;
    let handover = kernel::memfd::sealed("handover", handover(plan, &mounts).to_toml()?.as_bytes())?;

    let mut descriptors: Vec<BorrowedFd> = vec![handover.as_fd(), program.as_fd(), root.as_fd()];
    descriptors.extend(mounts.iter().map(|mount| mount.tree.as_fd()));
    let init = stage.boot(&descriptors)?;
    // The network was configured before: nothing to wait for.
    init.channel.send(handover::word::PROCEED.as_bytes(), &[])?;
    let said = expect(&init.channel, handover::word::PREPARED)
        .and_then(|ours| Ok((ours, expect(&init.channel, handover::word::RUNNING)?)));
    init.reap_stage();
    let (mut ours, listener) = said?;
    let notify = ours.pop().context("the notify socket did not arrive")?;
    let answered = listener.into_iter().map(Calls::of).collect::<Result<Vec<_>>>()?;
    if answered.is_empty() == plan.server.spec.answers_calls() {
        bail!("vsinit and vsctl do not agree on the system-call filter: are they of one build?");
    }
    let (pid, pidfd, notify) = (init.pid, init.pidfd, Some(notify));
    Ok(Running { pid, pidfd, consoles: ours, notify, lock: None, keeper, calls: answered, lifeline: Vec::new() })
}

/// Lets a restored server go on.
///
/// # Errors
/// What CRIU said.
pub fn go_on(world: &World, restore: Restore) -> Result<Running> {
    let keeper = Some(calls::supervisor(world.site)?);
    let plan = world.boot.as_ref().ok_or_else(|| anyhow!("nothing to restore"))?;
    let group = world.group(&world.site.server_cgroup(&plan.server.name))?;
    let image = world.image.as_ref().context("nothing to restore")?;
    let Restored { pid, pidfd, masters } = restore.finish(|moment| match moment {
        Moment::Apart => {
            group.unified_directory().map_or(Ok(()), |directory| guest_groups::fill(&directory, &image.groups))
        }
        Moment::Read => world.compared(),
        Moment::Complete => {
            // Until it is written down that it runs, and the images have gone. CRIU lets them run whatever we say.
            freeze::hold(world.site, &plan.server.name).inspect_err(|_| {
                let _ = group.kill();
            })?;
            thread_settings::apply_in(&group, &image.settings);
            // Known already, unless a CRIU has not said that it had read them.
            world.compared()
        }
    })?;
    Ok(Running {
        pid,
        pidfd,
        consoles: masters,
        notify: None,
        lock: None,
        keeper,
        calls: Vec::new(),
        lifeline: Vec::new(),
    })
}

fn expect(channel: &Channel, word: &str) -> Result<Vec<OwnedFd>> {
    let Some((text, descriptors)) = channel.receive_within(PATIENCE_MS)? else {
        bail!("vsinit did not say '{word}' within {} seconds", PATIENCE_MS / 1000);
    };
    let text = String::from_utf8_lossy(&text);
    match text.strip_prefix(handover::word::FAILED_PREFIX) {
        Some(why) => bail!("vsinit: {why}"),
        None if text == word => Ok(descriptors),
        None if text.is_empty() => bail!("vsinit ended before it said '{word}'"),
        None => bail!("vsinit said '{text}' instead of '{word}'"),
    }
}

/// vsinit as a read-only mount of its file: nobody inside can write it through `/proc/PID/exe`, and its pages are shared
/// by all servers.
fn vsinit(site: &Site) -> Result<Tree> {
    let tree = Tree::clone_of(&site.program("vsinit")?)?;
    tree.set_attributes(Attributes::READ_ONLY | Attributes::NODEV, false)?;
    Ok(tree)
}

/// A mount of the host's that goes to `target` inside.
struct Prepared {
    tree: Tree,
    target: PathBuf,
    kind: MountKind,
}

fn host_mounts(site: &Site, plan: &BootPlan, stage: &Stage, program: &Tree) -> Result<Vec<Prepared>> {
    let mut mounts = Vec::with_capacity(32);
    for (source, target) in node_sources(site, &plan.server) {
        mounts.push(Prepared { tree: Tree::clone_of(&source)?, target, kind: MountKind::File });
    }
    let views = view::mounts(site, plan.server.record.id)?;
    mounts.extend(views.into_iter().map(|View { tree, target, kind }| Prepared { tree, target, kind }));
    if plan.init == OWN_INIT {
        // The same mount that is executed, so that init's program has a path inside: CRIU dumps no other.
        let tree = Tree::from(program.as_fd().try_clone_to_owned().context("copy vsinit's mount")?);
        mounts.push(Prepared { tree, target: OWN_INIT_PATH.into(), kind: MountKind::File });
    }
    for bind in &plan.server.spec.mount {
        mounts.push(user_bind(bind, stage, plan.server.spec.privileged)?);
    }
    Ok(mounts)
}

/// Each device node: where the host has it, and where the server.
fn node_sources(site: &Site, server: &Server) -> Vec<(PathBuf, PathBuf)> {
    let directory = nodes::directory(site, server);
    let source = |(number, path): (usize, PathBuf)| (directory.join(number.to_string()), path);
    nodes::paths(server).into_iter().enumerate().map(source).collect()
}

/// What a server whose init is `init` sees of the host's without the mounts of its spec: where the host has it, and where the server.
/// It may have a `vsinit` of its own.
///
/// # Errors
/// When `lxcfs-fuse` does not run, or a program is missing.
pub fn from_host(site: &Site, server: &Server, init: &str, vsinit: Option<PathBuf>) -> Result<Vec<(PathBuf, PathBuf)>> {
    let mut all = node_sources(site, server);
    all.extend(view::sources(site, server.record.id)?.into_iter().map(|(source, target, _)| (source, target)));
    if init == OWN_INIT {
        all.push((vsinit.map_or_else(|| site.program("vsinit"), Ok)?, OWN_INIT_PATH.into()));
    }
    Ok(all)
}

/// A user's mount: owners inside are those on disk, and no device or set-user-id file of the host counts inside.
fn user_bind(bind: &Bind, stage: &Stage, privileged: bool) -> Result<Prepared> {
    let found = std::fs::metadata(&bind.source).with_context(|| format!("mount {bind}"))?;
    let tree = Tree::clone_of(&bind.source)?;
    if !privileged {
        // A file system without support shows its files as nobody's; that beats refusing to start.
        if let Err(error) = tree.set_idmap(stage.user_namespace()?.as_fd()) {
            log::warn!("{bind}: {error}: its files belong to nobody inside");
        }
    }
    let mut attributes = Attributes::NOSUID | Attributes::NODEV;
    attributes.set(Attributes::READ_ONLY, bind.read_only);
    tree.set_attributes(attributes, false)?;
    let kind = if found.is_dir() { MountKind::Directory } else { MountKind::File };
    Ok(Prepared { tree, target: bind.target.clone(), kind })
}

fn handover(plan: &BootPlan, mounts: &[Prepared]) -> Handover {
    let server = &plan.server;
    let is_block = |device: &Device| device.path.metadata().is_ok_and(|found| found.file_type().is_block_device());
    let has_devices = server.spec.privileged || server.spec.device.iter().any(is_block);
    let role = match (plan.rescue, plan.init.as_str()) {
        (true, _) => Role::Rescue,
        (false, OWN_INIT) => Role::Supervise,
        (false, init) => Role::Exec { argv: vec![init.to_owned()] },
    };
    let mounts = mounts.iter().enumerate().map(|(index, mount)| HostMount {
        fd: stage::mount_descriptor(index),
        target: mount.target.clone(),
        kind: mount.kind,
    });
    let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect();
    Handover {
        version: handover::VERSION,
        name: server.name.to_string(),
        hostname: server.spec.hostname_or(&server.name),
        uuid: server.record.uuid.clone(),
        role,
        channel: stage::CHANNEL,
        root: stage::ROOT_DESCRIPTOR,
        stage: stage::ROOT.into(),
        mounts: mounts.collect(),
        masked: if has_devices { paths(MASKED) } else { paths(&[MASKED, DEVICES].concat()) },
        read_only: paths(READ_ONLY),
        ttys: ttys(plan),
        capabilities: capabilities(server).bits(),
        seccomp: Some(SeccompProfile {
            migratable: server.spec.migratable,
            privileged: server.spec.privileged,
            listened: server.spec.answers_calls(),
        }),
        privileged: server.spec.privileged,
        environment: environment(plan),
    }
}

/// How many ttys the server gets beside its console. Where init does not hold their masters, CRIU restores one terminal and no more.
fn ttys(plan: &BootPlan) -> u8 {
    if plan.server.spec.migratable && plan.init != OWN_INIT { 0 } else { TTYS }
}

/// Tells systemd where to offer logins beside the console (systemd's CONTAINER_INTERFACE): console is pts/0, ttyN is pts/N.
fn environment(plan: &BootPlan) -> BTreeMap<String, String> {
    let ttys: Vec<String> = (1..=ttys(plan)).map(|number| format!("pts/{number}")).collect();
    let mut environment = BTreeMap::from([("container_ttys".into(), ttys.join(" "))]);
    if plan.server.spec.migratable {
        // sd_event_add_memory_pressure(3): a trigger is lost with a checkpoint.
        environment.insert("MEMORY_PRESSURE_WATCH".into(), "/dev/null".into());
    }
    environment
}

/// The bounding set that a server keeps.
pub fn capabilities(server: &Server) -> kernel::capability::Set {
    let mut set = kernel::capability::Set::default_for_servers();
    for change in &server.spec.cap {
        // Checked when the spec was read.
        let _ = set.apply_change(change.as_str());
    }
    set
}
