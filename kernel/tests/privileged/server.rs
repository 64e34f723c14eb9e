//! The making of a virtual server, as a manager does it: monitor → stage 1 in the new user namespace → init.
//!
//! Stage 1 is there because every namespace must belong to the server's user namespace, the time namespace too, and
//! because the overlay must be made by somebody inside. Init is the monitor's child all the same (`CLONE_PARENT`).

use std::fs::{self, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kernel::channel::{self, Channel};
use kernel::idmap::IdMap;
use kernel::mount::{self, Attributes, FileSystem, Tree};
use kernel::namespace::{self, Kinds};
use kernel::process::{self, CloneOptions, Fork, PidFd, fork};

use crate::Outcome;
use crate::cgroups::TestGroup;
use crate::child::{chain, ensure, ensure_equal};

/// Host ids of the server; nobody else uses so high a range.
const IDS: IdMap = IdMap { inside: 0, outside: 2_000_000_000, count: 65_536 };

/// The directories of a server on disk, whose files belong to plain ids.
struct Disk {
    base: tempfile::TempDir,
}

impl Disk {
    fn new() -> std::io::Result<Self> {
        let base = tempfile::tempdir()?;
        // The server's root must be able to walk here.
        fs::set_permissions(base.path(), Permissions::from_mode(0o755))?;
        for name in ["lower/etc", "layers/upper", "layers/work", "at/lower", "at/layers", "root"] {
            fs::create_dir_all(base.path().join(name))?;
        }
        fs::write(base.path().join("lower/etc/hostname"), "template\n")?;
        std::os::unix::fs::chown(base.path().join("lower/etc/hostname"), Some(1000), Some(1000))?;
        Ok(Self { base })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Of a test that failed halfway; what is mounted cannot be removed.
        let _ = mount::detach(&self.path("root"));
    }
}

pub fn from_birth_to_end() -> Outcome {
    let disk = Disk::new()?;
    let group = TestGroup::new("")?;
    // The monitor of a test keeps its mounts to itself.
    namespace::unshare(Kinds::MOUNT)?;
    mount::make_private_recursive(Path::new("/"))?;

    let (ours, theirs) = channel::pair()?;
    let options = CloneOptions { namespaces: Kinds::USER, cgroup: group.0.open_unified()?, sibling: false };
    match fork(&options)? {
        Fork::Child => {
            drop(ours);
            let outcome = stage1(&disk, &group, &theirs);
            if let Err(error) = &outcome {
                let _ = theirs.send(format!("failed: {}", chain(error.as_ref())).as_bytes(), &[]);
            }
            // Not by return: the monitor's values are the monitor's.
            std::process::exit(i32::from(outcome.is_err()))
        }
        Fork::Parent { pid, pidfd } => {
            drop(theirs);
            monitor(&disk, &group, &ours, pid, &pidfd)
        }
    }
}

/// Receives one packet that begins with `word`.
fn expect(channel: &Channel, word: &str) -> Result<(String, Vec<OwnedFd>), Box<dyn std::error::Error>> {
    let (bytes, descriptors) = channel.receive_within(30_000)?.ok_or("nothing came")?;
    let text = String::from_utf8(bytes)?;
    if text.starts_with(word) { Ok((text, descriptors)) } else { Err(format!("expected {word}, got '{text}'").into()) }
}

fn monitor(disk: &Disk, group: &TestGroup, channel: &Channel, stage1: i32, stage1_process: &PidFd) -> Outcome {
    IDS.write_for(stage1)?;
    let user_namespace = namespace::open(stage1, "user")?;
    // One clone for upper and work: overlay wants both on one mount.
    let trees = [Tree::clone_of(&disk.path("lower"))?, Tree::clone_of(&disk.path("layers"))?];
    for tree in &trees {
        tree.set_idmap(user_namespace.as_fd())?;
    }
    channel.send(b"mapped", &[trees[0].as_fd(), trees[1].as_fd()])?;
    let (_, mut descriptors) = expect(channel, "overlay")?;
    let root = Tree::from(descriptors.pop().ok_or("no descriptor came with the overlay")?);
    root.attach(&disk.path("root"))?;
    ensure_equal(
        "the template through the overlay",
        fs::read_to_string(disk.path("root/etc/hostname"))?,
        "template\n".to_owned(),
    )?;
    ensure_equal("its owner, from outside", fs::metadata(disk.path("root/etc/hostname"))?.uid(), IDS.outside + 1000)?;

    let (text, _) = expect(channel, "init ")?;
    let init: i32 = text["init ".len()..].parse()?;
    let init_process = PidFd::open(init)?;
    ensure_equal("stage 1", stage1_process.reap()?.code(), Some(0))?;
    ensure(group.0.processes()?.contains(&init), "init is in the group")?;
    let init_user = namespace::open(init, "user")?;
    ensure(namespace::is_same(init_user.as_fd(), user_namespace.as_fd())?, "init is in the user namespace")?;
    // A mount has one place: init gets a clone of what is shown on the host.
    let clone = Tree::clone_of(&disk.path("root"))?;
    channel.send(b"proceed", &[clone.as_fd()])?;
    expect(channel, "running")?;
    ensure(init_process.wait_exit(Some(30_000))?, "init ends")?;
    ensure_equal("init, as a child of the monitor", init_process.reap()?.code(), Some(42))?;

    let written = disk.path("layers/upper/etc/hostname");
    ensure_equal("what init wrote, on disk", fs::read_to_string(&written)?, "web1\n".to_owned())?;
    ensure_equal("its owner on disk", fs::metadata(&written)?.uid(), 1000)?;
    ensure_equal("owner on disk of what init made", fs::metadata(disk.path("layers/upper/new"))?.uid(), 0)?;
    Ok(())
}

/// In the user namespace, without an id yet: becomes its root, makes what must belong to it, and starts init.
fn stage1(disk: &Disk, group: &TestGroup, channel: &Channel) -> Outcome {
    // First, while the files of the hierarchies are still ours.
    group.0.attach_self_v1()?;
    let (_, trees) = expect(channel, "mapped")?;
    process::set_user(0, 0, &[])?;
    process::set_dumpable(true)?;
    namespace::unshare(Kinds::TIME)?;
    // Back is allowed as well, as far as the host's clock has come.
    namespace::set_clock_offsets(5_000_000_000, 7_500_000_000)?;
    namespace::unshare(Kinds::MOUNT)?;
    mount::make_slave_recursive(Path::new("/"))?;

    for (tree, place) in trees.into_iter().zip(["at/lower", "at/layers"]) {
        Tree::from(tree).attach(&disk.path(place))?;
    }
    let mut overlay = FileSystem::new("overlay")?;
    overlay.option("lowerdir", disk.path("at/lower"))?;
    overlay.option("upperdir", disk.path("at/layers/upper"))?;
    overlay.option("workdir", disk.path("at/layers/work"))?;
    overlay.flag("userxattr")?;
    let overlay = overlay.mount(Attributes::empty())?;
    channel.send(b"overlay", &[overlay.as_fd()])?;

    let namespaces = Kinds::PID | Kinds::NET | Kinds::UTS | Kinds::IPC | Kinds::CGROUP;
    match fork(&CloneOptions { namespaces, cgroup: None, sibling: true })? {
        Fork::Parent { pid, .. } => Ok(channel.send(format!("init {pid}").as_bytes(), &[])?),
        Fork::Child => {
            let code = match init(&disk.path("at"), channel) {
                Ok(()) => 42,
                Err(error) => {
                    let _ = channel.send(format!("failed: {}", chain(error.as_ref())).as_bytes(), &[]);
                    1
                }
            };
            std::process::exit(code)
        }
    }
}

/// Process 1 of the server.
fn init(stage: &Path, channel: &Channel) -> Outcome {
    let (_, mut descriptors) = expect(channel, "proceed")?;
    let root = Tree::from(descriptors.pop().ok_or("no root came")?);
    ensure_equal("pid", std::process::id(), 1)?;
    ensure_equal("uid", rustix::process::getuid().as_raw(), 0)?;
    let offsets = fs::read_to_string("/proc/self/timens_offsets")?;
    let offsets: Vec<_> = offsets.split_ascii_whitespace().collect();
    ensure_equal("clocks", offsets, vec!["monotonic", "5", "0", "boottime", "7", "500000000"])?;
    for line in fs::read_to_string("/proc/self/cgroup")?.lines() {
        ensure(line.ends_with(":/"), format!("{line} is not the root of a cgroup namespace"))?;
    }
    nix::unistd::sethostname("web1")?;

    root.attach(stage)?;
    fs::create_dir(stage.join("proc"))?;
    FileSystem::new("proc")?
        .mount(Attributes::NOSUID | Attributes::NODEV | Attributes::NOEXEC)?
        .attach(&stage.join("proc"))?;
    mount::pivot_into(stage)?;
    ensure_equal("owner of a file of the template", fs::metadata("/etc/hostname")?.uid(), 1000)?;
    fs::write("/etc/hostname", "web1\n")?;
    fs::write("/new", "")?;
    ensure_equal("processes seen", fs::read_to_string("/proc/1/comm")?.is_empty(), false)?;
    channel.send(b"running", &[])?;
    Ok(())
}
