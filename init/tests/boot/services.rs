//! Services: order, restarts, readiness, logs, identity, orphans.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use init::control::{Reply, Request};

use crate::Test;
use crate::server::{Plan, Server};

pub const TESTS: &[Test] = &[
    ("services_boot_to_running_and_are_listed", services_boot_to_running_and_are_listed),
    ("services_start_in_order", services_start_in_order),
    ("a_cycle_is_named_and_the_rest_runs", a_cycle_is_named_and_the_rest_runs),
    ("bad_files_are_named_and_the_rest_runs", bad_files_are_named_and_the_rest_runs),
    ("a_crashing_service_is_restarted_with_pauses", a_crashing_service_is_restarted_with_pauses),
    ("five_thousand_orphans_are_reaped_and_no_status_is_lost", five_thousand_orphans),
    ("readiness_is_what_the_program_says", readiness_is_what_the_program_says),
    ("logs_are_bounded_and_can_be_read", logs_are_bounded_and_can_be_read),
    ("a_service_runs_as_its_file_says", a_service_runs_as_its_file_says),
    ("start_stop_restart_follow_requirements", start_stop_restart_follow_requirements),
    ("a_service_that_ignores_its_stop_signal_is_killed", a_stubborn_service_is_killed),
    ("files_are_read_again_on_sighup", files_are_read_again_on_sighup),
    ("the_command_works_inside", the_command_works_inside),
    ("silent_clients_harm_nobody", silent_clients_harm_nobody),
    ("a_getty_gets_its_terminal", a_getty_gets_its_terminal),
];

/// Only for the program as it is shipped.
pub const SMALL: Test = ("an_idle_supervisor_is_small", an_idle_supervisor_is_small);

const SLEEP: &str = "exec = 'sleep 1000'\n";

fn oneshot(script: &str) -> String {
    format!("kind = 'oneshot'\nexec = ['sh', '-c', '''{script}''']\n")
}

fn daemon(script: &str) -> String {
    format!("exec = ['sh', '-c', '''{script}''']\n")
}

fn services_boot_to_running_and_are_listed() {
    let mut server = Plan::new(&[("a", SLEEP), ("b", &oneshot("exit 0")), ("c", &oneshot("exit 3"))]).start();
    assert_eq!(server.failure, None);
    server.wait_console("2 of 3 services are up");
    assert_eq!(server.service("a").state, "running");
    assert!(server.service("a").pid.is_some());
    assert_eq!(server.service("b").state, "done");
    assert_eq!(server.service("c").state, "failed");
    assert_eq!(server.service("c").last.as_deref(), Some("exit 3"));
    // The monitor hears that the boot is over.
    server.wait_for("READY=1", |server| server.notified.lines().any(|line| line == "READY=1").then_some(()));
}

fn services_start_in_order() {
    let late = oneshot("sleep 0.2; echo first >> /order");
    let server = &mut Plan::new(&[
        ("z-first", &late),
        ("m-second", &format!("{}requires = ['z-first']", oneshot("echo second >> /order"))),
        ("a-third", &format!("{}after = ['m-second', 'no-such-service']", oneshot("echo third >> /order"))),
        ("b-never", &format!("{}requires = ['fails']", oneshot("echo never >> /order"))),
        ("c-anyway", &format!("{}after = ['fails', 'a-third']", oneshot("echo anyway >> /order"))),
        ("fails", &oneshot("exit 1")),
    ])
    .start();
    assert_eq!(server.wait_file("/order", "anyway"), "first\nsecond\nthird\nanyway\n");
    let never = server.wait_state("b-never", "failed");
    assert_eq!(never.last.as_deref(), Some("requires 'fails', which is not up"));
}

fn a_cycle_is_named_and_the_rest_runs() {
    let mut server = Plan::new(&[
        ("a", &format!("{SLEEP}after = ['b']")),
        ("b", &format!("{SLEEP}requires = ['a']")),
        ("c", SLEEP),
        ("self", &format!("{SLEEP}after = ['self']")),
    ])
    .start();
    server.wait_console("come after each other: a → b → a");
    server.wait_console("self → self");
    server.wait_state("c", "running");
    for name in ["a", "b", "self"] {
        assert_eq!(server.service(name).state, "failed");
    }
    let reply = server.ask(Request::Start { name: "a".into() });
    assert_eq!(reply, Reply::Failed { message: "a comes after itself: a → b → a".into() });
}

