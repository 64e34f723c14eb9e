//! The service as the manager and its guests know it: the real program, a real mount, a real cgroup.
//!
//! Needs root and /dev/fuse; without them every test is counted as ignored.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use kernel::cgroup::Group;
use kernel::process::PidFd;
use libtest_mimic::{Arguments, Failed, Trial};

mod stage;
use stage::{Stage, is_alive};

/// Long enough for anything here on a machine that is busy; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let missing = missing();
    if let Some(missing) = missing {
        eprintln!("ignored: {missing}");
    }
    let tests: [(&str, fn()); 19] = [
        ("every_file_of_a_registered_server_can_be_read", every_file_of_a_registered_server_can_be_read),
        ("sendfile_never_says_that_a_file_is_empty", sendfile_never_says_that_a_file_is_empty),
        ("a_server_sees_its_limits_as_they_are_now", a_server_sees_its_limits_as_they_are_now),
        ("a_second_serve_says_that_it_is_live", a_second_serve_says_that_it_is_live),
        ("serve_mounts_again_what_was_unmounted", serve_mounts_again_what_was_unmounted),
        ("an_unregistered_server_is_gone_for_open_paths_too", an_unregistered_server_is_gone_for_open_paths_too),
        ("a_malformed_registration_hurts_nobody_else", a_malformed_registration_hurts_nobody_else),
        ("a_removed_cgroup_is_an_error_and_is_let_go", a_removed_cgroup_is_an_error_and_is_let_go),
        ("readers_do_not_notice_that_workers_are_killed", readers_do_not_notice_that_workers_are_killed),
        ("readers_do_not_notice_that_the_program_is_another", readers_do_not_notice_that_the_program_is_another),
        ("a_program_that_cannot_follow_does_not_get_the_place", a_program_that_cannot_follow_does_not_get_the_place),
        ("an_open_file_outlives_its_worker", an_open_file_outlives_its_worker),
        ("a_kernel_that_does_not_answer_keeps_no_reader", a_kernel_that_does_not_answer_keeps_no_reader),
        ("a_kernel_that_does_not_answer_makes_no_worker_hang", a_kernel_that_does_not_answer_makes_no_worker_hang),
        ("a_worker_that_hangs_is_replaced", a_worker_that_hangs_is_replaced),
        ("a_service_that_cannot_come_back_lets_its_readers_go", a_service_that_cannot_come_back_lets_its_readers_go),
        ("a_killed_supervisor_is_cleaned_up_by_the_next_serve", a_killed_supervisor_is_cleaned_up_by_the_next_serve),
        ("stop_leaves_no_mount_and_no_process", stop_leaves_no_mount_and_no_process),
        ("a_long_life_leaves_nothing_behind", a_long_life_leaves_nothing_behind),
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

/// The files at and below `path`; each link leads somewhere.
fn files_at(stage: &Stage, path: &str) -> Vec<String> {
    let kind = std::fs::symlink_metadata(stage.file(path)).expect("what is listed is there").file_type();
    if kind.is_symlink() && std::fs::read_link(stage.file(path)).expect("a link").is_relative() {
        std::fs::metadata(stage.file(path)).unwrap_or_else(|error| panic!("{path} leads nowhere: {error}"));
    }
    if !kind.is_dir() {
        return if kind.is_file() { vec![path.to_owned()] } else { vec![] };
    }
    let names = std::fs::read_dir(stage.file(path)).expect("list").map(|entry| entry.expect("entry").file_name());
    names.flat_map(|name| files_at(stage, &format!("{path}/{}", name.to_str().expect("a plain name")))).collect()
}

fn every_file_of_a_registered_server_can_be_read() {
    let stage = serving();
    let files = std::fs::read_to_string(stage.run().join("files")).expect("read the list of files");
    assert!(files.lines().any(|file| file == "proc/meminfo"));
    let files: Vec<String> = files.lines().flat_map(|path| files_at(&stage, path.trim_end_matches('/'))).collect();
    assert!(files.iter().any(|file| file == "sys/devices/system/cpu/cpu0/topology/core_id"));
    for file in &files {
        let text = std::fs::read_to_string(stage.file(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(text.is_empty() || text.ends_with('\n'), "{file}: {text}");
        let refused = std::fs::File::options().write(true).open(stage.file(file)).map(|_| ());
        assert!(refused.is_err(), "{file} can be opened for writing");
    }
    let mut listed: Vec<_> =
        std::fs::read_dir(stage.file("proc")).expect("list").flatten().map(|entry| entry.file_name()).collect();
    listed.sort();
    assert_eq!(listed[0], "cgroups");
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

fn serve_mounts_again_what_was_unmounted() {
    let stage = serving();
    let supervisor = stage.supervisor();
    rustix::mount::unmount(stage.run().join("mount"), rustix::mount::UnmountFlags::DETACH).expect("unmount");
    std::fs::read(stage.file("proc/stat")).expect_err("it is not mounted");
    stage.serve();
    std::fs::read(stage.file("proc/stat")).expect("it is mounted again");
    assert_ne!(stage.supervisor(), supervisor);
    assert!(!stage::is_alive(supervisor));
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
    while_four_read(&stage, |reads| kill_twenty_workers(&stage, reads));
}

fn readers_do_not_notice_that_the_program_is_another() {
    let stage = serving();
    let supervisor = stage.supervisor();
    let executable = || std::fs::read_link(format!("/proc/{supervisor}/exe")).expect("the supervisor lives");
    let open = || std::fs::read_dir(format!("/proc/{supervisor}/fd")).expect("list descriptors").count();
    let open_before = open();
    while_four_read(&stage, |reads| {
        for number in 1..=5 {
            let before = reads.load(Ordering::Relaxed);
            wait_until("reads to go on", || reads.load(Ordering::Relaxed) > before + 100);
            let next = stage.run().join(format!("lxcfs-fuse-{number}"));
            std::fs::copy(program(), &next).expect("copy the program");
            let reloaded = std::process::Command::new(&next).args(["reload", "--run"]).arg(stage.run()).output();
            let reloaded = reloaded.expect("run the next program");
            assert!(reloaded.status.success(), "{}\n{}", String::from_utf8_lossy(&reloaded.stderr), stage.log());
            assert_eq!((stage.supervisor(), executable()), (supervisor, next.clone()));
            let worker = stage.worker().expect("there is a worker");
            assert_eq!(std::fs::read_link(format!("/proc/{worker}/exe")).expect("the worker lives"), next);
        }
    });
    assert_eq!(open(), open_before, "descriptors are left over");
    assert_eq!(stage.command("stop").0, Some(0));
    assert!(!is_alive(supervisor) && !stage.has_mounts());
}

fn a_program_that_cannot_follow_does_not_get_the_place() {
    let stage = serving();
    let (supervisor, worker) = (stage.supervisor(), stage.worker());
    let channel = || kernel::channel::knock(&stage.run().join("listeners")).expect("knock");
    let old = stage.run().join("old");
    std::fs::write(&old, "#!/bin/sh\necho 0\n").expect("write a program");
    std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o700)).expect("make it one");
    for program in ["/bin/true", "/nowhere", old.to_str().expect("a plain path")] {
        let caller = channel();
        caller.send(format!("reload {program}").as_bytes(), &[]).expect("ask");
        let (answer, _) = caller.receive_within(30_000).expect("receive").expect("an answer");
        assert!(
            answer.starts_with(b"refused ") && answer.windows(program.len()).any(|part| part == program.as_bytes())
        );
    }
    assert_eq!((stage.supervisor(), stage.worker()), (supervisor, worker));
    std::fs::read(stage.file("proc/stat")).expect("read");
}

/// Lets four readers read while something happens: none of them may notice.
fn while_four_read(stage: &Stage, happens: impl FnOnce(&AtomicU64)) {
    let (done, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let failures: Vec<String> = std::thread::scope(|scope| {
        let files = ["proc/stat", "proc/meminfo", "proc/uptime", "proc/loadavg"];
        let readers = files.map(|file| {
            let (done, reads) = (&done, &reads);
            scope.spawn(move || read_until(done, reads, &stage.file(file)))
        });
        let happened = std::panic::catch_unwind(AssertUnwindSafe(|| happens(&reads)));
        done.store(true, Ordering::Relaxed);
        let ended = std::panic::catch_unwind(AssertUnwindSafe(|| {
            wait_until("all readers to have their answers", || readers.iter().all(|reader| reader.is_finished()));
        }));
        if ended.is_err() {
            // A reader that nobody answers would wait for ever, and this test for it.
            stage.command("stop");
        }
        let failures = readers.into_iter().flat_map(|reader| reader.join().expect("a reader ends")).collect();
        happened.expect("reads go on whatever happens");
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

fn a_kernel_that_does_not_answer_keeps_no_reader() {
    let stage = serving();
    let slow = SlowGroup::mount();
    // Five seconds are more than the deadline and what it takes to notice it, and less than what makes a worker hang.
    let (patience, soon) = (Duration::from_secs(5), Duration::from_millis(900));
    std::fs::write(
        stage.registration(2),
        format!("name = \"slow\"\nstarted_boottime_ns = 1\n\n[cgroup]\nunified = {:?}\n", slow.path()),
    )
    .expect("register a server");
    let file = |name: &str| stage.run().join("mount/2/proc").join(name);
    let read = |name: &str| {
        let begun = Instant::now();
        (std::fs::read_to_string(file(name)), begun.elapsed())
    };
    let (good, _) = read("meminfo");
    let good = good.expect("read while the kernel answers");
    assert_eq!(value(&good, "MemTotal"), 64 << 10);
    let worker = stage.worker();

    slow.hold(true);
    let first = file("meminfo");
    let waiting = std::thread::spawn(move || std::fs::read_to_string(first));
    let (last, took) = read("meminfo");
    assert!(took < patience, "{took:?}");
    assert_eq!(last.expect("the last good text"), good);
    assert_eq!(waiting.join().expect("a reader").expect("the last good text"), good);
    // Known to be overdue now.
    let (last, took) = read("meminfo");
    assert!(last.is_ok_and(|last| last == good) && took < soon, "{took:?}");
    // One that was never read has no last text, and others' readers notice nothing.
    let (never, took) = read("swaps");
    assert!(took < patience, "{took:?}");
    assert!(
        never.is_ok() || never.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ETIMEDOUT)),
        "{never:?}"
    );
    let begun = Instant::now();
    std::fs::read(stage.file("proc/stat")).expect("read of another server");
    assert!(begun.elapsed() < soon, "{:?}", begun.elapsed());

    slow.set(2 << 20);
    slow.hold(false);
    wait_until("new figures", || read("meminfo").0.is_ok_and(|text| text != good));
    assert_eq!(stage.worker(), worker, "no worker was replaced for it");
    assert!(stage.log().contains("server 2: the kernel keeps proc/meminfo waiting"), "{}", stage.log());
}

fn a_kernel_that_does_not_answer_makes_no_worker_hang() {
    let stage = serving();
    let slow = SlowGroup::mount();
    std::fs::write(
        stage.registration(2),
        format!("name = \"slow\"\nstarted_boottime_ns = 1\n\n[cgroup]\nunified = {:?}\n", slow.path()),
    )
    .expect("register a server");
    // From now on its load is sampled every five seconds.
    std::fs::read(stage.run().join("mount/2/proc/loadavg")).expect("read while the kernel answers");
    let worker = stage.worker();
    slow.hold(true);
    // Until a sample waits, and then for as long as a worker may be silent.
    std::thread::sleep(Duration::from_secs(6 + 10 + 3));
    assert_eq!(stage.worker(), worker, "it was replaced: {}", stage.log());
    assert!(slow.is_asked(), "no sample was taken");
    std::fs::read(stage.file("proc/loadavg")).expect("read of another server");
}

/// A directory that looks like a control group, whose figures can be held back.
struct SlowGroup {
    directory: tempfile::TempDir,
    state: Arc<(Mutex<Held>, Condvar)>,
    /// Unmounts when it is dropped.
    _session: fuser::BackgroundSession,
}

#[derive(Default)]
struct Held {
    is_held: bool,
    is_asked: bool,
    bytes: u64,
}

impl SlowGroup {
    fn mount() -> SlowGroup {
        let directory = tempfile::tempdir().expect("make a directory");
        let state = Arc::new((Mutex::new(Held { bytes: 1 << 20, ..Held::default() }), Condvar::new()));
        let mut config = fuser::Config::default();
        config.n_threads = Some(4);
        let session = fuser::Session::new(SlowFiles(state.clone()), directory.path(), &config).expect("mount");
        SlowGroup { directory, state, _session: session.spawn().expect("serve") }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn hold(&self, is_held: bool) {
        self.state.0.lock().expect("lock").is_held = is_held;
        self.state.1.notify_all();
    }

    /// Whether a reader has come while figures were held back.
    fn is_asked(&self) -> bool {
        self.state.0.lock().expect("lock").is_asked
    }

    fn set(&self, bytes: u64) {
        self.state.0.lock().expect("lock").bytes = bytes;
    }
}

impl Drop for SlowGroup {
    fn drop(&mut self) {
        // Nobody may wait for what is unmounted.
        self.hold(false);
    }
}

struct SlowFiles(Arc<(Mutex<Held>, Condvar)>);

impl SlowFiles {
    const NAMES: [&str; 7] = [
        "memory.max",
        "memory.current",
        "memory.stat",
        "memory.swap.max",
        "memory.swap.current",
        "cgroup.controllers",
        "cpu.stat",
    ];

    fn attributes(inode: u64) -> fuser::FileAttr {
        let is_file = inode > 1;
        let time = std::time::SystemTime::UNIX_EPOCH;
        fuser::FileAttr {
            ino: fuser::INodeNo(inode),
            size: 0,
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: if is_file { fuser::FileType::RegularFile } else { fuser::FileType::Directory },
            perm: if is_file { 0o444 } else { 0o555 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl fuser::Filesystem for SlowFiles {
    fn lookup(&self, _: &fuser::Request, _: fuser::INodeNo, name: &std::ffi::OsStr, reply: fuser::ReplyEntry) {
        match Self::NAMES.iter().position(|known| name == *known) {
            Some(number) => reply.entry(&PATIENCE, &Self::attributes(number as u64 + 2), fuser::Generation(0)),
            None => reply.error(fuser::Errno::ENOENT),
        }
    }

    fn getattr(
        &self,
        _: &fuser::Request,
        inode: fuser::INodeNo,
        _: Option<fuser::FileHandle>,
        reply: fuser::ReplyAttr,
    ) {
        reply.attr(&PATIENCE, &Self::attributes(inode.0));
    }

    fn open(&self, _: &fuser::Request, _: fuser::INodeNo, _: fuser::OpenFlags, reply: fuser::ReplyOpen) {
        reply.opened(fuser::FileHandle(0), fuser::FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &fuser::Request,
        inode: fuser::INodeNo,
        _: fuser::FileHandle,
        offset: u64,
        _: u32,
        _: fuser::OpenFlags,
        _: Option<fuser::LockOwner>,
        reply: fuser::ReplyData,
    ) {
        let mut held = self.0.0.lock().expect("lock");
        held.is_asked |= held.is_held;
        let state = self.0.1.wait_while(held, |state| state.is_held).expect("wait");
        let text = match Self::NAMES[inode.0 as usize - 2] {
            "memory.max" => format!("{}\n", 64 << 20),
            "memory.current" => format!("{}\n", state.bytes),
            "memory.stat" => format!("anon {}\nfile 0\n", state.bytes),
            "cgroup.controllers" => "memory\n".to_owned(),
            "cpu.stat" => "usage_usec 7\nuser_usec 4\nsystem_usec 3\n".to_owned(),
            _ => "0\n".to_owned(),
        };
        reply.data(text.as_bytes().get(offset as usize..).unwrap_or_default());
    }
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

/// Reads, and lives of servers, in one part of a long life. There are five parts, after the first ones that count for nothing.
const READS: usize = 4_000;
const LIVES: usize = 40;

/// How many times as long as usual it is: with 50 it is a million reads and 10,000 servers.
fn length() -> usize {
    std::env::var("LXCFS_FUSE_LIFE").map_or(1, |times| times.parse().expect("LXCFS_FUSE_LIFE is a number"))
}

fn a_long_life_leaves_nothing_behind() {
    let stage = serving();
    let files = std::fs::read_to_string(stage.run().join("files")).expect("read the list of files");
    let files: Vec<String> = files.lines().flat_map(|path| files_at(&stage, path.trim_end_matches('/'))).collect();
    let begun = Instant::now();
    // What was needed once may be kept for the next time: here for more servers at once than there will be again.
    live(&stage, &files, 3, 100);
    let before = Holding::of(&stage);
    live(&stage, &files, 5 * length(), 1);
    let after = Holding::of(&stage);
    if length() > 1 {
        println!("{before:?}\n{after:?}\n{:.0?}", begun.elapsed());
    }
    assert_eq!((after.pids, after.descriptors), (before.pids, before.descriptors));
    for (before, after) in before.resident_kib.iter().zip(after.resident_kib) {
        assert!(after * 10 <= before * 11, "resident memory went from {before} to {after} KiB");
    }
}

/// What supervisor and worker have.
#[derive(Debug)]
struct Holding {
    pids: [i32; 2],
    descriptors: [usize; 2],
    resident_kib: [u64; 2],
}

impl Holding {
    /// Once all is closed of servers that are gone.
    fn of(stage: &Stage) -> Holding {
        let pids = [stage.supervisor(), stage.worker().expect("there is a worker")];
        let open = |pid: i32| -> Vec<_> {
            let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("list descriptors").flatten();
            descriptors.filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect()
        };
        let own = stage.group.path();
        wait_until("the files of servers that are gone to be closed", || {
            let of_groups =
                open(pids[1]).into_iter().filter(|path| path.to_string_lossy().contains("lxcfs-fuse-test-"));
            of_groups.into_iter().all(|path| path.to_string_lossy().contains(&*own.to_string_lossy()))
        });
        let resident_kib = |pid: i32| -> u64 {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("read status");
            value(&status, "VmRSS")
        };
        Holding { pids, descriptors: pids.map(|pid| open(pid).len()), resident_kib: pids.map(resident_kib) }
    }
}

/// Reads all files of a server from four threads, while other servers come, are read, and go when there are `at_once`.
fn live(stage: &Stage, files: &[String], parts: usize, at_once: usize) {
    std::thread::scope(|scope| {
        for reader in 0..4 {
            scope.spawn(move || {
                for file in files.iter().cycle().skip(reader * 7).take(parts * READS / 4) {
                    std::fs::read(stage.file(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
                }
            });
        }
        let (mut lives, mut gone) = (VecDeque::new(), VecDeque::new());
        for id in (2..).take(parts * LIVES) {
            lives.push_back(Life::begin(stage, id));
            let surplus = (lives.len() + 1).saturating_sub(at_once);
            gone.extend(lives.drain(..surplus).map(|life| life.end(stage)));
            // A tenth of a second later its end is seen by who asks again. Of some nobody does.
            let seen = gone.drain(..gone.len().saturating_sub(10)).filter(|id| id % 10 != 0);
            seen.for_each(|id| wait_until("the server to go", || is_gone(&file_of(stage, id, "stat"))));
        }
        for life in lives {
            life.end(stage);
        }
    });
}

fn file_of(stage: &Stage, id: u64, name: &str) -> PathBuf {
    stage.run().join(format!("mount/{id}/proc/{name}"))
}

fn is_gone(file: &Path) -> bool {
    std::fs::read(file).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// A server that is one for as long as this is there.
struct Life {
    id: u64,
    group: Group,
}

impl Life {
    fn begin(stage: &Stage, id: u64) -> Life {
        let life = Life { id, group: stage::new_group() };
        stage.register_group(id, &life.group);
        for name in ["meminfo", "stat", "loadavg", "vmstat"] {
            std::fs::read(file_of(stage, id, name)).unwrap_or_else(|error| panic!("{name} of {id}: {error}"));
        }
        life
    }

    fn end(self, stage: &Stage) -> u64 {
        self.group.remove().expect("remove the cgroup");
        std::fs::remove_file(stage.registration(self.id)).expect("unregister");
        self.id
    }
}
