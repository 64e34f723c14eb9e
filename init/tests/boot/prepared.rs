//! What the guest sees when it is prepared.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::symlink;

use init::control;
use kernel::process::PidFd;

use crate::Test;
use crate::server::Plan;

pub const TESTS: &[Test] = &[
    ("the_guest_sees_a_machine_of_its_own", the_guest_sees_a_machine_of_its_own),
    ("what_belongs_to_the_host_is_hidden", what_belongs_to_the_host_is_hidden),
    ("nothing_of_the_host_stays_open", nothing_of_the_host_stays_open),
    ("links_of_the_root_disk_do_not_lead_out", links_of_the_root_disk_do_not_lead_out),
    ("an_empty_root_disk_gets_its_directories", an_empty_root_disk_gets_its_directories),
    ("a_privileged_server_boots", a_privileged_server_boots),
    ("an_unread_console_stops_nobody_but_its_writers", an_unread_console),
    ("a_new_monitor_gets_the_consoles_again", a_new_monitor_gets_the_consoles_again),
];

/// A oneshot that runs a script and writes what it prints to a file of the root.
fn script(text: &str) -> String {
    format!("kind = 'oneshot'\nlog = 'none'\nexec = ['/bin/sh', '-c', '''exec >/out 2>&1\n{text}\necho end''']")
}

fn run(text: &str) -> String {
    let mut server = Plan::new(&[("look", &script(text))]).start();
    assert_eq!(server.failure, None);
    server.wait_file("/out", "end\n")
}

