//! From a service file to a running process.
//!
//! What can fail by the user's mistake (an unknown user, a program that is not there) is found
//! out before the fork, so that it is a message and not an exit status.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use init::accounts;
use kernel::process::{self, fork_plainly};
use rustix::process::{Rlimit, setrlimit};

use crate::failure::{During, Failure, Result, chain};
use crate::service::{Limit, Log, Resource, ServiceFile};

/// Where programs are looked for, and `PATH` in a service's environment.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The exit status of a child that could not become its program; shells use it so.
const CANNOT_EXECUTE: i32 = 127;

/// Who a service runs as.
struct Identity {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

/// Everything that the child needs, made by the parent.
struct Plan<'a> {
    file: &'a ServiceFile,
    program: CString,
    argv: Vec<CString>,
    environment: Vec<CString>,
    identity: Option<Identity>,
    output: Option<BorrowedFd<'a>>,
}

/// Starts the service's process and returns its pid. `output` is where a log file's bytes go,
/// `notify` the socket on which it is to say that it is ready.
pub fn spawn(
    file: &ServiceFile,
    base: &BTreeMap<String, String>,
    output: Option<BorrowedFd>,
    notify: Option<&Path>,
) -> Result<i32> {
    let mut base = base.clone();
    if let Some(path) = notify {
        base.insert("NOTIFY_SOCKET".into(), path.to_string_lossy().into_owned());
    }
    let plan = plan(file, base, output)?;
    if let (Some(path), Some(identity)) = (notify, &plan.identity) {
        std::os::unix::fs::chown(path, Some(identity.uid), Some(identity.gid))
            .during(|| "give the notify socket to the user".into())?;
    }
    match fork_plainly().during(|| "cannot make a process".into())? {
        Some(pid) => Ok(pid),
        None => become_program(&plan),
    }
}

fn plan<'a>(
    file: &'a ServiceFile,
    mut environment: BTreeMap<String, String>,
    output: Option<BorrowedFd<'a>>,
) -> Result<Plan<'a>> {
    environment.insert("PATH".into(), PATH.into());
    if file.console.is_some() {
        environment.entry("TERM".into()).or_insert_with(|| "linux".into());
    }
    let identity = identity(file, &mut environment)?;
    environment.extend(file.env.clone());
    let path = environment.get("PATH").map_or(PATH, String::as_str);
    let program = find_program(file.exec.program(), path)?;
    let strings = environment.iter().map(|(key, value)| format!("{key}={value}"));
    Ok(Plan {
        file,
        program: c_string(program)?,
        argv: file.exec.as_slice().iter().cloned().map(c_string).collect::<Result<_>>()?,
        environment: strings.map(c_string).collect::<Result<_>>()?,
        identity,
        output,
    })
}

fn c_string(text: String) -> Result<CString> {
    CString::new(text).during(|| "an argument or variable holds a NUL".into())
}

/// The user and groups of the service, from the guest's own files, and the variables that login
/// would set. Nothing when the service stays root.
fn identity(file: &ServiceFile, environment: &mut BTreeMap<String, String>) -> Result<Option<Identity>> {
    // Most services stay root: for them nothing is read.
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let groups = if file.user.is_some() || file.group.is_some() { read("/etc/group") } else { String::new() };
    let user = match &file.user {
        None => None,
        Some(name) => Some(match accounts::user(&read("/etc/passwd"), name) {
            Some(user) => user,
            // A number needs no line in the file.
            None => number_as_user(name).ok_or_else(|| Failure::new(format!("no user '{name}'")))?,
        }),
    };
    let group = match &file.group {
        None => None,
        Some(name) => {
            let gid = accounts::group(&groups, name);
            Some(gid.ok_or_else(|| Failure::new(format!("no group '{name}'")))?)
        }
    };
    let Some(user) = user else {
        environment.insert("HOME".into(), "/root".into());
        return Ok(group.map(|gid| Identity { uid: 0, gid, groups: vec![gid] }));
    };
    let shell = if user.shell.is_empty() { "/bin/sh" } else { &user.shell };
    for (key, value) in [("HOME", user.home.as_str()), ("USER", &user.name), ("LOGNAME", &user.name), ("SHELL", shell)]
    {
        environment.insert(key.into(), value.into());
    }
    let gid = group.unwrap_or(user.gid);
    let groups = accounts::groups_of(&groups, &user.name, gid);
    Ok(Some(Identity { uid: user.uid, gid, groups }))
}

