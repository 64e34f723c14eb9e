//! The supervisor: mounts the file system, holds its connection, and sees to it that a worker answers.
//!
//! ```text
//!            ┌──────── dies, hangs ────────┐
//!            v                             │
//!   start: INIT → reply → go ──────> serving (pinged) ──── exit 0: unmounted ──> end
//!            │ fails, dies young
//!            ├─ 3 in a row:  cautious (what earlier workers left unanswered gets EIO)
//!            ├─ 20 in a row: a second between attempts
//!            └─ 25 in a row: abort the connection, so that nobody waits for ever ──> end
//! ```
//!
//! Single-threaded, and so small that it has no reason to die; it never touches the mounted tree, whose answers it
//! would have to give itself. If it is killed, its worker goes with it and the next `serve` mounts anew.
//!
//! Limit: before Linux 6.9 the kernel cannot give a request out again: a reader whose worker died in the middle of
//! its request is left waiting until it is killed or the connection ends.

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

use crate::run_directory::RunDirectory;
use crate::worker::Mode;
use crate::{handshake, mountpoint};

/// A worker that lived this long was not born dead.
const GROWN_UP: Duration = Duration::from_secs(1);

/// One that was killed from outside counts as born dead only if it lived less than this.
const KILLED_YOUNG: Duration = Duration::from_millis(10);

/// Young deaths in a row after which a worker leaves alone what earlier ones were asked.
const CAUTIOUS_AFTER: u32 = 3;
/// … after which there is a pause before the next.
const SLOW_AFTER: u32 = 20;
/// … after which there is no next.
const HOPELESS_AFTER: u32 = 25;

const PAUSE: Duration = Duration::from_secs(1);

/// How long a worker may take to begin.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a worker is asked whether it gets on.
const PING_INTERVAL: Duration = Duration::from_secs(3);

/// A worker that is silent for this long, or has a request for this long, hangs.
const HUNG_AFTER: Duration = Duration::from_secs(10);

/// How the supervisor came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was asked to.
    Stopped,
    /// Somebody unmounted the file system or aborted its connection.
    Unmounted,
    /// No worker could be brought up.
    Hopeless,
}

/// Mounts and serves until told to stop. Calls `live` when readers are answered.
///
/// The caller holds the lock of `run`. SIGTERM or SIGINT ends it.
pub fn run(run: &RunDirectory, live: impl FnOnce()) -> anyhow::Result<End> {
    let signals = block_signals().context("block signals")?;
    protect_from_oom_killer();
    // What a killed supervisor has left: a mount that answers ENOTCONN.
    mountpoint::clear(&run.mount())?;
    let connection = mountpoint::mount(&run.mount())?;
    let ended = serve(run, connection, &signals, live);
    run.withdraw();
    if !matches!(ended, Ok(End::Stopped)) {
        // Whoever waits in a bind mount of this file system is let go.
        report(mountpoint::abort(&run.mount()));
    }
    mountpoint::clear(&run.mount())?;
    ended
}

fn serve(run: &RunDirectory, connection: OwnedFd, signals: &SignalFd, live: impl FnOnce()) -> anyhow::Result<End> {
    let init = read_init(&connection).context("read INIT from the kernel")?;
    let mut supervisor = Supervisor {
        run: run.clone(),
        program: std::env::current_exe().context("find this program")?,
        connection,
        init,
        reply: None,
        young_deaths: 0,
    };
    // The first worker must come up at once: what is wrong now will not mend itself.
    let worker = supervisor.start_worker()?;
    run.announce()?;
    live();
    supervisor.watch(worker, signals)
}

struct Supervisor {
    run: RunDirectory,
    program: PathBuf,
    connection: OwnedFd,
    init: Vec<u8>,
    /// The answer to INIT that the kernel has: what was agreed with the first worker binds the others.
    reply: Option<Vec<u8>>,
    young_deaths: u32,
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
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What happened while waiting.
enum Event {
    Stop,
    Died(ExitStatus),
    Hung,
    Nothing,
}

impl Supervisor {
    /// Keeps a worker serving until the end.
    fn watch(&mut self, first: Worker, signals: &SignalFd) -> anyhow::Result<End> {
        let mut worker = first;
        loop {
            match wait(&mut worker, signals)? {
                Event::Nothing => continue,
                Event::Stop => return Ok(End::Stopped),
                Event::Died(status) if status.success() => return Ok(End::Unmounted),
                Event::Died(status) => {
                    let lived = worker.since.elapsed();
                    let killed = status.signal() == Some(libc::SIGKILL);
                    let young = lived < if killed { KILLED_YOUNG } else { GROWN_UP };
                    self.young_deaths = if young { self.young_deaths + 1 } else { 0 };
                    log::warn!("worker {} ended ({status}) after {lived:.1?}", worker.child.id());
                }
                Event::Hung => {
                    log::error!("worker {} hangs, it is replaced", worker.child.id());
                    self.young_deaths += 1;
                }
            }
            drop(worker);
            worker = match self.replace_worker(signals)? {
                Ok(worker) => worker,
                Err(end) => return Ok(end),
            };
        }
    }

