//! sysinfo(2) and sched_getaffinity(2), which no file system can answer for: a server's own truth, whatever dies meanwhile.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use system_tests::{
    ability,
    command::eventually,
    host::{HostState, Scope},
    promise::skip,
    promises,
    server::{GUEST_LIMIT, Running},
    site::Site,
};

promises![
    what_init_started_is_told_the_truth_too,
    a_mask_can_be_given_back,
    bad_arguments_fail_as_on_any_machine,
    a_32_bit_program_is_told_the_same,
    a_killed_worker_loses_no_call,
    calls_outlive_supervisor_and_monitor,
    a_call_that_nobody_answers_holds_up_no_command,
    who_does_not_take_its_answer_keeps_only_itself_waiting,
    a_migratable_server_asks_the_kernel,
    a_server_may_ask_the_kernel;
    each of ["busybox", "debian-13"]:
    system_calls_tell_its_limits,
    nobody_inside_has_the_listener
];

/// The flags of a server whose limits differ from any host's.
const LIMITS: &str = "--memory 256M --cpus 0.5";
const LIMIT_KIB: u64 = 256 << 10;

/// The total that busybox's free(1) and a perl that calls sysinfo(2) itself show, in KiB.
fn total_kib(server: &Running) -> Result<u64> {
    let script = "if command -v perl >/dev/null; then perl -e '$b = \"\\0\" x 112; syscall(99, $b) and die $!; \
                  print +(unpack q(q10), $b)[4] / 1024'; else free -k | awk '/^Mem:/ { print $2 }'; fi";
    let text = server.sh(script)?;
    text.parse().with_context(|| format!("the total is {text:?}"))
}

fn host_cpus() -> Result<usize> {
    Ok(std::thread::available_parallelism()?.get())
}

fn system_calls_tell_its_limits(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").with(LIMITS).start()?;
    ensure!(total_kib(&server)? == LIMIT_KIB, "{} kB", total_kib(&server)?);
    ensure!(server.sh("nproc")? == "1" && server.sh("getconf _NPROCESSORS_ONLN 2>/dev/null || nproc")? == "1");
    let up: f64 = server.sh("cut -d ' ' -f 1 /proc/uptime")?.parse()?;
    ensure!(up < 600.0 && !server.sh("uptime")?.contains("day"), "up {up} s: {}", server.sh("uptime")?);
    let mut shell = server.terminal(&["enter", "web1"])?;
    shell.send("echo cpus-$(nproc)-\r")?;
    shell.expect("cpus-1-")?;
    shell.send("exit\r")?;
    shell.finish()?;
    // A change counts at once, as it does in the files.
    site.ok(["set", "web1", "memory=128M"])?;
    ensure!(total_kib(&server)? == LIMIT_KIB / 2, "{} kB", total_kib(&server)?);
    Ok(())
}

fn nobody_inside_has_the_listener(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    server.sh("nproc")?;
    let open = server.sh("ls -l /proc/[0-9]*/fd 2>/dev/null || :")?;
    ensure!(open.contains("->") && !open.contains("seccomp"), "{open}");
    let held = listeners_of(monitor(&server)?)?;
    ensure!(held >= 1, "its monitor holds {held} listeners");
    Ok(())
}

fn what_init_started_is_told_the_truth_too(site: &Site) -> Result<()> {
    let small = site.template("busybox")?.server("web1").with(LIMITS).start()?;
    let service = "exec = [\"/bin/sh\", \"-c\", \"free -k >/run/free; nproc >/run/nproc\"]\nkind = \"oneshot\"\n";
    let call = site.vsctl(["exec", "web1", "--", "sh", "-c", "cat >/etc/vsinit/tell.toml"]);
    site.keep(call.input(service))?.success()?;
    let small = small.stop()?.start()?;
    small.until("test -s /run/nproc")?;
    ensure!(small.file("/run/nproc")? == "1" && small.file("/run/free")?.contains(" 262144 "));
    let large = site.template("debian-13")?.server("web2").with(LIMITS).start()?;
    large.booted()?;
    let told = large.sh("systemd-run --quiet --wait --pipe nproc")?;
    ensure!(told == "1", "systemd's child is told of {told} CPUs");
    Ok(())
}

