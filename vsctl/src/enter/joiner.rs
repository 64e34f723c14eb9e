//! The processes that enter: one that joins and cannot be seen inside, and its sibling that becomes the program.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use kernel::channel::{self, Channel};
use kernel::process::{self, CloneOptions, Fork, PidFd};
use kernel::seccomp::{Filter, Listener, Profile};
use kernel::{capability, keyring, namespace};
use nix::libc;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::CannotExecute;
use super::account::Account;
use super::program::Prepared;
use super::relay::Signals;
use super::target::Target;
use crate::failure::{Exit, Failure, exit_of, hint_of};
use crate::lifecycle::calls::Calls;
use crate::monitor;
use crate::site::Site;

/// What the joiner says, with a pidfd, when the program's process is there.
const BORN: &str = "born ";
/// The code of a program that is there and may not be executed, as shells have it.
const MAY_NOT_BE_EXECUTED: i32 = 126;
/// The code of one that is not there.
const NOT_FOUND: i32 = 127;

/// Everything that the processes need, made before the fork.
pub(super) struct Plan<'a> {
    pub site: &'a Site,
    pub target: &'a Target,
    pub account: &'a Account,
    pub program: Prepared,
    pub directory: Option<PathBuf>,
    /// What standard input, output and error become; none: they stay.
    pub standard: [Option<BorrowedFd<'a>>; 3],
    /// Whether standard input becomes the controlling terminal.
    pub is_terminal: bool,
}

/// The program's process, a child of this one.
#[derive(Debug)]
pub(super) struct Child {
    /// Its pid on the host; it leads a process group.
    pub pid: i32,
    pub pidfd: PidFd,
}

/// What became of a start.
#[derive(Debug)]
pub(super) enum Begun {
    /// The program has been executed.
    Runs(Child),
    /// A signal came first; nothing of it is left.
    Interrupted(i32),
}

/// Starts the program; returns when it has been executed. The guest can make that last: a program may lie on a file
/// system of its own.
pub(super) fn start(plan: &Plan, signals: &Signals) -> Result<Begun> {
    // Before the fork, so that there is no moment in which a child is dumpable.
    process::set_dumpable(false)?;
    let (ours, theirs) = channel::pair()?;
    let birthplace = plan.target.birthplace.as_ref().map(|group| group.try_clone()).transpose();
    let birthplace = birthplace.context("copy a descriptor")?;
    let options = CloneOptions { cgroup: birthplace, ..CloneOptions::default() };
    match process::fork(&options).map_err(|error| no_room(error, plan))? {
        Fork::Child => {
            drop(ours);
            join(&theirs, plan)
        }
        Fork::Parent { pidfd: joiner, .. } => {
            drop(theirs);
            hear(&ours, &joiner, plan, signals)
        }
    }
}

/// The server's group has no place for another process; everything else stays as it is.
fn no_room(error: kernel::Error, plan: &Plan) -> anyhow::Error {
    let name = &plan.target.name;
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Failure::new(Exit::System, format!("'{name}' has no room for another process"))
            .hint(format!("`vsctl set {name} pids=N` allows more"))
            .into(),
        _ => error.into(),
    }
}

fn hear(channel: &Channel, joiner: &PidFd, plan: &Plan, signals: &Signals) -> Result<Begun> {
    let ended = || {
        let why = if plan.target.init.is_alive() { "was killed while it entered" } else { "was stopped" };
        Failure::new(Exit::Failed, format!("the process in '{}' {why}", plan.target.name))
    };
    let (words, mut descriptors) = match signals.or(channel.as_fd())? {
        Some(signal) => return interrupted(signal, joiner),
        None => channel.receive()?,
    };
    joiner.reap()?;
    let words = String::from_utf8_lossy(&words).into_owned();
    if words.is_empty() {
        return Err(ended().into());
    }
    let Some(pid) = words.strip_prefix(BORN) else { return Err(failure(&words)) };
    let pid = pid.parse().context("the program's pid did not arrive")?;
    let child = Child { pid, pidfd: descriptors.pop().map(PidFd::from).context("the program's pidfd did not arrive")? };
    // While the program is being executed; its calls wait until somebody listens.
    if let Some(listener) = descriptors.pop() {
        have_answered(listener, plan);
    }
    if let Some(signal) = signals.or(channel.as_fd())? {
        return interrupted(signal, &child.pidfd);
    }
    // Closed by exec.
    let (words, _) = channel.receive()?;
    if words.is_empty() {
        return Ok(Begun::Runs(child));
    }
    child.pidfd.reap()?;
    Err(failure(&String::from_utf8_lossy(&words)))
}

