//! The other roles: the guest's own init, and the rescue shell.

use init::handover::Role;

use crate::Test;
use crate::server::Plan;

pub const TESTS: &[Test] = &[
    ("the_guests_own_init_takes_over", the_guests_own_init_takes_over),
    ("busybox_init_boots_and_reboots", busybox_init_boots_and_reboots),
    ("a_missing_init_is_a_failed_start", a_missing_init_is_a_failed_start),
    ("rescue_is_a_root_shell_that_comes_back", rescue_is_a_root_shell_that_comes_back),
];

/// Names a tree with systemd in it.
pub const TREE: &str = "VSINIT_SYSTEMD_TREE";

/// Only where there is one.
pub const SYSTEMD: Test = ("systemd_takes_over_and_hears_an_early_stop", systemd_takes_over);

fn exec(argv: &[&str]) -> Role {
    Role::Exec { argv: argv.iter().map(ToString::to_string).collect() }
}

fn the_guests_own_init_takes_over() {
    let script = "echo pid $$; env; grep Sig /proc/self/status; ls -l /proc/self/fd; echo end; sleep 1000";
    let mut server = Plan::new(&[]).role(exec(&["/bin/sh", "-c", script])).start();
    assert_eq!(server.failure, None);
    server.wait_console("end\r\n");
    for expected in [
        "pid 1\r\n",
        "container=vsos\r\n",
        "container_uuid=0e7a7c32-6b0a-4a53-9c4f-0d2a9d1f5b11\r\n",
        "NOTIFY_SOCKET=/run/host/notify\r\n",
        "LANG=C.UTF-8\r\n",
        "SigBlk:\t0000000000000000\r\n",
        "SigIgn:\t0000000000000000\r\n",
    ] {
        assert!(server.console.contains(expected), "no {expected:?} in:\n{}", server.console);
    }
    assert!(!server.console.contains("HOST_SECRET"));
    // The one that lists has no name any more.
    assert_eq!(server.console.matches(" -> ").count(), 3, "{}", server.console);
}

fn busybox_init_boots_and_reboots() {
    let plan = Plan::new(&[]).role(exec(&["/bin/init"]));
    std::fs::write(plan.root().join("etc/inittab"), "::sysinit:/bin/echo sysinit\n::once:/bin/sh -c 'echo up; grep SigBlk /proc/1/status'\n::shutdown:/bin/echo going down\n").unwrap();
    let mut server = plan.start();
    assert_eq!(server.failure, None);
    server.wait_console("SigBlk");
    server.signal(libc::SIGTERM);
    server.wait_console("going down");
    assert_eq!(server.wait_end(), Some(libc::SIGHUP), "{}", server.console);
}

fn a_missing_init_is_a_failed_start() {
    let server = Plan::new(&[]).role(exec(&["/sbin/no-such-init"])).start();
    let failure = server.failure.clone().unwrap_or_default();
    assert!(failure.contains("/sbin/no-such-init: No such file"), "{failure}");
}

fn rescue_is_a_root_shell_that_comes_back() {
    let mut server = Plan::new(&[("broken", "exec = 'never'")]).role(Role::Rescue).start();
    assert_eq!(server.failure, None);
    let say = |server: &crate::server::Server, text: &str| {
        rustix::io::write(&server.masters[0], text.as_bytes()).unwrap();
    };
    server.wait_state("rescue", "running");
    say(&server, "echo $((6*7)) $(id -u) $(tty)\n");
    server.wait_console("42 0 /dev/");
    say(&server, "exit\n");
    let again = server.wait_for("second shell", |server| {
        Some(server.service("rescue")).filter(|s| s.restarts == 1 && s.state == "running")
    });
    assert!(again.pid.is_some());
    say(&server, "echo back $((40+4))\n");
    server.wait_console("back 44");
    assert_eq!(server.list().len(), 1);
}

fn systemd_takes_over() {
    let tree = std::path::PathBuf::from(std::env::var_os(TREE).unwrap());
    let plan = || Plan::new(&[]).tree(&tree).role(exec(&["/sbin/init"]));
    let mut server = plan().start();
    assert_eq!(server.failure, None);
    server.wait_for("READY=1", |server| server.notified.lines().any(|line| line == "READY=1").then_some(()));
    server.signal(libc::SIGRTMIN() + 4);
    assert_eq!(server.wait_end(), Some(libc::SIGINT), "{}", server.console);
    // The stop comes before systemd has opened its eyes, and is not lost.
    let mut server = plan().start();
    server.signal(libc::SIGRTMIN() + 4);
    assert_eq!(server.wait_end(), Some(libc::SIGINT), "{}", server.console);
}
