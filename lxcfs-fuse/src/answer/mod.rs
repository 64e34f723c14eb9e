//! Answers the system calls that tell of a machine and that no file system can answer for: sysinfo(2), sched_getaffinity(2).
//!
//! ```text
//! manager ── listener, slot ──> supervisor (keeps them) ──> worker: a *line* each
//!                                                              │ epoll, one call of one line at a time
//!                                                              v
//!                                          snapshot ─> sysinfo, affinity (pure) ─> the caller's memory
//! ```
//!
//! One thread attends to all lines. A line is out of epoll while a call of it is answered and comes back at the end of the
//! queue, so one that calls without end delays the others by one answer each.
//!
//! A guest decides how long it takes to write into its memory: that may come from a file system of its own. So a *watchman*
//! sees to it that the attendant gets on: when an answer takes too long, another thread attends, and the answers of that
//! server are given by threads of their own from then on. No server has more than one answer under way, so there are never
//! more threads than servers, and a server can keep only itself waiting.
//!
//! What cannot be answered is left to the kernel, whose answer tells of the host: worse than ours, better than an error.

pub mod affinity;
pub mod sysinfo;

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once};
use std::time::{Duration, Instant};

use kernel::process::Memory;
use kernel::seccomp::{Abi, Answer, Call, Listener, Notification, Slot};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rustix::net::{SendFlags, send};

use crate::clock::Now;
use crate::snapshot::{Host, Snapshot, Unreadable};
use crate::watch::{Server, Servers};

/// An answer that takes longer does not keep the others waiting. Far above what one takes on a busy machine.
const PATIENCE: Duration = Duration::from_millis(20);

/// How long a server that was waited for is answered by threads of its own.
const SLOW_FOR: Duration = Duration::from_secs(60);

/// Room for what an answer calls; most of it is never touched.
const STACK_BYTES: usize = 256 * 1024;

/// The word by which a worker tells that nobody is left on a line, followed by its number.
pub const GONE: &str = "gone ";

/// A listener that was handed to this worker.
#[derive(Debug)]
struct Line {
    /// The supervisor's number of it.
    number: u64,
    /// Whose calls arrive here.
    server: u64,
    listener: Listener,
    slot: Slot,
}

/// The answering part of a worker.
#[derive(Debug, Clone)]
pub struct Answers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    host: Arc<Host>,
    servers: Arc<Servers>,
    epoll: Epoll,
    lines: Mutex<HashMap<u64, Arc<Line>>>,
    turns: Mutex<Turns>,
    watch: Mutex<Watch>,
    watchman: Condvar,
    supervisor: OwnedFd,
    cautious: bool,
}

/// Which servers are being answered, and what waits for that.
#[derive(Debug, Default)]
struct Turns {
    answering: HashSet<u64>,
    waiting: Vec<Arc<Line>>,
    slow: HashMap<u64, Instant>,
}

/// Whether the attendant gets on.
#[derive(Debug, Default)]
struct Watch {
    /// Which attendant it is: an earlier one has been given up.
    attendant: u64,
    /// The answer it is giving: since when, to which server.
    answering: Option<(Instant, u64)>,
    /// Nothing has to be watched until the next answer.
    asleep: bool,
}

impl Answers {
    /// Begins to attend; lines come with [`Answers::add`]. What has to be told to the supervisor goes to `supervisor`.
    /// With `cautious` the calls that an earlier worker received are left to the kernel: one of them may be what kills
    /// workers.
    ///
    /// # Errors
    /// When there is no descriptor or no thread.
    pub fn begin(host: Arc<Host>, servers: Arc<Servers>, supervisor: OwnedFd, cautious: bool) -> io::Result<Answers> {
        let inner = Arc::new(Inner {
            host,
            servers,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            lines: Mutex::default(),
            turns: Mutex::default(),
            watch: Mutex::default(),
            watchman: Condvar::new(),
            supervisor,
            cautious,
        });
        let (attendant, watchman) = (inner.clone(), inner.clone());
        spawn("answers", move || attendant.attend(0))?;
        spawn("watchman", move || watchman.watch_over())?;
        Ok(Answers(inner))
    }

