//! What CRIU cannot put into images, found before anything is frozen, by process, with what to do about it.
//!
//! Limit: what /proc shows. Some of it CRIU finds out only when it looks from inside (unsupported sockets); then it says so, and the
//! server goes on.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use kernel::mount::parse_mountinfo;

use crate::processes::Process;

/// Something that cannot be dumped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// Inside and on the host.
    pids: (i32, i32),
    command: String,
    what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    /// An open file of a kind that has no place in images.
    File { kind: &'static str, link: String },
    /// A namespace of a kind that may not be nested.
    Namespace(&'static str),
    /// Its parent is outside: somebody entered.
    Visitor,
}

impl What {
    fn advice(&self) -> &'static str {
        match self {
            Self::File { .. } => "end it, or let it close the file",
            Self::Namespace(_) => "end it; a migratable server refuses new ones since its start",
            Self::Visitor => "leave the session: it belongs to `vsctl enter` or `exec`",
        }
    }
}

impl fmt::Display for Blocker {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What a guest has named goes to somebody's terminal.
        write!(out, "process {} ({}, {} on the host) ", self.pids.0, self.command.escape_debug(), self.pids.1)?;
        match &self.what {
            What::File { kind, link } => write!(out, "has {kind} open: {}", link.escape_debug()),
            What::Namespace(kind) => write!(out, "is in a {kind} namespace of its own"),
            What::Visitor => write!(out, "has come in from outside"),
        }?;
        write!(out, "; {}", self.what.advice())
    }
}

/// Namespaces that CRIU dumps for a whole server only.
const WHOLE: &[&str] = &["cgroup", "ipc", "pid", "time", "user", "uts"];

/// What stands in the way of a dump of `processes`, whose init is `init` on the host.
///
/// # Errors
/// When init cannot be looked at. A process that ends meanwhile blocks nothing.
pub fn find(init: i32, processes: &[Process]) -> Result<Vec<Blocker>> {
    let own = namespaces(init).with_context(|| format!("look at the namespaces of process {init}"))?;
    let mut found = Vec::new();
    for process in processes {
        let mut note = |what| {
            let pids = (process.pid_inside, process.pid);
            found.push(Blocker { pids, command: process.command.clone(), what });
        };
        if process.pid != init && parent_inside(process.pid) == Some(0) {
            note(What::Visitor);
        }
        let theirs = namespaces(process.pid).unwrap_or_default();
        for (kind, number) in &theirs {
            if own.get(kind).is_some_and(|own| own != number) {
                note(What::Namespace(kind));
            }
        }
        for (kind, link) in files(process.pid).unwrap_or_default() {
            note(What::File { kind, link });
        }
    }
    Ok(found)
}

fn namespaces(pid: i32) -> Result<BTreeMap<&'static str, u64>> {
    let number = |kind: &&'static str| match fs::metadata(format!("/proc/{pid}/ns/{kind}")) {
        Ok(found) => Some(Ok((*kind, found.ino()))),
        // A kernel without that kind.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && Path::new(&format!("/proc/{pid}")).exists() => {
            None
        }
        Err(error) => Some(Err(error.into())),
    };
    WHOLE.iter().filter_map(number).collect()
}

/// The number of the parent in the process's own pid namespace: 0 when it is outside.
fn parent_inside(pid: i32) -> Option<i32> {
    // NStgid has a number for each pid namespace; a parent has none in ours inside when it is outside.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let parent: i32 = field(&status, "PPid:")?.parse().ok()?;
    let depth = |status: &str| field(status, "NStgid:").map(|numbers| numbers.split_whitespace().count());
    let above = fs::read_to_string(format!("/proc/{parent}/status")).ok()?;
    Some(if depth(&above)? < depth(&status)? { 0 } else { parent })
}

