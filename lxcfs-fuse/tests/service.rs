//! The service as the manager and its guests know it: the real program, a real mount, a real cgroup.
//!
//! Needs root and /dev/fuse; without them every test is counted as ignored.

use std::io::{self, Read};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kernel::process::PidFd;
use libtest_mimic::{Arguments, Failed, Trial};

mod stage;
use stage::Stage;

/// Long enough for anything here on a machine that is busy; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let missing = missing();
    if let Some(missing) = missing {
        eprintln!("ignored: {missing}");
    }
    let tests: [(&str, fn()); 13] = [
        ("every_file_of_a_registered_server_can_be_read", every_file_of_a_registered_server_can_be_read),
        ("sendfile_never_says_that_a_file_is_empty", sendfile_never_says_that_a_file_is_empty),
        ("a_server_sees_its_limits_as_they_are_now", a_server_sees_its_limits_as_they_are_now),
        ("a_second_serve_says_that_it_is_live", a_second_serve_says_that_it_is_live),
        ("an_unregistered_server_is_gone_for_open_paths_too", an_unregistered_server_is_gone_for_open_paths_too),
        ("a_malformed_registration_hurts_nobody_else", a_malformed_registration_hurts_nobody_else),
        ("a_removed_cgroup_is_an_error_and_is_let_go", a_removed_cgroup_is_an_error_and_is_let_go),
        ("readers_do_not_notice_that_workers_are_killed", readers_do_not_notice_that_workers_are_killed),
        ("an_open_file_outlives_its_worker", an_open_file_outlives_its_worker),
        ("a_worker_that_hangs_is_replaced", a_worker_that_hangs_is_replaced),
        ("a_service_that_cannot_come_back_lets_its_readers_go", a_service_that_cannot_come_back_lets_its_readers_go),
        ("a_killed_supervisor_is_cleaned_up_by_the_next_serve", a_killed_supervisor_is_cleaned_up_by_the_next_serve),
        ("stop_leaves_no_mount_and_no_process", stop_leaves_no_mount_and_no_process),
    ];
    let trials = tests.into_iter().map(|(name, test)| {
        let trial = Trial::test(name, move || {
            test();
            Ok::<(), Failed>(())
        });
        trial.with_ignored_flag(missing.is_some())
    });
    let mut arguments = Arguments::from_args();
    // `--include-ignored` cannot make a machine have what it has not; and two cores do not serve twelve at once.
    arguments.ignored &= missing.is_none();
    arguments.include_ignored &= missing.is_none();
    arguments.test_threads.get_or_insert(1);
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Why the tests cannot run here.
fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root, to mount and to make cgroups");
    }
    let fuse = std::fs::File::options().read(true).write(true).open("/dev/fuse");
    fuse.is_err().then_some("needs /dev/fuse")
}

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_lxcfs-fuse"))
}

fn serving() -> Stage {
    let stage = Stage::new(program());
    stage.serve();
    stage
}