/// Gives the listener of the program's filter to who answers. Without one these calls fail inside, and nothing else does.
fn have_answered(listener: OwnedFd, plan: &Plan) {
    let target = plan.target;
    let kept = Calls::of(listener).and_then(|calls| monitor::keep(plan.site, &target.name, target.id, calls));
    if let Err(error) = kept {
        log::warn!("sysinfo(2) and sched_getaffinity(2) fail in this session: {error:#}");
    }
}

/// Ends what was started. Not waited for: it may stand still for as long as the guest likes.
fn interrupted(signal: i32, process: &PidFd) -> Result<Begun> {
    process.signal(libc::SIGKILL)?;
    Ok(Begun::Interrupted(signal))
}

/// `CODE why`, and after NUL a hint, as an error.
fn failure(words: &str) -> anyhow::Error {
    let (code, why) = words.split_once(' ').unwrap_or(("1", words));
    let (why, hint) = why.split_once('\0').unwrap_or((why, ""));
    if let Ok(code @ (MAY_NOT_BE_EXECUTED | NOT_FOUND)) = code.parse() {
        return CannotExecute { code, message: why.into() }.into();
    }
    let failure = Failure::new(Exit::from_code(code.parse().unwrap_or(1)), why);
    if hint.is_empty() { failure.into() } else { failure.hint(hint).into() }
}

fn words(error: &anyhow::Error) -> String {
    match error.downcast_ref::<CannotExecute>() {
        Some(refused) => format!("{} {refused}", refused.code),
        None => format!("{} {error:#}\0{}", exit_of(error) as u8, hint_of(error).unwrap_or_default()),
    }
}

/// The life of both processes. Never returns; what goes wrong is told on the channel.
fn join(channel: &Channel, plan: &Plan) -> ! {
    let told = match joined(channel, plan) {
        Ok((Fork::Parent { pid, pidfd }, listener)) => {
            let descriptors: Vec<BorrowedFd<'_>> = listener.iter().map(AsFd::as_fd).chain([pidfd.as_fd()]).collect();
            channel.send(format!("{BORN}{pid}").as_bytes(), &descriptors)
        }
        Ok((Fork::Child, listener)) => {
            // Before anything else: no process of the server is to have it.
            drop(listener);
            let Err(error) = become_program(channel, plan);
            channel.send(words(&error).as_bytes(), &[])
        }
        Err(error) => channel.send(words(&error).as_bytes(), &[]),
    };
    // Nobody is left to be told that telling failed.
    std::process::exit(i32::from(told.is_err()))
}

/// Becomes the server's, step by step, and forks into its pid namespace. With the listener of its filter.
fn joined(channel: &Channel, plan: &Plan) -> Result<(Fork, Option<Listener>)> {
    let target = plan.target;
    // By itself and while it still sees the host's hierarchies: nothing waits for the kernel then.
    target.group.attach_self_v1()?;
    for (number, descriptor) in plan.standard.iter().enumerate() {
        if let Some(descriptor) = descriptor {
            process::place_descriptor(descriptor, number as i32)?;
        }
    }
    let init = target.init.as_fd();
    process::close_from(3, &[channel.as_fd().as_raw_fd(), init.as_raw_fd()])?;
    match keyring::join_new_session() {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {}
        joined => joined.context("leave the host's session keyring")?,
    }
    namespace::enter(init, target.kinds)?;
    // First its root, and the session's user by a change that the kernel knows as one from root to another: only that
    // takes the capabilities away.
    process::set_user(0, 0, &[])?;
    process::set_dumpable(false)?;
    capability::limit_bounding(target.capabilities)?;
    limit_own(target.capabilities)?;
    // The migratable part follows later: it refuses clone3.
    let listener = Filter::compile(&Profile { migratable: false, ..target.profile }).install()?;
    let forked = process::fork(&CloneOptions { sibling: true, ..CloneOptions::default() });
    Ok((forked.map_err(|error| no_room(error, plan))?, listener))
}