fn bad_files_are_named_and_the_rest_runs() {
    let mut server = Plan::new(&[
        ("good", SLEEP),
        ("typo", "exec = 'true'\nrestrat = 'never'\n"),
        ("gone", "exec = '/no/such/program'\nrestart = 'never'\n"),
        ("nobody", "exec = 'true'\nuser = 'nobody-here'\nrestart = 'never'\n"),
    ])
    .start();
    server.wait_console("/etc/vsinit/typo.toml:2:1: unknown key 'restrat', did you mean 'restart'?");
    server.wait_state("good", "running");
    assert_eq!(server.service("typo").state, "invalid");
    assert_eq!(server.wait_state("gone", "failed").last.as_deref(), Some("no program '/no/such/program'"));
    assert_eq!(server.wait_state("nobody", "failed").last.as_deref(), Some("no user 'nobody-here'"));
    for (name, expected) in [("typo", "did you mean"), ("gone", "no program"), ("nix", "no service 'nix'")] {
        match server.ask(Request::Start { name: name.into() }) {
            Reply::Failed { message } => assert!(message.contains(expected), "{message}"),
            reply => panic!("{reply:?}"),
        }
    }
}

fn a_crashing_service_is_restarted_with_pauses() {
    let crash = format!("{}restart_delay_ms = 10\nrestart_delay_max_ms = 80\n", daemon("echo x >> /runs; kill -9 $$"));
    let once = format!("{}restart = 'on-failure'\n", daemon("echo x >> /once"));
    let mut server = Plan::new(&[("crash", &crash), ("once", &once)]).start();
    server.wait_console("crash: killed by SIGKILL; again in 10 ms");
    server.wait_console("again in 20 ms");
    server.wait_console("again in 80 ms");
    let service = server.wait_for("some restarts", |s| Some(s.service("crash")).filter(|c| c.restarts >= 5));
    assert_eq!(service.last.as_deref(), Some("killed by SIGKILL"));
    assert_eq!(server.service("once").state, "done");
    assert_eq!(server.read("/once").unwrap(), "x\n");
    assert_eq!(server.ask(Request::Stop { name: "crash".into() }), Reply::Done);
    assert_eq!(server.service("crash").state, "stopped");
    assert!(!server.console.contains("again in 160 ms"));
}

fn five_thousand_orphans() {
    // Their parents end at once, so all of them come to PID 1; they end while others begin.
    let many = oneshot("i=0; while [ $i -lt 5000 ]; do (sleep 0 &); i=$((i+1)); done");
    let marked = oneshot("sleep 0.5; exit 42");
    let mut server = Plan::new(&[("many", &many), ("marked", &marked), ("stays", SLEEP)]).start();
    assert_eq!(server.wait_state("marked", "failed").last.as_deref(), Some("exit 42"));
    server.wait_state("many", "done");
    server.wait_for("only the service left", |server| (server.children() == 1).then_some(()));
    assert_eq!(server.service("stays").restarts, 0);
}

fn readiness_is_what_the_program_says() {
    let plan = Plan::new(&[
        (
            "slow",
            &format!(
                "{}notify = true\n",
                daemon("until [ -e /go ]; do sleep 0.05; done; notify-ready; exec sleep 1000")
            ),
        ),
        ("next", &format!("{}requires = ['slow']\n", oneshot("echo next > /next"))),
        ("mute", &format!("{SLEEP}notify = true\nstart_timeout_ms = 50\nrestart = 'never'\n")),
    ]);
    let mut server = plan.with_notify_ready().start();
    assert_eq!(server.wait_state("mute", "failed").last.as_deref(), Some("killed by SIGKILL"));
    assert_eq!(server.service("slow").state, "starting");
    assert_eq!(server.service("next").state, "waiting");
    std::fs::write(server.root().join("go"), "").unwrap();
    server.wait_state("slow", "running");
    server.wait_file("/next", "next");
}

