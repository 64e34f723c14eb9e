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
//! ```
//!
//! The end of the socket is the end of the worker. Exit status: 0 when the file system was unmounted.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::clock::Now;
use crate::filesystem::{Filesystem, Progress};
use crate::handshake;
use crate::run_directory::RunDirectory;
use crate::snapshot::Host;
use crate::watch::Servers;

/// How a worker begins, the first byte it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// The connection is new or another worker's; answer everything.
    Normal = b'n',
    /// Workers have died young: do not answer requests that one of them may have died of.
    Cautious = b'c',
}

/// House-keeping is done this often while a server is being read.
const TEND_MS: i64 = 1_000;

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
    let mut filesystem = Filesystem::new(host.clone(), servers.clone());
    if mode == Mode::Cautious as u8 {
        filesystem = filesystem.refuse_resent();
    }
    let progress = filesystem.progress();
    let greeted = handshake::greet(filesystem, init, threads()).context("shake hands with fuser")?;
    send(&control, &[b"reply", greeted.reply()].concat(), SendFlags::NOSIGNAL).context("send the answer to INIT")?;
    let (length, _) = recv(&control, &mut message, RecvFlags::empty()).context("receive from the supervisor")?;
    if &message[..length] != b"go" {
        bail!("the supervisor refused the answer to INIT");
    }
    let session = greeted.connect(connection.as_fd())?;
    // fuser has its own copy now; the connection shall end when that is closed.
    drop(connection);
    send(&control, b"serving", SendFlags::NOSIGNAL).context("tell the supervisor")?;

    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || control_loop(&control, &host, &servers, &progress))
        .context("start the control thread")?;
    session.run().context("serve")
}

/// Two threads answer while one waits for the disk; more than the CPUs would only meet in the kernel.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 4)
}

/// Answers pings and keeps house. Ends the process when the supervisor is gone.
fn control_loop(control: &OwnedFd, host: &Host, servers: &Servers, progress: &Progress) {
    let mut message = [0_u8; 64];
    let mut tended_ms = 0;
    loop {
        // A quiet worker sleeps until it is pinged.
        let timeout = (!servers.is_quiet()).then_some(Timespec { tv_sec: TEND_MS / 1000, tv_nsec: 0 });
        let mut wanted = [PollFd::new(control, PollFlags::IN)];
        let ready = poll(&mut wanted, timeout.as_ref()).unwrap_or(0) > 0;
        let now = Now::read();
        if ready {
            match recv(control, &mut message, RecvFlags::DONTWAIT) {
                Ok((0, _)) => std::process::exit(1),
                Ok(_) => {
                    let pong = [b"pong", &progress.oldest_ms(now).to_ne_bytes()[..]].concat();
                    let _ = send(control, &pong, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
                }
                Err(_) => {}
            }
        }
        if now.boottime_ms().saturating_sub(tended_ms) >= TEND_MS as u64 {
            servers.tend(host, now);
            tended_ms = now.boottime_ms();
        }
    }
}

/// All that is read is readable for everybody, and what is written is an open descriptor. Failures change nothing
/// for the servers, so they are only told.
fn drop_privileges() {
    // Many servers, a dozen files each.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        log::warn!("raise the limit of open files: {error}");
    }
    let dropped = kernel::capability::set_all(kernel::capability::Set::default())
        .and_then(|()| kernel::process::no_new_privileges());
    if let Err(error) = dropped {
        log::warn!("drop privileges: {error}");
    }
}