fn kill(pid: i32, signal: i32) {
    let process = PidFd::open(pid).expect("open a process");
    process.signal(signal).expect("send a signal");
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for a worker other than `before`.
fn next_worker(stage: &Stage, before: i32) -> i32 {
    wait_until("a new worker", || stage.worker().is_some_and(|worker| worker != before));
    stage.worker().expect("there was one a moment ago")
}

fn value(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("the line is there");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn every_file_of_a_registered_server_can_be_read() {
    let stage = serving();
    let files = std::fs::read_to_string(stage.run().join("files")).expect("read the list of files");
    assert!(files.lines().any(|file| file == "proc/meminfo"));
    for file in files.lines() {
        match std::fs::read_to_string(stage.file(file)) {
            Ok(text) => assert!(text.is_empty() || text.ends_with('\n'), "{file}: {text}"),
            // A kernel with psi=0 says the same of its own files.
            Err(error) => {
                assert!(file.starts_with("proc/pressure/"), "{file}: {error}");
                assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "{file}: {error}");
            }
        }
        let refused = std::fs::File::options().write(true).open(stage.file(file)).map(|_| ());
        assert!(refused.is_err(), "{file} can be opened for writing");
    }
    let mut listed: Vec<_> =
        std::fs::read_dir(stage.file("proc")).expect("list").flatten().map(|entry| entry.file_name()).collect();
    listed.sort();
    assert_eq!(listed[0], "cpuinfo");
    assert_eq!(std::fs::metadata(stage.file("proc/stat")).expect("stat").len(), 4096);
    assert_eq!(std::fs::metadata(stage.file("sys/devices/system/cpu/online")).expect("stat").len(), 4096);
    let unknown = std::fs::read(stage.run().join("mount/2/proc/stat")).unwrap_err();
    assert_eq!(unknown.kind(), io::ErrorKind::NotFound);
}

/// busybox cat(1) tries sendfile(2) first, and falls back to read(2) only when that fails.
fn sendfile_never_says_that_a_file_is_empty() {
    let stage = serving();
    for file in ["proc/uptime", "proc/meminfo", "sys/devices/system/cpu/online"] {
        for _ in 0..2 {
            let from = std::fs::File::open(stage.file(file)).expect("open");
            let (_reader, to) = rustix::pipe::pipe().expect("make a pipe");
            let sent = rustix::fs::sendfile(&to, &from, None, 65536);
            assert!(!matches!(sent, Ok(0)), "{file} ends at once");
        }
    }
}

fn a_server_sees_its_limits_as_they_are_now() {
    let stage = serving();
    let meminfo = || std::fs::read_to_string(stage.file("proc/meminfo")).expect("read meminfo");
    for limit in [128 << 20, 64 << 20_u64] {
        stage.group.set_memory(Some(limit), None).expect("limit memory");
        assert_eq!(value(&meminfo(), "MemTotal"), limit / 1024);
    }
    stage.group.set_cpus(Some(0.5)).expect("limit CPUs");
    assert_eq!(std::fs::read_to_string(stage.file("sys/devices/system/cpu/online")).expect("read"), "0\n");
    let stat = std::fs::read_to_string(stage.file("proc/stat")).expect("read stat");
    assert_eq!(stat.lines().filter(|line| line.starts_with("cpu")).count(), 2);
    let uptime = std::fs::read_to_string(stage.file("proc/uptime")).expect("read uptime");
    let seconds: f64 = uptime.split(' ').next().and_then(|word| word.parse().ok()).expect("a number");
    // Registered as started 100 s ago, on a stage that is younger than the patience of its tests.
    assert!((100.0..100.0 + PATIENCE.as_secs_f64()).contains(&seconds), "{uptime}");
}

fn a_second_serve_says_that_it_is_live() {
    let stage = serving();
    let supervisor = stage.supervisor();
    let (code, text) = stage.command("serve");
    assert_eq!(code, Some(0));
    assert!(text.contains("already serving"), "{text}");
    assert_eq!(stage.supervisor(), supervisor);
}

fn an_unregistered_server_is_gone_for_open_paths_too() {
    let stage = serving();
    let path = stage.file("proc/uptime");
    // As a bind mount does: the inode is reached without looking any name up.
    let directory =
        rustix::fs::open(&path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).expect("open the path");
    let again = || {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&directory));
        std::fs::read_to_string(path)
    };
    again().expect("read through the descriptor");
    std::fs::remove_file(stage.registration(1)).expect("unregister");
    wait_until("the path to go", || {
        std::fs::metadata(&path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    });
    let error = again().expect_err("the server is not registered");
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE), "{error}");
    stage.register(1);
    wait_until("the server to come back", || again().is_ok());
}

fn a_malformed_registration_hurts_nobody_else() {
    let stage = serving();
    std::fs::write(stage.registration(2), "name = ").expect("write a malformed registration");
    for _ in 0..3 {
        let error = std::fs::read(stage.run().join("mount/2/proc/stat")).expect_err("the registration is malformed");
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
        std::fs::read(stage.file("proc/stat")).expect("read another server's file");
    }
    let lines = stage.log().lines().filter(|line| line.contains("2.toml")).count();
    assert_eq!(lines, 1, "one line for a malformed registration: {}", stage.log());
}

fn a_removed_cgroup_is_an_error_and_is_let_go() {
    let stage = serving();
    let held = || {
        let worker = stage.worker().expect("there is a worker");
        let descriptors = std::fs::read_dir(format!("/proc/{worker}/fd")).expect("list descriptors").flatten();
        let targets = descriptors.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        targets.filter(|target| target.to_string_lossy().contains(&*stage.group.path().to_string_lossy())).count()
    };
    std::fs::read(stage.file("proc/meminfo")).expect("read meminfo");
    assert!(held() > 0);
    stage.group.remove().expect("remove the cgroup");
    let error = std::fs::read(stage.file("proc/meminfo")).expect_err("the cgroup is gone");
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE), "{error}");
    assert_eq!(held(), 0, "descriptors of a removed cgroup are closed");
    stage.group.create().expect("create the cgroup again");
    std::fs::read(stage.file("proc/meminfo")).expect("a restarted server is read anew");
}

