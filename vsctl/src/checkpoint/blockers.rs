//! What CRIU cannot put into images, found before anything is frozen, by process, with what to do about it.
//!
//! Limit: what /proc shows, and sockets what they are. Some of it CRIU finds out only when it looks from inside (as a connection to a unix
//! socket with something to read, which nobody has accepted); then it says so, and the server goes on.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kernel::mount::{Attributes, FileSystem, MountInfo, parse_mountinfo};
use kernel::namespace::{self, Kinds};
use kernel::process::{self, PidFd};
use nix::libc;
use rustix::fs::{Dir, Mode, OFlags};
use rustix::net::{AddressFamily, SocketType, sockopt};
use serde::{Deserialize, Serialize};

use crate::aside::{self, Found};
use crate::failure::{Exit, Failure};
use crate::lifecycle::restore::GHOST_BYTES_MAX;
use crate::processes::{self, Process, field};

/// How long who listens may take to accept a connection, before it is said that it does not.
const ACCEPT_LIMIT: Duration = Duration::from_secs(2);

/// How long it may take to list what no process need have open.
const LIST_LIMIT: Duration = Duration::from_secs(30);

/// Something that cannot be dumped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blocker {
    /// Of a process.
    Process {
        /// Inside and on the host.
        pids: (i32, i32),
        /// What it is called.
        command: String,
        /// What it has.
        what: What,
    },
    /// A POSIX message queue, which lasts without a process.
    Queue(String),
    /// A connection that nobody has accepted yet, at this TCP port.
    Waiting(u16),
}

/// What a process has that cannot be dumped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// An open file of a kind that has no place in images.
    File(Opened),
    /// A namespace of a kind that may not be nested.
    Namespace(&'static str),
    /// Its parent is outside: somebody entered.
    Visitor,
    /// A tree of the host's is in namespaces that are not the host's.
    Elsewhere(&'static str),
    /// Of a tree: its session began outside.
    Session(i32),
    /// Of a tree: a terminal, or the master of one.
    Terminal(String),
    /// Of a tree: a pipe that somebody outside has too.
    Pipe {
        /// Its link in /proc/PID/fd.
        link: String,
        /// Who.
        other: i32,
    },
    /// Of a tree: a TCP connection.
    Connection(String),
    /// Of a tree's session, and no more in the tree.
    Stray,
    /// The command that is to dump it.
    Ourselves,
}

/// An open file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// What it is.
    pub kind: String,
    /// Its link in /proc/PID/fd.
    pub link: String,
}

impl What {
    fn advice(&self) -> &'static str {
        match self {
            Self::File(_) => "end it, or let it close the file",
            Self::Namespace(_) => "end it; a migratable server refuses new ones since its start",
            Self::Visitor => "leave the session: it belongs to `vsctl enter` or `exec`",
            Self::Elsewhere(_) => "only trees in the namespaces of this command can be put on the disk",
            Self::Session(_) => "start the tree with `vsctl checkpoint run`",
            Self::Terminal(_) | Self::Pipe { .. } => "let it read and write files, as with `vsctl checkpoint run`",
            Self::Connection(_) => "let it close the connection, which would be reset anyway",
            Self::Stray => "end it, or let its parent wait for it",
            Self::Ourselves => "name a process below",
        }
    }
}

