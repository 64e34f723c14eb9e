//! The programs that people look at a machine with: what they show of a server is what its control groups say at that instant.
//!
//! Their template is Debian 13 with these programs, which the harness makes. A program that reads files can be run beside a frozen
//! server: in its namespaces, of its root, and not in its groups, so that nothing changes while it looks. What asks by system
//! call is run inside, and what the group holds is read all the while.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use system_tests::{
    command::{Invocation, eventually},
    promises,
    server::{GUEST_LIMIT, Running},
    site::Site,
};

promises![
    readers_of_meminfo_agree_with_the_group_to_a_page,
    callers_of_sysinfo_agree_with_the_group_to_a_page,
    htop_shows_its_memory,
    all_count_one_cpu,
    all_know_when_it_started,
    cpu_time_adds_up_to_the_wall_clock,
    stress_against_a_quota_is_steal,
    stress_takes_a_share_of_its_own_memory
];

const TEMPLATE: &str = "consumers";
const LIMIT: u64 = 256 << 20;
const LIMIT_FLAG: &str = "--memory 256M";
/// The period of a quota of CPU time, as this project sets it.
const QUOTA_PERIOD_S: f64 = 0.1;
/// How far a figure may be from the group's.
const PAGE: u64 = 4096;

/// A file of the server's group, as this host has its controllers.
fn group_file(server: &Running, v1: &str, v2: &str) -> Result<PathBuf> {
    let group = format!("{}/{}", server.site().cgroup(), server.name());
    let places = [format!("/sys/fs/cgroup/{}", v1.replace("GROUP", &group)), format!("/sys/fs/cgroup/{group}/{v2}")];
    let found = places.iter().map(PathBuf::from).find(|path| path.exists());
    found.with_context(|| format!("none of {places:?}"))
}

fn number_in(file: &File) -> Result<u64> {
    let mut text = [0; 64];
    let length = file.read_at(&mut text, 0)?;
    Ok(std::str::from_utf8(&text[..length])?.trim().parse()?)
}

/// The least and the most that is charged to a group while `body` runs, with what that says.
fn charged<T>(usage: &Path, body: impl FnOnce() -> Result<T>) -> Result<(u64, u64, T)> {
    let file = File::open(usage)?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| -> Result<(u64, u64)> {
            let first = number_in(&file)?;
            let (mut least, mut most) = (first, first);
            while !done.load(Ordering::Relaxed) {
                let now = number_in(&file)?;
                (least, most) = (least.min(now), most.max(now));
            }
            let last = number_in(&file)?;
            Ok((least.min(last), most.max(last)))
        });
        let said = body();
        done.store(true, Ordering::Relaxed);
        let (least, most) = watch.join().expect("a thread that reads a file")?;
        Ok((least, most, said?))
    })
}

/// The sum of some counters of the group's `memory.stat`.
fn counters(stat: &Path, names: &[&str]) -> Result<u64> {
    let text = fs::read_to_string(stat)?;
    let lines = text.lines().filter_map(|line| line.split_once(' ')).filter(|(name, _)| names.contains(name));
    Ok(lines.map(|(_, value)| value.parse::<u64>()).sum::<Result<u64, _>>()?)
}

/// A program of the server's own root, in its namespaces and not in its groups.
fn beside(server: &Running, script: &str) -> Result<String> {
    let pid = server.init_pid()?.to_string();
    let call = Invocation::new("nsenter").args(["--all", "--root", "--wd=/", "--target", &pid]);
    Ok(call.args(["env", "LC_ALL=C", "PATH=/usr/bin:/usr/sbin", "sh", "-c", script]).directory("/").succeed()?.text())
}

fn numbers(text: &str) -> Result<Vec<u64>> {
    text.split_whitespace().map(|word| word.parse().with_context(|| format!("{text:?}"))).collect()
}

