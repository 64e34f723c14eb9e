//! A worker: the process that answers. Replaceable at any moment, it owns nothing that its successor would miss.
//!
//! Descriptor 0 is the FUSE connection, descriptor 1 the socket to the supervisor, one packet a message:
//!
//! ```text
//! supervisor → worker   mode byte, then the kernel's INIT          (modes: see [`Mode`])
//! worker → supervisor   `reply`, then the answer to INIT
//! supervisor → worker   `go`                                       (the answer was written, or is the known one)
//! worker → supervisor   `serving`
//! supervisor → worker   `ping`                                     (every few seconds from here on)
//! worker → supervisor   `pong`, then 8 bytes: milliseconds the oldest unanswered request has been waiting
//! supervisor → worker   `lines NUMBER:SERVER …`, each with a listener and its slot   (at any time after `serving`)
//! worker → supervisor   `gone NUMBER`                              (nobody is left behind that listener)
//! ```
//!
//! The end of the socket is the end of the worker. Exit status: 0 when the file system was unmounted.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::Thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::answer::Answers;
use crate::clock::Now;
use crate::filesystem::Filesystem;
use crate::run_directory::RunDirectory;
use crate::serving::{Progress, Serving};
use crate::snapshot::Host;
use crate::watch::Servers;
use crate::{handshake, parking};

/// How a worker begins, the first byte it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// The connection is new or another worker's; answer everything.
    Normal = b'n',
    /// Workers have crashed: do not answer requests that one of them may have died of.
    Cautious = b'c',
}

/// House-keeping is done this often while a server is being read.
const TEND_INTERVAL: Duration = Duration::from_secs(1);

/// Runs a worker until the file system is unmounted.
pub fn run(run: &Path) -> anyhow::Result<()> {
    let connection = kernel::process::adopt_descriptor(0)?;
    let control = kernel::process::adopt_descriptor(1)?;
    // An answer from a worker without supervisor would be taken for a live service that cannot be stopped.
    kernel::process::set_parent_death_signal(libc::SIGKILL)?;
    nix::sys::signal::SigSet::empty().thread_set_mask().context("unblock signals")?;
    let run = RunDirectory::open(run)?;
    drop_privileges();

    let mut message = vec![0; 8192];
    let (length, _) = recv(&control, &mut message, RecvFlags::empty()).context("receive INIT from the supervisor")?;
    let Some((&mode, init)) = message[..length].split_first() else { bail!("the supervisor is gone") };

    let host = Arc::new(Host::at(Path::new("/")));
    let servers = Arc::new(Servers::registered_in(&run.servers()));
    let cautious = mode == Mode::Cautious as u8;
    let serving = Serving::of(Filesystem::new(host.clone(), servers.clone()), cautious);
    let (progress, waiting, watching) = (serving.progress(), serving.clone(), serving.clone());
    let greeted = handshake::greet(serving, init, threads()).context("shake hands with fuser")?;
    send(&control, &[b"reply", greeted.reply()].concat(), SendFlags::NOSIGNAL).context("send the answer to INIT")?;
    let (length, _) = recv(&control, &mut message, RecvFlags::empty()).context("receive from the supervisor")?;
    if &message[..length] != b"go" {
        bail!("the supervisor refused the answer to INIT");
    }
    let session = greeted.connect(connection.as_fd())?;
    // fuser has its own copy now; the connection shall end when that is closed.
    drop(connection);
    send(&control, b"serving", SendFlags::NOSIGNAL).context("tell the supervisor")?;

    let told = control.try_clone().context("copy the socket to the supervisor")?;
    let answers = Answers::begin(host.clone(), servers.clone(), told, cautious).context("begin to answer calls")?;
    std::thread::Builder::new()
        .name("waiting".to_owned())
        .spawn(move || waiting.answer_waiting())
        .context("start the thread for what waits")?;
    std::thread::Builder::new()
        .name("deadlines".to_owned())
        .spawn(move || watching.keep_deadlines())
        .context("start the thread for deadlines")?;
    let (seen, known) = (host.clone(), servers.clone());
    let keeper = std::thread::Builder::new()
        .name("house-keeping".to_owned())
        .spawn(move || keep_house(&seen, &known))
        .context("start the thread for house-keeping")?;
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || control_loop(&control, &progress, &answers, keeper.thread()))
        .context("start the control thread")?;
    session.run().context("serve")
}

/// Two threads answer while one waits for the disk; more than the CPUs would only meet in the kernel.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 4)
}

/// Answers pings. Ends the process when the supervisor is gone. Asks the kernel for no figures, which it might keep waiting for.
fn control_loop(control: &OwnedFd, progress: &Progress, answers: &Answers, keeper: &Thread) {
    let mut message = [0_u8; 8192];
    loop {
        match kernel::channel::receive(control.as_fd(), &mut message) {
            Ok((0, _)) => std::process::exit(1),
            Ok((length, descriptors)) if !descriptors.is_empty() => {
                for (number, server, listener, slot) in
                    parking::lines(&message[..length], descriptors).unwrap_or_default()
                {
                    answers.add(number, server, listener, &slot);
                }
            }
            Ok(_) => {
                // Threads that have nobody to answer any more do no harm, until they are all.
                let is_stuck = progress.overdue() >= threads();
                let oldest_ms = if is_stuck { u64::MAX } else { progress.oldest_ms(Now::read()) };
                let pong = [b"pong", &oldest_ms.to_ne_bytes()[..]].concat();
                let _ = send(control, &pong, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
                keeper.unpark();
            }
            Err(error) => log::error!("hear the supervisor: {error}"),
        }
    }
}

/// Takes samples and closes what nobody reads, without end: at each ping, and more often while a server is being read.
fn keep_house(host: &Host, servers: &Servers) {
    loop {
        if servers.is_quiet() {
            std::thread::park();
        }
        std::thread::sleep(TEND_INTERVAL);
        servers.tend(host, Now::read());
    }
}

/// All that is read is readable for everybody, and what is written is an open descriptor. Only the answers to calls go into
/// the memory of guests, which takes the rights of a debugger: kept in reserve, for the threads that give them. Failures
/// change nothing for the servers, so they are only told.
fn drop_privileges() {
    raise_file_limit();
    // The file of a process's memory is its owner's alone.
    let kept = "sys_ptrace,dac_override".parse().and_then(kernel::capability::keep_in_reserve);
    let dropped = kept.and_then(|()| kernel::process::no_new_privileges());
    if let Err(error) = dropped {
        log::warn!("drop privileges: {error}");
    }
}

/// Many servers, a dozen files each.
pub(crate) fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        log::warn!("raise the limit of open files: {error}");
    }
}