impl fmt::Display for Blocker {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What a guest has named goes to somebody's terminal.
        let (pids, command, what) = match self {
            Self::Process { pids, command, what } => (pids, command, what),
            Self::Waiting(port) => {
                return write!(
                    out,
                    "a connection waits at TCP port {port} and is not accepted; try again, or end who listens there"
                );
            }
            Self::Queue(name) => {
                let name = name.escape_debug();
                return write!(
                    out,
                    "a POSIX message queue is there: /{name}; end who uses it, and remove it (mq_unlink(3))"
                );
            }
        };
        let (command, (inside, outside)) = (command.escape_debug(), *pids);
        match inside == outside {
            true => write!(out, "process {inside} ({command}) "),
            false => write!(out, "process {inside} ({command}, {outside} on the host) "),
        }?;
        match what {
            What::File(Opened { kind, link }) => write!(out, "has {kind} open: {}", link.escape_debug()),
            What::Namespace(kind) => write!(out, "is in a {kind} namespace of its own"),
            What::Visitor => write!(out, "has come in from outside"),
            What::Elsewhere(kind) => write!(out, "is in another {kind} namespace"),
            What::Session(leader) => write!(out, "is of the session of process {leader}, outside the tree"),
            What::Terminal(link) => write!(out, "has a terminal open: {}", link.escape_debug()),
            What::Pipe { link, other } => write!(out, "has a pipe to process {other}, outside the tree: {link}"),
            What::Connection(ends) => write!(out, "has a TCP connection: {ends}"),
            What::Stray => write!(out, "is of the tree's session, and has left the tree"),
            What::Ourselves => write!(out, "is this command"),
        }?;
        write!(out, "; {}", what.advice())
    }
}

impl Blocker {
    /// Something about `process`.
    pub fn new(process: &Process, what: What) -> Self {
        Self::Process { pids: (process.pid_inside, process.pid), command: process.command.clone(), what }
    }
}

/// That `subject` cannot be dumped; nothing when nothing stands in the way.
///
/// # Errors
/// Exit 5, with all that does.
pub fn refuse(subject: &str, found: &[Blocker]) -> Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = found.iter().map(|blocker| format!("\n  {blocker}")).collect();
    let message = format!("{subject} cannot be put on the disk as it is:{}", list.concat());
    Err(Failure::new(Exit::Unsupported, message).into())
}

/// Namespaces that CRIU dumps for a whole server only.
const WHOLE: &[&str] = &["cgroup", "ipc", "pid", "time", "user", "uts"];

/// What stands in the way of a dump of `processes`, whose init is `init` on the host.
///
/// # Errors
/// When init cannot be looked at. A process that ends meanwhile blocks nothing.
pub fn find(init: i32, processes: &[Process]) -> Result<Vec<Blocker>> {
    let own = namespaces(init, WHOLE).with_context(|| format!("look at the namespaces of process {init}"))?;
    let mut found: Vec<Blocker> =
        queues(init).context("list message queues")?.into_iter().map(Blocker::Queue).collect();
    found.extend(waiting(init).into_iter().map(Blocker::Waiting));
    // A descriptor that was handed on may be of a mount that only another sees.
    let mut views = BTreeMap::new();
    for process in processes {
        let Ok(Entry::Vacant(view)) = view(process.pid).map(|view| views.entry(view)) else { continue };
        // One that has just ended shows none; another may see the same.
        if let Some(mounts) = mounts(process.pid).ok().filter(|mounts| !mounts.is_empty()) {
            view.insert(mounts);
        }
    }
    let mounts: Vec<MountInfo> = views.into_values().flatten().collect();
    for process in processes {
        let mut note = |what| found.push(Blocker::new(process, what));
        if process.pid != init && parent_inside(process.pid) == Some(0) {
            note(What::Visitor);
        }
        let theirs = namespaces(process.pid, WHOLE).unwrap_or_default();
        for (kind, number) in &theirs {
            if own.get(kind).is_some_and(|own| own != number) {
                note(What::Namespace(kind));
            }
        }
    }
    let mut opened = opened(processes.iter().map(|process| (process.pid, &mounts[..])))?;
    found.extend(processes.iter().flat_map(|process| {
        let files = opened.remove(&process.pid).unwrap_or_default();
        files.into_iter().map(|file| Blocker::new(process, What::File(file)))
    }));
    Ok(found)
}