    /// Takes a line. What cannot be one is told to the supervisor as gone.
    pub fn add(&self, number: u64, server: u64, listener: OwnedFd, slot: &OwnedFd) {
        let added = Slot::map(slot.as_fd()).map_err(io::Error::other).and_then(|slot| {
            let line = Arc::new(Line { number, server, listener: Listener::from(listener), slot });
            self.0.add(line)
        });
        if let Err(error) = added {
            log::error!("listen to server {server}: {error}");
            self.0.tell_gone(number);
        }
    }
}

/// Starts a thread that may write into the memory of guests.
fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let run = move || {
        if let Err(error) = kernel::capability::use_reserve() {
            log::error!("{error}");
        }
        run();
    };
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(run).map(drop)
}

/// A poisoned lock only says that a thread panicked while it held it.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Inner {
    fn add(&self, line: Arc<Line>) -> io::Result<()> {
        // A received call that nobody has answered shows as "can be written". Those of a dead worker stand in the slot.
        let left = line.slot.received().is_some();
        let wanted = if left { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
        locked(&self.lines).insert(line.number, line.clone());
        let added = self.epoll.add(&line.listener, event(wanted, line.number));
        if added.is_err() {
            locked(&self.lines).remove(&line.number);
        }
        Ok(added?)
    }

    /// Puts a line at the end of the queue again.
    fn wait_for_next(&self, line: &Line) {
        if let Err(error) = self.epoll.modify(&line.listener, &mut event(EpollFlags::EPOLLIN, line.number)) {
            log::error!("wait for calls of server {}: {error}", line.server);
        }
    }

    fn tell_gone(&self, number: u64) {
        // The supervisor reads as long as it lives, and its end is ours.
        let _ = send(&self.supervisor, format!("{GONE}{number}").as_bytes(), SendFlags::NOSIGNAL);
    }

    /// The life of an attendant.
    fn attend(self: &Arc<Self>, attendant: u64) {
        loop {
            // One at a time: what an attendant that is given up has fetched would be lost.
            let mut events = [EpollEvent::empty()];
            if self.epoll.wait(&mut events, EpollTimeout::NONE) != Ok(1) {
                continue;
            }
            let line = locked(&self.lines).get(&events[0].data()).cloned();
            let Some(line) = line else { continue };
            let happened = events[0].events();
            if !happened.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT) {
                self.hang_up(&line);
                continue;
            }
            let Some(slow) = self.take_turn(&line) else { continue };
            if slow && self.answer_apart(&line, happened) {
                continue;
            }
            self.begin_answer(line.server);
            self.answer_next(&line, happened);
            if !self.end_answer(attendant) {
                return;
            }
        }
    }

    /// Nobody is left who could call.
    fn hang_up(&self, line: &Line) {
        let _ = self.epoll.delete(&line.listener);
        locked(&self.lines).remove(&line.number);
        self.tell_gone(line.number);
    }

    /// Makes it the turn of a line's server, and says whether it is a slow one; `None` when the line has to wait.
    fn take_turn(&self, line: &Arc<Line>) -> Option<bool> {
        let mut turns = locked(&self.turns);
        if !turns.answering.insert(line.server) {
            turns.waiting.push(line.clone());
            return None;
        }
        let slow = turns.slow.get(&line.server).is_some_and(|until| Instant::now() < *until);
        if !slow {
            turns.slow.remove(&line.server);
        }
        Some(slow)
    }

    fn end_turn(&self, line: &Line) {
        let waited = {
            let mut turns = locked(&self.turns);
            turns.answering.remove(&line.server);
            let (mine, others) = turns.waiting.drain(..).partition(|waiting| waiting.server == line.server);
            turns.waiting = others;
            let mine: Vec<Arc<Line>> = mine;
            mine
        };
        self.wait_for_next(line);
        for line in waited {
            self.wait_for_next(&line);
        }
    }

    /// Answers by a thread of its own; false when there is none.
    fn answer_apart(self: &Arc<Self>, line: &Arc<Line>, happened: EpollFlags) -> bool {
        let (inner, line) = (self.clone(), line.clone());
        spawn("answer", move || inner.answer_next(&line, happened)).is_ok()
    }

    fn begin_answer(&self, server: u64) {
        let mut watch = locked(&self.watch);
        watch.answering = Some((Instant::now(), server));
        if std::mem::take(&mut watch.asleep) {
            self.watchman.notify_one();
        }
    }

    /// False: another attends now.
    fn end_answer(&self, attendant: u64) -> bool {
        let mut watch = locked(&self.watch);
        if watch.attendant != attendant {
            return false;
        }
        watch.answering = None;
        true
    }

    /// The life of the watchman.
    fn watch_over(self: &Arc<Self>) {
        let mut watch = locked(&self.watch);
        loop {
            match watch.answering {
                None => {
                    watch.asleep = true;
                    watch = self.watchman.wait(watch).unwrap_or_else(|poisoned| poisoned.into_inner());
                }
                Some((since, server)) if since.elapsed() >= PATIENCE => {
                    let next = watch.attendant + 1;
                    let inner = self.clone();
                    match spawn("answers", move || inner.attend(next)) {
                        Ok(()) => {
                            (watch.attendant, watch.answering) = (next, None);
                            locked(&self.turns).slow.insert(server, Instant::now() + SLOW_FOR);
                            log::warn!("server {server} takes long to be answered; the others do not wait for it");
                        }
                        Err(error) => {
                            log::error!("start a thread: {error}");
                            watch = self.sleep(watch);
                        }
                    }
                }
                Some(_) => watch = self.sleep(watch),
            }
        }
    }

    fn sleep<'a>(&self, watch: MutexGuard<'a, Watch>) -> MutexGuard<'a, Watch> {
        self.watchman.wait_timeout(watch, PATIENCE).unwrap_or_else(|poisoned| poisoned.into_inner()).0
    }

    /// Answers the call that stands in the line's slot, or else the next one.
    fn answer_next(&self, line: &Line, happened: EpollFlags) {
        let left = line.slot.received().filter(|left| line.listener.is_waiting(left.id));
        match left {
            Some(left) if self.cautious => self.send(line, &left, Answer::AsKernel),
            Some(left) => self.answer(line, &left),
            None if happened.contains(EpollFlags::EPOLLIN) => match line.listener.receive(&line.slot) {
                Ok(Some(notification)) => self.answer(line, &notification),
                Ok(None) => {}
                Err(error) => log::error!("server {}: {error}", line.server),
            },
            None => {}
        }
        line.slot.clear();
        self.end_turn(line);
    }

    fn answer(&self, line: &Line, notification: &Notification) {
        let answer = self.find_answer(line, notification).unwrap_or_else(|why| {
            why.tell(line.server);
            Answer::AsKernel
        });
        self.send(line, notification, answer);
    }

    fn send(&self, line: &Line, notification: &Notification, answer: Answer) {
        if let Err(error) = line.listener.answer(notification.id, answer) {
            log::error!("server {}: {error}", line.server);
        }
    }

    fn find_answer(&self, line: &Line, notification: &Notification) -> Result<Answer, NoAnswer> {
        let now = Now::read();
        let server = self.servers.find(line.server, now).map_err(|_| NoAnswer::Unregistered)?;
        match notification.call.ok_or(NoAnswer::Unregistered)? {
            Call::Sysinfo { buffer } => {
                let reader = notification.thread as u32;
                let found =
                    self.with_snapshot(&server, now, |snapshot| sysinfo::Sysinfo::of(&server, snapshot, reader))?;
                write(line, notification, buffer, &found.laid_out(notification.abi), 0)
            }
            Call::Affinity { thread, length, mask } => {
                let word_bytes = if notification.abi == Abi::I386 { 4 } else { 8 };
                if !affinity::takes_length(length, self.host.cpu_ids(now).map_err(Unreadable::from)?, word_bytes) {
                    return Ok(Answer::Failure(libc::EINVAL));
                }
                let real = match find_thread(notification, thread)?.map(affinity::real) {
                    Some(Ok(real)) => real,
                    Some(Err(error)) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error.into()),
                    _ => return Ok(Answer::Failure(libc::ESRCH)),
                };
                let cpus = self.with_snapshot(&server, now, |snapshot| snapshot.cpus())?;
                let shown = affinity::shown(&real, &cpus);
                let bytes: Vec<u8> = shown.iter().flat_map(|word| word.to_ne_bytes()).take(length as usize).collect();
                write(line, notification, mask, &bytes, bytes.len() as i64)
            }
        }
    }

    /// Reads of a server, whose descriptors may be those of its former cgroup.
    fn with_snapshot<T>(
        &self,
        server: &Server,
        now: Now,
        read: impl Fn(&Snapshot<'_>) -> Result<T, Unreadable>,
    ) -> Result<T, Unreadable> {
        let once = || read(&Snapshot::new(&self.host, &*server.files(now)?, now));
        match once() {
            Err(Unreadable::Gone) => {
                server.close_files();
                once()
            }
            other => other,
        }
    }
}

