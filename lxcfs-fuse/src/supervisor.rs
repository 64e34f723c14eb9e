//! The supervisor: mounts the file system, holds its connection, and sees to it that a worker answers.
//!
//! ```text
//!            ┌──────── dies, hangs ────────┐
//!            v                             │
//!   start: INIT → reply → go ──────> serving (pinged) ──── exit 0: unmounted ──> end
//!            │ dies or hangs, and the kernel cannot resend: abort the connection ──> end
//!            │ fails, or crashes young (SIGKILL is from outside: no request has done that)
//!            ├─ 3 in a row:  cautious (what workers that crashed left unanswered gets EIO)
//!            ├─ 20 in a row: a second between attempts
//!            └─ 25 in a row: abort the connection, so that nobody waits for ever ──> end
//! ```
//!
//! Single-threaded, and so small that it has no reason to die; it never touches the mounted tree, whose answers it
//! would have to give itself. If it is killed, its worker goes with it and the next `serve` mounts anew.
//!
//! It also keeps the listeners of servers (`parking`) and hands them to each worker, like the connection. Asked for another program,
//! it ends its worker and becomes that program, which finds all this and starts a worker of its own (`handover`).
//!
//! Before Linux 6.9 the kernel cannot give a request out again: a reader whose worker died in the middle of its request would wait
//! for ever, and not even SIGKILL would end it. There the connection ends with its worker, and the supervisor with both: its end
//! is what the manager's monitors wait for, and they start the next one.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use crate::handover::Estate;
use crate::parking::{Parking, Reload};
use crate::run_directory::RunDirectory;
use crate::worker::Mode;
use crate::{answer, handover, handshake, mountpoint, worker};

/// A worker that lived this long was not born dead.
const GROWN_UP: Duration = Duration::from_secs(1);

/// Crashes in a row after which a worker leaves alone what earlier ones were asked.
const CAUTIOUS_AFTER: u32 = 3;
/// Crashes and failed starts in a row after which there is a pause before the next.
const SLOW_AFTER: u32 = 20;
/// … after which there is no next.
const HOPELESS_AFTER: u32 = 25;

const PAUSE: Duration = Duration::from_secs(1);

/// How long a worker may take to begin.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a worker that was killed may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a worker is asked whether it gets on.
const PING_INTERVAL: Duration = Duration::from_secs(3);

/// A worker that is silent for this long, or has a request for this long, hangs.
const HUNG_AFTER: Duration = Duration::from_secs(10);

/// When this is in the environment, the kernel is taken for one that cannot resend: to try out there what happens here.
const NO_RESEND: &str = "LXCFS_FUSE_NO_RESEND";

/// How the supervisor came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was asked to.
    Stopped,
    /// Somebody unmounted the file system or aborted its connection.
    Unmounted,
    /// No worker could be brought up.
    Hopeless,
    /// A worker died or hung, and this kernel cannot give out again what it left unanswered.
    Broken,
}

/// Mounts and serves until told to stop. Calls `live` when readers are answered.
///
/// `lock` is that of `run`. SIGTERM or SIGINT ends it.
pub fn run(run: &RunDirectory, lock: OwnedFd, live: impl FnOnce()) -> anyhow::Result<End> {
    let signals = block_signals().context("block signals")?;
    protect_from_oom_killer();
    worker::raise_file_limit();
    // What a killed supervisor has left: a mount that answers ENOTCONN, also when a thread of its worker could not be killed
    // and holds the connection.
    report(mountpoint::abort(&run.mount()));
    mountpoint::clear(&run.mount())?;
    let connection = mountpoint::mount(&run.mount())?;
    let ended = serve(run, lock, connection, &signals, live);
    clear_up(run, ended)
}

/// Goes on where another program was the supervisor until it became this one.
pub fn follow(run: &RunDirectory) -> anyhow::Result<End> {
    let signals = block_signals().context("block signals")?;
    let ended = go_on(run, &signals);
    clear_up(run, ended)
}

fn clear_up(run: &RunDirectory, ended: anyhow::Result<End>) -> anyhow::Result<End> {
    run.withdraw();
    if !matches!(ended, Ok(End::Stopped)) {
        // Whoever waits in a bind mount of this file system is let go.
        report(mountpoint::abort(&run.mount()));
    }
    mountpoint::clear(&run.mount())?;
    ended
}