fn readers_of_meminfo_agree_with_the_group_to_a_page(site: &Site) -> Result<()> {
    let host = fs::read_to_string("/proc/meminfo")?;
    let host: u64 = host.split_whitespace().nth(1).context("no MemTotal")?.parse()?;
    for (name, flags, limit) in [("limited", LIMIT_FLAG, LIMIT), ("unlimited", "", host << 10)] {
        let server = site.template(TEMPLATE)?.server(name).with(flags).start()?;
        server.booted()?;
        server.sh("dd if=/dev/zero of=/dev/shm/ballast bs=1M count=20 2>/dev/null; cat /usr/bin/* >/dev/null")?;
        site.ok(["freeze", name])?;
        agree_to_a_page(&server, limit)?;
    }
    Ok(())
}

/// Each program prints what it says of free memory, of what is cached, and, if it says that, of all, in KiB.
const READERS: [(&str, &str); 5] = [
    ("free", "free -k | awk '/^Mem:/ { print $4, $6, $2 }'"),
    (
        "vmstat -s",
        "vmstat -s | awk '/total memory/ { t = $1 } /free memory/ { f = $1 } /swap cache/ { print f, $1, t }'",
    ),
    ("vmstat", "vmstat | awk 'NR == 3 { print $4, $6 }'"),
    ("top", "top -b -n 1 -E k | awk '/Mem :/ { print $6, $10, $4 }'"),
    ("busybox top", "busybox top -b -n 1 | awk '/^Mem:/ { print $4 + 0, $10 + 0, $2 + $4 }'"),
];

fn agree_to_a_page(server: &Running, limit: u64) -> Result<()> {
    let usage = group_file(server, "memory/GROUP/memory.usage_in_bytes", "memory.current")?;
    let stat = usage.with_file_name("memory.stat");
    for (who, script) in READERS {
        // What the kernel had charged in advance it may still take back.
        let (used, said) = eventually(&format!("{who} while nothing changes"), GUEST_LIMIT, || {
            let (least, most, said) = charged(&usage, || beside(server, script)).ok()?;
            (least == most).then_some((least, said))
        })?;
        let (free, cached, total) = match numbers(&said)?[..] {
            [free, cached] => (free, cached, limit >> 10),
            [free, cached, total] => (free, cached, total),
            _ => bail!("{who} says {said:?}"),
        };
        ensure!(total == limit >> 10, "{who}: {total} kB in all");
        ensure!((free << 10).abs_diff(limit - used) <= PAGE, "{who}: {free} kB free, and {used} bytes are charged");
        // Some count reclaimable slab in, where it is counted.
        let cache = counters(&stat, &["total_cache", "file"])?;
        let slab = counters(&stat, &["slab_reclaimable"])?;
        ensure!(cache > 20 << 20, "the group has {cache} bytes of cache");
        let agrees = [cache, cache + slab].iter().any(|cache| (cached << 10).abs_diff(*cache) <= PAGE);
        ensure!(agrees, "{who}: {cached} kB cached, and the group has {cache} and {slab} bytes");
    }
    Ok(())
}

/// Prints what sysinfo(2) says of all memory and of the free, and what the file said just before and just after, in KiB, as soon
/// as these two are the same and a page from it; else what was seen last. In between, the kernel may take back what it has charged
/// in advance, and charge it again.
const CALL_AND_READ: &str = r#"
    sub file { open F, "<", "/proc/meminfo" or die $!; local $/; my ($free) = <F> =~ /MemFree: *(\d+)/; close F; $free }
    my ($before, $after, @told);
    for (1 .. 200) {
        $before = file; my $b = "\0" x 112; syscall(99, $b) and die $!; @told = unpack q(q10), $b; $after = file;
        last if $before == $after and abs($told[5] / 1024 - $after) <= 4;
    }
    print join " ", $told[4] / 1024, $told[5] / 1024, $after"#;

