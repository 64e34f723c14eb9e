//! The processes of servers, as the host sees them in /proc.
//!
//! What a guest can choose (names, arguments, its /etc/passwd) is text of a stranger: it is bounded here, and made
//! printable where it is printed.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use kernel::cgroup::Group;
use serde::Serialize;

use crate::failure::{Exit, Failure};
use crate::guest_file;
use crate::name::Name;
use crate::site::Site;

/// More of a command line is not read.
const LONGEST_BYTES: u64 = 64 << 10;

/// One process of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Its id on the host.
    pub pid: i32,
    /// Its id in the server.
    pub pid_inside: i32,
    /// Its user's id in the server; none for one that the server has not.
    pub uid_inside: Option<u32>,
    /// Its user's name in the server, or the id.
    pub user: String,
    /// R, S, D, T, Z, … (proc(5)).
    pub state: char,
    /// Memory that is in RAM, shared pages included.
    pub rss_bytes: u64,
    /// CPU time used.
    pub cpu_ms: u64,
    /// The command line; the name in brackets where there is none.
    pub command: String,
}

/// The processes of the group, by their id; those that end meanwhile are left out.
///
/// `init` is the server's init, `first_id` the host's id of its root.
///
/// # Errors
/// When the group cannot be read.
pub fn of(group: &Group, init: i32, first_id: u32) -> Result<Vec<Process>> {
    let mut pids = group.processes()?;
    pids.sort_unstable();
    let users = users(init).unwrap_or_default();
    Ok(pids.into_iter().filter_map(|pid| read(pid, first_id, &users)).collect())
}

/// Process `pid` of the host's; none when it has ended.
pub fn of_host(pid: i32) -> Option<Process> {
    read(pid, 0, &BTreeMap::new())
}

fn read(pid: i32, first_id: u32, users: &BTreeMap<u32, String>) -> Option<Process> {
    let status = Status::parse(&text(pid, "status").ok()?)?;
    let uid_inside = status.uid.checked_sub(first_id).filter(|uid| first_id == 0 || *uid < crate::site::IDS_PER_SERVER);
    let user = match uid_inside {
        Some(uid) => users.get(&uid).cloned().unwrap_or_else(|| uid.to_string()),
        None => format!("({})", status.uid),
    };
    let mut arguments = Vec::new();
    let cmdline = File::open(format!("/proc/{pid}/cmdline")).ok()?;
    cmdline.take(LONGEST_BYTES).read_to_end(&mut arguments).ok()?;
    Some(Process {
        pid,
        pid_inside: status.pid_inside,
        uid_inside,
        user,
        state: status.state,
        rss_bytes: status.rss_bytes,
        cpu_ms: cpu_ms(&text(pid, "stat").ok()?)?,
        command: command(&arguments, &status.name),
    })
}

/// What is told of each open descriptor of a process, by its number (proc_pid_fdinfo(5)). One that ends meanwhile has none.
pub fn descriptors(pid: i32) -> impl Iterator<Item = (OsString, String)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name(), fs::read_to_string(entry.path()).ok()?)))
}

/// The file `name` of thread `id` in /proc. The kernel writes names of threads and of control groups as they are, and they need not be
/// UTF-8: what is not is replaced.
///
/// # Errors
/// When it has ended.
pub fn text(id: i32, name: &str) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(format!("/proc/{id}/{name}"))?).into_owned())
}

/// A line of a file of /proc with names and values.
pub fn field<'t>(status: &'t str, name: &str) -> Option<&'t str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// The threads of process `pid`, by their numbers.
///
/// # Errors
/// When it has ended.
pub fn threads(pid: i32) -> Result<Vec<i32>> {
    let mut threads = numbers(&format!("/proc/{pid}/task"))?;
    threads.sort_unstable();
    Ok(threads)
}

/// The entries of a directory that are numbers.
///
/// # Errors
/// When it cannot be read.
pub fn numbers(directory: &str) -> Result<Vec<i32>> {
    let read = || format!("read {directory}");
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(read)? {
        found.extend(entry.with_context(read)?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(found)
}

/// The number that `thread` has for itself, in the innermost pid namespace; none when it has ended.
pub fn number_inside(thread: i32) -> Option<i32> {
    let status = text(thread, "status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_ascii_whitespace().last()?.parse().ok()
}

/// What is needed of /proc/PID/status.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    name: String,
    state: char,
    uid: u32,
    pid_inside: i32,
    rss_bytes: u64,
}

impl Status {
    fn parse(text: &str) -> Option<Self> {
        let field = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim);
        let word = |key: &str, index: usize| field(key)?.split_ascii_whitespace().nth(index);
        // A column for each pid namespace; the last one is the process's own.
        let pid_inside = field("NSpid")?.split_ascii_whitespace().nth(1).or_else(|| word("NSpid", 0))?;
        Some(Self {
            name: field("Name")?.to_owned(),
            state: field("State")?.chars().next()?,
            // The effective one.
            uid: word("Uid", 1)?.parse().ok()?,
            pid_inside: pid_inside.parse().ok()?,
            // A zombie has no memory.
            rss_bytes: word("VmRSS", 0).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10,
        })
    }
}

/// User and system time from /proc/PID/stat. The name in it may hold blanks and parentheses.
fn cpu_ms(stat: &str) -> Option<u64> {
    let mut after_name = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    // Fields 14 and 15; the first after the name is field 3. Ticks of 1/100 s (USER_HZ, fixed on Linux).
    let user: u64 = after_name.nth(11)?.parse().ok()?;
    let system: u64 = after_name.next()?.parse().ok()?;
    Some((user + system) * 10)
}

fn command(arguments: &[u8], name: &str) -> String {
    let text = String::from_utf8_lossy(arguments);
    let text = text.trim_end_matches('\0').replace('\0', " ");
    if text.is_empty() { format!("[{name}]") } else { text }
}

/// Names of the server's users, from its own /etc/passwd.
fn users(init: i32) -> Result<BTreeMap<u32, String>> {
    let root = File::open(format!("/proc/{init}/root")).context("open the server's root")?;
    let [passwd] = guest_file::read(root.as_fd(), ["etc/passwd"])?;
    Ok(parse_passwd(&passwd))
}

/// The first name of each id (passwd(5)).
fn parse_passwd(text: &str) -> BTreeMap<u32, String> {
    let mut users = BTreeMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        let (Some(name), Some(_), Some(Ok(uid))) = (fields.next(), fields.next(), fields.next().map(str::parse)) else {
            continue;
        };
        users.entry(uid).or_insert_with(|| name.to_owned());
    }
    users
}