/// The namespaces of a process, of those `kinds` that the kernel has.
///
/// # Errors
/// When it has ended.
pub fn namespaces(pid: i32, kinds: &[&'static str]) -> Result<BTreeMap<&'static str, u64>> {
    let number = |kind: &&'static str| match fs::metadata(format!("/proc/{pid}/ns/{kind}")) {
        Ok(found) => Some(Ok((*kind, found.ino()))),
        // A kernel without that kind.
        Err(error) if error.kind() == io::ErrorKind::NotFound && Path::new(&format!("/proc/{pid}")).exists() => None,
        Err(error) => Some(Err(error.into())),
    };
    kinds.iter().filter_map(number).collect()
}

/// The number of the parent in the process's own pid namespace: 0 when it is outside.
fn parent_inside(pid: i32) -> Option<i32> {
    // NStgid has a number for each pid namespace; a parent has none in ours inside when it is outside.
    let status = processes::text(pid, "status").ok()?;
    let parent: i32 = field(&status, "PPid:")?.parse().ok()?;
    let depth = |status: &str| field(status, "NStgid:").map(|numbers| numbers.split_whitespace().count());
    let above = processes::text(parent, "status").ok()?;
    Some(if depth(&above)? < depth(&status)? { 0 } else { parent })
}

/// The names of the message queues of the server.
fn queues(init: i32) -> Result<BTreeSet<String>> {
    let listed = aside::fetch(LIST_LIMIT, &[], || {
        namespace::enter(namespace::open(init, "ipc")?.as_fd(), Kinds::IPC)?;
        Ok(Found { bytes: own_queues()?.join("\n").into_bytes(), ..Found::default() })
    })?;
    // Names are shown, not used: it matters little which ends at a line's end of its own.
    Ok(String::from_utf8_lossy(&listed.bytes).lines().map(str::to_owned).collect())
}

/// The names of the message queues in this process's namespace: a file system of the kernel's shows them, wherever it is mounted.
fn own_queues() -> Result<Vec<String>> {
    let tree = FileSystem::new("mqueue")?.mount(Attributes::READ_ONLY)?;
    // The mount is a place, which cannot be read itself.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(tree.as_fd(), ".", flags, Mode::empty()).context("open them")?;
    let mut names = Vec::new();
    for entry in Dir::new(directory).context("read them")? {
        let name = entry.context("read them")?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// The TCP ports of the server at which connections wait for longer than one who serves them needs to accept one.
fn waiting(init: i32) -> BTreeSet<u16> {
    let look = || -> BTreeSet<u16> {
        let read = |family| fs::read_to_string(format!("/proc/{init}/net/{family}")).unwrap_or_default();
        ["tcp", "tcp6"].into_iter().flat_map(|family| ports_with_waiting(&read(family))).collect()
    };
    let mut found = look();
    let end = Instant::now() + ACCEPT_LIMIT;
    while !found.is_empty() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
        let still = look();
        found.retain(|port| still.contains(port));
    }
    found
}

/// The ports of listeners in a table of /proc/net/tcp that have connections to accept: its column `rx_queue` counts them (proc_net(5)).
fn ports_with_waiting(table: &str) -> BTreeSet<u16> {
    const LISTEN: &str = "0A";
    let port = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (local, state, queues) = (words.get(1)?, words.get(3)?, words.get(4)?);
        let is_waited_for = *state == LISTEN && queues.split_once(':')?.1 != "00000000";
        is_waited_for.then(|| u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok())?
    };
    table.lines().filter_map(port).collect()
}

/// What decides which mounts a process sees: its namespace, and its root.
fn view(pid: i32) -> io::Result<(u64, PathBuf)> {
    Ok((fs::metadata(format!("/proc/{pid}/ns/mnt"))?.ino(), fs::read_link(format!("/proc/{pid}/root"))?))
}

/// The mounts that a process sees.
///
/// # Errors
/// When it has ended.
pub fn mounts(pid: i32) -> Result<Vec<MountInfo>> {
    Ok(parse_mountinfo(&fs::read_to_string(format!("/proc/{pid}/mountinfo"))?))
}

/// Open files that cannot be dumped, of each process, with the mounts that it and those of the same tree see. They are looked at aside: what
/// a process has put in the place of another file meanwhile may be of a file system of its own making.
///
/// # Errors
/// When it takes too long.
pub fn opened<'m>(processes: impl Iterator<Item = (i32, &'m [MountInfo])>) -> Result<BTreeMap<i32, Vec<Opened>>> {
    let look = |(pid, mounts)| {
        // One that ends meanwhile has none.
        let files = files(pid, mounts).unwrap_or_default().into_iter();
        (pid, files.map(|(kind, link)| Opened { kind: kind.to_owned(), link }).collect::<Vec<_>>())
    };
    let found = aside::fetch(LIST_LIMIT, &[], || {
        let all: BTreeMap<i32, Vec<Opened>> = processes.map(look).filter(|(_, files)| !files.is_empty()).collect();
        Ok(Found { bytes: serde_json::to_vec(&all)?, ..Found::default() })
    });
    let found = found.context("look at open files")?;
    serde_json::from_slice(&found.bytes).context("read what is known of open files")
}

