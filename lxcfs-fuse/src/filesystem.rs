//! The FUSE side: names and inodes, paging, time-outs, errors. What a file says is not decided here.
//!
//! Limits: read-only; no state that a successor would miss (inodes are computed, handles may be unknown).

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, Request,
};

use crate::clock::Now;
use crate::inode::{self, Kind, Node, PLACES};
use crate::render;
use crate::snapshot::{Host, Resource, Snapshot, Unreadable};
use crate::text::{self, Texts};
use crate::watch::{Missing, Server, Servers};

/// A server's directory is looked up again after this, so one that is unregistered disappears.
const SERVER_TTL: Duration = Duration::from_millis(500);

/// What is in a server's directory does not change while the server is there, and every path goes through that.
/// Also of attributes: a guest's bind mounts then cost no question but open and read.
const PLACE_TTL: Duration = Duration::from_secs(24 * 3600);

/// Requests that were handed to an earlier worker and then to us have this bit in their number
/// (`FUSE_UNIQUE_RESEND` of linux/fuse.h, Linux ≥ 6.9).
const RESENT: u64 = 1 << 63;

/// Answers being made at once that are watched; there are never more threads.
const SLOTS: usize = 16;

/// When the answers being made were begun, for who watches that they get on.
#[derive(Debug, Default)]
pub struct Progress {
    begun_ms: [AtomicU64; SLOTS],
}

impl Progress {
    /// How long the oldest request has been waiting for its answer, in milliseconds.
    pub fn oldest_ms(&self, now: Now) -> u64 {
        let begun = self.begun_ms.iter().map(|slot| slot.load(Ordering::Relaxed)).filter(|&begun| begun > 0);
        begun.map(|begun| now.boottime_ms().saturating_sub(begun)).max().unwrap_or(0)
    }

    fn begin(&self, now: Now) -> Answering<'_> {
        let slot = SLOT.with(|slot| *slot) % SLOTS;
        self.begun_ms[slot].store(now.boottime_ms().max(1), Ordering::Relaxed);
        Answering(&self.begun_ms[slot])
    }
}

/// The number of the next thread that answers.
static NEXT_SLOT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SLOT: usize = NEXT_SLOT.fetch_add(1, Ordering::Relaxed);
}

struct Answering<'a>(&'a AtomicU64);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// The file system of one worker.
#[derive(Debug)]
pub struct Filesystem {
    host: Arc<Host>,
    servers: Arc<Servers>,
    texts: Texts,
    progress: Arc<Progress>,
    refuse_resent: bool,
}

thread_local! {
    /// The text being made and the part being sent: used again for every answer of this thread.
    static TEXT: RefCell<(String, Vec<u8>)> = const { RefCell::new((String::new(), Vec::new())) };
}

impl Filesystem {
    /// Serves `servers` on `host`.
    pub fn new(host: Arc<Host>, servers: Arc<Servers>) -> Filesystem {
        Filesystem {
            host,
            servers,
            texts: Texts::new(Now::read().boottime_ns),
            progress: Arc::default(),
            refuse_resent: false,
        }
    }

    /// A file system over captured trees: the host's below `host`, registrations in `servers`.
    pub fn at(host: &Path, servers: &Path) -> Filesystem {
        Filesystem::new(Arc::new(Host::at(host)), Arc::new(Servers::registered_in(servers)))
    }

    /// Answers EIO to requests that earlier workers did not answer: one of them may be what kills workers.
    pub fn refuse_resent(mut self) -> Filesystem {
        self.refuse_resent = true;
        self
    }