fn logs_are_bounded_and_can_be_read() {
    let chatty = format!("{}log_size_bytes = 20000\n", oneshot("seq 1 20000; echo error >&2; printf no-newline"));
    let mut server =
        Plan::new(&[("chatty", &chatty), ("quiet", &format!("{}log = 'none'", oneshot("echo hidden")))]).start();
    server.wait_state("chatty", "done");
    let text = match server.ask(Request::Log { name: "chatty".into(), lines: 3 }) {
        Reply::Log { text } => text,
        reply => panic!("{reply:?}"),
    };
    let ends: Vec<&str> = text.lines().map(|line| line.split_once("Z ").unwrap().1).collect();
    assert_eq!(ends, ["20000", "error", "no-newline"]);
    server.wait_state("quiet", "done");
    let mut files: Vec<(String, u64)> = std::fs::read_dir(server.root().join("var/log/vsinit"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len()))
        .collect();
    files.sort();
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["chatty.log", "chatty.log.1"]);
    // One piece of output may pass the limit.
    assert!(files.iter().all(|(_, size)| *size < 60_000), "{files:?}");
}

fn a_service_runs_as_its_file_says() {
    let file = "kind = 'oneshot'\nuser = 'web'\ndir = '/tmp'\nenv = { COLOUR = 'blue' }\n\
        limits = { nofile = '77:88', core = 0 }\nlog = 'file'\n\
        exec = ['sh', '-c', '''id -u; id -g; id -G; pwd; echo $COLOUR $HOME $USER $LANG; ulimit -n; ulimit -Hn; cat /proc/self/stat | cut -d' ' -f6; echo $$; ls -l /proc/self/fd; grep Sig /proc/self/status; echo end''']";
    let mut server = Plan::new(&[("who", file)]).start();
    server.wait_state("who", "done");
    let out = server.wait_file("/var/log/vsinit/who.log", "end");
    let lines: Vec<&str> = out.lines().map(|line| line.split_once("Z ").unwrap().1).collect();
    assert_eq!(lines[..7], ["33", "34", "34 77", "/tmp", "blue /tmp web C.UTF-8", "77", "88"], "{out}");
    assert_eq!(lines[7], lines[8], "it leads its own session");
    assert!(out.contains("0 -> /dev/null") && out.matches(" -> pipe:").count() == 2, "{out}");
    assert_eq!(out.matches(" -> ").count(), 3, "{out}");
    assert!(out.contains("SigBlk:\t0000000000000000") && out.contains("SigIgn:\t0000000000000000"), "{out}");
}

fn start_stop_restart_follow_requirements() {
    let mut server = Plan::new(&[
        ("db", &daemon("trap 'echo db down >> /order; exit' TERM; while :; do sleep 0.05; done")),
        (
            "app",
            &format!(
                "{}requires = ['db']",
                daemon("trap 'sleep 0.2; echo app down >> /order; exit' TERM; while :; do sleep 0.05; done")
            ),
        ),
    ])
    .start();
    server.wait_state("app", "running");
    // Time to set the traps.
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(server.ask(Request::Stop { name: "db".into() }), Reply::Done);
    assert_eq!(server.read("/order").unwrap(), "app down\ndb down\n");
    assert_eq!(server.service("app").state, "stopped");
    assert_eq!(server.ask(Request::Start { name: "app".into() }), Reply::Done);
    assert_eq!(server.service("db").state, "running");
    let before = server.service("db").pid;
    assert_eq!(server.ask(Request::Restart { name: "db".into() }), Reply::Done);
    assert_ne!(server.service("db").pid, before);
    assert_eq!(server.service("app").state, "running");
}

fn a_stubborn_service_is_killed() {
    let stubborn =
        format!("{}stop_timeout_ms = 100\n", daemon("trap '' TERM; touch /set; while :; do sleep 0.05; done"));
    let polite = format!(
        "{}stop_signal = 'SIGRTMIN+2'\n",
        daemon("trap 'touch /asked; exit' RTMIN+2 36; touch /set2; while :; do sleep 0.05; done")
    );
    let mut server = Plan::new(&[("stubborn", &stubborn), ("polite", &polite)]).start();
    server.wait_for("trap", |s| s.read("/set").ok().and(s.read("/set2").ok()));
    assert_eq!(server.ask(Request::Stop { name: "stubborn".into() }), Reply::Done);
    assert_eq!(server.service("stubborn").last.as_deref(), Some("killed by SIGKILL"));
    server.wait_console("stubborn: takes too long, killed");
    assert_eq!(server.ask(Request::Stop { name: "polite".into() }), Reply::Done);
    assert_eq!(server.read("/asked").unwrap(), "");
}

