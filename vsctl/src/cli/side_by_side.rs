//! One verb for several servers at once, each in a process of its own: a checkpoint forks, which a process with threads must not.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::thread::available_parallelism;

use anyhow::{Context, Result};
use kernel::process::{CloneOptions, Fork, PidFd, fork};
use nix::errno::Errno;
use nix::libc::{SIGHUP, SIGINT, SIGTERM};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::failed;
use crate::failure::{Exit, Failure};
use crate::interrupt::{self, Hold};
use crate::name::Name;

/// Those of which it failed, with the exit codes.
#[derive(Debug)]
pub struct Failed(pub Vec<(Name, i32)>);

impl Failed {
    fn of(mut codes: Vec<(Name, i32)>) -> Self {
        codes.retain(|(_, code)| *code != 0);
        Self(codes)
    }

    /// That of the first; when somebody has called it off, that.
    pub fn code(&self) -> i32 {
        let first = self.0.first().map_or(0, |(_, code)| *code);
        if self.is_interrupted() { Exit::Interrupted as i32 } else { first }
    }

    /// Whether somebody has called it off.
    pub fn is_interrupted(&self) -> bool {
        self.0.iter().any(|(_, code)| *code == Exit::Interrupted as i32)
    }
}

/// Does `work` to all `names`, as many at once as there are processors, and goes on past failures, which have been printed. ^C and the
/// like reach all that are at work, and none is begun after them.
///
/// # Errors
/// When nobody was at work when it was interrupted.
pub fn side_by_side(names: &[Name], work: impl Fn(&Name) -> Result<()>) -> Result<Failed> {
    if let [name] = names {
        return Ok(Failed::of(vec![(name.clone(), failed(work(name)))]));
    }
    let at_once = available_parallelism().map_or(1, usize::from);
    let mut hold = Some(Hold::begin()?);
    let (mut left, mut at_work): (_, Vec<(Name, PidFd)>) = (names.iter(), Vec::new());
    let (mut codes, mut interrupted) = (Vec::new(), None);
    loop {
        if interrupted.is_none() {
            interrupted = interrupt::check().err();
            if interrupted.is_some() {
                // From a terminal they have heard it, too; from elsewhere they have not.
                at_work.iter().for_each(|(_, process)| drop(process.signal(SIGTERM)));
            }
        }
        while interrupted.is_none() && at_work.len() < at_once {
            let Some(name) = left.next() else { break };
            match begin(name, &work, &mut hold) {
                Ok(process) => at_work.push((name.clone(), process)),
                Err(error) => codes.push((name.clone(), failed(Err(error)))),
            }
        }
        if at_work.is_empty() {
            break;
        }
        let ended = first_ended(&at_work, hold.as_ref().filter(|_| interrupted.is_none()))?;
        if let Some(at) = ended {
            let (name, process) = at_work.swap_remove(at);
            let status = process.reap()?;
            let code = match (status.code(), status.signal()) {
                // Before it has held them back it ends of them.
                (_, Some(SIGHUP | SIGINT | SIGTERM)) if interrupted.is_some() => Exit::Interrupted as i32,
                (Some(code), _) => code,
                (None, signal) => {
                    let message = format!("what worked on '{name}' was killed (signal {})", signal.unwrap_or_default());
                    failed(Err(Failure::new(Exit::Failed, message).into()))
                }
            };
            codes.push((name, code));
        }
    }
    let order = |name: &Name| names.iter().position(|known| known == name);
    codes.sort_by_key(|(name, _)| order(name));
    let these = Failed::of(codes);
    match interrupted {
        Some(error) if !these.is_interrupted() => Err(error),
        _ => Ok(these),
    }
}

/// Begins the work on one; does not come back in the child.
fn begin(name: &Name, work: &impl Fn(&Name) -> Result<()>, hold: &mut Option<Hold>) -> Result<PidFd> {
    // Else both would print what is in it.
    std::io::stdout().flush().context("write to standard output")?;
    match fork(&CloneOptions::default())? {
        Fork::Child => {
            drop(hold.take());
            let done = interrupt::before_more().and_then(|()| work(name));
            std::process::exit(failed(done));
        }
        Fork::Parent { pidfd, .. } => Ok(pidfd),
    }
}

/// Which of them has ended; none: a signal has come.
fn first_ended(at_work: &[(Name, PidFd)], hold: Option<&Hold>) -> Result<Option<usize>> {
    let mut polled: Vec<PollFd<'_>> =
        at_work.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
    polled.extend(hold.map(|hold| PollFd::new(hold.as_fd(), PollFlags::POLLIN)));
    match poll(&mut polled, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno).context("wait for servers"),
    }
    Ok(polled[..at_work.len()].iter().position(|polled| polled.any() == Some(true)))
}