    /// The counter of requests.
    pub fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }

    /// The text of a file of server `id` at `now`, in place of `out`; `reader` is the task that asks, or 0.
    pub fn text(&self, id: u64, kind: Kind, reader: u32, now: Now, out: &mut String) -> Result<(), Errno> {
        let server = self.server(id, now)?;
        let mut made = self.try_text(&server, kind, reader, now, out);
        if matches!(made, Err(Unreadable::Gone)) {
            // Perhaps only the descriptors are old: a restarted server has a new cgroup at the same path.
            server.close_files();
            made = self.try_text(&server, kind, reader, now, out);
        }
        made.map_err(|error| match error {
            Unreadable::Gone => {
                server.close_files();
                Errno::ESTALE
            }
            Unreadable::Io(error) => Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO)),
        })
    }

    fn try_text(&self, server: &Server, kind: Kind, reader: u32, now: Now, out: &mut String) -> Result<(), Unreadable> {
        out.clear();
        let files = server.files(now)?;
        let snapshot = Snapshot::new(&self.host, &files, now);
        render_kind(server, &snapshot, kind, reader, out)
    }

    fn server(&self, id: u64, now: Now) -> Result<Arc<Server>, Errno> {
        self.servers.find(id, now).map_err(|missing| match missing {
            // The inode is known, what it stood for is not there any more.
            Missing::Unregistered => Errno::ESTALE,
            Missing::Malformed => Errno::EIO,
        })
    }

    fn attributes(&self, node: Node, now: Now) -> Result<FileAttr, Errno> {
        match node {
            Node::Root => Ok(attributes(node, None, SystemTime::UNIX_EPOCH)),
            Node::Place { id, index } => {
                let server = self.server(id, now)?;
                Ok(attributes(node, PLACES[usize::from(index)].kind, server.started))
            }
        }
    }

    fn look_up(&self, parent: u64, name: &OsStr, now: Now) -> Result<(FileAttr, Duration), Errno> {
        match Node::of(parent).ok_or(Errno::ESTALE)? {
            Node::Root => {
                let id = inode::id_of(name).ok_or(Errno::ENOENT)?;
                let attributes = self.attributes(Node::Place { id, index: 0 }, now);
                // By name it never was there.
                let attributes = attributes.map_err(|error| match i32::from(error) {
                    libc::ESTALE => Errno::ENOENT,
                    _ => error,
                })?;
                Ok((attributes, SERVER_TTL))
            }
            Node::Place { id, index } => {
                let index = inode::child(index, name).ok_or(Errno::ENOENT)?;
                Ok((self.attributes(Node::Place { id, index }, now)?, PLACE_TTL))
            }
        }
    }

    /// Whether an earlier worker had this request and we are told not to touch such.
    fn is_refused(&self, request: &Request) -> bool {
        self.refuse_resent && request.unique().0 & RESENT != 0
    }

    /// Answers a read: a new text at the beginning of a file, the rest of the known one after it. The answer is
    /// left in `part`.
    fn answer(&self, read: &Read, now: Now, text: &mut String, part: &mut Vec<u8>) -> Result<(), Errno> {
        if read.offset > 0 && self.texts.part(read.handle, read.offset, read.size, part) {
            return Ok(());
        }
        let Some(Node::Place { id, index }) = Node::of(read.inode) else {
            return Err(Errno::ESTALE);
        };
        let kind = PLACES[usize::from(index)].kind.ok_or(Errno::EISDIR)?;
        self.text(id, kind, read.reader, now, text)?;
        // Before the answer is sent: the next read may come to another thread at once.
        self.texts.keep(read.handle, text);
        part.clear();
        part.extend_from_slice(match read.offset {
            0 => text::slice(text.as_bytes(), 0, read.size),
            _ => text::resume(text.as_bytes(), read.offset, read.size),
        });
        Ok(())
    }
}

/// What a read asks for.
struct Read {
    inode: u64,
    handle: u64,
    offset: u64,
    size: u32,
    /// The task that asks.
    reader: u32,
}

/// Collects what the file needs and renders it.
fn render_kind(
    server: &Server,
    snapshot: &Snapshot<'_>,
    kind: Kind,
    reader: u32,
    out: &mut String,
) -> Result<(), Unreadable> {
    let started_ns = server.registration.started_boottime_ns;
    match kind {
        Kind::Meminfo => render::meminfo(out, &snapshot.host_memory()?.text, &snapshot.memory()?),
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
        Kind::Swaps => render::swaps(out, &snapshot.memory()?),
        Kind::Diskstats => render::diskstats(out, &snapshot.disks()?),
        Kind::Vmstat => {
            let (memory, events) = snapshot.memory_and_events()?;
            render::vmstat(out, snapshot.vmstat_names()?, &memory, &events, &snapshot.disks()?);
        }
        Kind::PressureCpu => pressure(out, snapshot, Resource::Cpu)?,
        Kind::PressureMemory => pressure(out, snapshot, Resource::Memory)?,
        Kind::PressureIo => pressure(out, snapshot, Resource::Io)?,
        Kind::Cpus => render::cpus(out, snapshot.cpus()?.visible),
    }
    Ok(())
}

