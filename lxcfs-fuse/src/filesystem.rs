//! The files: names and inodes, attributes, texts, errors. What a file says is not decided here, nor when it is answered (`serving`).
//!
//! Limits: read-only; no state that a successor would miss (inodes are computed, handles may be unknown).

use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use fuser::{Errno, FileAttr, FileType, INodeNo};

use crate::clock::Now;
use crate::inode::{self, At, Kind, Node};
use crate::render;
use crate::snapshot::{Host, Memory, Snapshot, Unreadable};
use crate::text::{self, Texts};
use crate::there;
use crate::watch::{Missing, Server, Servers};

/// A server's directory is looked up again after this, so one that is unregistered disappears.
const SERVER_TTL: Duration = Duration::from_millis(500);

/// What is in a server's directory does not change while the server is there, and every path goes through that.
/// Also of attributes: a guest's bind mounts then cost no question but open and read.
pub(crate) const PLACE_TTL: Duration = Duration::from_secs(24 * 3600);

/// The file system of one worker.
#[derive(Debug)]
pub struct Filesystem {
    host: Arc<Host>,
    servers: Arc<Servers>,
    texts: Texts,
    /// Fixed while the kernel runs.
    meminfo: OnceLock<render::Meminfo>,
}

impl Filesystem {
    /// Serves `servers` on `host`.
    pub fn new(host: Arc<Host>, servers: Arc<Servers>) -> Filesystem {
        Filesystem { host, servers, texts: Texts::new(Now::read().boottime_ns), meminfo: OnceLock::new() }
    }

    /// A file system over captured trees: the host's below `host`, registrations in `servers`.
    pub fn at(host: &Path, servers: &Path) -> Filesystem {
        Filesystem::new(Arc::new(Host::at(host)), Arc::new(Servers::registered_in(servers)))
    }

    /// The text of the file `at` of server `id` at `now`, in place of `out`; `reader` is the task that asks, or 0.
    pub fn text(&self, id: u64, at: At, reader: u32, now: Now, out: &mut String) -> Result<(), Errno> {
        self.text_of(&*self.server(id, now)?, at, reader, now, out)
    }

    fn text_of(&self, server: &Server, at: At, reader: u32, now: Now, out: &mut String) -> Result<(), Errno> {
        self.with_snapshot(server, now, |snapshot| {
            out.clear();
            match at.kind() {
                Some(kind) => self.render(server, snapshot, at, kind, reader, out),
                None => Err(Unreadable::Io(rustix::io::Errno::ISDIR.into())),
            }
        })
    }

    /// What is in the directory `at` of server `id`.
    pub fn children(&self, id: u64, at: At, now: Now) -> Result<Vec<At>, Errno> {
        let server = self.server(id, now)?;
        self.with_snapshot(&server, now, |snapshot| there::children(snapshot, at))
    }