fn number_as_user(name: &str) -> Option<accounts::User> {
    let uid = name.parse().ok()?;
    let (home, shell) = ("/".into(), String::new());
    Some(accounts::User { name: name.into(), uid, gid: uid, home, shell })
}

/// The path of a program; one without a slash is looked for in `path`.
fn find_program(name: &str, path: &str) -> Result<String> {
    let candidates: Vec<String> = match name.contains('/') {
        true => vec![name.into()],
        false => path.split(':').map(|directory| format!("{directory}/{name}")).collect(),
    };
    let is_program = |path: &String| {
        let data = std::fs::metadata(path);
        data.is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    let found = candidates.into_iter().find(is_program);
    found.ok_or_else(|| Failure::new(format!("no program '{name}'")))
}

/// The child's way to its program. Never returns to the supervisor's code.
fn become_program(plan: &Plan) -> ! {
    let error = match dress(plan) {
        Ok(()) => Failure::from(process::exec_path(&plan.program, &plan.argv, &plan.environment)),
        Err(error) => error,
    };
    // Standard error is the service's log by now, or still the console.
    log::error!("{}: {}", plan.file.exec.program(), chain(&error));
    std::process::exit(CANNOT_EXECUTE)
}

/// Session, terminal, limits, identity, directory: in this order, because the user may have no
/// right to the former and must have one to the directory.
fn dress(plan: &Plan) -> Result<()> {
    process::new_session()?;
    connect(plan)?;
    for (resource, limit) in &plan.file.limits {
        set_limit(*resource, *limit)?;
    }
    if let Some(identity) = &plan.identity {
        process::set_user(identity.uid, identity.gid, &identity.groups)?;
    }
    let directory = &plan.file.dir;
    std::env::set_current_dir(directory).during(|| format!("enter {}", directory.display()))?;
    // Last: until here a signal would end the child as if it were the service.
    process::reset_signals()?;
    Ok(())
}

/// Standard input, output and error.
fn connect(plan: &Plan) -> Result<()> {
    if let Some(console) = &plan.file.console {
        let terminal = open(console)?;
        process::set_controlling_terminal(&terminal)?;
        return (0..=2).try_for_each(|number| place(&terminal, number));
    }
    place(&open(Path::new("/dev/null"))?, 0)?;
    let opened: OwnedFd;
    let output = match (plan.output, plan.file.log) {
        (Some(output), Log::File) => output,
        (_, Log::Console) => {
            opened = open(Path::new("/dev/console"))?;
            opened.as_fd()
        }
        _ => {
            opened = open(Path::new("/dev/null"))?;
            opened.as_fd()
        }
    };
    place(&output, 1)?;
    place(&output, 2)
}

fn open(path: &Path) -> Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path);
    file.map(OwnedFd::from).during(|| format!("open {}", path.display()))
}

fn place(descriptor: &impl AsFd, number: i32) -> Result<()> {
    Ok(process::place_descriptor(descriptor, number)?)
}

fn set_limit(resource: Resource, limit: Limit) -> Result<()> {
    use rustix::process::Resource as Kernel;
    let kernel = match resource {
        Resource::As => Kernel::As,
        Resource::Core => Kernel::Core,
        Resource::Cpu => Kernel::Cpu,
        Resource::Data => Kernel::Data,
        Resource::Fsize => Kernel::Fsize,
        Resource::Locks => Kernel::Locks,
        Resource::Memlock => Kernel::Memlock,
        Resource::Msgqueue => Kernel::Msgqueue,
        Resource::Nice => Kernel::Nice,
        Resource::Nofile => Kernel::Nofile,
        Resource::Nproc => Kernel::Nproc,
        Resource::Rss => Kernel::Rss,
        Resource::Rtprio => Kernel::Rtprio,
        Resource::Rttime => Kernel::Rttime,
        Resource::Sigpending => Kernel::Sigpending,
        Resource::Stack => Kernel::Stack,
    };
    setrlimit(kernel, Rlimit { current: limit.soft, maximum: limit.hard })
        .during(|| format!("set the limit of {resource:?} to {limit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_only_without_a_slash() {
        assert_eq!(find_program("sh", "/nonexistent:/bin").unwrap(), "/bin/sh");
        assert_eq!(find_program("/bin/sh", "").unwrap(), "/bin/sh");
        for missing in ["./sh-that-is-not-there", "/bin", "/etc/passwd", "no-such-program"] {
            let error = find_program(missing, PATH).unwrap_err();
            assert_eq!(error.to_string(), format!("no program '{missing}'"));
        }
    }
}