fn pressure(out: &mut String, snapshot: &Snapshot<'_>, resource: Resource) -> Result<(), Unreadable> {
    match snapshot.pressure(resource)? {
        Some(text) => render::pressure(out, &text),
        // As the kernel answers with `psi=0`.
        None => {
            return Err(Unreadable::Io(io::Error::from_raw_os_error(libc::EOPNOTSUPP)));
        }
    }
    Ok(())
}

/// The attributes of a place. They never change while the server lives, so they may be cached.
fn attributes(node: Node, kind: Option<Kind>, started: SystemTime) -> FileAttr {
    let is_file = kind.is_some();
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
        kind: if is_file { FileType::RegularFile } else { FileType::Directory },
        perm: if is_file { 0o444 } else { 0o555 },
        nlink: if is_file { 1 } else { 2 },
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl fuser::Filesystem for Filesystem {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Says that we know resent requests; from Linux 6.9, and it works without where the kernel has it.
        let _ = config.add_capabilities(InitFlags::FUSE_HAS_RESEND);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let now = Now::read();
        let _answering = self.progress.begin(now);
        if self.is_refused(request) {
            return reply.error(Errno::EIO);
        }
        match self.look_up(parent.0, name, now) {
            Ok((attributes, ttl)) => reply.entry_with_ttls(&PLACE_TTL, &ttl, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let now = Now::read();
        let _answering = self.progress.begin(now);
        let attributes = match Node::of(inode.0) {
            Some(node) if !self.is_refused(request) => self.attributes(node, now),
            Some(_) => Err(Errno::EIO),
            None => Err(Errno::ESTALE),
        };
        match attributes {
            Ok(attributes) => reply.attr(&PLACE_TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let now = Now::read();
        let _answering = self.progress.begin(now);
        let server = match Node::of(inode.0) {
            Some(Node::Place { id, .. }) => self.server(id, now),
            _ => Err(Errno::ESTALE),
        };
        match server {
            // No page cache: each beginning of a file is a new text. Nothing to flush: nobody writes.
            Ok(_) => {
                reply.opened(FileHandle(self.texts.handle()), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH)
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let now = Now::read();
        let _answering = self.progress.begin(now);
        if self.is_refused(request) {
            return reply.error(Errno::EIO);
        }
        // Only a read on behalf of the page cache has no owner (fs/fuse/file.c): a sendfile(2). What the cache held
        // would be served for ever, so it gets nothing, and the caller falls back to read(2).
        if lock_owner.is_none() {
            return reply.error(Errno::EINVAL);
        }
        let read = Read { inode: inode.0, handle: handle.0, offset, size, reader: request.pid() };
        TEXT.with_borrow_mut(|(text, part)| match self.answer(&read, now, text, part) {
            Ok(()) => reply.data(part),
            Err(error) => reply.error(error),
        });
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.texts.close(handle.0);
        reply.ok();
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let now = Now::read();
        let _answering = self.progress.begin(now);
        let Some(node) = Node::of(inode.0) else {
            return reply.error(Errno::ESTALE);
        };
        let (own, parent, children) = match node {
            Node::Root => (node, node, self.servers.ids().into_iter().map(|id| (id.to_string(), id, 0)).collect()),
            Node::Place { id, index } => {
                if let Err(error) = self.server(id, now) {
                    return reply.error(error);
                }
                let above =
                    if index == 0 { Node::Root } else { Node::Place { id, index: PLACES[usize::from(index)].parent } };
                (node, above, children_of(id, index))
            }
        };
        let dots = [(".".to_owned(), own), ("..".to_owned(), parent)];
        let entries = children.into_iter().map(|(name, id, index)| (name, Node::Place { id, index }));
        for (position, (name, node)) in dots.into_iter().chain(entries).enumerate().skip(offset as usize) {
            let is_file = matches!(node, Node::Place { index, .. } if PLACES[usize::from(index)].kind.is_some());
            let kind = if is_file { FileType::RegularFile } else { FileType::Directory };
            if reply.add(INodeNo(node.inode()), position as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

/// Name, id and index of what is in a directory of server `id`.
fn children_of(id: u64, parent: u8) -> Vec<(String, u64, u8)> {
    let places = PLACES.iter().enumerate();
    let inside = places.filter(|(_, place)| place.parent == parent && !place.name.is_empty());
    inside.map(|(index, place)| (place.name.to_owned(), id, index as u8)).collect()
}