    /// Starts workers until one serves, or the end has come.
    fn replace_worker(&mut self, signals: &SignalFd) -> anyhow::Result<Result<Worker, End>> {
        loop {
            if self.young_deaths >= HOPELESS_AFTER {
                log::error!("{} workers died young in a row: giving up, readers are let go", self.young_deaths);
                return Ok(Err(End::Hopeless));
            }
            if self.young_deaths >= SLOW_AFTER {
                log::error!("{} workers died young in a row: waiting {PAUSE:?}", self.young_deaths);
                if wait_for_stop(signals, PAUSE)? {
                    return Ok(Err(End::Stopped));
                }
            }
            match self.start_worker() {
                Ok(worker) => return Ok(Ok(worker)),
                Err(error) => {
                    self.young_deaths += 1;
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
        let connection = self.connection.try_clone().context("copy the connection")?;
        command.stdin(Stdio::from(connection)).stdout(Stdio::from(theirs));
        let child = command.spawn().with_context(|| format!("run {}", program.display()))?;
        // Its copies of the worker's descriptors would keep a dead worker's socket open.
        drop(command);
        let now = Instant::now();
        let mut worker = Worker { child, control, since: now, pinged: now, answered: now };
        self.shake_hands(&worker)?;
        worker.since = Instant::now();
        worker.answered = worker.since;
        Ok(worker)
    }

    fn shake_hands(&mut self, worker: &Worker) -> anyhow::Result<()> {
        let mode = if self.young_deaths >= CAUTIOUS_AFTER { Mode::Cautious } else { Mode::Normal };
        send(&worker.control, &[&[mode as u8], &self.init[..]].concat(), SendFlags::NOSIGNAL).context("send INIT")?;
        let answer = receive(&worker.control).context("wait for the answer to INIT")?;
        let Some(reply) = answer.strip_prefix(b"reply") else { bail!("the worker said something else than its reply") };
        match &self.reply {
            None => {
                rustix::io::write(&self.connection, reply).context("answer INIT")?;
                self.reply = Some(reply.to_vec());
            }
            Some(agreed) if agreed == reply => {
                // After the last worker is dead, before the next one reads: all it left is given out again.
                if let Err(error) = handshake::resend(self.connection.as_fd()) {
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
}

/// Waits for something to happen, and pings when it is time.
fn wait(worker: &mut Worker, signals: &SignalFd) -> anyhow::Result<Event> {
    let due = PING_INTERVAL.saturating_sub(worker.pinged.elapsed());
    {
        let mut wanted = [PollFd::new(signals, PollFlags::IN), PollFd::new(&worker.control, PollFlags::IN)];
        poll_for(&mut wanted, due)?;
    }
    if take_signals(signals)? {
        return Ok(Event::Stop);
    }
    if let Some(status) = worker.child.try_wait().context("wait for the worker")? {
        return Ok(Event::Died(status));
    }
    take_pongs(worker);
    if worker.answered.elapsed() > HUNG_AFTER {
        return Ok(Event::Hung);
    }
    if worker.pinged.elapsed() >= PING_INTERVAL {
        let _ = send(&worker.control, b"ping", SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        worker.pinged = Instant::now();
    }
    Ok(Event::Nothing)
}

/// A pong counts only if no request hangs.
fn take_pongs(worker: &mut Worker) {
    let mut message = [0_u8; 64];
    while let Ok((length, _)) = recv(&worker.control, &mut message, RecvFlags::DONTWAIT) {
        let Some(oldest) = message[..length].strip_prefix(b"pong") else {
            break;
        };
        let oldest_ms = oldest.try_into().map_or(0, u64::from_ne_bytes);
        if u128::from(oldest_ms) < HUNG_AFTER.as_millis() {
            worker.answered = Instant::now();
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