fn field<'t>(status: &'t str, name: &str) -> Option<&'t str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// Open files that cannot be dumped: what they are, and their links.
fn files(pid: i32) -> Result<Vec<(&'static str, String)>> {
    let mounts = parse_mountinfo(&fs::read_to_string(format!("/proc/{pid}/mountinfo"))?);
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        let link = link.to_string_lossy().into_owned();
        if let Some(kind) = kind_of_link(&link) {
            found.push((kind, link));
            continue;
        }
        let number = entry.file_name();
        let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy())) else { continue };
        if waits_for_pressure(&link, &info) {
            found.push(("a trigger of pressure", link));
            continue;
        }
        let mount: Option<u64> = field(&info, "mnt_id:").and_then(|id| id.parse().ok());
        let mount = mounts.iter().find(|known| Some(known.id) == mount);
        if let Some(kind) = mount.and_then(|mount| kind_of_file_system(&mount.kind)) {
            found.push((kind, link));
        }
    }
    Ok(found)
}

/// Whether the file is one of pressure, open for writing: nobody writes there but who sets a trigger (Documentation/accounting/psi.rst).
fn waits_for_pressure(link: &str, info: &str) -> bool {
    let flags = field(info, "flags:").and_then(|flags| i32::from_str_radix(flags, 8).ok());
    (link.ends_with(".pressure") || link.starts_with("/proc/pressure/"))
        && flags.is_some_and(|flags| flags & nix::libc::O_ACCMODE != nix::libc::O_RDONLY)
}

/// Kinds of descriptors by their names in /proc/PID/fd (proc(5)).
fn kind_of_link(link: &str) -> Option<&'static str> {
    Some(match link.strip_prefix("anon_inode:")?.trim_matches(['[', ']']) {
        "io_uring" => "an io_uring",
        "bpf-prog" | "bpf_prog" => "a BPF program",
        "bpf-map" | "bpf_map" => "a BPF map",
        "bpf_link" | "bpf-link" => "a BPF link",
        "fanotify" => "a fanotify group",
        "perf_event" => "a performance counter",
        "userfaultfd" => "a userfaultfd",
        "seccomp notify" => "a seccomp listener",
        _ => return None,
    })
}

fn kind_of_file_system(kind: &str) -> Option<&'static str> {
    match kind {
        "mqueue" => Some("a POSIX message queue"),
        "autofs" => Some("a file of an automounter"),
        _ if kind == "fuse" || kind.starts_with("fuse.") => Some("a file of a FUSE file system"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_known_by_their_names() {
        assert_eq!(kind_of_link("anon_inode:[io_uring]"), Some("an io_uring"));
        assert_eq!(kind_of_link("anon_inode:bpf-prog"), Some("a BPF program"));
        for fine in ["anon_inode:[eventfd]", "/etc/passwd", "socket:[12]", "anon_inode:[pidfd]"] {
            assert_eq!(kind_of_link(fine), None, "{fine}");
        }
    }

    #[test]
    fn who_only_reads_pressure_waits_for_none() {
        let info = |flags: &str| format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t9\n");
        assert!(waits_for_pressure("/sys/fs/cgroup/init.scope/memory.pressure", &info("02504002")));
        assert!(!waits_for_pressure("/sys/fs/cgroup/init.scope/memory.pressure", &info("0100000")));
        assert!(!waits_for_pressure("/root/blood", &info("02504002")));
    }

    #[test]
    fn file_systems_are_known_by_their_kinds() {
        assert!(kind_of_file_system("fuse.lxcfs-fuse").is_some() && kind_of_file_system("mqueue").is_some());
        assert!(kind_of_file_system("overlay").is_none() && kind_of_file_system("fusectl").is_none());
    }

    #[test]
    fn a_blocker_says_who_what_and_what_to_do() {
        let what = What::File { kind: "an io_uring", link: "anon_inode:[io_uring]".into() };
        let blocker = Blocker { pids: (7, 1234), command: "postgres".into(), what };
        assert_eq!(
            blocker.to_string(),
            "process 7 (postgres, 1234 on the host) has an io_uring open: anon_inode:[io_uring]; end it, or let it close the file"
        );
    }

    #[test]
    fn an_ordinary_process_blocks_nothing() {
        let own = std::process::id() as i32;
        assert_eq!(namespaces(own).unwrap(), namespaces(own).unwrap());
        assert!(files(own).unwrap().is_empty());
        assert!(parent_inside(own).is_some_and(|parent| parent > 0));
    }
}