/// Those of one process: what they are, and their links.
fn files(pid: i32, mounts: &[MountInfo]) -> Result<Vec<(&'static str, String)>> {
    let mut found = Vec::new();
    let process = PidFd::open(pid)?;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        let link = link.to_string_lossy().into_owned();
        if link.starts_with("socket:") {
            let number = entry.file_name().to_str().and_then(|number| number.parse().ok());
            found.extend(number.and_then(|number| kind_of_socket(&process, number)).map(|kind| (kind, link)));
            continue;
        }
        if let Some(kind) = kind_of_link(&link) {
            found.push((kind, link));
            continue;
        }
        let number = entry.file_name();
        let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy())) else { continue };
        if waits_for_pressure(&link, &info) {
            found.push(("a trigger of pressure", link));
            continue;
        }
        if is_semaphore(&info) {
            found.push(("an eventfd that is a semaphore", link));
            continue;
        }
        let mount: Option<u64> = field(&info, "mnt_id:").and_then(|id| id.parse().ok());
        let kind = match mounts.iter().find(|known| Some(known.id) == mount) {
            Some(mount) => kind_of_file_system(&mount.kind).or_else(|| kind_of_file(pid, &entry.path(), &link)),
            None => is_nowhere(&link).then_some("a file that is mounted nowhere (a POSIX message queue is one)"),
        };
        found.extend(kind.map(|kind| (kind, link)));
    }
    Ok(found)
}

/// Whether the file is one of pressure, open for writing: nobody writes there but who sets a trigger (Documentation/accounting/psi.rst).
fn waits_for_pressure(link: &str, info: &str) -> bool {
    let flags = field(info, "flags:").and_then(|flags| i32::from_str_radix(flags, 8).ok());
    (link.ends_with(".pressure") || link.starts_with("/proc/pressure/"))
        && flags.is_some_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}

/// Whether the descriptor is an eventfd that gives one at a time (EFD_SEMAPHORE): CRIU would make one that gives all at once. Older
/// kernels (6.1) do not tell.
fn is_semaphore(info: &str) -> bool {
    field(info, "eventfd-semaphore:") == Some("1")
}

/// Whether a file whose mount nobody sees is one that CRIU would look for there. It knows memfds by their names, and what is no file by
/// other names: `socket:[12]`.
fn is_nowhere(link: &str) -> bool {
    link.starts_with('/') && !link.starts_with("/memfd:")
}

/// Kinds of descriptors by their names in /proc/PID/fd (proc(5)).
fn kind_of_link(link: &str) -> Option<&'static str> {
    Some(match link.strip_prefix("anon_inode:")?.trim_matches(['[', ']']) {
        "io_uring" => "an io_uring",
        "bpf-prog" | "bpf_prog" => "a BPF program",
        "bpf-map" | "bpf_map" => "a BPF map",
        "bpf_link" | "bpf-link" => "a BPF link",
        "fanotify" => "a fanotify group",
        "perf_event" => "a performance counter",
        "userfaultfd" => "a userfaultfd",
        "seccomp notify" => "a seccomp listener",
        _ => return None,
    })
}

