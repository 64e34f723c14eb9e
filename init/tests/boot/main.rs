//! vsinit as a real PID 1: each test is a promise to who runs a server.
//!
//! They take root, a static busybox and unprivileged namespaces; where these are missing the
//! tests are counted as ignored, with the reason. No test asserts a time.
#![forbid(unsafe_code)]

mod prepared;
mod roles;
mod server;
mod services;
mod shutdown;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

fn main() {
    if std::env::args().next().is_some_and(|name| name.ends_with("notify-ready")) {
        return notify_ready();
    }
    let mut arguments = Arguments::from_args();
    // Forking takes a process with one thread: the tests run one after the other in this one.
    arguments.test_threads = Some(1);
    let missing = missing();
    let small = missing
        .or(std::env::var_os(server::PROGRAM).is_none().then_some("needs the static vsinit in VSINIT_UNDER_TEST"));
    let systemd = missing
        .or(std::env::var_os(roles::TREE).is_none().then_some("needs a tree with systemd in VSINIT_SYSTEMD_TREE"));
    let tests = [prepared::TESTS, roles::TESTS, services::TESTS, shutdown::TESTS];
    let trials = tests.into_iter().flatten().map(|(name, test)| trial(name, *test, missing));
    let (name, test) = services::SMALL;
    let trials = trials.chain([trial(name, test, small)]);
    let (name, test) = roles::SYSTEMD;
    let trials = trials.chain([trial(name, test, systemd)]).collect();
    libtest_mimic::run(&arguments, trials).exit()
}

/// A test's name and body; it fails by panic.
type Test = (&'static str, fn());

fn trial(name: &str, test: fn(), missing: Option<&'static str>) -> Trial {
    Trial::ignorable_test(name, move || match missing {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => {
            let result = std::panic::catch_unwind(test);
            result.map(|()| Completion::Completed).map_err(|_| Failed::from("see the panic above"))
        }
    })
}

/// What this program is inside a server: busybox has nothing that sends to a datagram socket.
fn notify_ready() {
    let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let path = std::env::var("NOTIFY_SOCKET").unwrap();
    socket.send_to(b"STATUS=up\nREADY=1\n", path).unwrap();
}

/// What this host lacks.
fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root");
    }
    let busybox = std::fs::read("/bin/busybox").ok();
    match busybox {
        None => Some("needs /bin/busybox (package busybox-static)"),
        // A dynamic one names its interpreter behind the headers.
        Some(program) if has_interpreter(&program) => Some("needs a static busybox (package busybox-static)"),
        Some(_) => None,
    }
}

fn has_interpreter(program: &[u8]) -> bool {
    let headers = program.get(..4096).unwrap_or(program);
    headers.windows(4).any(|window| window == b"/ld-")
}