fn event(wanted: EpollFlags, number: u64) -> EpollEvent {
    EpollEvent::new(wanted | EpollFlags::EPOLLONESHOT, number)
}

/// Why a call is left to the kernel.
#[derive(Debug)]
enum NoAnswer {
    Unregistered,
    Unreadable(Unreadable),
    Refused(kernel::Error),
}

impl From<Unreadable> for NoAnswer {
    fn from(error: Unreadable) -> Self {
        NoAnswer::Unreadable(error)
    }
}

impl From<kernel::Error> for NoAnswer {
    fn from(error: kernel::Error) -> Self {
        NoAnswer::Refused(error)
    }
}

impl NoAnswer {
    /// A guest could make these happen without end: only what is wrong with the host is told, and once.
    fn tell(&self, server: u64) {
        static TOLD: Once = Once::new();
        let reason = match self {
            NoAnswer::Unregistered | NoAnswer::Unreadable(Unreadable::Gone) => return,
            NoAnswer::Unreadable(Unreadable::Io(error)) => error.to_string(),
            // A caller that was killed in between.
            NoAnswer::Refused(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => return,
            NoAnswer::Refused(error) => {
                format!("{error}: {}", std::error::Error::source(error).map(ToString::to_string).unwrap_or_default())
            }
        };
        TOLD.call_once(|| log::error!("server {server} is answered by the kernel: {reason}"));
    }
}

/// Writes the result where the caller wants it; the answer is `value` then.
fn write(line: &Line, notification: &Notification, address: u64, bytes: &[u8], value: i64) -> Result<Answer, NoAnswer> {
    let memory = Memory::open(notification.thread)?;
    // Opened by a number: if the caller still waits, it was the caller's, and the descriptor stays with that memory.
    if !line.listener.is_waiting(notification.id) {
        return Ok(Answer::AsKernel);
    }
    match memory.write(address, bytes) {
        Ok(()) => Ok(Answer::Value(value)),
        Err(_) => Ok(Answer::Failure(libc::EFAULT)),
    }
}

/// The thread that the caller calls `thread`, by its number here; `None`: there is none in its pid namespace.
fn find_thread(notification: &Notification, thread: i32) -> Result<Option<i32>, NoAnswer> {
    match thread {
        0 => return Ok(Some(notification.thread)),
        ..0 => return Ok(None),
        _ => {}
    }
    let namespace = kernel::namespace::open(notification.thread, "pid")?;
    match kernel::namespace::thread_from(namespace.as_fd(), thread) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        // Linux before 6.11 cannot tell; but most programs ask about themselves.
        Err(error) if is_itself(notification.thread, thread) => {
            log::debug!("{error}");
            Ok(Some(notification.thread))
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether a thread's number in its own pid namespace is `inside`.
fn is_itself(thread: i32, inside: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers.and_then(|numbers| numbers.split_whitespace().last()?.parse().ok()) == Some(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_knows_its_own_number() {
        let own = std::process::id() as i32;
        assert!(is_itself(own, own) && !is_itself(own, own + 1));
    }
}
