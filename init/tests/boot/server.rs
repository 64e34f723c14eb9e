//! A real server for a test: namespaces of its own, a busybox root, vsinit as PID 1; this process
//! plays the monitor. Everything goes when the value is dropped.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use init::control::{self, Reply, Request, Service};
use init::handover::{self, Handover, HostMount, MountKind, Role, SeccompProfile, word};
use kernel::capability::Set;
use kernel::cgroup::Hierarchies;
use kernel::channel::{self, Channel};
use kernel::file::open_beneath_with;
use kernel::idmap::IdMap;
use kernel::mount::Tree;
use kernel::namespace::Kinds;
use kernel::process::{self, CloneOptions, Fork, PidFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::net::{RecvFlags, recv};

/// No wait of a test is longer; it is not a measure, only an end.
const PATIENCE: Duration = Duration::from_secs(60);

/// The server's ids on this host.
const IDS: IdMap = IdMap { inside: 0, outside: 655_360_000, count: 65_536 };

/// Those of a privileged one.
const HOST_IDS: IdMap = IdMap { inside: 0, outside: 0, count: u32::MAX };

const NODES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// The vsinit to test: that of this build, or another one, such as the static one that is shipped.
pub fn program() -> PathBuf {
    std::env::var_os(PROGRAM).map_or(env!("CARGO_BIN_EXE_vsinit").into(), PathBuf::from)
}

/// Names another vsinit to test.
pub const PROGRAM: &str = "VSINIT_UNDER_TEST";

/// What will become a server.
pub struct Plan {
    directory: tempfile::TempDir,
    handover: Handover,
}

/// A server that was started.
pub struct Server {
    pub pid: i32,
    pub console: String,
    pub masters: Vec<OwnedFd>,
    pub notify: Option<OwnedFd>,
    /// What came on the notify socket, all of it.
    pub notified: String,
    pub failure: Option<String>,
    pidfd: PidFd,
    directory: tempfile::TempDir,
    cgroup: Cgroup,
    ended: Option<ExitStatus>,
}

/// A cgroup that the server may divide further, as a manager gives it one; removed on drop.
struct Cgroup(PathBuf);

impl Plan {
    /// A busybox root with the given service files (name and text).
    pub fn new(services: &[(&str, &str)]) -> Plan {
        let directory = tempfile::tempdir().unwrap();
        // The server's root user has to find the way to its root.
        fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        fs::create_dir(directory.path().join("stage")).unwrap();
        let root = directory.path().join("root");
        for path in ["bin", "sbin", "etc/vsinit", "root", "tmp", "usr"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for applet in Command::new("/bin/busybox").arg("--list").output().unwrap().stdout.split(|b| *b == b'\n') {
            let applet = String::from_utf8_lossy(applet);
            if !applet.is_empty() && applet != "busybox" {
                symlink("busybox", root.join("bin").join(&*applet)).unwrap();
            }
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/tmp:/bin/sh\n").unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\ntty:x:5:\nweb:x:34:\nextra:x:77:web\n").unwrap();
        for (name, text) in services {
            fs::write(root.join(format!("etc/vsinit/{name}.toml")), text).unwrap();
        }
        let handover = Handover {
            version: handover::VERSION,
            name: "test".into(),
            hostname: "test.example".into(),
            uuid: "0e7a7c32-6b0a-4a53-9c4f-0d2a9d1f5b11".into(),
            role: Role::Supervise,
            channel: -1,
            root: -1,
            stage: directory.path().join("stage"),
            mounts: vec![],
            masked: ["/proc/cmdline", "/proc/kcore", "/sys/firmware", "/proc/not-there"].map(PathBuf::from).into(),
            read_only: vec!["/proc/sys".into()],
            ttys: 2,
            capabilities: Set::default_for_servers().bits(),
            seccomp: Some(SeccompProfile { migratable: false, privileged: false, listened: false }),
            privileged: false,
            environment: [("LANG".to_string(), "C.UTF-8".to_string())].into(),
        };
        Plan { directory, handover }
    }

    /// Without a user namespace.
    pub fn privileged(mut self) -> Plan {
        self.handover.privileged = true;
        self.handover.seccomp = Some(SeccompProfile { migratable: false, privileged: true, listened: false });
        self
    }

    /// Puts a distribution's tree in place of the busybox root.
    pub fn tree(self, tree: &Path) -> Plan {
        fs::remove_dir_all(self.root()).unwrap();
        let copied = Command::new("cp").args(["-a", "--reflink=auto"]).args([tree, &self.root()]).status();
        assert!(copied.unwrap().success());
        self
    }

    pub fn role(mut self, role: Role) -> Plan {
        self.handover.role = role;
        self
    }

    /// The server's root on the host, to change before the start.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// Puts this vsinit into the root.
    pub fn with_vsinit(self) -> Plan {
        self.with_program(&program(), "sbin/vsinit")
    }

    /// Puts this test into the root, as the program that says that a service is ready.
    pub fn with_notify_ready(self) -> Plan {
        self.with_program(&std::env::current_exe().unwrap(), "bin/notify-ready")
    }

    /// A program with the libraries that its (dynamic) test build wants.
    fn with_program(self, program: &Path, target: &str) -> Plan {
        let root = self.root();
        fs::copy(program, root.join(target)).unwrap();
        let listed = Command::new("ldd").arg(program).output().unwrap().stdout;
        let listed = String::from_utf8_lossy(&listed).into_owned();
        for library in listed.split_whitespace().filter(|word| word.starts_with('/')) {
            let target = root.join(library.trim_start_matches('/'));
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            fs::copy(library, target).unwrap();
        }
        self
    }

    /// Starts it and waits for `running`, or for `failed`.
    pub fn start(self) -> Server {
        let ids = if self.handover.privileged { HOST_IDS } else { IDS };
        own_all(&self.root(), ids.outside);
        let (ours, theirs) = channel::pair().unwrap();
        let (pipe_read, pipe_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let inherited = Inherited::new(&self, theirs);
        let mut namespaces =
            Kinds::USER | Kinds::PID | Kinds::MOUNT | Kinds::NET | Kinds::UTS | Kinds::IPC | Kinds::CGROUP;
        if self.handover.privileged {
            namespaces.remove(Kinds::USER);
        }
        let cgroup = Cgroup::new(ids.outside);
        let options = CloneOptions { namespaces, cgroup: Some(cgroup.open()), ..Default::default() };
        match process::fork(&options).unwrap() {
            Fork::Child => {
                drop(pipe_write);
                become_vsinit(&pipe_read, &inherited)
            }
            Fork::Parent { pid, pidfd } => {
                if namespaces.contains(Kinds::USER) {
                    ids.write_for(pid).unwrap();
                }
                rustix::io::write(&pipe_write, b"x").unwrap();
                drop(inherited);
                let mut server = Server {
                    pid,
                    pidfd,
                    console: String::new(),
                    masters: vec![],
                    notify: None,
                    notified: String::new(),
                    failure: None,
                    directory: self.directory,
                    cgroup,
                    ended: None,
                };
                server.play_monitor(&ours);
                server
            }
        }
    }
}

/// The descriptors that vsinit finds.
struct Inherited {
    program: OwnedFd,
    handover: OwnedFd,
    others: Vec<OwnedFd>,
}

impl Inherited {
    fn new(plan: &Plan, channel: Channel) -> Inherited {
        let mut handover = plan.handover.clone();
        let mut others = Vec::new();
        // High numbers, so that descriptor 3 is free for the handover.
        let mut keep = |fd: BorrowedFd| {
            let copy = rustix::io::fcntl_dupfd_cloexec(fd, 20).unwrap();
            others.push(copy);
            others.last().unwrap().as_raw_fd()
        };
        handover.channel = keep(channel.as_fd());
        handover.root = keep(Tree::clone_of(&plan.root()).unwrap().as_fd());
        for node in NODES {
            let target = Path::new("/dev").join(node);
            let tree = Tree::clone_of(&target).unwrap();
            handover.mounts.push(HostMount { fd: keep(tree.as_fd()), target, kind: MountKind::File });
        }
        let covered = plan.directory.path().join("uptime");
        fs::write(&covered, "covered\n").unwrap();
        fs::set_permissions(&covered, PermissionsExt::from_mode(0o644)).unwrap();
        for target in ["/proc/uptime", "/proc/not-there", "/mnt/new/file"] {
            let tree = Tree::clone_of(&covered).unwrap();
            let target = PathBuf::from(target);
            handover.mounts.push(HostMount { fd: keep(tree.as_fd()), target, kind: MountKind::File });
        }
        // A descriptor of the host that nobody named: vsinit has to close it.
        keep(fs::File::open("/etc/passwd").unwrap().as_fd());
        let text = handover.to_toml().unwrap();
        let sealed = kernel::memfd::sealed("handover", text.as_bytes()).unwrap();
        Inherited {
            program: fs::File::open(program()).unwrap().into(),
            handover: rustix::io::fcntl_dupfd_cloexec(sealed, 20).unwrap(),
            others,
        }
    }
}

fn become_vsinit(go: &OwnedFd, inherited: &Inherited) -> ! {
    let run = || -> kernel::Result<()> {
        let _ = rustix::io::read(go, &mut [0; 1]);
        process::new_session()?;
        process::set_user(0, 0, &[0])?;
        // A test that is killed takes its servers along.
        process::set_parent_death_signal(libc::SIGKILL)?;
        for fd in &inherited.others {
            process::keep_across_exec(fd)?;
        }
        process::place_descriptor(&inherited.handover, handover::DESCRIPTOR)?;
        Err(process::exec_descriptor(
            inherited.program.as_fd(),
            &[c"vsinit".into()],
            &[c"HOST_SECRET=1".into(), process::SPARING.into()],
        ))
    };
    eprintln!("cannot become vsinit: {:?}", run());
    std::process::exit(1)
}

impl Server {
    fn play_monitor(&mut self, channel: &Channel) {
        loop {
            let (bytes, descriptors) = channel
                .receive_within(PATIENCE.as_millis() as u64)
                .unwrap()
                .unwrap_or_else(|| panic!("vsinit says nothing; console:\n{}", self.console));
            let said = String::from_utf8(bytes).unwrap();
            match said.as_str() {
                word::PREPARED => {
                    self.masters = descriptors;
                    self.notify = self.masters.pop();
                    channel.send(word::PROCEED.as_bytes(), &[]).unwrap();
                }
                word::RUNNING => return,
                _ => {
                    self.failure = Some(said.strip_prefix(word::FAILED_PREFIX).unwrap_or(&said).to_string());
                    return;
                }
            }
        }
    }

    /// Reads what the console has to say, at most for a moment, and what init notifies.
    pub fn pump(&mut self) {
        let mut message = [0; 4096];
        // A monitor has to take them all: ten unread ones stop a systemd in its tracks.
        while let Some(Ok((length, _))) = self.notify.as_ref().map(|fd| recv(fd, &mut message, RecvFlags::DONTWAIT)) {
            self.notified.push_str(&String::from_utf8_lossy(&message[..length]));
            self.notified.push('\n');
        }
        let moment = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        let Some(console) = self.masters.first() else {
            std::thread::sleep(Duration::from_millis(5));
            return;
        };
        let mut polled = [PollFd::new(console, PollFlags::IN)];
        if !poll(&mut polled, Some(&moment)).is_ok_and(|ready| ready > 0) {
            return;
        }
        let mut buffer = [0; 4096];
        match rustix::io::read(console, &mut buffer) {
            Ok(length) => self.console.push_str(&String::from_utf8_lossy(&buffer[..length])),
            // EIO: nobody has the other side open.
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }

    /// Waits until `condition` gives something.
    pub fn wait_for<T>(&mut self, what: &str, mut condition: impl FnMut(&mut Server) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = condition(self) {
                return found;
            }
            assert!(Instant::now() < end, "no {what}; console:\n{}", self.console);
            self.pump();
        }
    }

    /// Waits for a text on the console.
    pub fn wait_console(&mut self, text: &str) {
        self.wait_for(&format!("'{text}' on the console"), |server| server.console.contains(text).then_some(()));
    }

    /// Waits for a file of the guest to hold `text`, and returns all of it.
    pub fn wait_file(&mut self, path: &str, text: &str) -> String {
        self.wait_for(&format!("'{text}' in {path}"), |server| {
            server.read(path).ok().filter(|found| found.contains(text))
        })
    }

    /// The text of a guest's file on its root volume.
    pub fn read(&self, path: &str) -> io::Result<String> {
        fs::read_to_string(self.root().join(path.trim_start_matches('/')))
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// A path below the server's mounts, through its own eyes.
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// The control socket, found as a manager has to: no link of the guest leads out.
    pub fn socket(&self) -> OwnedFd {
        let root = fs::File::open(self.inside("/")).unwrap();
        open_beneath_with(root, Path::new(control::SOCKET), OFlags::PATH, 0).unwrap()
    }

    pub fn ask(&self, request: Request) -> Reply {
        control::call_within(self.socket().as_fd(), &request, PATIENCE).unwrap()
    }

    pub fn list(&self) -> Vec<Service> {
        match self.ask(Request::List) {
            Reply::Services { services } => services,
            reply => panic!("{reply:?}"),
        }
    }

    pub fn service(&self, name: &str) -> Service {
        self.list().into_iter().find(|service| service.name == name).unwrap()
    }

    pub fn wait_state(&mut self, name: &str, state: &str) -> Service {
        self.wait_for(&format!("'{state}' of {name}"), |server| {
            Some(server.service(name)).filter(|service| service.state == state)
        })
    }

    pub fn signal(&self, number: i32) {
        self.pidfd.signal(number).unwrap();
    }

    /// The children of PID 1.
    pub fn children(&self) -> usize {
        let path = format!("/proc/{0}/task/{0}/children", self.pid);
        fs::read_to_string(path).unwrap().split_whitespace().count()
    }

    /// Waits for the end of PID 1 and gives the signal that the kernel killed it with.
    pub fn wait_end(&mut self) -> Option<i32> {
        self.wait_for("end of the server", |server| (!server.pidfd.is_alive()).then_some(()));
        let status = process::status_of(self.pid).unwrap();
        self.ended = Some(status);
        status.signal()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // With PID 1 the kernel ends all its processes, and with them go the mounts.
            let _ = self.pidfd.signal(libc::SIGKILL);
            let _ = process::status_of(self.pid);
        }
        self.cgroup.remove();
    }
}

impl Cgroup {
    fn new(owner: u32) -> Cgroup {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let hierarchies = Hierarchies::detect().unwrap();
        let unified = hierarchies.unified().expect("a host without cgroup2");
        let path = unified.join(format!("vsinit-test-{}-{count}", std::process::id()));
        fs::create_dir(&path).unwrap();
        for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            chown(path.join(file), Some(owner), Some(owner)).unwrap();
        }
        Cgroup(path)
    }

    fn open(&self) -> OwnedFd {
        fs::File::open(&self.0).unwrap().into()
    }

    fn remove(&self) {
        fn remove(path: &Path) -> io::Result<()> {
            for entry in fs::read_dir(path)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    remove(&entry.path())?;
                }
            }
            fs::remove_dir(path)
        }
        // The kernel takes a moment to see that the last process is gone.
        let end = Instant::now() + PATIENCE;
        while self.0.exists() && remove(&self.0).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Gives everything below `root` to the server's root user.
fn own_all(root: &Path, owner: u32) {
    for entry in fs::read_dir(root).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            own_all(&entry.path(), owner);
        }
        std::os::unix::fs::lchown(entry.path(), Some(owner), Some(owner)).unwrap();
    }
    chown(root, Some(owner), Some(owner)).unwrap();
}