/// Runs perl in a server, where it can make any system call.
fn perl(server: &Running, script: &str) -> Result<String> {
    Ok(server.exec(&["perl", "-e", script])?.success()?.text())
}

fn a_mask_can_be_given_back(site: &Site) -> Result<()> {
    if host_cpus()? < 2 {
        return Err(skip("this host has one CPU"));
    }
    let template = site.template("debian-13")?;
    let quota = template.server("web1").with("--cpus 1").start()?;
    let script = "$m = \"\\0\" x 128; $n = syscall(204, 0, 128, $m); $n > 0 or die $!; print unpack(q(%32b*), $m); \
                  syscall(203, 0, $n, $m) and die qq(set: $!); print q( set)";
    ensure!(perl(&quota, script)? == "1 set");
    // Its real CPUs, not numbered anew: others could not be set.
    let set = template.server("web2").with("--cpuset 1").start()?;
    ensure!(perl(&set, script)? == "1 set");
    ensure!(set.sh("taskset -cp $$")?.ends_with(": 1"), "{}", set.sh("taskset -cp $$")?);
    // Of others and of threads it knows the numbers of its own pid namespace only; older kernels answer for them themselves.
    if ability::knows_threads_of_other_namespaces()? {
        ensure!(quota.sh("taskset -cp 1")?.ends_with(": 0") && quota.sh("taskset -cp $$")?.ends_with(": 0"));
    } else {
        site.note("this kernel does not know threads of other namespaces");
        ensure!(!quota.sh("taskset -cp 1")?.ends_with(": 0"));
    }
    Ok(())
}

fn bad_arguments_fail_as_on_any_machine(site: &Site) -> Result<()> {
    let server = site.template("debian-13")?.server("web1").with(LIMITS).start()?;
    // The same script on the host says what the kernel says; the number of CPUs plays no part in it.
    let script = "$m = \"\\0\" x 4096; $b = \"\\0\" x 112; \
        sub say_it { my $r = syscall($_[0], @_[1 .. $#_]); print $r < 0 ? $! + 0 : qq(ok$r), q( ) } \
        say_it(204, 0, 0, $m); say_it(204, 0, 7, $m); say_it(204, 0, 12, $m); say_it(204, 0, 0x20000000, $m); \
        say_it(204, -1, 128, $m); say_it(204, 4000000, 128, $m); say_it(204, 0, 128, 8); say_it(204, 4000000, 7, 8); \
        say_it(204, 0, 4096, $m); say_it(204, $$, 128, $m); \
        say_it(99, 8); say_it(99, 0); say_it(99, -1); say_it(99, $b); \
        $p = syscall(9, 0, 8192, 3, 0x22, -1, 0); say_it(99, $p + 4040); say_it(99, $p + 8000); syscall(10, $p, 4096, 1); \
        say_it(99, $p); say_it(99, $p + 4090); say_it(204, 0, 128, $p);";
    let host = std::process::Command::new("perl").args(["-e", script]).output().context("run perl on the host")?;
    let (inside, outside) = (perl(&server, script)?, String::from_utf8_lossy(&host.stdout).trim().to_owned());
    let words = |said: &str| said.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let (inside, mut outside) = (words(&inside), words(&outside));
    ensure!(outside.len() == 19, "the host's perl said {outside:?}");
    if !ability::knows_threads_of_other_namespaces()? {
        site.note("this kernel does not tell what is writable: read-only memory of the caller's own is written");
        outside.splice(16.., ["ok0", "ok0", "ok8"].map(str::to_owned));
    }
    ensure!(inside == outside, "the server says {inside:?}, the kernel says {outside:?}");
    Ok(())
}