fn callers_of_sysinfo_agree_with_the_group_to_a_page(site: &Site) -> Result<()> {
    let server = site.template(TEMPLATE)?.server("web1").with(LIMIT_FLAG).start()?;
    server.booted()?;
    let said = numbers(&server.exec(&["perl", "-e", CALL_AND_READ])?.success()?.text())?;
    let [total, called, read] = said[..] else { bail!("it says {said:?}") };
    ensure!(total == LIMIT >> 10, "{total} kB in all");
    // What the file says is the group's, see above.
    ensure!(called.abs_diff(read) <= PAGE >> 10, "the call tells {called} kB free, the file {read}");
    let usage = group_file(&server, "memory/GROUP/memory.usage_in_bytes", "memory.current")?;
    for (who, script) in [
        ("busybox free", "busybox free -k | awk '/^Mem:/ { print $2, $4 }'"),
        ("free", "free -k | awk '/^Mem:/ { print $2, $4 }'"),
    ] {
        // The watch misses a peak when it is kept from its CPU just then.
        eventually(&format!("{who} to say what the group has"), GUEST_LIMIT, || {
            let (least, most, said) = charged(&usage, || server.sh(script)).ok()?;
            let [total, free] = numbers(&said).ok()?[..] else { return None };
            let used = LIMIT.checked_sub(free << 10)?;
            (total == LIMIT >> 10 && (least.saturating_sub(PAGE)..=most + PAGE).contains(&used)).then_some(())
        })?;
    }
    Ok(())
}

fn htop_shows_its_memory(site: &Site) -> Result<()> {
    let server = site.template(TEMPLATE)?.server("web1").with(LIMIT_FLAG).with("--cpus 1").start()?;
    server.booted()?;
    let usage = group_file(&server, "memory/GROUP/memory.usage_in_bytes", "memory.current")?;
    let stat = usage.with_file_name("memory.stat");
    let mut terminal = server.terminal(&["exec", "-t", "web1", "--", "env", "TERM=vt100", "htop", "-C"])?;
    let (least, most, seen) = charged(&usage, || terminal.expect("M/256M"))?;
    let digits: String =
        seen.trim_end_matches("M/256M").chars().rev().take_while(|c| "0123456789.".contains(*c)).collect();
    let shown: f64 = digits.chars().rev().collect::<String>().parse().with_context(|| format!("{seen:?}"))?;
    // It leaves out what is cached, and shows a tenth of a MiB.
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let cache = counters(&stat, &["total_cache", "file", "slab_reclaimable"])?;
    ensure!(
        mib(least.saturating_sub(cache)) - 0.5 <= shown && shown <= mib(most) + 0.1,
        "{shown} MiB of {least} to {most}, {cache} cached"
    );
    // One bar: more would have numbers.
    ensure!(seen.contains("CPU") && !seen.contains(" 1["), "{seen:?}");
    terminal.send("q")?;
    ensure!(terminal.finish()? == 0, "htop failed");
    Ok(())
}

fn all_count_one_cpu(site: &Site) -> Result<()> {
    let server = site.template(TEMPLATE)?.server("web1").with("--memory 512M --cpus 1").start()?;
    for script in [
        "nproc",
        "nproc --all",
        "busybox nproc",
        "getconf _NPROCESSORS_CONF",
        "getconf _NPROCESSORS_ONLN",
        "lscpu -p=CPU | grep -vc '#'",
        "python3 -c 'import os; print(os.cpu_count())'",
        "python3 -c 'import os; print(os.process_cpu_count())'",
        "python3 -c 'import os; print(len(os.sched_getaffinity(0)))'",
        "top -b -n 1 -1 | grep -o '%Cpu[0-9]' | wc -l",
        "vmstat --version >/dev/null && grep -c ^cpu[0-9] /proc/stat",
        "mpstat -P ALL | tail -n +5 | wc -l",
        "iostat -c | sed -n '1s/.*(\\([0-9]*\\) CPU)/\\1/p'",
        // As many as there are, unless they are counted for it. By itself it takes as much memory as the cache of the CPU.
        "stress-ng --cpu 0 --cache-size 1M --timeout 1s 2>&1 | sed -n 's/.*dispatching hogs: \\([0-9]*\\) cpu.*/\\1/p'",
    ] {
        let said = server.sh(script)?;
        ensure!(said == "1", "{script}: {said:?}");
    }
    Ok(())
}

fn uptime_s(server: &Running) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{}/root/proc/uptime", server.init_pid()?))?;
    Ok(text.split(' ').next().unwrap_or_default().parse()?)
}