fn readers_do_not_notice_that_workers_are_killed() {
    let stage = serving();
    let (done, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let failures: Vec<String> = std::thread::scope(|scope| {
        let files = ["proc/stat", "proc/meminfo", "proc/uptime", "proc/loadavg"];
        let readers = files.map(|file| {
            let (stage, done, reads) = (&stage, &done, &reads);
            scope.spawn(move || read_until(done, reads, &stage.file(file)))
        });
        let killed = std::panic::catch_unwind(|| kill_twenty_workers(&stage, &reads));
        done.store(true, Ordering::Relaxed);
        let ended = std::panic::catch_unwind(AssertUnwindSafe(|| {
            wait_until("all readers to have their answers", || readers.iter().all(|reader| reader.is_finished()));
        }));
        if ended.is_err() {
            // A reader that nobody answers would wait for ever, and this test for it.
            stage.command("stop");
        }
        let failures = readers.into_iter().flat_map(|reader| reader.join().expect("a reader ends")).collect();
        killed.expect("reads go on whenever a worker was killed");
        ended.expect("no reader is left without an answer");
        failures
    });
    assert!(failures.is_empty(), "{} of {} reads: {failures:?}", failures.len(), reads.load(Ordering::Relaxed));
}

/// Reads a file again and again; what went wrong.
fn read_until(done: &AtomicBool, reads: &AtomicU64, file: &Path) -> Vec<String> {
    let mut failures = Vec::new();
    while !done.load(Ordering::Relaxed) {
        match std::fs::read_to_string(file) {
            Ok(text) if text.ends_with('\n') => {}
            Ok(text) => failures.push(format!("{}: cut: {text:?}", file.display())),
            Err(error) => failures.push(format!("{}: {error}", file.display())),
        }
        reads.fetch_add(1, Ordering::Relaxed);
    }
    failures
}

fn kill_twenty_workers(stage: &Stage, reads: &AtomicU64) {
    let mut worker = stage.worker().expect("there is a worker");
    let reads_go_on = || {
        let before = reads.load(Ordering::Relaxed);
        wait_until("reads to go on", || reads.load(Ordering::Relaxed) > before + 100);
    };
    for _ in 0..20 {
        reads_go_on();
        kill(worker, libc::SIGKILL);
        worker = next_worker(stage, worker);
    }
    reads_go_on();
}

fn an_open_file_outlives_its_worker() {
    let stage = serving();
    let mut file = std::fs::File::open(stage.file("proc/meminfo")).expect("open meminfo");
    let mut first = [0; 64];
    file.read_exact(&mut first).expect("read the beginning");
    let worker = stage.worker().expect("there is a worker");
    kill(worker, libc::SIGKILL);
    next_worker(&stage, worker);
    let mut rest = String::new();
    file.read_to_string(&mut rest).expect("read the rest from another worker");
    assert!(rest.contains("SwapTotal:") && rest.ends_with('\n'), "{rest}");
}

fn a_worker_that_hangs_is_replaced() {
    let stage = serving();
    let worker = stage.worker().expect("there is a worker");
    kill(worker, libc::SIGSTOP);
    // Blocks until the supervisor has noticed; the request goes to the next worker.
    std::fs::read(stage.file("proc/stat")).expect("read, from the next worker");
    assert_ne!(stage.worker(), Some(worker));
}

fn a_service_that_cannot_come_back_lets_its_readers_go() {
    let directory = tempfile::tempdir().expect("make a temporary directory");
    let copy = directory.path().join("lxcfs-fuse");
    std::fs::copy(program(), &copy).expect("copy the program");
    let stage = Stage::new(&copy);
    stage.serve();
    let (supervisor, worker) = (stage.supervisor(), stage.worker().expect("there is a worker"));
    let waits = PidFd::open(supervisor).expect("open the supervisor");
    std::fs::copy("/bin/false", directory.path().join("new")).expect("copy a program that fails");
    std::fs::rename(directory.path().join("new"), &copy).expect("replace the program");
    kill(worker, libc::SIGKILL);
    let error = std::fs::read(stage.file("proc/stat")).expect_err("nobody answers");
    assert!(matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED | libc::ENOENT)), "{error}");
    assert!(waits.wait_exit(Some(PATIENCE.as_millis() as u64)).expect("wait for the supervisor"));
    assert!(!stage.has_mounts());
    assert!(stage.log().contains("giving up"), "{}", stage.log());
    std::fs::copy(program(), directory.path().join("new")).expect("copy the program");
    std::fs::rename(directory.path().join("new"), &copy).expect("bring the program back");
}

fn a_killed_supervisor_is_cleaned_up_by_the_next_serve() {
    let stage = serving();
    let (supervisor, worker) = (stage.supervisor(), stage.worker().expect("there is a worker"));
    kill(supervisor, libc::SIGKILL);
    wait_until("supervisor and worker to end", || !stage::is_alive(supervisor) && !stage::is_alive(worker));
    let error = std::fs::read(stage.file("proc/stat")).expect_err("the mount is dead");
    // The second while the kernel is still about to close the connection.
    assert!(matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)), "{error}");
    stage.serve();
    std::fs::read(stage.file("proc/stat")).expect("the new mount answers");
}

fn stop_leaves_no_mount_and_no_process() {
    let stage = serving();
    let (supervisor, worker) = (stage.supervisor(), stage.worker().expect("there is a worker"));
    // A file in use makes an orderly unmount impossible.
    let _held = std::fs::File::open(stage.file("proc/stat")).expect("open a file");
    assert!(stage.has_mounts());
    let (code, text) = stage.command("stop");
    assert_eq!(code, Some(0), "{text}");
    assert!(!stage.has_mounts());
    assert!(!stage::is_alive(supervisor) && !stage::is_alive(worker));
    assert!(!stage.run().join("pid").exists() && !stage.run().join("files").exists());
    assert_eq!(stage.command("stop").0, Some(0), "stopping what is stopped is fine");
    stage.serve();
    std::fs::read(stage.file("proc/stat")).expect("it can be started again");
}