/// Kinds of sockets that CRIU does not know (criu: `criu/sockets.c`, `can_dump_ipproto` of `criu/sk-inet.c`).
fn kind_of_socket(process: &PidFd, number: i32) -> Option<&'static str> {
    // Closed meanwhile, or not to be had: then CRIU says what it is.
    let socket = process.descriptor(number).ok()?;
    let family = sockopt::socket_domain(&socket).ok()?;
    match family {
        AddressFamily::UNIX | AddressFamily::NETLINK | AddressFamily::PACKET => None,
        AddressFamily::INET | AddressFamily::INET6 => {
            let is_raw = sockopt::socket_type(&socket).ok()? == SocketType::RAW;
            let protocol = sockopt::socket_protocol(&socket).ok()?.map_or(0, |protocol| protocol.as_raw().get());
            if is_raw { None } else { kind_of_protocol(protocol as i32) }
        }
        _ => Some(kind_of_family(family)),
    }
}

fn kind_of_protocol(protocol: i32) -> Option<&'static str> {
    Some(match protocol {
        0 | libc::IPPROTO_TCP | libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE => return None,
        libc::IPPROTO_MPTCP => "an MPTCP socket",
        libc::IPPROTO_SCTP => "an SCTP socket",
        libc::IPPROTO_DCCP => "a DCCP socket",
        // Those of ping are known to CRIU 4.2.
        _ => return None,
    })
}

fn kind_of_family(family: AddressFamily) -> &'static str {
    match i32::from(family.as_raw()) {
        libc::AF_ALG => "a socket of the kernel's ciphers (AF_ALG)",
        libc::AF_VSOCK => "a socket to the hypervisor (AF_VSOCK)",
        libc::AF_XDP => "a socket of AF_XDP",
        libc::AF_CAN => "a socket of a CAN bus",
        libc::AF_BLUETOOTH => "a Bluetooth socket",
        _ => "a socket of a family that CRIU does not know",
    }
}

/// Kinds of files that CRIU dumps only in part: devices, and what was removed. `path` leads to the file itself.
fn kind_of_file(pid: i32, path: &Path, link: &str) -> Option<&'static str> {
    let is_device = link.starts_with("/dev/") && !BY_PLUGINS.iter().any(|start| link.starts_with(start));
    let is_removed = link.ends_with(" (deleted)");
    let meta = (is_device || is_removed).then(|| fs::metadata(path).ok())??;
    if meta.file_type().is_block_device() || meta.file_type().is_char_device() && !is_known_device(meta.rdev()) {
        return Some("a device that CRIU does not know");
    }
    if meta.file_type().is_char_device() && meta.rdev() == rustix::fs::makedev(5, 0) && !leads_foreground(pid) {
        return Some("its terminal (CRIU gives that back to a session's leader in the foreground alone)");
    }
    let is_kept = !meta.is_file() || meta.nlink() > 0 || meta.blocks() * 512 <= u64::from(GHOST_BYTES_MAX);
    (!is_kept).then_some("a removed file of more than 64 MiB")
}

/// Whether process `pid` leads its session, and its group has the terminal (criu: `tty_verify_ctty` of `criu/tty.c`).
fn leads_foreground(pid: i32) -> bool {
    process::stat(pid).is_ok_and(|stat| stat.session == pid && stat.foreground == pid)
}

/// Character devices that CRIU restores (criu: `dump_one_file` of `criu/files.c`, `criu/tty.c`): memory, as null and random, terminals and
/// serial lines, tun, and the automounter's.
fn is_known_device(number: u64) -> bool {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    matches!(major, 1 | 4 | 5 | 128..=143 | 188 | 204) || matches!((major, minor), (10, 200 | 235))
}

