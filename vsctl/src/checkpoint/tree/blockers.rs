//! What keeps a tree of the host's from being dumped, beside what keeps anything: what it shares with processes outside.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};

use super::members::{self, Members};
use crate::checkpoint::blockers::{self, Blocker, Opened, What};
use crate::processes::Process;

/// Namespaces in which a tree has to be where this command is: CRIU puts it back there.
const SHARED: &[&str] = &["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

/// The one that CRIU gives a tree of its own, so that its clocks go on: all of it has to be in the root's.
const CLOCKS: &[&str] = &["time"];

/// What stands in the way of a dump of `tree`.
///
/// # Errors
/// When /proc cannot be read. A process that ends meanwhile blocks nothing.
pub fn find(tree: &Members) -> Result<Vec<Blocker>> {
    let mounts: Vec<_> =
        tree.inside.iter().map(|process| (process.pid, blockers::mounts(process.pid).unwrap_or_default())).collect();
    let opened = blockers::opened(mounts.iter().map(|(pid, mounts)| (*pid, &mounts[..])))?;
    ties_of(tree, opened)
}

/// The same, when it is known what files of each cannot be dumped.
fn ties_of(tree: &Members, mut opened: BTreeMap<i32, Vec<Opened>>) -> Result<Vec<Blocker>> {
    let own = std::process::id() as i32;
    let mut here = blockers::namespaces(own, SHARED).context("look at the own namespaces")?;
    if let Some(root) = tree.inside.first() {
        here.extend(blockers::namespaces(root.pid, CLOCKS).unwrap_or_default());
    }
    let open: BTreeMap<i32, BTreeSet<String>> =
        tree.inside.iter().map(|process| (process.pid, files(process.pid).unwrap_or_default())).collect();
    let shared = shared_pipes(&open)?;
    let connections = connections()?;
    let mut found = Vec::new();
    for process in &tree.inside {
        let pid = process.pid;
        let mut note = |what| found.push(Blocker::new(process, what));
        if pid == own {
            // All the rest follows from it.
            return Ok(vec![Blocker::new(process, What::Ourselves)]);
        }
        let theirs = [SHARED, CLOCKS].map(|kinds| blockers::namespaces(pid, kinds).unwrap_or_default());
        for (kind, _) in
            theirs.iter().flatten().filter(|(kind, number)| here.get(*kind).is_some_and(|here| here != *number))
        {
            note(What::Elsewhere(kind));
        }
        if let Some(session) = tree.sessions.get(&pid).filter(|session| !tree.sessions.contains_key(session)) {
            note(What::Session(*session));
        }
        // What is said of terminals below says more.
        let files = opened.remove(&pid).unwrap_or_default().into_iter().filter(|file| !is_terminal(&file.link));
        files.for_each(|file| note(What::File(file)));
        ties(&open[&pid], &shared, &connections).into_iter().for_each(note);
    }
    found.extend(tree.strayed.iter().map(|process: &Process| Blocker::new(process, What::Stray)));
    Ok(found)
}

/// The links in /proc/PID/fd (proc(5)), each once.
fn files(pid: i32) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        if let Ok(link) = fs::read_link(entry?.path()) {
            found.insert(link.to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// What ties one with these files to the world outside.
fn ties(open: &BTreeSet<String>, shared: &BTreeMap<String, i32>, connections: &BTreeMap<u64, String>) -> Vec<What> {
    let tie = |link: &String| {
        if let Some(other) = shared.get(link) {
            return Some(What::Pipe { link: link.clone(), other: *other });
        }
        if let Some(inode) = link.strip_prefix("socket:[").and_then(|rest| rest.trim_end_matches(']').parse().ok()) {
            return connections.get(&inode).cloned().map(What::Connection);
        }
        is_terminal(link).then(|| What::Terminal(link.clone()))
    };
    open.iter().filter_map(tie).collect()
}

/// Whether a file is a terminal (linux: Documentation/admin-guide/devices.txt), or the master of one. Also a terminal that the tree has
/// made for itself has a number among the host's, which may be another's when it comes back.
fn is_terminal(link: &str) -> bool {
    ["/dev/pts/", "/dev/ptmx", "/dev/tty", "/dev/console", "/dev/hvc"].iter().any(|start| link.starts_with(start))
}

/// The pipes of the tree that a process outside has open too, and which.
fn shared_pipes(open: &BTreeMap<i32, BTreeSet<String>>) -> Result<BTreeMap<String, i32>> {
    let own: BTreeSet<&String> = open.values().flatten().filter(|link| link.starts_with("pipe:[")).collect();
    let mut shared = BTreeMap::new();
    if own.is_empty() {
        return Ok(shared);
    }
    for pid in members::pids()?.into_iter().filter(|pid| !open.contains_key(pid)) {
        // Who ends meanwhile has nothing open.
        let mut theirs = files(pid).unwrap_or_default();
        theirs.retain(|link| own.contains(link));
        if !theirs.is_empty() && !members::is_below(pid, |pid| open.contains_key(&pid)) {
            shared.extend(theirs.into_iter().map(|link| (link, pid)));
        }
    }
    Ok(shared)
}

/// The TCP sockets of this network that have, or had, a peer: by inode, with both ends.
fn connections() -> Result<BTreeMap<u64, String>> {
    let mut all = BTreeMap::new();
    for file in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        match fs::read_to_string(file) {
            Ok(text) => all.extend(text.lines().skip(1).filter_map(connection)),
            // A kernel without IPv6.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("read {file}")),
        }
    }
    Ok(all)
}

/// States in which a socket has no peer: TCP_CLOSE and TCP_LISTEN (include/net/tcp_states.h).
const ALONE: [&str; 2] = ["07", "0A"];

/// One line of /proc/net/tcp (linux: Documentation/networking/proc_net_tcp.rst).
fn connection(line: &str) -> Option<(u64, String)> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, local, remote, state] = fields.get(..4)?.try_into().ok()?;
    let inode = fields.get(9)?.parse().ok().filter(|inode| *inode != 0)?;
    if ALONE.contains(&state) {
        return None;
    }
    Some((inode, format!("{} to {}", address(local)?, address(remote)?)))
}