    /// Passes a snapshot of the server to `ask`; twice, when the first one turns out to be of a cgroup that is gone.
    fn with_snapshot<T>(
        &self,
        server: &Server,
        now: Now,
        mut ask: impl FnMut(&Snapshot<'_>) -> Result<T, Unreadable>,
    ) -> Result<T, Errno> {
        let mut attempt = || {
            let files = server.files(now)?;
            ask(&Snapshot::new(&self.host, &files, now))
        };
        let mut answer = attempt();
        if matches!(answer, Err(Unreadable::Gone)) {
            // Perhaps only the descriptors are old: a restarted server has a new cgroup at the same path.
            server.close_files();
            answer = attempt();
        }
        answer.map_err(|error| match error {
            Unreadable::Gone => {
                server.close_files();
                Errno::ESTALE
            }
            Unreadable::Io(error) => Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO)),
        })
    }

    /// Collects what the file needs and renders it.
    fn render(
        &self,
        server: &Server,
        snapshot: &Snapshot<'_>,
        at: At,
        kind: Kind,
        reader: u32,
        out: &mut String,
    ) -> Result<(), Unreadable> {
        let started_ns = server.registration.started_boottime_ns;
        match kind {
            Kind::Meminfo => {
                let host = snapshot.host_memory()?;
                let lines = self.meminfo.get_or_init(|| render::Meminfo::of(&host.lines));
                render::meminfo(out, lines, &snapshot.memory()?);
            }
            Kind::Stat => {
                let tasks = server.load(snapshot, reader)?.tasks();
                let accounts = server.accounts(snapshot)?;
                let started_s = snapshot.now().realtime_of_ns(started_ns) / 1_000_000_000;
                render::stat(out, &render::Stat { accounts: &accounts, started_s, tasks });
            }
            Kind::Cpuinfo => render::cpuinfo(out, &snapshot.host_cpuinfo()?, &snapshot.cpus()?),
            Kind::Uptime => {
                let idle_ns = server.accounts(snapshot)?.idle_ns();
                render::uptime(out, snapshot.now().since_ns(started_ns), idle_ns);
            }
            Kind::Loadavg => {
                let (hundredths, tasks) = {
                    let load = server.load(snapshot, reader)?;
                    (load.hundredths(), load.tasks())
                };
                render::loadavg(out, hundredths, tasks, snapshot.task_count()?);
            }
            // A host without swap has none to give: nothing to read.
            Kind::Swaps if snapshot.host_memory()?.swap_total_bytes == 0 => render::swaps(out, &Memory::default()),
            Kind::Swaps => render::swaps(out, &snapshot.memory()?),
            Kind::Diskstats => render::diskstats(out, &snapshot.disks()?),
            Kind::Vmstat => {
                let (memory, events) = snapshot.memory_and_events()?;
                render::vmstat(out, snapshot.vmstat_names()?, &memory, &events, &snapshot.disks()?);
            }
            Kind::Partitions => {
                let disks = snapshot.disks()?;
                render::partitions(out, &disks, &snapshot.disk_sizes()?);
            }
            Kind::Interrupts => render::interrupts(out, snapshot.cpus()?.visible),
            Kind::Softirqs => render::softirqs(out, snapshot.cpus()?.visible),
            Kind::Schedstat => {
                let up_ns = snapshot.now().since_ns(started_ns);
                render::schedstat(out, snapshot.schedstat_version(), &*server.accounts(snapshot)?, up_ns);
            }
            Kind::Zoneinfo => render::zoneinfo(out, &snapshot.memory()?, snapshot.cpus()?.visible),
            Kind::Cgroups => render::cgroups(out, &snapshot.host_text("proc/cgroups")?, snapshot.group_count()?),
            Kind::NodeMeminfo => render::node_meminfo(out, &snapshot.memory()?),
            Kind::NodeVmstat => {
                let (memory, events) = snapshot.memory_and_events()?;
                render::node_vmstat(out, snapshot.vmstat_names()?, &memory, &events);
            }
            Kind::Fixed(text) => out.push_str(text),
            Kind::Cpus
            | Kind::CpusMask
            | Kind::Itself
            | Kind::ItselfMask
            | Kind::Number
            | Kind::SharedCpus
            | Kind::SharedCpusMask
            | Kind::NodeCpu
            | Kind::Host => there::text(out, snapshot, at, kind)?,
        }
        Ok(())
    }

    /// The server `id`, or what its reader is told instead.
    pub(crate) fn server(&self, id: u64, now: Now) -> Result<Arc<Server>, Errno> {
        self.servers.find(id, now).map_err(|missing| match missing {
            // The inode is known, what it stood for is not there any more.
            Missing::Unregistered => Errno::ESTALE,
            Missing::Malformed => Errno::EIO,
        })
    }

    /// The attributes of a place.
    pub(crate) fn attributes(&self, node: Node, now: Now) -> Result<FileAttr, Errno> {
        match node {
            Node::Root => Ok(attributes(node, SystemTime::UNIX_EPOCH)),
            Node::Place { id, .. } => {
                let server = self.server(id, now)?;
                Ok(attributes(node, server.started))
            }
        }
    }

    /// What has this name in a directory, and for how long its attributes hold.
    pub(crate) fn look_up(&self, parent: u64, name: &OsStr, now: Now) -> Result<(FileAttr, Duration), Errno> {
        match Node::of(parent).ok_or(Errno::ESTALE)? {
            Node::Root => {
                let id = inode::id_of(name).ok_or(Errno::ENOENT)?;
                let attributes = self.attributes(Node::Place { id, at: At::default() }, now);
                // By name it never was there.
                let attributes = attributes.map_err(|error| match i32::from(error) {
                    libc::ESTALE => Errno::ENOENT,
                    _ => error,
                })?;
                Ok((attributes, SERVER_TTL))
            }
            Node::Place { id, at } => {
                let at = at.child(name).ok_or(Errno::ENOENT)?;
                // Most are there always.
                let server = self.server(id, now)?;
                if at.may_be_missing() && !self.with_snapshot(&server, now, |snapshot| there::is_there(snapshot, at))? {
                    return Err(Errno::ENOENT);
                }
                // The number of CPUs may change, and which of the host's they are.
                let ttl = if at.is_numbered() || at.is_of_the_host() { SERVER_TTL } else { PLACE_TTL };
                Ok((attributes(Node::Place { id, at }, server.started), ttl))
            }
        }
    }

    /// What a listing of a directory has.
    pub(crate) fn entries(&self, node: Node, now: Now) -> Result<Vec<(String, Node)>, Errno> {
        let of = |id| move |at: At| (at.name(), Node::Place { id, at });
        let (parent, children) = match node {
            Node::Root => {
                (node, self.servers.ids().into_iter().map(|id| (id.to_string(), of(id)(At::default()).1)).collect())
            }
            Node::Place { id, at } => {
                let children: Vec<_> = self.children(id, at, now)?.into_iter().map(of(id)).collect();
                let parent = if at.index == 0 { Node::Root } else { Node::Place { id, at: at.parent() } };
                (parent, children)
            }
        };
        let dots = [(".".to_owned(), node), ("..".to_owned(), parent)];
        Ok(dots.into_iter().chain::<Vec<_>>(children).collect())
    }

    /// The handle of a file that is opened.
    pub(crate) fn open(&self, id: u64, now: Now) -> Result<u64, Errno> {
        self.server(id, now).map(|_| self.texts.handle())
    }

    /// A file is closed.
    pub(crate) fn close(&self, handle: u64) {
        self.texts.close(handle);
    }

    /// Puts the rest of a text that the reader has the beginning of in `part`; false if it is not known (any more).
    pub(crate) fn rest(&self, read: &Read, part: &mut Vec<u8>) -> bool {
        read.offset > 0 && self.texts.part(read.handle, read.offset, read.size, part)
    }

    /// Makes the text that a read begins. The answer is left in `part`.
    pub(crate) fn begin(
        &self,
        server: &Server,
        read: &Read,
        now: Now,
        text: &mut String,
        part: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        self.text_of(server, read.at, read.reader, now, text)?;
        server.last.keep(read.at, text, now.boottime_ms());
        self.give(read, text, part);
        Ok(())
    }

    /// Puts what the file said last in `part`.
    pub(crate) fn last(&self, server: &Server, read: &Read, part: &mut Vec<u8>) -> Result<(), Errno> {
        let mut text = String::new();
        if !server.last.text(read.at, &mut text) {
            return Err(Errno::ETIMEDOUT);
        }
        self.give(read, &text, part);
        Ok(())
    }

    fn give(&self, read: &Read, text: &str, part: &mut Vec<u8>) {
        // Before the answer is sent: the next read may come to another thread at once.
        self.texts.keep(read.handle, text);
        part.clear();
        part.extend_from_slice(match read.offset {
            0 => text::slice(text.as_bytes(), 0, read.size),
            _ => text::resume(text.as_bytes(), read.offset, read.size),
        });
    }
}