fn all_know_when_it_started(site: &Site) -> Result<()> {
    let server = site.template(TEMPLATE)?.server("web1").start()?;
    // Not a number that any clock begins with.
    thread::sleep(Duration::from_secs(3));
    // Each prints how many seconds ago, and is as exact as said here.
    for (script, exact_s) in [
        ("ps -o etimes= -p 1", 1.5),
        ("echo $(($(date +%s) - $(date -d \"$(ps -o lstart= -p 1)\" +%s)))", 2.0),
        ("echo $(($(date +%s) - $(date -d \"$(uptime -s)\" +%s)))", 2.0),
        ("echo $(($(date +%s) - $(vmstat -s | awk '/boot time/ { print $1 }')))", 2.0),
        ("python3 -c 'import time; print(time.clock_gettime(time.CLOCK_BOOTTIME))'", 0.5),
        ("perl -e '$b = \"\\0\" x 112; syscall(99, $b) and die $!; print unpack q(q), $b'", 1.5),
        ("busybox uptime | sed -n 's/.* up \\([0-9]*\\) min.*/\\1/p' | awk '{ print $1 * 60 }'", 60.0),
        ("top -b -n 1 | sed -n '1s/.* up \\([0-9]*\\) min.*/\\1/p' | awk '{ print $1 * 60 }'", 60.0),
    ] {
        let before = uptime_s(&server)?;
        let said: f64 = server.sh(script)?.parse().with_context(|| script.to_owned())?;
        let after = uptime_s(&server)?;
        ensure!(
            (before - exact_s..=after + exact_s).contains(&said),
            "{script}: {said} s, it is up {before} to {after} s"
        );
    }
    Ok(())
}

/// The lines of `/proc/stat` that count CPU time, in ticks of 10 ms.
fn cpu_lines(root: &Path) -> Result<Vec<Vec<u64>>> {
    let text = fs::read_to_string(root.join("proc/stat"))?;
    let lines = text.lines().filter(|line| line.starts_with("cpu"));
    lines.map(|line| numbers(line.split_once(' ').unwrap_or_default().1)).collect()
}

/// What a group used, in microseconds: by v1's `cpuacct.usage`, or v2's `cpu.stat`.
fn busy_us(text: &str) -> Result<u64> {
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::parse::<u64>);
    match (value("user_usec "), value("system_usec ")) {
        (Some(user), Some(system)) => Ok(user? + system?),
        _ => Ok(text.trim().parse::<u64>()? / 1000),
    }
}

fn cpu_time_adds_up_to_the_wall_clock(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    for (name, flags) in [("free", ""), ("one", "--cpus 1"), ("fifth", "--cpus 0.2")] {
        let server = template.server(name).with(flags).start()?;
        server.sh("for n in 1 2; do while :; do :; done >/dev/null 2>&1 </dev/null & done")?;
        let root = PathBuf::from(format!("/proc/{}/root", server.init_pid()?));
        let usage = group_file(&server, "cpuacct/GROUP/cpuacct.usage", "cpu.stat")?;
        let busy_ticks = || -> Result<u64> { Ok(busy_us(&fs::read_to_string(&usage)?)? / 10_000) };
        let begun = Instant::now();
        let mut last: Vec<Vec<u64>> = Vec::new();
        while begun.elapsed() < Duration::from_secs(2) {
            let (up, busy) = (uptime_s(&server)?, busy_ticks()?);
            let lines = cpu_lines(&root)?;
            let (up, busy) = (up..=uptime_s(&server)?, busy..=busy_ticks()?);
            for (now, before) in lines.iter().zip(&last) {
                ensure!(now.iter().zip(before).all(|(now, before)| now >= before), "{name}: {now:?} after {before:?}");
            }
            let (all, each) = lines.split_first().context("no CPU")?;
            for line in each {
                // Both are rounded, and busy time may run ahead: by a tick of the kernel, and under a quota by
                // what several CPUs of the host used up at the start of a period.
                let sum = line.iter().sum::<u64>() as f64 / 100.0;
                let ahead = if flags.is_empty() { 0.05 } else { 0.05 + QUOTA_PERIOD_S };
                ensure!(
                    (up.start() - 0.05..=up.end() + ahead).contains(&sum),
                    "{name}: {line:?} is {sum} s, it is up {up:?} s"
                );
            }
            for (column, total) in all.iter().enumerate() {
                ensure!(*total == each.iter().map(|line| line[column]).sum::<u64>(), "{name}: {lines:?}");
            }
            let used: u64 = all[..3].iter().sum();
            let rounding = 3 * each.len() as u64;
            ensure!(
                (busy.start().saturating_sub(rounding)..=busy.end() + rounding).contains(&used),
                "{name}: {used} ticks, and the group used {busy:?}"
            );
            last = lines;
        }
        ensure!(last.first().is_some_and(|all| all[0] + all[2] >= 20), "{name}: it was not busy: {last:?}");
        // Two loops in a fifth of a CPU have been held back.
        ensure!((last[0][7] > 0) == (name != "free") || name == "one", "{name}: steal in {last:?}");
    }
    Ok(())
}

