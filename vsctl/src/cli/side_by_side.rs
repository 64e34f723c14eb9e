//! One verb for several servers at once, each in a process of its own: a checkpoint forks, which a process with threads must not.

use std::io::Write;
use std::os::fd::AsFd;
use std::thread::available_parallelism;

use anyhow::{Context, Result};
use kernel::process::{CloneOptions, Fork, PidFd, fork};
use nix::errno::Errno;
use nix::libc::SIGTERM;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::print_error;
use crate::failure::{Exit, exit_of};
use crate::interrupt::{self, Hold};
use crate::name::Name;

/// Those of which it failed, with the exit codes.
pub type Failed = Vec<(Name, i32)>;

/// Does `work` to all `names`, as many at once as there are processors, and goes on past failures, which have been printed. ^C and the
/// like reach all that are at work, and none is begun after them.
///
/// # Errors
/// When there can be no child, or nobody was at work when it was interrupted.
pub fn side_by_side(names: &[Name], work: impl Fn(&Name) -> Result<()>) -> Result<Failed> {
    let mut failed = Failed::new();
    if let [name] = names {
        failed.extend(code_of(work(name)).map(|code| (name.clone(), code)));
        return Ok(failed);
    }
    let at_once = available_parallelism().map_or(1, usize::from);
    let mut hold = Some(Hold::begin()?);
    let (mut left, mut at_work): (_, Vec<(Name, PidFd)>) = (names.iter(), Vec::new());
    let mut interrupted = None;
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
            // Else both would print what is in it.
            std::io::stdout().flush().context("write to standard output")?;
            match fork(&CloneOptions::default())? {
                Fork::Child => {
                    drop(hold.take());
                    let done = interrupt::before_more().and_then(|()| work(name));
                    std::process::exit(code_of(done).unwrap_or(0));
                }
                Fork::Parent { pidfd, .. } => at_work.push((name.clone(), pidfd)),
            }
        }
        if at_work.is_empty() {
            break;
        }
        let ended = first_ended(&at_work, hold.as_ref().filter(|_| interrupted.is_none()))?;
        if let Some(at) = ended {
            let (name, process) = at_work.swap_remove(at);
            let status = process.reap()?;
            if !status.success() {
                failed.push((name, status.code().unwrap_or(Exit::Failed as i32)));
            }
        }
    }
    let order = |name: &Name| names.iter().position(|known| known == name);
    failed.sort_by_key(|(name, _)| order(name));
    match interrupted {
        Some(error) if !failed.iter().any(|(_, code)| *code == Exit::Interrupted as i32) => Err(error),
        _ => Ok(failed),
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

/// The exit code of a failure, which is printed.
fn code_of(done: Result<()>) -> Option<i32> {
    let error = done.err()?;
    print_error(&error);
    Some(exit_of(&error) as i32)
}