/// A program for i386 without a library: calls sysinfo, then writes its 64 bytes and what sched_getaffinity returned with
/// the first 4 bytes of the mask.
fn program_for_i386() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const BUFFER: u32 = BASE + 0x800;
    let mut code: Vec<u8> = Vec::new();
    // mov eax, call; mov ebx, …; mov ecx, …; mov edx, …; int 0x80
    let mut call = |number: u32, arguments: [u32; 3]| {
        for (opcode, value) in [(0xb8_u8, number), (0xbb, arguments[0]), (0xb9, arguments[1]), (0xba, arguments[2])] {
            code.push(opcode);
            code.extend(value.to_le_bytes());
        }
        code.extend([0xcd, 0x80]);
    };
    call(116, [BUFFER, 0, 0]);
    call(242, [0, 128, BUFFER + 64]);
    call(4, [1, BUFFER, 68]);
    call(1, [0, 0, 0]);
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let start = 52 + 32;
    // An executable for i386 with one program header.
    for word in [0x0003_0002, 1, BASE + start, 52, 0, 0, 0x0020_0034, 1, 0] {
        file.extend(word.to_le_bytes());
    }
    // PT_LOAD of one page: readable, writable and executable.
    for word in [1, 0, BASE, BASE, 0x1000, 0x1000, 7, 0x1000_u32] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file.resize(0x1000, 0);
    file
}

fn a_32_bit_program_is_told_the_same(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with(LIMITS).start()?;
    let call = site.vsctl(["exec", "web1", "--", "sh", "-c", "cat >/tmp/small; chmod 755 /tmp/small"]);
    site.keep(call.input(program_for_i386()))?.success()?;
    let done = server.exec(&["/tmp/small"])?;
    if done.code == 126 {
        return Err(skip("this kernel runs no 32-bit programs"));
    }
    let bytes = done.success()?.stdout;
    ensure!(bytes.len() == 68, "{} bytes", bytes.len());
    let int = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    ensure!(int(16) == 256 << 20 && int(52) == 1, "{} units of {}", int(16), int(52));
    ensure!(int(0) < 600 && int(64).count_ones() == 1, "up {} s, mask {:#x}", int(0), int(64));
    Ok(())
}

/// Processes of this site that run `program`.
fn processes(site: &Site, program: &str) -> BTreeMap<i32, String> {
    let state = HostState::capture(&Scope::Site { root: site.root().to_owned(), suffix: site.suffix() });
    let named = state.of("process").filter(|line| line.split(' ').nth(1).is_some_and(|exe| exe.contains(program)));
    named.filter_map(|line| Some((line.split(' ').next()?.parse().ok()?, line.to_owned()))).collect()
}

fn one(site: &Site, program: &str, word: &str) -> Result<i32> {
    let all = processes(site, program);
    let found = all.iter().find(|(_, line)| line.split(' ').any(|part| part == word)).map(|(pid, _)| *pid);
    found.with_context(|| format!("no {program} {word} in {all:?}"))
}

fn monitor(server: &Running) -> Result<i32> {
    one(server.site(), "vsctl", "monitor")
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {pid}"))
}

/// How many listeners a process has open.
fn listeners_of(pid: i32) -> Result<usize> {
    let open = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let targets = open.filter_map(|entry| fs::read_link(entry.path()).ok());
    Ok(targets.filter(|target| target.to_string_lossy().contains("seccomp notify")).count())
}

/// Four loops that ask until `/run/enough` is there, and say how often each was told right.
const LOOPS: &str = "for n in 1 2 3 4; do (i=0; while ! test -e /run/enough; do test \"$(nproc)\" = 1 || { echo wrong; exit; }; \
                     i=$((i+1)); done; test $i -gt 0 && echo right) & done; wait";

fn a_killed_worker_loses_no_call(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with(LIMITS).start()?;
    let mut loops = server.spawn(&["exec", "web1", "--", "sh", "-c", LOOPS])?;
    for _ in 0..20 {
        std::thread::sleep(std::time::Duration::from_millis(50));
        let old = eventually("a worker", GUEST_LIMIT, || one(site, "lxcfs-fuse", "worker").ok())?;
        signal(old, Signal::SIGKILL)?;
        eventually("the next worker", GUEST_LIMIT, || {
            one(site, "lxcfs-fuse", "worker").ok().filter(|new| *new != old)
        })?;
    }
    server.sh("touch /run/enough")?;
    let said = loops.wait()?.success()?.text();
    ensure!(said.lines().collect::<Vec<_>>() == ["right"; 4], "{said}");
    Ok(())
}