fn the_guest_sees_a_machine_of_its_own() {
    let out = run("hostname
        cat /proc/1/comm
        cat /proc/uptime /mnt/new/file
        ls -l /dev | awk '{print $1, $3, $4, $NF}'
        ls -l /dev/pts | awk 'NR>1 {print $1, $3, $4, $NF}'
        awk '{print $2, $3, $4}' /proc/mounts
        cat /run/host/container-manager /run/host/container-uuid
        echo n > /dev/null && echo null works
        stat -c '%a %n' /run/lock /dev/shm
        echo $LANG $HOST_SECRET.");
    for expected in [
        "test.example\n",
        "vsinit\n",
        "covered\ncovered\n",
        "/proc proc rw,nosuid,nodev,noexec",
        "/sys sysfs ro,nosuid,nodev,noexec",
        "/sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec",
        "/dev/pts devpts rw,nosuid,noexec,relatime,gid=",
        "/dev/mqueue mqueue",
        "crw--w---- root tty 0\n",
        "crw--w---- root tty 2\n",
        // The console and tty2, by the numbers of their terminals.
        "lrwxrwxrwx root root pts/0\n",
        "lrwxrwxrwx root root pts/2\n",
        "lrwxrwxrwx root root pts/ptmx\n",
        "vsos\n0e7a7c32-6b0a-4a53-9c4f-0d2a9d1f5b11\n",
        "null works\n",
        "1777 /run/lock\n1777 /dev/shm\n",
        "C.UTF-8 .\n",
    ] {
        assert!(out.contains(expected), "no {expected:?} in:\n{out}");
    }
    // Of the host's mounts only those that were handed over are left.
    assert!(!out.contains("stage") && !out.contains("/target"), "{out}");
}

fn what_belongs_to_the_host_is_hidden() {
    let out = run("cat /proc/cmdline && echo cmdline is empty
        echo h > /proc/cmdline
        ls -A /sys/firmware && echo firmware is empty
        echo 1 > /proc/sys/vm/drop_caches
        echo 1 > /sys/kernel/uevent_seqnum
        echo 1 > /proc/sys/net/ipv4/ip_forward && cat /proc/sys/net/ipv4/ip_forward && echo forwarding
        mknod /tmp/disk b 8 0
        dmesg
        grep Cap /proc/self/status
        grep Seccomp: /proc/self/status");
    for expected in [
        "cmdline is empty",
        "can't create /proc/cmdline: Read-only file system",
        "firmware is empty",
        "can't create /proc/sys/vm/drop_caches: Read-only file system",
        "1\nforwarding",
        "mknod: /tmp/disk: Operation not permitted",
        "CapInh:\t0000000000000000",
        "Seccomp:\t2",
    ] {
        assert!(out.contains(expected), "no {expected:?} in:\n{out}");
    }
}

fn nothing_of_the_host_stays_open() {
    let server = Plan::new(&[]).start();
    assert_eq!(server.failure, None);
    let directory = format!("/proc/{}/fd", server.pid);
    let mut seen = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let target = match std::fs::read_link(entry.unwrap().path()) {
            // One that init has closed meanwhile does not stay open.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            target => target.unwrap(),
        };
        let target = target.to_string_lossy();
        let known = ["socket:", "anon_inode:[signalfd]", "/dev/pts/", "/dev/console", "/0", "/ptmx", "/pts/"];
        assert!(known.iter().any(|known| target.contains(known)), "{target}");
        assert!(!target.contains("passwd") && !target.contains("memfd"), "{target}");
        seen += 1;
    }
    assert!(seen > 2, "{seen} descriptors");
}

fn links_of_the_root_disk_do_not_lead_out() {
    let outside = tempfile::tempdir().unwrap();
    let plan = Plan::new(&[]);
    let root = plan.root();
    symlink(outside.path(), root.join("mnt")).unwrap();
    symlink("../../../../../../tmp", root.join("sys")).unwrap();
    let server = plan.start();
    // Either it starts in spite of that or it says why not; but nothing is made outside.
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    if let Some(failure) = &server.failure {
        assert!(failure.contains("/mnt/new/file"), "{failure}");
    }
}

fn an_empty_root_disk_gets_its_directories() {
    let plan = Plan::new(&[]);
    for entry in std::fs::read_dir(plan.root()).unwrap() {
        std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
    let server = plan.start();
    assert_eq!(server.failure, None);
    for path in ["/proc/1/stat", "/sys/class", "/dev/console", "/run/vsinit/control"] {
        assert!(server.inside(path).exists(), "{path}");
    }
}

fn a_privileged_server_boots() {
    let mut server =
        Plan::new(&[("look", &script("id -u; echo 1 > /proc/sys/vm/drop_caches; cat /proc/self/uid_map"))])
            .privileged()
            .start();
    assert_eq!(server.failure, None);
    let out = server.wait_file("/out", "end\n");
    assert!(out.contains("drop_caches: Read-only file system") && out.contains("4294967295"), "{out}");
    assert_eq!(server.ask(init::control::Request::Reboot), init::control::Reply::Done);
    assert_eq!(server.wait_end(), Some(libc::SIGHUP));
}

fn an_unread_console() {
    let yes = "log = 'console'\nexec = 'yes'\n";
    let crash = "log = 'console'\nexec = ['sh', '-c', 'exit 1']\nrestart_delay_max_ms = 1\nrestart_delay_ms = 0\n";
    let server = Plan::new(&[("yes", yes), ("crash", crash)]).start();
    // Nobody reads the console meanwhile; vsinit's own messages fill what is left of it.
    while server.service("crash").restarts < 200 {}
    assert_eq!(server.service("yes").state, "running");
}

fn a_new_monitor_gets_the_consoles_again() {
    let mut server =
        Plan::new(&[("hello", "kind = 'oneshot'\nlog = 'console'\nexec = 'sh -c \"sleep 1; echo again\"'")]).start();
    // The old monitor dies.
    server.masters.clear();
    let mut found = control::consoles(server.socket().as_fd()).unwrap();
    assert_eq!(found.len(), 4, "console, tty1, tty2, notify socket");
    server.notify = found.pop();
    assert!(found.iter().all(|master| rustix::termios::isatty(master.as_fd())));
    server.masters = found;
    server.wait_console("again");
    assert!(PidFd::open(server.pid).is_ok() && server.masters[0].as_raw_fd() > 2);
}
