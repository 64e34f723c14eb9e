//! Who answers a request, and until when: the threads that fuser has, one for what waits for its turn, and one that looks at
//! deadlines.
//!
//! ```text
//! the kernel's queue ──> fuser's threads ──┬── the server's turn ──> answer ──┬── in time ──────> reply
//!                                          └── not yet ──> a thread ──> answer ┘      │
//!                                                                                    └── overdue ──> the last good text
//! ```
//!
//! Limit: only readings have a deadline. All else is answered from what is in memory, or by a stat(2) of the host's sysfs.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::Thread;
use std::time::Duration;

use fuser::{
    Errno, FileHandle, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, Request,
};

use crate::clock::Now;
use crate::filesystem::{Filesystem, PLACE_TTL, Read, file_type};
use crate::inode::Node;
use crate::last;
use crate::turns::Turns;
use crate::watch::Server;

/// Requests that were handed to an earlier worker and then to us have this bit in their number
/// (`FUSE_UNIQUE_RESEND` of linux/fuse.h, Linux ≥ 6.9).
const RESENT: u64 = 1 << 63;

/// How often it is looked for answers that are overdue, while there are readers.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// The priority of answers that wait for their turn (nice(2)).
const WAITING_NICE: i32 = 5;

/// Answers being made at once that are watched; there are never more threads.
const SLOTS: usize = 16;

/// When the answers being made were begun, for who watches that they get on.
#[derive(Debug, Default)]
pub struct Progress {
    begun_ms: [AtomicU64; SLOTS],
    /// Threads of fuser's that make an answer which was overdue and is given.
    overdue: AtomicUsize,
}

impl Progress {
    /// How long the oldest request has been waiting for its answer, in milliseconds.
    pub fn oldest_ms(&self, now: Now) -> u64 {
        let begun = self.begun_ms.iter().map(|slot| slot.load(Ordering::Relaxed)).filter(|&begun| begun > 0);
        begun.map(|begun| now.boottime_ms().saturating_sub(begun)).max().unwrap_or(0)
    }

    /// How many of fuser's threads the kernel keeps waiting for what nobody needs from them any more.
    pub fn overdue(&self) -> usize {
        self.overdue.load(Ordering::Relaxed)
    }

    fn begin(&self, now: Now) -> Answering<'_> {
        let slot = slot();
        self.begun_ms[slot].store(now.boottime_ms().max(1), Ordering::Relaxed);
        Answering(&self.begun_ms[slot])
    }
}

/// The number of the next thread that answers.
static NEXT_SLOT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SLOT: usize = NEXT_SLOT.fetch_add(1, Ordering::Relaxed);
}

/// The slot of this thread.
fn slot() -> usize {
    SLOT.with(|slot| *slot) % SLOTS
}

struct Answering<'a>(&'a AtomicU64);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

thread_local! {
    /// The text being made and the part being sent: used again for every answer of this thread.
    static TEXT: RefCell<(String, Vec<u8>)> = const { RefCell::new((String::new(), Vec::new())) };
}

/// What may have to wait for its turn.
#[derive(Debug)]
enum Asked {
    Open { id: u64, begun_ms: u64, reply: ReplyOpen },
    Read(Reading),
}

impl Asked {
    fn is_overdue(&self, now: Now) -> bool {
        let (Asked::Open { begun_ms, .. } | Asked::Read(Reading { begun_ms, .. })) = self;
        is_overdue(*begun_ms, now)
    }
}

fn is_overdue(begun_ms: u64, now: Now) -> bool {
    now.boottime_ms().saturating_sub(begun_ms) >= last::DEADLINE_MS
}

/// A reading that has no answer yet.
#[derive(Debug)]
struct Reading {
    read: Read,
    begun_ms: u64,
    reply: ReplyData,
}

impl Reading {
    fn answer(self, made: Result<(), Errno>, part: &[u8]) {
        match made {
            Ok(()) => self.reply.data(part),
            Err(error) => self.reply.error(error),
        }
    }
}

/// A reading whose answer is being made.
#[derive(Debug)]
struct Held {
    reading: Reading,
    server: Arc<Server>,
}

/// A file system as its threads share it.
#[derive(Clone, Debug)]
pub struct Serving(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    filesystem: Filesystem,
    refuse_resent: bool,
    progress: Arc<Progress>,
    turns: Turns<Asked>,
    /// What each thread is making an answer to. Whoever takes it out gives the answer.
    held: [Mutex<Option<Held>>; SLOTS],
    /// The slot of the thread that answers what waits.
    waiting_slot: OnceLock<usize>,
    /// Whether anything was asked lately, whether somebody looks at deadlines, and who does.
    is_asked: AtomicBool,
    is_watched: AtomicBool,
    watcher: OnceLock<Thread>,
}