/// The server that process `pid` belongs to, and its id there.
///
/// # Errors
/// When there is no such process, or it is no server's.
pub fn owner(site: &Site, pid: i32) -> Result<(Name, i32)> {
    let file = |name: &str| {
        text(pid, name).map_err(|_| Failure::new(Exit::BadParameter, format!("there is no process {pid}")))
    };
    let Some(name) = owner_in(&file("cgroup")?, &site.cgroup()) else {
        return Err(Failure::new(Exit::Failed, format!("process {pid} belongs to no server")).into());
    };
    let status = Status::parse(&file("status")?).with_context(|| format!("read the status of process {pid}"))?;
    Ok((name, status.pid_inside))
}

/// The group below `parent` that /proc/PID/cgroup names, in any hierarchy.
fn owner_in(text: &str, parent: &str) -> Option<Name> {
    text.lines().find_map(|line| {
        let path = line.splitn(3, ':').nth(2)?.strip_prefix('/')?;
        let below = path.strip_prefix(parent)?.strip_prefix('/')?;
        below.split('/').next()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read() {
        let text = "Name:\tsleep (x)\nUmask:\t0022\nState:\tS (sleeping)\nUid:\t1879113728\t1879113728\t0\t0\n\
                    NSpid:\t4711\t23\nVmRSS:\t     880 kB\n";
        let expected =
            Status { name: "sleep (x)".into(), state: 'S', uid: 1_879_113_728, pid_inside: 23, rss_bytes: 880 << 10 };
        assert_eq!(Status::parse(text), Some(expected));
        assert_eq!(Status::parse("Name:\tx\n"), None);
    }

    #[test]
    fn a_thread_is_found_where_the_kernel_has_it() {
        let own = std::process::id() as i32;
        let look = move || {
            let thread = rustix::thread::gettid().as_raw_nonzero().get();
            (thread, threads(own).unwrap(), number_inside(thread))
        };
        let (thread, all, inside) = std::thread::spawn(look).join().unwrap();
        assert!(all.contains(&thread) && all.contains(&own) && thread != own, "{thread} in {all:?}");
        assert_eq!((inside, number_inside(i32::MAX)), (Some(thread), None));
    }

    #[test]
    fn a_name_that_is_no_utf8_hides_nobody() {
        let look = || {
            let thread = rustix::thread::gettid().as_raw_nonzero().get();
            rustix::thread::set_name(c"a\xff\xfeb").unwrap();
            (thread, number_inside(thread), of_host(thread))
        };
        let (thread, inside, found) = std::thread::spawn(look).join().unwrap();
        let found = found.unwrap();
        assert_eq!((inside, found.pid, found.pid_inside), (Some(thread), thread, thread));
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 250 150 0 0 20 0 1 0 99 0 0";
        assert_eq!(cpu_ms(stat), Some(4000));
        assert_eq!(cpu_ms("7 (a) S 1"), None);
    }

    #[test]
    fn the_owner_is_found_in_any_hierarchy_and_in_groups_below() {
        let name = |text: &str| owner_in(text, "vsos").map(|name| name.to_string());
        assert_eq!(name("5:pids:/\n0::/vsos/web1\n"), Some("web1".into()));
        assert_eq!(name("0::/vsos/web1/system.slice/cron\n"), Some("web1".into()));
        assert_eq!(name("2:cpu:/vsos/a.b\n0::/\n"), Some("a.b".into()));
        assert_eq!(name("0::/vsos-1a2b/web1\n0::/vsos\n0::/\n"), None);
    }

    #[test]
    fn users_have_their_first_name() {
        let users = parse_passwd("root:x:0:0::/root:/bin/sh\ntoor:x:0:0\nbad\nx:y:z\nwww:x:33:33\n");
        assert_eq!(users.into_iter().collect::<Vec<_>>(), [(0, "root".into()), (33, "www".into())]);
    }

    #[test]
    fn a_process_without_arguments_has_its_name() {
        assert_eq!(command(b"sleep\x0010\0", "sleep"), "sleep 10");
        assert_eq!(command(b"", "kthread"), "[kthread]");
    }
}