fn serve(
    run: &RunDirectory,
    lock: OwnedFd,
    connection: OwnedFd,
    signals: &SignalFd,
    live: impl FnOnce(),
) -> anyhow::Result<End> {
    let init = read_init(&connection).context("read INIT from the kernel")?;
    let parking = Parking::open(&run.listeners())?;
    let mut supervisor = Supervisor::of(run, Estate { lock, connection, init, reply: None, parking })?;
    // The first worker must come up at once: what is wrong now will not mend itself.
    let worker = supervisor.start_worker()?;
    run.announce()?;
    live();
    supervisor.watch(worker, signals)
}

fn go_on(run: &RunDirectory, signals: &SignalFd) -> anyhow::Result<End> {
    let (estate, caller) = handover::find().context("find what the program before this one has left")?;
    let mut supervisor = Supervisor::of(run, estate)?;
    let worker = match supervisor.replace_worker(signals)? {
        Ok(worker) => worker,
        Err(end) => return Ok(end),
    };
    // This program may have other files.
    run.announce()?;
    log::info!("lxcfs-fuse {} goes on", env!("CARGO_PKG_VERSION"));
    // Who has left meanwhile does not need to know.
    let _ = caller.send(concat!("reloaded ", env!("CARGO_PKG_VERSION")).as_bytes(), &[]);
    drop(caller);
    supervisor.watch(worker, signals)
}

struct Supervisor {
    run: RunDirectory,
    program: PathBuf,
    /// Whether the kernel gives out again what a dead worker left unanswered.
    resends: bool,
    /// Workers in a row that ended young and by themselves while they served: a request may have done it.
    crashes: u32,
    estate: Estate,
}

/// A live worker.
struct Worker {
    child: Child,
    control: OwnedFd,
    since: Instant,
    pinged: Instant,
    answered: Instant,
}

impl Drop for Worker {
    /// Kills it. It is not waited for without end: a guest can hold one of its threads inside the kernel, where it cannot be
    /// killed (a page of memory for an answer, from a file system of the guest's own), and that thread answers nobody.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if begun.elapsed() > END_TIMEOUT {
                log::warn!("worker {} is held by a guest and ends when that lets go", self.child.id());
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What happened while waiting.
enum Event {
    Stop,
    Died(ExitStatus),
    Hung,
    Reload(Reload),
    Nothing,
}

impl Supervisor {
    fn of(run: &RunDirectory, estate: Estate) -> anyhow::Result<Supervisor> {
        Ok(Supervisor {
            run: run.clone(),
            program: std::env::current_exe().context("find this program")?,
            resends: handshake::can_resend(&estate.init) && std::env::var_os(NO_RESEND).is_none(),
            crashes: 0,
            estate,
        })
    }

    /// Whether another program may take this one's place.
    fn may_reload(&self, reload: &Reload) -> anyhow::Result<()> {
        if !self.resends {
            bail!("this kernel cannot give out again what the worker leaves unanswered (Linux 6.9 and newer can)");
        }
        handover::can_follow(&reload.program)
    }

    /// Keeps a worker serving until the end.
    fn watch(&mut self, first: Worker, signals: &SignalFd) -> anyhow::Result<End> {
        let mut worker = first;
        loop {
            let mut wanted = None;
            match self.wait(&mut worker, signals)? {
                Event::Nothing => continue,
                Event::Stop => return Ok(End::Stopped),
                Event::Died(status) if status.success() => return Ok(End::Unmounted),
                Event::Died(status) => {
                    let lived = worker.since.elapsed();
                    if lived >= GROWN_UP {
                        self.crashes = 0;
                    } else if status.signal() != Some(libc::SIGKILL) {
                        self.crashes += 1;
                    }
                    log::warn!("worker {} ended ({status}) after {lived:.1?}", worker.child.id());
                }
                Event::Hung => {
                    log::error!("worker {} hangs, it is replaced", worker.child.id());
                    // A request may do it again and again, and then is left alone; no service is given up for it.
                    self.crashes = (self.crashes + 1).min(CAUTIOUS_AFTER);
                }
                Event::Reload(reload) => match self.may_reload(&reload) {
                    Ok(()) => wanted = Some(reload),
                    Err(error) => {
                        reload.refuse(&error);
                        continue;
                    }
                },
            }
            drop(worker);
            if !self.resends {
                return Ok(End::Broken);
            }
            if let Some(reload) = wanted {
                let error = handover::become_program(&reload.program, self.run.path(), &self.estate, &reload.caller);
                reload.refuse(&error);
            }
            worker = match self.replace_worker(signals)? {
                Ok(worker) => worker,
                Err(end) => return Ok(end),
            };
        }
    }