/// Devices for which there are plugins of CRIU's.
const BY_PLUGINS: [&str; 3] = ["/dev/dri/", "/dev/kfd", "/dev/nvidia"];

fn kind_of_file_system(kind: &str) -> Option<&'static str> {
    match kind {
        "mqueue" => Some("a POSIX message queue"),
        "autofs" => Some("a file of an automounter"),
        _ if kind == "fuse" || kind.starts_with("fuse.") => Some("a file of a FUSE file system"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{SocketFlags, socket_with};

    use super::*;

    #[test]
    fn descriptors_are_known_by_their_names() {
        assert_eq!(kind_of_link("anon_inode:[io_uring]"), Some("an io_uring"));
        assert_eq!(kind_of_link("anon_inode:bpf-prog"), Some("a BPF program"));
        for fine in ["anon_inode:[eventfd]", "/etc/passwd", "socket:[12]", "anon_inode:[pidfd]"] {
            assert_eq!(kind_of_link(fine), None, "{fine}");
        }
    }

    #[test]
    fn who_only_reads_pressure_waits_for_none() {
        let info = |flags: &str| format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t9\n");
        assert!(waits_for_pressure("/sys/fs/cgroup/init.scope/memory.pressure", &info("02504002")));
        assert!(!waits_for_pressure("/sys/fs/cgroup/init.scope/memory.pressure", &info("0100000")));
        assert!(!waits_for_pressure("/root/blood", &info("02504002")));
    }

    #[test]
    fn file_systems_are_known_by_their_kinds() {
        assert!(kind_of_file_system("fuse.lxcfs-fuse").is_some() && kind_of_file_system("mqueue").is_some());
        assert!(kind_of_file_system("overlay").is_none() && kind_of_file_system("fusectl").is_none());
    }

    /// What is said of each descriptor of this process whose link ends so.
    fn said_of(link: &str) -> Vec<&'static str> {
        let own = std::process::id() as i32;
        let all = files(own, &mounts(own).unwrap()).unwrap();
        all.into_iter().filter(|(_, found)| found.ends_with(link)).map(|(kind, _)| kind).collect()
    }

    #[test]
    fn sockets_are_asked_what_they_are() {
        let link = |socket: &std::os::fd::OwnedFd| {
            let number = std::os::fd::AsRawFd::as_raw_fd(socket);
            fs::read_link(format!("/proc/self/fd/{number}")).unwrap().display().to_string()
        };
        // Not for the children of other tests.
        let of = |family, kind| socket_with(family, kind, SocketFlags::CLOEXEC, None);
        for (family, kind) in [
            (AddressFamily::UNIX, SocketType::SEQPACKET),
            (AddressFamily::INET, SocketType::STREAM),
            (AddressFamily::INET6, SocketType::DGRAM),
        ] {
            let socket = of(family, kind).unwrap();
            assert!(said_of(&link(&socket)).is_empty(), "{family:?}");
        }
        let family = |number: i32| AddressFamily::from_raw(number as u16);
        // Not every kernel has them.
        if let Ok(socket) = of(family(libc::AF_ALG), SocketType::SEQPACKET) {
            assert_eq!(said_of(&link(&socket)), ["a socket of the kernel's ciphers (AF_ALG)"]);
        }
        let protocol = rustix::net::Protocol::from_raw(std::num::NonZero::new(libc::IPPROTO_MPTCP as u32).unwrap());
        if let Ok(socket) = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, Some(protocol)) {
            assert_eq!(said_of(&link(&socket)), ["an MPTCP socket"]);
        }
        assert_eq!(kind_of_protocol(libc::IPPROTO_UDPLITE), None);
        assert_eq!(kind_of_family(family(libc::AF_VSOCK)), "a socket to the hypervisor (AF_VSOCK)");
    }

    #[test]
    fn removed_files_that_are_too_large_and_devices_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let file = fs::File::create(&path).unwrap();
        // A hole takes no place in the images.
        file.set_len(u64::from(GHOST_BYTES_MAX) * 2).unwrap();
        fs::remove_file(&path).unwrap();
        let link = format!("{} (deleted)", path.display());
        assert!(said_of(&link).is_empty());
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, u64::from(GHOST_BYTES_MAX) + 4096)
            .unwrap();
        assert_eq!(said_of(&link), ["a removed file of more than 64 MiB"]);
        let number = |major, minor| rustix::fs::makedev(major, minor);
        for (known, device) in
            [(true, number(1, 3)), (true, number(136, 0)), (true, number(10, 200)), (false, number(10, 229))]
        {
            assert_eq!(is_known_device(device), known, "{device}");
        }
    }

    #[test]
    fn a_blocker_says_who_what_and_what_to_do() {
        let what = What::File(Opened { kind: "an io_uring".into(), link: "anon_inode:[io_uring]".into() });
        let blocker = Blocker::Process { pids: (7, 1234), command: "postgres".into(), what };
        assert_eq!(
            blocker.to_string(),
            "process 7 (postgres, 1234 on the host) has an io_uring open: anon_inode:[io_uring]; end it, or let it close the file"
        );
    }

    #[test]
    fn a_queue_is_named_as_it_is_opened() {
        let said = Blocker::Queue("jobs\u{1b}".into()).to_string();
        assert!(said.contains("/jobs\\u{1b};") && said.contains("mq_unlink"), "{said}");
    }

    #[test]
    #[ignore = "mounts: needs root"]
    fn a_queue_that_nobody_has_open_is_listed() {
        let own = std::process::id() as i32;
        let name = format!("vsos-test-{own}");
        let tree = FileSystem::new("mqueue").unwrap().mount(Attributes::empty()).unwrap();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        drop(rustix::fs::openat(tree.as_fd(), &name, flags, Mode::RUSR | Mode::WUSR).unwrap());
        let listed = own_queues();
        rustix::fs::unlinkat(tree.as_fd(), &name, rustix::fs::AtFlags::empty()).unwrap();
        assert!(listed.unwrap().contains(&name));
        assert!(!own_queues().unwrap().contains(&name));
    }

    #[test]
    fn an_eventfd_that_is_a_semaphore_is_told_from_one_that_counts() {
        let info =
            |kind: u8| format!("pos:\t0\neventfd-count:                5\neventfd-id: 2\neventfd-semaphore: {kind}\n");
        assert!(is_semaphore(&info(1)) && !is_semaphore(&info(0)) && !is_semaphore("eventfd-count: 1\n"));
    }

    #[test]
    fn a_listener_that_has_not_accepted_is_found_by_its_port() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:1B9F 00000000:0000 0A 00000000:00000001 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n   \
                     1: 0100007F:1BA0 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n   \
                     2: 0100007F:1BA1 0100007F:1B9F 01 00000000:00000005 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n";
        assert_eq!(ports_with_waiting(table), BTreeSet::from([7071]));
    }

    #[test]
    fn a_file_that_is_mounted_nowhere_is_told_from_what_is_no_file() {
        assert!(is_nowhere("/jobs") && is_nowhere("/secretmem (deleted)"));
        assert!(
            !is_nowhere("/memfd:survivor (deleted)")
                && !is_nowhere("socket:[12]")
                && !is_nowhere("anon_inode:[eventfd]")
        );
    }

    #[test]
    fn an_ordinary_process_blocks_nothing() {
        // Not this one, in which other tests hold what blocks.
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        let found =
            (namespaces(pid, WHOLE).unwrap().len(), files(pid, &mounts(pid).unwrap()).unwrap(), parent_inside(pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, (WHOLE.len(), Vec::new(), Some(std::process::id() as i32)));
    }
}