fn calls_outlive_supervisor_and_monitor(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with(LIMITS).start()?;
    let mut loops = server.spawn(&["exec", "web1", "--", "sh", "-c", LOOPS])?;
    for _ in 0..3 {
        // Its worker ends with it, and what both had of listeners. The loops wait, and go on with the next one.
        std::thread::sleep(std::time::Duration::from_millis(100));
        signal(one(site, "lxcfs-fuse", "supervise")?, Signal::SIGKILL)?;
        site.ok(["doctor", "--fix"])?;
        ensure!(server.sh("nproc")? == "1");
        // The next monitor has them from the supervisor, for the next supervisor.
        let old = monitor(&server)?;
        let held = eventually("the monitor holds the loops' listener", GUEST_LIMIT, || {
            listeners_of(old).ok().filter(|held| *held >= 2)
        })?;
        std::thread::sleep(std::time::Duration::from_millis(1500));
        signal(old, Signal::SIGKILL)?;
        eventually("the end of the monitor", GUEST_LIMIT, || monitor(&server).is_err().then_some(()))?;
        site.ok(["doctor", "--fix"])?;
        eventually(&format!("a new monitor with {held} listeners"), GUEST_LIMIT, || {
            listeners_of(monitor(&server).ok()?).ok().filter(|now| *now >= 2)
        })?;
    }
    server.sh("touch /run/enough")?;
    let said = loops.wait()?.success()?.text();
    ensure!(said.lines().collect::<Vec<_>>() == ["right"; 4], "{said}");
    Ok(())
}

fn a_call_that_nobody_answers_holds_up_no_command(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with(LIMITS).start()?;
    server.sh("nproc")?;
    let (supervisor, worker) = (one(site, "lxcfs-fuse", "supervise")?, one(site, "lxcfs-fuse", "worker")?);
    signal(supervisor, Signal::SIGSTOP)?;
    signal(worker, Signal::SIGSTOP)?;
    let held = || -> Result<()> {
        let mut waiting = server.spawn(&["exec", "web1", "--", "nproc"])?;
        std::thread::sleep(std::time::Duration::from_millis(300));
        ensure!(waiting.is_running(), "who has answered?");
        site.ok(["freeze", "web1"])?;
        site.ok(["thaw", "web1"])?;
        site.ok(["stop", "--kill", "web1"])?;
        ensure!(waiting.wait()?.code != 0);
        Ok(())
    };
    let held = held();
    signal(worker, Signal::SIGCONT)?;
    signal(supervisor, Signal::SIGCONT)?;
    held?;
    site.ok(["start", "web1"])?;
    ensure!(server.sh("nproc")? == "1");
    Ok(())
}

/// A file system of one file whose data never comes, and a call that is to be answered into a mapping of it.
const NEVER_DELIVERED: &str = r#"
    open(F, "+<", "/dev/fuse") or die "fuse: $!"; open(T, ">", "/tmp/file"); close(T);
    $options = "fd=" . fileno(F) . ",rootmode=100644,user_id=0,group_id=0";
    ($source, $target, $kind) = ("test", "/tmp/file", "fuse");
    syscall(165, $source, $target, $kind, 0, $options) and die "mount: $!";
    if (!fork) {
        while (sysread(F, $request, 135168)) {
            ($length, $operation, $unique) = unpack("LLQ", $request);
            next if $operation == 15 or $operation == 2 or $operation == 36; # READ, FORGET, INTERRUPT
            $error = 0;
            if ($operation == 26) { $body = pack("L4S2L2S2L8", 7, 31, 0, 0, 1, 1, 4096, 1, 0, 0, (0) x 8); }
            elsif ($operation == 3) {
                $body = pack("QLLQ6L10", 9, 0, 0, 1, 4096, 8, 0, 0, 0, 0, 0, 0, 0100644, 1, 0, 0, 0, 4096, 0);
            } elsif ($operation == 14) { $body = pack("QLL", 1, 0, 0); }
            else { ($error, $body) = (-38, ""); }
            syswrite(F, pack("LlQ", 16 + length $body, $error, $unique) . $body);
        }
        exit;
    }
    open(M, "<", "/tmp/file") or die "open: $!";
    $memory = syscall(9, 0, 4096, 3, 2, fileno(M), 0);
    $memory > 0 or die "mmap: $!";
    $| = 1; print "asks\n"; open(T, ">", "/tmp/asks"); close(T); syscall(99, $memory); print "answered\n";