/// Keeps no more than the bounding set. Nothing is inheritable: a root program gets its capabilities from the bounding
/// set, and others are to get none.
fn limit_own(keep: capability::Set) -> Result<()> {
    let permitted = rustix::thread::capabilities(None).context("read capabilities")?.permitted;
    let kept = CapabilitySet::from_bits_retain(keep.bits() & permitted.bits());
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).context("limit capabilities")
}

fn become_program(channel: &Channel, plan: &Plan) -> Result<std::convert::Infallible> {
    process::new_session()?;
    if plan.is_terminal {
        process::set_controlling_terminal(rustix::stdio::stdin())?;
    }
    if plan.target.profile.migratable {
        Filter::compile(&plan.target.profile).install()?;
    }
    let account = plan.account;
    process::set_user(account.uid, account.gid, &account.groups)?;
    process::set_dumpable(false)?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    go_to(plan)?;
    if !plan.is_terminal {
        // With a terminal the kernel hangs up when the master is closed. After the change of user, which clears it.
        process::set_parent_death_signal(libc::SIGHUP)?;
        // It may have died before; then its end of the channel is closed.
        if channel.receive_within(0)?.is_some() {
            std::process::exit(1);
        }
    }
    process::reset_signals()?;
    Err(execute(&plan.program, &plan.target.name.to_string()).into())
}

fn go_to(plan: &Plan) -> Result<()> {
    match &plan.directory {
        Some(directory) => std::env::set_current_dir(directory).map_err(|error| {
            let message = format!("cannot go to {} in '{}': {error}", directory.display(), plan.target.name);
            Failure::new(Exit::BadParameter, message).into()
        }),
        None => {
            let home = std::env::set_current_dir(Path::new(&plan.account.home));
            home.or_else(|_| std::env::set_current_dir("/")).context("go to /")
        }
    }
}

/// Tries the candidates as execvp(3) does. Returns only when none can be executed.
fn execute(program: &Prepared, server: &str) -> CannotExecute {
    let mut denied = None;
    for path in &program.candidates {
        let error = process::exec_path(path, &program.arguments, &program.environment);
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => {}
            Some(libc::EACCES) => denied = Some(error),
            Some(libc::ENOEXEC) => return cannot(program, server, MAY_NOT_BE_EXECUTED, &as_script(program, path)),
            _ => return cannot(program, server, MAY_NOT_BE_EXECUTED, &anyhow!(error)),
        }
    }
    match denied {
        Some(error) => cannot(program, server, MAY_NOT_BE_EXECUTED, &anyhow!(error)),
        None => cannot(program, server, NOT_FOUND, &anyhow!("not found")),
    }
}

/// A script without its first line is the shell's.
fn as_script(program: &Prepared, path: &CString) -> anyhow::Error {
    let mut arguments = vec![c"sh".to_owned(), path.clone()];
    arguments.extend(program.arguments.iter().skip(1).cloned());
    process::exec_path(c"/bin/sh", &arguments, &program.environment).into()
}

fn cannot(program: &Prepared, server: &str, code: i32, why: &anyhow::Error) -> CannotExecute {
    // The innermost cause says it all; the rest names paths that were tried.
    CannotExecute { code, message: format!("cannot execute '{}' in '{server}': {}", program.shown, why.root_cause()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_survive_the_way_out() {
        let full = anyhow::Error::from(Failure::new(Exit::BadParameter, "cannot go to /x").hint("make it"));
        let back = failure(&words(&full));
        assert_eq!((exit_of(&back), back.to_string()), (Exit::BadParameter, "cannot go to /x".into()));
        assert_eq!(hint_of(&back), Some("make it"));
        let missing = CannotExecute { code: 127, message: "cannot execute 'x'".into() }.into();
        let back = failure(&words(&missing));
        assert_eq!(back.downcast_ref::<CannotExecute>().map(|refused| refused.code), Some(127));
        assert_eq!(failure("nonsense").to_string(), "nonsense");
    }
}