    /// Starts workers until one serves, or the end has come.
    fn replace_worker(&mut self, signals: &SignalFd) -> anyhow::Result<Result<Worker, End>> {
        let mut failed_starts = 0;
        loop {
            let failures = self.crashes + failed_starts;
            if failures >= HOPELESS_AFTER {
                log::error!("{failures} workers failed in a row: giving up, readers are let go");
                return Ok(Err(End::Hopeless));
            }
            if failures >= SLOW_AFTER {
                log::error!("{failures} workers failed in a row: waiting {PAUSE:?}");
                if wait_for_stop(signals, PAUSE)? {
                    return Ok(Err(End::Stopped));
                }
            }
            match self.start_worker() {
                Ok(worker) => return Ok(Ok(worker)),
                Err(error) => {
                    failed_starts += 1;
                    log::error!("start a worker: {error:#}");
                }
            }
        }
    }

    /// Starts a worker and waits until it serves.
    fn start_worker(&mut self) -> anyhow::Result<Worker> {
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (control, theirs) = pair.context("make a socket pair")?;
        // By path, so that an upgraded program is what comes next; the running one if that is being replaced.
        let program = if self.program.exists() { self.program.clone() } else { PathBuf::from("/proc/self/exe") };
        let mut command = Command::new(&program);
        command.arg("worker").arg("--run").arg(self.run.path());
        let connection = self.estate.connection.try_clone().context("copy the connection")?;
        command.stdin(Stdio::from(connection)).stdout(Stdio::from(theirs));
        let child = command.spawn().with_context(|| format!("run {}", program.display()))?;
        // Its copies of the worker's descriptors would keep a dead worker's socket open.
        drop(command);
        let now = Instant::now();
        let mut worker = Worker { child, control, since: now, pinged: now, answered: now };
        self.shake_hands(&worker)?;
        // Never waited for: a worker that does not read is given up instead.
        rustix::io::ioctl_fionbio(&worker.control, true).context("use a socket without waiting")?;
        self.estate
            .parking
            .hand_over(worker.control.as_fd(), &self.estate.parking.all())
            .context("hand over the listeners")?;
        worker.since = Instant::now();
        worker.answered = worker.since;
        Ok(worker)
    }

    fn shake_hands(&mut self, worker: &Worker) -> anyhow::Result<()> {
        let mode = if self.crashes >= CAUTIOUS_AFTER { Mode::Cautious } else { Mode::Normal };
        send(&worker.control, &[&[mode as u8], &self.estate.init[..]].concat(), SendFlags::NOSIGNAL)
            .context("send INIT")?;
        let answer = receive(&worker.control).context("wait for the answer to INIT")?;
        let Some(reply) = answer.strip_prefix(b"reply") else { bail!("the worker said something else than its reply") };
        match &self.estate.reply {
            None => {
                rustix::io::write(&self.estate.connection, reply).context("answer INIT")?;
                self.estate.reply = Some(reply.to_vec());
            }
            Some(agreed) if agreed == reply => {
                // After the last worker is dead, before the next one reads: all it left is given out again.
                if let Err(error) = handshake::resend(self.estate.connection.as_fd()) {
                    log::warn!("the kernel cannot resend ({error}): requests in flight are lost");
                }
            }
            Some(_) => bail!("the worker would agree on something else than the kernel was told"),
        }
        send(&worker.control, b"go", SendFlags::NOSIGNAL).context("let the worker go")?;
        if receive(&worker.control).context("wait for the worker to serve")? != b"serving" {
            bail!("the worker said something else than that it serves");
        }
        Ok(())
    }