"#;

fn who_does_not_take_its_answer_keeps_only_itself_waiting(site: &Site) -> Result<()> {
    // Privileged: on behalf of our answers the kernel asks no file system of a server with ids of its own.
    let hostile = site.template("debian-13")?.server("web1").with("--privileged --cpus 0.5").start()?;
    let mut waiting = hostile.spawn(&["exec", "web1", "--", "perl", "-e", NEVER_DELIVERED])?;
    hostile.until("test -e /tmp/asks")?;
    let mut also = hostile.spawn(&["exec", "web1", "--", "sh", "-c", "sleep 1; nproc"])?;
    let other = site.template("busybox")?.server("web2").with(LIMITS).start()?;
    std::thread::sleep(std::time::Duration::from_millis(1500));
    for _ in 0..20 {
        ensure!(other.sh("nproc")? == "1");
    }
    ensure!(waiting.is_running() && also.is_running(), "the hostile server was not held up: this tests nothing");
    // Nor can it hold up the next worker, although a thread of this one cannot be killed.
    let old = one(site, "lxcfs-fuse", "worker")?;
    signal(old, Signal::SIGKILL)?;
    eventually("the answer of the next worker", GUEST_LIMIT, || (other.sh("nproc").ok()? == "1").then_some(()))?;
    let total = || other.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo");
    if !ability::resends_fuse_requests()? {
        // There the files come back a moment later, with the next supervisor.
        eventually("its files", GUEST_LIMIT, || total().ok().map(drop))?;
    }
    ensure!(total()? == LIMIT_KIB.to_string());
    ensure!(waiting.is_running(), "it was let go");
    let hostile = hostile.kill()?;
    let said = waiting.wait()?;
    ensure!(said.text() == "asks", "{said}");
    // It ends, with or without an answer of the next worker.
    also.wait()?;
    site.ok(["start", hostile.name()])?;
    ensure!(site.ok(["exec", "web1", "--", "nproc"])?.text() == "1");
    ensure!(other.sh("nproc")? == "1");
    Ok(())
}

fn asks_the_kernel(server: &Running) -> Result<()> {
    ensure!(server.sh("nproc")? == host_cpus()?.to_string(), "nproc says {}", server.sh("nproc")?);
    let host = fs::read_to_string("/proc/meminfo")?.split_whitespace().nth(1).context("no MemTotal")?.to_owned();
    ensure!(total_kib(server)?.to_string() == host, "{} kB", total_kib(server)?);
    let held = listeners_of(monitor(server)?)?;
    ensure!(held == 0, "its monitor holds {held} listeners");
    Ok(())
}

fn a_migratable_server_asks_the_kernel(site: &Site) -> Result<()> {
    asks_the_kernel(&site.template("busybox")?.server("web1").with("--migratable").with(LIMITS).start()?)
}

fn a_server_may_ask_the_kernel(site: &Site) -> Result<()> {
    // With a listener around it no program can have one of its own (seccomp(2)).
    let script = "syscall(157, 38, 1, 0, 0, 0); $f = pack(q(SCCL), 6, 0, 0, 0x7fff0000); $p = pack(q(S x6 P), 1, $f); \
                  $r = syscall(317, 1, 8, $p); print $r < 0 ? $! + 0 : q(listens)";
    let template = site.template("debian-13")?;
    let own = template.server("web1").with(LIMITS).start()?;
    let busy = (nix::errno::Errno::EBUSY as i32).to_string();
    ensure!(perl(&own, script)? == busy, "{}", perl(&own, script)?);
    site.ok(["set", "web1", "sysinfo=host"])?;
    ensure!(own.sh("nproc")? == "1", "the change waits for the next start");
    let host = own.stop()?.start()?;
    asks_the_kernel(&host)?;
    ensure!(perl(&host, script)? == "listens");
    Ok(())
}