/// `0100007F:1F90`: words of the address as the processor has them, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let words: Vec<[u8; 4]> = (0..address.len() / 8)
        .map(|word| Some(u32::from_str_radix(address.get(word * 8..word * 8 + 8)?, 16).ok()?.to_ne_bytes()))
        .collect::<Option<_>>()?;
    let ip = match words[..] {
        [word] => IpAddr::V4(Ipv4Addr::from(word)),
        [a, b, c, d] => {
            let bytes: [u8; 16] = [a, b, c, d].concat().try_into().ok()?;
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::process::{Command, Stdio};

    use super::*;

    fn said(open: &[&str]) -> Vec<String> {
        let shared = BTreeMap::from([("pipe:[7]".to_owned(), 99)]);
        let connections = BTreeMap::from([(12, "a to b".to_owned())]);
        let process = Process {
            pid: 5,
            pid_inside: 5,
            uid_inside: Some(0),
            user: "root".into(),
            state: 'S',
            rss_bytes: 0,
            cpu_ms: 0,
            command: "sort".into(),
        };
        let ties = ties(&open.iter().map(|link| (*link).to_owned()).collect(), &shared, &connections);
        ties.into_iter().map(|what| Blocker::new(&process, what).to_string()).collect()
    }

    #[test]
    fn files_of_its_own_tie_it_to_nobody() {
        let own = ["/etc/passwd", "/dev/null", "pipe:[8]", "socket:[13]", "/srv/dev/tty1"];
        assert_eq!(said(&own), [""; 0]);
    }

    #[test]
    fn what_ties_it_is_said_once_and_with_advice() {
        let ties = ["pipe:[7]", "pipe:[7]", "socket:[12]", "/dev/pts/3", "/dev/ptmx"];
        assert_eq!(
            said(&ties),
            [
                "process 5 (sort) has a terminal open: /dev/ptmx; let it read and write files, as with `vsctl checkpoint run`",
                "process 5 (sort) has a terminal open: /dev/pts/3; let it read and write files, as with `vsctl checkpoint run`",
                "process 5 (sort) has a pipe to process 99, outside the tree: pipe:[7]; let it read and write files, as with `vsctl checkpoint run`",
                "process 5 (sort) has a TCP connection: a to b; let it close the connection, which would be reset anyway",
            ]
        );
    }

    #[test]
    fn lines_of_tcp_are_read() {
        let line = |state: &str, inode: &str| {
            format!("  0: 0100007F:1F90 0200A8C0:0016 {state} 00000000:00000000 00:00000000 00000000  0  0 {inode} 1")
        };
        assert_eq!(connection(&line("01", "77")), Some((77, "127.0.0.1:8080 to 192.168.0.2:22".into())));
        // One that waits for its end has no owner any more.
        assert_eq!((connection(&line("06", "0")), connection(&line("0A", "77")), connection("x")), (None, None, None));
        let six = address("00000000000000000000000001000000:0050").unwrap();
        assert_eq!(six.to_string(), "[::1]:80");
    }

    #[test]
    fn a_connection_of_this_process_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let inode = |fd: i32| fs::read_link(format!("/proc/self/fd/{fd}")).unwrap().to_string_lossy().into_owned();
        let all = connections().unwrap();
        let is_listed = |fd: i32| all.keys().any(|number| format!("socket:[{number}]") == inode(fd));
        assert!(is_listed(stream.as_raw_fd()) && !is_listed(listener.as_raw_fd()));
    }

    #[test]
    fn a_child_with_our_pipe_is_tied_to_us() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let own = std::process::id();
        // What it is before exec has more of ours.
        let pid = child.id() as i32;
        let is_cat = || fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "cat\n");
        while !is_cat() {
            std::thread::yield_now();
        }
        let said: Vec<String> = ties_of(&Members::of(pid).unwrap(), BTreeMap::new())
            .unwrap()
            .into_iter()
            .map(|blocker| blocker.to_string())
            .collect();
        let mut pipe = child.stdin.take().unwrap();
        pipe.write_all(b"done").unwrap();
        drop(pipe);
        child.wait().unwrap();
        let expects = [format!("has a pipe to process {own}, outside"), "is of the session of process".to_owned()];
        assert!(expects.iter().all(|expected| said.iter().any(|line| line.contains(expected))), "{said:?}");
    }

    #[test]
    fn this_command_is_in_no_tree_that_it_dumps() {
        let found = ties_of(&Members::of(std::process::id() as i32).unwrap(), BTreeMap::new()).unwrap();
        assert!(found.len() == 1 && found[0].to_string().contains("is this command"), "{found:?}");
    }
}