    /// Waits for something to happen, and pings when it is time.
    fn wait(&mut self, worker: &mut Worker, signals: &SignalFd) -> anyhow::Result<Event> {
        let due = PING_INTERVAL.saturating_sub(worker.pinged.elapsed());
        let somebody_came = {
            let mut wanted = vec![PollFd::new(signals, PollFlags::IN), PollFd::new(&worker.control, PollFlags::IN)];
            let first = wanted.len();
            wanted.extend(self.estate.parking.descriptors().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            poll_for(&mut wanted, due)?;
            wanted[first..].iter().any(|polled| !polled.revents().is_empty())
        };
        if take_signals(signals)? {
            return Ok(Event::Stop);
        }
        if let Some(status) = worker.child.try_wait().context("wait for the worker")? {
            return Ok(Event::Died(status));
        }
        self.hear_worker(worker);
        if somebody_came {
            let heard = self.estate.parking.serve();
            if let Err(error) = self.estate.parking.hand_over(worker.control.as_fd(), &heard.lines) {
                log::error!("hand over listeners: {error}");
                return Ok(Event::Hung);
            }
            if let Some(reload) = heard.reload {
                return Ok(Event::Reload(reload));
            }
        }
        if worker.answered.elapsed() > HUNG_AFTER {
            return Ok(Event::Hung);
        }
        if worker.pinged.elapsed() >= PING_INTERVAL {
            let _ = send(&worker.control, b"ping", SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            worker.pinged = Instant::now();
        }
        Ok(Event::Nothing)
    }

    /// Takes pongs, which count only if no request hangs, and word of listeners that nobody is behind any more.
    fn hear_worker(&mut self, worker: &mut Worker) {
        let mut message = [0_u8; 64];
        while let Ok((length @ 1.., _)) = recv(&worker.control, &mut message, RecvFlags::DONTWAIT) {
            if let Some(number) = message[..length].strip_prefix(answer::GONE.as_bytes()) {
                let number = std::str::from_utf8(number).ok().and_then(|number| number.parse().ok());
                number.into_iter().for_each(|number| self.estate.parking.forget(number));
            } else if let Some(oldest) = message[..length].strip_prefix(b"pong") {
                let oldest_ms = oldest.try_into().map_or(0, u64::from_ne_bytes);
                if u128::from(oldest_ms) < HUNG_AFTER.as_millis() {
                    worker.answered = Instant::now();
                }
            }
        }
    }
}

/// Whether one of the signals that came means to stop. SIGCHLD only wakes.
fn take_signals(signals: &SignalFd) -> anyhow::Result<bool> {
    let mut stop = false;
    while let Some(signal) = signals.read_signal().context("read signals")? {
        stop |= signal.ssi_signo != Signal::SIGCHLD as u32;
    }
    Ok(stop)
}

/// Waits for `time`, or until told to stop.
fn wait_for_stop(signals: &SignalFd, time: Duration) -> anyhow::Result<bool> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        poll_for(&mut [PollFd::new(signals, PollFlags::IN)], end - Instant::now())?;
        if take_signals(signals)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn receive(control: &OwnedFd) -> anyhow::Result<Vec<u8>> {
    let mut wanted = [PollFd::new(control, PollFlags::IN)];
    if poll_for(&mut wanted, START_TIMEOUT)? == 0 {
        bail!("nothing for {START_TIMEOUT:?}");
    }
    let mut message = vec![0; 8192];
    let (length, _) = recv(control, &mut message, RecvFlags::DONTWAIT).context("receive")?;
    if length == 0 {
        bail!("the worker ended");
    }
    message.truncate(length);
    Ok(message)
}

/// The kernel's first message. It comes as soon as the file system is made.
fn read_init(connection: &OwnedFd) -> anyhow::Result<Vec<u8>> {
    if poll_for(&mut [PollFd::new(connection, PollFlags::IN)], START_TIMEOUT)? == 0 {
        bail!("nothing for {START_TIMEOUT:?}");
    }
    // The kernel refuses to read into less than FUSE_MIN_READ_BUFFER, 8192.
    let mut message = vec![0; 16 * 1024];
    let length = rustix::io::read(connection, &mut message[..])?;
    message.truncate(length);
    Ok(message)
}

/// poll(2); an interrupted wait is one in which nothing came.
fn poll_for(wanted: &mut [PollFd<'_>], time: Duration) -> anyhow::Result<usize> {
    // Rounded up by a millisecond, so that a wait for the rest of an interval does not spin.
    let time = time + Duration::from_millis(1);
    let timeout = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
    match poll(wanted, Some(&timeout)) {
        Err(rustix::io::Errno::INTR) => Ok(0),
        other => other.context("poll"),
    }
}

fn block_signals() -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let mut ignored = SigSet::empty();
    // A hangup of the terminal it was started from is none of its business; setsid has left it anyway.
    ignored.add(Signal::SIGHUP);
    ignored.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

/// All servers' views depend on this process. Workers inherit it.
fn protect_from_oom_killer() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        log::warn!("lower oom_score_adj: {error}; going on without");
    }
}

fn report(result: Result<(), kernel::Error>) {
    if let Err(error) = result {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        log::error!("{error}{cause}");
    }
}

/// Writes one line to whoever started us, if somebody still listens.
pub fn tell_starter(line: &str) {
    let _ = io::stdout().write_all(format!("{line}\n").as_bytes());
    let _ = io::stdout().flush();
}
