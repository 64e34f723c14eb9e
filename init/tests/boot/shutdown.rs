//! The end of a server: what asks for it, in which order, and what the monitor sees.

use init::control::{Reply, Request};

use crate::Test;
use crate::server::Plan;

pub const TESTS: &[Test] = &[
    ("poweroff_and_reboot_reach_the_monitor", poweroff_and_reboot_reach_the_monitor),
    ("signals_end_the_server", signals_end_the_server),
    ("poweroff_from_inside_works", poweroff_from_inside_works),
    ("services_stop_in_reverse_order", services_stop_in_reverse_order),
    ("start_and_stop_at_once_never_hang", start_and_stop_at_once_never_hang),
];

const SLEEP: &str = "exec = 'sleep 1000'\n";

fn poweroff_and_reboot_reach_the_monitor() {
    for (request, signal) in
        [(Request::Poweroff, libc::SIGINT), (Request::Halt, libc::SIGINT), (Request::Reboot, libc::SIGHUP)]
    {
        let mut server = Plan::new(&[("a", SLEEP)]).start();
        assert_eq!(server.ask(request), Reply::Done);
        assert_eq!(server.wait_end(), Some(signal), "{}", server.console);
    }
}

fn signals_end_the_server() {
    let (halt, poweroff) = (libc::SIGRTMIN() + 3, libc::SIGRTMIN() + 4);
    for (sent, seen) in [
        (libc::SIGPWR, libc::SIGINT),
        (libc::SIGUSR1, libc::SIGINT),
        (libc::SIGUSR2, libc::SIGINT),
        (halt, libc::SIGINT),
        (poweroff, libc::SIGINT),
        (libc::SIGTERM, libc::SIGHUP),
        (libc::SIGINT, libc::SIGHUP),
    ] {
        let mut server = Plan::new(&[]).start();
        server.signal(sent);
        assert_eq!(server.wait_end(), Some(seen), "signal {sent}: {}", server.console);
    }
}

fn poweroff_from_inside_works() {
    let plan = Plan::new(&[("bye", "kind = 'oneshot'\nexec = 'poweroff'\n")]);
    let poweroff = plan.root().join("bin/poweroff");
    std::fs::remove_file(&poweroff).unwrap();
    std::os::unix::fs::symlink("../sbin/vsinit", poweroff).unwrap();
    let mut server = plan.with_vsinit().start();
    assert_eq!(server.wait_end(), Some(libc::SIGINT), "{}", server.console);
}

fn services_stop_in_reverse_order() {
    let trap = |name: &str, pause: &str| {
        format!(
            "exec = ['sh', '-c', '''trap 'sleep {pause}; echo {name} >> /order; exit' TERM; echo x >> /set; while :; do sleep 0.05; done''']\n"
        )
    };
    let mut server = Plan::new(&[
        ("log", &trap("log", "0")),
        ("db", &format!("{}after = ['log']", trap("db", "0.1"))),
        ("app", &format!("{}requires = ['db']", trap("app", "0.2"))),
        ("stranger", "kind = 'oneshot'\nexec = ['sh', '-c', '(sleep 1000 &)']\n"),
    ])
    .start();
    server.wait_file("/set", "x\nx\nx\n");
    server.signal(libc::SIGPWR);
    assert_eq!(server.wait_end(), Some(libc::SIGINT), "{}", server.console);
    assert_eq!(server.read("/order").unwrap(), "app\ndb\nlog\n");
}

fn start_and_stop_at_once_never_hang() {
    for _ in 0..20 {
        let mut server = Plan::new(&[("a", SLEEP)]).start();
        server.signal(libc::SIGRTMIN() + 4);
        assert_eq!(server.wait_end(), Some(libc::SIGINT), "{}", server.console);
    }
}