impl Serving {
    /// Serves `filesystem`. With `refuse_resent`, EIO to requests that earlier workers did not answer: one of them may be what
    /// kills workers.
    pub fn of(filesystem: Filesystem, refuse_resent: bool) -> Serving {
        Serving(Arc::new(Shared {
            filesystem,
            refuse_resent,
            progress: Arc::default(),
            turns: Turns::default(),
            held: Default::default(),
            waiting_slot: OnceLock::new(),
            is_asked: AtomicBool::new(false),
            is_watched: AtomicBool::new(true),
            watcher: OnceLock::new(),
        }))
    }

    /// The counter of requests.
    pub fn progress(&self) -> Arc<Progress> {
        self.0.progress.clone()
    }

    /// Answers what waits for its turn, without end. For a thread of its own.
    pub fn answer_waiting(&self) -> ! {
        let shared = &self.0;
        // Who asks for much at once is not in the way of who asks for little, where there are not CPUs for both.
        if let Err(error) = rustix::process::setpriority_process(None, WAITING_NICE) {
            log::warn!("lower the priority of answers that wait: {error}");
        }
        let _ = shared.waiting_slot.set(slot());
        loop {
            let asked = shared.turns.next();
            let now = Now::read();
            let _answering = shared.progress.begin(now);
            shared.watch();
            shared.answer(asked, now);
        }
    }

    /// Answers what is overdue, without end. For a thread of its own, which never asks the kernel for figures.
    pub fn keep_deadlines(&self) -> ! {
        let shared = &self.0;
        let _ = shared.watcher.set(std::thread::current());
        // A moment at a time while anybody asks, and not at all while nobody does.
        loop {
            let was_asked = shared.is_asked.swap(false, Ordering::SeqCst);
            if !was_asked && shared.progress.oldest_ms(Now::read()) == 0 && shared.turns.is_empty() {
                shared.is_watched.store(false, Ordering::SeqCst);
                // Who comes in between sees it unwatched, or is seen here.
                if !shared.is_asked.load(Ordering::SeqCst) {
                    std::thread::park();
                }
                shared.is_watched.store(true, Ordering::SeqCst);
            }
            std::thread::sleep(WATCH_INTERVAL);
            shared.answer_overdue(Now::read());
        }
    }
}

impl Shared {
    /// Whether an earlier worker had this request and we are told not to touch such.
    fn is_refused(&self, request: &Request) -> bool {
        self.refuse_resent && request.unique().0 & RESENT != 0
    }

    /// Sees to it that somebody looks at deadlines.
    fn watch(&self) {
        self.is_asked.store(true, Ordering::SeqCst);
        if !self.is_watched.load(Ordering::SeqCst) {
            if let Some(watcher) = self.watcher.get() {
                watcher.unpark();
            }
        }
    }

    /// Answers when it is the server's turn, now or later.
    fn take_turn(&self, id: u64, now: Now, asked: Asked) {
        self.watch();
        if let Some(asked) = self.turns.ask(id, now.boottime_ms(), asked) {
            self.answer(asked, now);
            self.turns.answered(id);
        }
    }