/// What a read asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Read {
    /// The server.
    pub id: u64,
    pub at: At,
    pub handle: u64,
    pub offset: u64,
    pub size: u32,
    /// The task that asks.
    pub reader: u32,
}

/// The attributes of a place. They never change while the server lives, so they may be cached.
fn attributes(node: Node, started: SystemTime) -> FileAttr {
    let kind = file_type(node);
    let is_file = kind == FileType::RegularFile;
    FileAttr {
        ino: INodeNo(node.inode()),
        // As sysfs has it. procfs says 0, but since Linux 6.5 sendfile(2) and splice(2) go through the page cache even of
        // a file opened for direct I/O, and would see the end of the file at once: see `read`.
        size: if is_file { 4096 } else { 0 },
        blocks: 0,
        atime: started,
        mtime: started,
        ctime: started,
        crtime: started,
        kind,
        perm: match kind {
            FileType::RegularFile => 0o444,
            FileType::Symlink => 0o777,
            _ => 0o555,
        },
        nlink: if kind == FileType::Directory { 2 } else { 1 },
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// What kind of file a place is.
pub(crate) fn file_type(node: Node) -> FileType {
    match node {
        Node::Place { at, .. } if at.is_link() => FileType::Symlink,
        Node::Place { at, .. } if at.kind().is_some() => FileType::RegularFile,
        _ => FileType::Directory,
    }
}
