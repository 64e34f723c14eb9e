//! Boots a server: gathers what its init is handed, and waits until init can take signals.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use init::handover::{self, Handover, HostMount, MountKind, Role, SeccompProfile};
use kernel::channel::Channel;
use kernel::mount::{Attributes, Tree};

use super::nodes;
use super::stage::{self, Stage};
use super::view;
use super::world::World;
use crate::monitor::Running;
use crate::site::Site;
use crate::spec::Bind;
use crate::store::Server;

/// How many ttys a server has beside its console.
pub const TTYS: u8 = 4;

/// How long init may take until it can take signals; emulated machines are slow.
const PATIENCE_MS: u64 = 60_000;

/// The program that PID 1 of a small template stays.
pub const OWN_INIT: &str = "vsinit";

/// What tells of the host or its other servers, or leads to its kernel.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/slabinfo",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/vmallocinfo",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/kernel/debug",
    "/sys/kernel/notes",
    "/sys/kernel/security",
    "/sys/kernel/slab",
    "/sys/kernel/tracing",
];

/// What may be read and not written.
const READ_ONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

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
    let mounts = host_mounts(world.site, plan, &stage)?;
    let handover = kernel::memfd::sealed("handover", handover(plan, &mounts).to_toml()?.as_bytes())?;

    let mut descriptors: Vec<BorrowedFd> = vec![handover.as_fd(), program.as_fd(), root.as_fd()];
    descriptors.extend(mounts.iter().map(|mount| mount.tree.as_fd()));
    let init = stage.boot(&descriptors)?;
    // The network was configured before: nothing to wait for.
    init.channel.send(handover::word::PROCEED.as_bytes(), &[])?;
    let said = expect(&init.channel, handover::word::PREPARED)
        .and_then(|ours| expect(&init.channel, handover::word::RUNNING).map(|_| ours));
    init.reap_stage();
    let mut ours = said?;
    let notify = ours.pop().context("the notify socket did not arrive")?;
    Ok(Running { pid: init.pid, pidfd: init.pidfd, consoles: ours, notify: Some(notify), lock: None })
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

fn host_mounts(site: &Site, plan: &BootPlan, stage: &Stage) -> Result<Vec<Prepared>> {
    let mut mounts = Vec::with_capacity(32);
    let nodes = nodes::directory(site, &plan.server);
    for (number, path) in nodes::paths(&plan.server).iter().enumerate() {
        mounts.push(as_it_is(&nodes.join(number.to_string()), path)?);
    }
    let views = view::mounts(site, plan.server.record.id)?;
    mounts.extend(views.into_iter().map(|(tree, target)| Prepared { tree, target, kind: MountKind::File }));
    if plan.init == OWN_INIT {
        mounts.push(Prepared { tree: vsinit(site)?, target: "/sbin/vsinit".into(), kind: MountKind::File });
    }
    for bind in &plan.server.spec.mount {
        mounts.push(user_bind(bind, stage, plan.server.spec.privileged)?);
    }
    Ok(mounts)
}

fn as_it_is(source: &Path, target: &Path) -> Result<Prepared> {
    Ok(Prepared { tree: Tree::clone_of(source)?, target: target.to_owned(), kind: MountKind::File })
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
        masked: paths(MASKED),
        read_only: paths(READ_ONLY),
        ttys: TTYS,
        capabilities: capabilities(server).bits(),
        seccomp: Some(SeccompProfile { migratable: server.spec.migratable, privileged: server.spec.privileged }),
        privileged: server.spec.privileged,
        environment: environment(),
    }
}

/// Tells systemd where to offer logins beside the console (systemd's CONTAINER_INTERFACE): console is pts/0, ttyN is pts/N.
fn environment() -> BTreeMap<String, String> {
    let ttys: Vec<String> = (1..=TTYS).map(|number| format!("pts/{number}")).collect();
    BTreeMap::from([("container_ttys".into(), ttys.join(" "))])
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