    fn answer(&self, asked: Asked, now: Now) {
        match asked {
            Asked::Open { id, reply, .. } => match self.filesystem.open(id, now) {
                // No page cache: each beginning of a file is a new text. Nothing to flush: nobody writes.
                Ok(handle) => {
                    reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH);
                }
                Err(error) => reply.error(error),
            },
            Asked::Read(reading) => {
                TEXT.with_borrow_mut(|(text, part)| self.answer_reading(reading, now, text, part));
            }
        }
    }

    fn answer_reading(&self, reading: Reading, now: Now, text: &mut String, part: &mut Vec<u8>) {
        let read = reading.read;
        if self.filesystem.rest(&read, part) {
            return reading.answer(Ok(()), part);
        }
        let server = match self.filesystem.server(read.id, now) {
            Ok(server) => server,
            Err(error) => return reading.answer(Err(error), part),
        };
        // What keeps one of a server's files waiting keeps the others: one thread is enough to find out when it is over.
        if server.last.has_overdue() {
            let made = self.filesystem.last(&server, &read, part);
            return reading.answer(made, part);
        }
        let held = &self.held[slot()];
        *locked(held) = Some(Held { reading, server: server.clone() });
        let made = self.filesystem.begin(&server, &read, now, text, part);
        match locked(held).take() {
            Some(held) => held.reading.answer(made, part),
            None => {
                server.last.end_overdue();
                if !self.is_waiting_slot(slot()) {
                    self.progress.overdue.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
    }

    fn is_waiting_slot(&self, slot: usize) -> bool {
        self.waiting_slot.get() == Some(&slot)
    }

    /// Answers the readings that have taken too long.
    fn answer_overdue(&self, now: Now) {
        let mut part = Vec::new();
        for (slot, held) in self.held.iter().enumerate() {
            let mut held = locked(held);
            let Some(Held { reading, server }) = held.take_if(|held| is_overdue(held.reading.begun_ms, now)) else {
                continue;
            };
            let Read { id, at, .. } = reading.read;
            log::warn!("server {id}: the kernel keeps {} waiting", at.path(at.cpu));
            // Before the lock is let go: the thread may come back at any moment, and undoes all this.
            server.last.begin_overdue();
            if !self.is_waiting_slot(slot) {
                self.progress.overdue.fetch_add(1, Ordering::Relaxed);
            }
            self.progress.begun_ms[slot].store(0, Ordering::Relaxed);
            drop(held);
            let made = self.filesystem.last(&server, &reading.read, &mut part);
            reading.answer(made, &part);
        }
        // The thread for these is kept waiting itself, or has too much to do.
        for asked in self.turns.take(|asked| asked.is_overdue(now)) {
            let Asked::Read(reading) = asked else {
                self.answer(asked, now);
                continue;
            };
            let made = if self.filesystem.rest(&reading.read, &mut part) {
                Ok(())
            } else {
                let server = self.filesystem.server(reading.read.id, now);
                server.and_then(|server| self.filesystem.last(&server, &reading.read, &mut part))
            };
            reading.answer(made, &part);
        }
    }
}

impl fuser::Filesystem for Serving {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Says that we know resent requests; from Linux 6.9, and it works without where the kernel has it.
        let _ = config.add_capabilities(InitFlags::FUSE_HAS_RESEND);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let now = Now::read();
        let _answering = self.0.progress.begin(now);
        if self.0.is_refused(request) {
            return reply.error(Errno::EIO);
        }
        match self.0.filesystem.look_up(parent.0, name, now) {
            Ok((attributes, ttl)) => reply.entry_with_ttls(&PLACE_TTL, &ttl, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let now = Now::read();
        let _answering = self.0.progress.begin(now);
        let attributes = match Node::of(inode.0) {
            Some(node) if !self.0.is_refused(request) => self.0.filesystem.attributes(node, now),
            Some(_) => Err(Errno::EIO),
            None => Err(Errno::ESTALE),
        };
        match attributes {
            Ok(attributes) => reply.attr(&PLACE_TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, request: &Request, inode: INodeNo, reply: ReplyData) {
        let now = Now::read();
        let _answering = self.0.progress.begin(now);
        let mut target = String::new();
        let made = match Node::of(inode.0) {
            Some(Node::Place { id, at }) if !self.0.is_refused(request) => {
                self.0.filesystem.text(id, at, request.pid(), now, &mut target)
            }
            Some(_) => Err(Errno::EIO),
            None => Err(Errno::ESTALE),
        };
        match made {
            Ok(()) => reply.data(target.as_bytes()),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let now = Now::read();
        let _answering = self.0.progress.begin(now);
        match Node::of(inode.0) {
            Some(Node::Place { id, .. }) => {
                self.0.take_turn(id, now, Asked::Open { id, begun_ms: now.boottime_ms(), reply })
            }
            _ => reply.error(Errno::ESTALE),
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
        let _answering = self.0.progress.begin(now);
        if self.0.is_refused(request) {
            return reply.error(Errno::EIO);
        }
        // Only a read on behalf of the page cache has no owner (fs/fuse/file.c): a sendfile(2). What the cache held
        // would be served for ever, so it gets nothing, and the caller falls back to read(2).
        if lock_owner.is_none() {
            return reply.error(Errno::EINVAL);
        }
        let Some(Node::Place { id, at }) = Node::of(inode.0) else {
            return reply.error(Errno::ESTALE);
        };
        let read = Read { id, at, handle: handle.0, offset, size, reader: request.pid() };
        self.0.take_turn(id, now, Asked::Read(Reading { read, begun_ms: now.boottime_ms(), reply }));
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
        self.0.filesystem.close(handle.0);
        reply.ok();
    }

    fn readdir(&self, request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let now = Now::read();
        let _answering = self.0.progress.begin(now);
        let entries = match Node::of(inode.0) {
            Some(node) if !self.0.is_refused(request) => self.0.filesystem.entries(node, now),
            Some(_) => Err(Errno::EIO),
            None => Err(Errno::ESTALE),
        };
        match entries {
            Ok(entries) => {
                for (position, (name, node)) in entries.into_iter().enumerate().skip(offset as usize) {
                    if reply.add(INodeNo(node.inode()), position as u64 + 1, file_type(node), name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(error) => reply.error(error),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
