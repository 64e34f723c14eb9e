//! Starts a command as a tree that nothing ties to who started it: a session of its own, no terminal, files as input and output.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result};
use kernel::channel::{self, Channel};
use kernel::process::{self, CloneOptions, Fork, PidFd};

use super::{NAME_VARIABLE, that_ended};
use crate::enter::CannotExecute;
use crate::enter::relay::Signals;
use crate::failure::{self, Exit, Failure};
use crate::interrupt::ignored;
use crate::name::Name;
use crate::site::Site;

/// What shells answer when a program may not be executed, and when there is none.
const MAY_NOT_BE_EXECUTED: i32 = 126;
const NOT_FOUND: i32 = 127;

/// What to run, and how.
#[derive(Debug)]
pub struct Wish {
    /// The program and its arguments; never empty.
    pub command: Vec<OsString>,
    /// What its checkpoints are called, before the time.
    pub name: Option<Name>,
    /// Its input, instead of nothing.
    pub input: Option<PathBuf>,
    /// The end of this file gets what it writes, errors too, instead of the caller's own output.
    pub output: Option<PathBuf>,
    /// Gets the number of its root.
    pub pid_file: Option<PathBuf>,
}

/// How a tree has ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// The root's exit code; 128+N when signal N ended it.
    pub code: i32,
    /// The checkpoint that has ended it.
    pub kept: Option<Name>,
}

/// Runs a command as a tree, and waits for the end of its root.
///
/// # Errors
/// When it cannot be started ([`CannotExecute`] when that is the program's fault), or could not be put on the disk for its output.
pub fn run(site: &Site, wish: &Wish) -> Result<Ended> {
    let input = open(wish.input.as_ref(), File::options().read(true))?;
    let output = open(wish.output.as_ref(), File::options().append(true).create(true))?;
    let input = match input {
        Some(input) => input,
        None => File::open("/dev/null").context("open /dev/null")?,
    };
    if output.is_none() {
        check_output(1, "output")?;
        check_output(2, "error output")?;
    }
    let (ours, theirs) = channel::pair()?;
    // Before there is somebody to whom they go; the new process unblocks them.
    let signals = Signals::block(false)?;
    match process::fork(&CloneOptions::default())? {
        Fork::Child => {
            drop(ours);
            let Err(error) = become_command(wish, &input, output.as_ref(), &theirs);
            // Nobody is left to be told that telling failed.
            let _ = theirs.send(told(&error).as_bytes(), &[]);
            std::process::exit(1)
        }
        Fork::Parent { pidfd, pid } => {
            drop(theirs);
            let (said, _) = ours.receive().context("wait for the start")?;
            if !said.is_empty() {
                pidfd.reap()?;
                return Err(heard(&String::from_utf8_lossy(&said)));
            }
            follow(site, pid, &pidfd, &signals)
        }
    }
}

/// Waits for the end of process `pid`, a child, and passes on to it the signals that would end this one.
///
/// # Errors
/// When the kernel does not wait.
pub fn wait(site: &Site, pid: i32, child: &PidFd) -> Result<Ended> {
    follow(site, pid, child, &Signals::block(false)?)
}

fn follow(site: &Site, pid: i32, child: &PidFd, signals: &Signals) -> Result<Ended> {
    let ignored = ignored()?;
    let start_ticks = process::start_time(pid)?;
    while let Some(signal) = signals.or(child.as_fd())? {
        // What it is told to ignore (nohup(1)) reaches it all the same while it is blocked.
        if ignored & (1 << (signal - 1)) == 0 && child.is_alive() {
            child.signal(signal)?;
        }
    }
    let status = child.reap()?;
    let was_killed = status.signal() == Some(nix::libc::SIGKILL);
    let kept = if was_killed { that_ended(site, pid, start_ticks)? } else { None };
    Ok(Ended { code: code(status), kept })
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

fn open(path: Option<&PathBuf>, how: &OpenOptions) -> Result<Option<File>> {
    path.map(|path| how.open(path).with_context(|| format!("open {}", path.display()))).transpose()
}

/// Whether what the caller has as descriptor `number` can be put on the disk.
fn check_output(number: i32, what: &str) -> Result<()> {
    let path = format!("/proc/self/fd/{number}");
    let link = fs::read_link(&path).with_context(|| format!("read {path}"))?;
    let found = fs::metadata(&path).with_context(|| format!("look at {path}"))?;
    if found.is_file() || link == Path::new("/dev/null") {
        return Ok(());
    }
    let message = format!("standard {what} is {}, which cannot be put on the disk", link.display());
    Err(Failure::new(Exit::BadParameter, message).hint("`--output FILE`, or redirect it to a file").into())
}

/// Leaves all that ties the new process to its parent, and becomes the command.
fn become_command(wish: &Wish, input: &File, output: Option<&File>, channel: &Channel) -> Result<Infallible> {
    process::new_session()?;
    process::place_descriptor(input, 0)?;
    if let Some(output) = output {
        process::place_descriptor(output, 1)?;
        process::place_descriptor(output, 2)?;
    }
    process::close_from(3, &[channel.as_fd().as_raw_fd()])?;
    if let Some(file) = &wish.pid_file {
        let text = format!("{}\n", std::process::id());
        fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    }
    process::reset_signals()?;
    let (program, arguments) = wish.command.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).env_remove(NAME_VARIABLE);
    if let Some(name) = &wish.name {
        command.env(NAME_VARIABLE, name.as_str());
    }
    let error = command.exec();
    let code = if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { MAY_NOT_BE_EXECUTED };
    Err(CannotExecute::new(code, &program.to_string_lossy(), error).into())
}

/// A failure of the new process, as its parent hears it: the exit code and the sentence.
fn told(error: &anyhow::Error) -> String {
    let code = match error.downcast_ref::<CannotExecute>() {
        Some(refused) => refused.code,
        None => failure::exit_of(error) as i32,
    };
    format!("{code} {error:#}")
}

fn heard(said: &str) -> anyhow::Error {
    let (code, sentence) = said.split_once(' ').unwrap_or(("1", said));
    match code.parse() {
        Ok(code @ (NOT_FOUND | MAY_NOT_BE_EXECUTED)) => CannotExecute::said(code, sentence).into(),
        code => Failure::new(Exit::from_code(code.unwrap_or(1) as u8), sentence).into(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_went_wrong_reaches_the_parent() {
        let missing = CannotExecute::new(NOT_FOUND, "x", "no such file").into();
        let back = heard(&told(&missing));
        assert_eq!(back.downcast_ref::<CannotExecute>().map(|refused| refused.code), Some(127));
        assert_eq!(back.to_string(), "cannot execute 'x': no such file");
        let back = heard(&told(&Failure::new(Exit::NoSpace, "no room").into()));
        assert_eq!((failure::exit_of(&back), back.to_string()), (Exit::NoSpace, "no room".into()));
    }

    #[test]
    fn a_signal_is_told_as_shells_do() {
        assert_eq!((code(ExitStatus::from_raw(3 << 8)), code(ExitStatus::from_raw(15))), (3, 143));
    }

    #[test]
    fn output_goes_to_files_only() {
        let file = tempfile::tempfile().unwrap();
        check_output(file.as_raw_fd(), "output").unwrap();
        check_output(File::open("/dev/null").unwrap().as_raw_fd(), "output").unwrap();
        let (end, _other) = UnixStream::pair().unwrap();
        let refused = check_output(end.as_raw_fd(), "output").unwrap_err().to_string();
        assert!(refused.starts_with("standard output is socket:["), "{refused}");
    }
}