fn files_are_read_again_on_sighup() {
    let mut server = Plan::new(&[("old", SLEEP), ("stays", SLEEP)]).start();
    let before = server.wait_state("stays", "running").pid;
    let directory = server.root().join("etc/vsinit");
    std::fs::remove_file(directory.join("old.toml")).unwrap();
    std::fs::write(directory.join("new.toml"), SLEEP).unwrap();
    server.signal(libc::SIGHUP);
    server.wait_for("new service", |s| s.list().iter().any(|l| l.name == "new" && l.state == "running").then_some(()));
    server.wait_for("end of the old one", |s| s.list().iter().all(|l| l.name != "old").then_some(()));
    assert_eq!(server.service("stays").pid, before);
}

fn the_command_works_inside() {
    let script = oneshot(
        "vsinit list; vsinit stop sleeper; echo stop $?; vsinit start nix; echo start $?; vsinit log -n 1 talker; vsinit; echo usage $?; vsinit --version; echo end",
    );
    let plan = Plan::new(&[
        ("script", &format!("{script}after = ['sleeper', 'talker']")),
        ("sleeper", SLEEP),
        ("talker", &oneshot("echo words")),
    ]);
    let mut server = plan.with_vsinit().start();
    let out = server.wait_file("/var/log/vsinit/script.log", "end\n");
    for expected in [
        "SERVICE ",
        "sleeper  running",
        "stop 0",
        "vsinit: no service 'nix'",
        "start 1",
        "Z words",
        "usage 2",
        "vsinit 0.",
    ] {
        assert!(out.contains(expected), "no {expected:?} in:\n{out}");
    }
    assert_eq!(server.service("sleeper").state, "stopped");
}

fn silent_clients_harm_nobody() {
    let server = Plan::new(&[("a", SLEEP)]).start();
    let socket = server.socket();
    let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
    let silent: Vec<UnixStream> = (0..100).map(|_| UnixStream::connect(&path).unwrap()).collect();
    assert_eq!(server.list().len(), 1);
    drop(silent);
    assert_eq!(server.list().len(), 1);
}

fn a_getty_gets_its_terminal() {
    let shell = "exec = ['sh']\nconsole = '/dev/tty1'\n";
    let mut server = Plan::new(&[("shell", shell)]).start();
    server.wait_state("shell", "running");
    // The first master is the console's, the second tty1's: from here on the test reads that one.
    server.masters.remove(0);
    rustix::io::write(&server.masters[0], b"ps -o pid,tty,args; tty; echo $TERM | cat; echo e''nd\n").unwrap();
    server.wait_console("end\r\n");
    assert!(server.console.contains("/dev/") && server.console.contains("linux\r\n"), "{}", server.console);
    assert!(!server.console.contains("can't access tty"), "{}", server.console);
}

fn an_idle_supervisor_is_small() {
    let size = std::fs::metadata(crate::server::program()).unwrap().len();
    assert!(size <= 2 << 20, "{size} bytes on disk");
    let log = oneshot("seq 1 5000");
    let mut server = Plan::new(&[("a", SLEEP), ("b", SLEEP), ("c", SLEEP), ("d", &log)]).start();
    server.wait_state("d", "done");
    // Given back as soon as there is a moment without an event. The program's own pages are clean, and shared by all servers.
    let private_kib = |server: &mut Server| {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", server.pid)).unwrap();
        let private = text.lines().filter(|line| line.starts_with("Private_Dirty"));
        private.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum::<u64>()
    };
    let kib = server.wait_for("little private memory", |server| Some(private_kib(server)).filter(|kib| *kib <= 96));
    println!("{size} bytes on disk, {kib} KiB private");
    // A day's requests leave nothing behind either.
    for _ in 0..50 {
        assert_eq!(server.list().len(), 4);
        server.ask(Request::Log { name: "d".into(), lines: 1000 });
    }
    server.wait_for("no more after requests", |server| (private_kib(server) <= 96).then_some(()));
}