fn stress_against_a_quota_is_steal(site: &Site) -> Result<()> {
    let server = site.template(TEMPLATE)?.server("web1").with("--memory 512M --cpus 0.2").start()?;
    server.booted()?;
    let mut stress =
        server.spawn(&["exec", "web1", "--", "stress-ng", "--cpu", "0", "--cache-size", "1M", "--timeout", "60s"])?;
    server.until("pgrep -f stress-ng-cpu")?;
    // Each prints user, nice, system, idle, wait and steal of three seconds, in percent.
    for (who, script) in [
        ("vmstat", "vmstat 3 2 | awk 'END { print $13, 0, $14, $15, $16, $17 }'"),
        (
            "top",
            "top -b -n 2 -d 3 | tr , ' ' | awk '/^%Cpu/ { l = $2 \" \" $6 \" \" $4 \" \" $8 \" \" $10 \" \" $16 } END { print l }'",
        ),
        ("mpstat", "mpstat 3 1 | awk '/^Average/ { print $3, $4, $5, $12, $6, $9 }'"),
        (
            "iostat",
            "iostat -c 3 2 | awk 'NF == 6 && /^ *[0-9]/ { l = $1 \" \" $2 \" \" $3 \" \" $6 \" \" $4 \" \" $5 } END { print l }'",
        ),
    ] {
        let said = server.sh(&format!("export LC_ALL=C; {script}"))?;
        let parts: Vec<f64> = said
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(|| format!("{who}: {said:?}"))?;
        let [user, nice, system, _idle, _wait, steal] = parts[..] else { bail!("{who}: {said:?}") };
        let all: f64 = parts.iter().sum();
        ensure!((97.0..=103.0).contains(&all), "{who}: {said} are {all} %");
        let busy = user + nice + system;
        // Where others keep the host busy, it gets less than its fifth, and then is held back for less.
        ensure!((3.0..=32.0).contains(&busy), "{who}: {busy} % busy of a fifth: {said}");
        ensure!(steal >= 5.0, "{who}: {steal} % steal: {said}");
    }
    stress.kill();
    Ok(())
}

fn stress_takes_a_share_of_its_own_memory(site: &Site) -> Result<()> {
    let server = site.template(TEMPLATE)?.server("web1").with(LIMIT_FLAG).start()?;
    server.booted()?;
    let mut stress = server.spawn(&[
        "exec",
        "web1",
        "--",
        "stress-ng",
        "--vm",
        "1",
        "--vm-bytes",
        "60%",
        "--vm-keep",
        "--vm-hang",
        "0",
        "--cache-size",
        "1M",
        "--timeout",
        "60s",
    ])?;
    // 60 % of what is free: of the host's memory the server would have been killed.
    server.until("test $(free -k | awk '/^Mem:/ { print $3 }') -gt $((110 << 10))")?;
    let used: u64 = server.sh("free -k | awk '/^Mem:/ { print $3 }'")?.parse()?;
    ensure!(used < 200 << 10, "{used} kB of {} are in use", LIMIT >> 10);
    let killed = server.sh("awk '/^oom_kill / { print $2 }' /proc/vmstat")?;
    ensure!(killed == "0" && stress.is_running(), "killed: {killed}");
    // And who looks at one process is told its share of the server's memory.
    let share: f64 = server.sh("ps -C stress-ng-vm -o pmem= --sort=-rss | head -n 1")?.parse()?;
    ensure!((40.0..80.0).contains(&share), "{share} % of its memory");
    stress.kill();
    Ok(())
}
