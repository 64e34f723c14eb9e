//! The files of statistics: what programs in a server count, and that nobody else shows in them.

use anyhow::{Context, Result, ensure};
use system_tests::{command::kill_hard, promise::skip, promises, server::Running, site::Site, stranger::Stranger};

promises![
    cpus_come_and_go_with_the_quota,
    its_own_pressure_wakes_a_program,
    who_is_given_a_device_sees_what_the_host_has,
    directories_of_a_killed_service_come_back;
    each of ["busybox", "debian-13"]:
    sysfs_has_its_cpus_only,
    tables_have_a_column_for_each_cpu,
    one_node_has_all_it_has,
    strangers_show_nowhere,
    pressure_is_its_groups,
    its_controllers_are_those_of_version_2
];

const CPUS: &str = "/sys/devices/system/cpu";

/// What each of some commands says, which must be `wanted`.
fn all_say(server: &Running, wanted: &str, commands: &[&str]) -> Result<()> {
    for command in commands {
        let said = server.sh(command)?;
        ensure!(said == wanted, "{command}: {said:?} instead of {wanted:?}");
    }
    Ok(())
}

fn sysfs_has_its_cpus_only(site: &Site, template: &str) -> Result<()> {
    let host = std::thread::available_parallelism()?.get();
    let made = site.template(template)?;
    for (flags, count) in [("--cpus 0.5", 1), ("", host)] {
        let server = made.server(&format!("cpu{count}")).with(flags).start()?;
        let last = count - 1;
        let list = if last == 0 { "0".to_owned() } else { format!("0-{last}") };
        let lists = ["online", "possible", "present", "cpu0/topology/core_siblings_list"];
        all_say(&server, &list, &lists.map(|file| format!("cat {CPUS}/{file}")).each_ref().map(String::as_str))?;
        let counted = ["nproc", "nproc --all 2>/dev/null || nproc", "grep -c ^processor /proc/cpuinfo"];
        all_say(&server, &count.to_string(), &counted)?;
        all_say(&server, &count.to_string(), &[&format!("ls -d {CPUS}/cpu[0-9]* | wc -l")])?;
        all_say(&server, &last.to_string(), &[&format!("cat {CPUS}/cpu{last}/topology/core_id")])?;
        server.sh_fails(&format!("cat {CPUS}/cpu{count}/topology/core_id"))?;
        // Nor has another place in sysfs a name for it; of a disk's queues the kernel tells below its bus.
        all_say(&server, "", &[&format!("find /sys -name cpu{count} -o -name memory0 | grep -v /mq/ || true")])?;
        // All of it can be listed and read, and nothing written.
        server.sh(&format!("find {CPUS} -type f | xargs cat >/dev/null"))?;
        server.sh_fails(&format!("echo 0 >{CPUS}/cpu0/online"))?;
        if template != "busybox" {
            let counted = ["getconf _NPROCESSORS_CONF", "getconf _NPROCESSORS_ONLN", "lscpu -p=CPU | grep -vc '#'"];
            all_say(&server, &count.to_string(), &counted)?;
            let described = server.sh("LC_ALL=C lscpu")?;
            ensure!(
                described
                    .lines()
                    .any(|line| line.starts_with("Core(s) per socket:") && line.ends_with(&format!(" {count}"))),
                "{described}"
            );
        }
    }
    Ok(())
}

fn cpus_come_and_go_with_the_quota(site: &Site) -> Result<()> {
    if std::thread::available_parallelism()?.get() < 2 {
        return Err(skip("this host has one CPU"));
    }
    let server = site.template("busybox")?.server("web1").start()?;
    // Whoever is in the directory stays in it.
    server.sh(&format!("ls -d {CPUS}/cpu1/topology"))?;
    site.ok(["set", "web1", "cpus=1"])?;
    server.until(&format!("! test -e {CPUS}/cpu1 && test $(ls -d {CPUS}/cpu[0-9]* | wc -l) = 1"))?;
    site.ok(["set", "web1", "cpus=2"])?;
    server.until(&format!("test $(cat {CPUS}/cpu1/topology/core_id) = 1"))
}

fn tables_have_a_column_for_each_cpu(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").with("--cpus 1 --memory 256M").start()?;
    all_say(&server, "1", &["head -n 1 /proc/interrupts | wc -w", "head -n 1 /proc/softirqs | wc -w"])?;
    all_say(&server, "0", &["sed 1d /proc/interrupts | wc -l", "sed 1,2d /proc/slabinfo | wc -l"])?;
    all_say(&server, "10", &["sed 1d /proc/softirqs | grep -c ': *0$'"])?;
    all_say(&server, "65536", &["awk '/ managed / { print $2 }' /proc/zoneinfo"])?;
    all_say(&server, "1", &["grep -c 'cpu: ' /proc/zoneinfo"])?;
    let listed = server.sh("sed 1,2d /proc/partitions | awk '{ print $4 }'")?;
    let used = server.sh("awk '{ print $3 }' /proc/diskstats")?;
    ensure!(listed == used, "partitions has {listed}, diskstats {used}");
    if std::path::Path::new("/proc/schedstat").exists() {
        all_say(&server, "1", &["grep -c ^cpu /proc/schedstat"])?;
    }
    if template != "busybox" {
        server.sh("vmstat -s >/dev/null && vmstat -m >/dev/null && slabtop -o >/dev/null")?;
        // Of util-linux-extra, which not every template has.
        server.sh("! command -v lsirq >/dev/null || lsirq -n >/dev/null")?;
    }
    Ok(())
}

fn one_node_has_all_it_has(site: &Site, template: &str) -> Result<()> {
    const NODE: &str = "/sys/devices/system/node";
    if !std::path::Path::new(NODE).exists() {
        return Err(skip("this kernel knows no nodes"));
    }
    let server = site.template(template)?.server("web1").with("--cpus 1 --memory 256M").start()?;
    all_say(&server, "0", &[&format!("cat {NODE}/online"), &format!("cat {NODE}/node0/cpulist")])?;
    all_say(&server, "262144", &[&format!("awk '/MemTotal/ {{ print $4 }}' {NODE}/node0/meminfo")])?;
    all_say(&server, "1", &[&format!("cat {NODE}/node0/cpumap"), &format!("ls -d {NODE}/node* | wc -l")])?;
    // Round the links and back.
    all_say(&server, "10", &[&format!("cat {NODE}/node0/cpu0/node0/distance")])?;
    server.sh(&format!("find {NODE} -type f | xargs cat >/dev/null"))?;
    if template != "busybox" {
        let described = server.sh("LC_ALL=C lscpu")?;
        let numa = described.lines().filter(|line| line.starts_with("NUMA")).map(|line| line.split_whitespace().last());
        ensure!(numa.eq([Some("1"), Some("0")]), "{described}");
    }
    Ok(())
}

/// Prints each file, link and text of /proc and /sys that has `$1`. Processes' own files are in other promises.
const WALK: &str = r#"
    below() { find /proc /sys -path '/proc/[0-9]*' -prune -o -path /sys/fs/cgroup -prune -o "$@" -print0 2>/dev/null; }
    below | tr '\0' '\n' >/tmp/all
    grep -E "$1" /tmp/all
    below -type l | xargs -0 -n 500 ls -ld 2>/dev/null | grep -E -- "$1" | sed 's/^/link /'
    # Some wait for news: that is seen, and not taken for a file without names.
    below -type f | xargs -0 -n 100 sh -c '
        timeout 20 grep -aslE -e "$0" -- "$@"; test $? -lt 124 || echo "one of these does not end: $*"' "$1" | sed 's/^/text of /'
    wc -l </tmp/all"#;

fn strangers_show_nowhere(site: &Site, template: &str) -> Result<()> {
    let stranger = Stranger::new(&site.suffix(), site.root().to_owned())?;
    let made = site.template(template)?;
    let _other = made.server(&format!("other{}", site.suffix())).start()?;
    for flags in ["", "--privileged"] {
        let server = made.server(&format!("web{}", flags.len())).with(flags).start()?;
        if template != "busybox" {
            server.booted()?;
        }
        let wanted = format!(
            "{}|(^|[^a-z]){}($|[^0-9])|other{}|{}",
            stranger.name,
            stranger.device,
            site.suffix(),
            site.cgroup()
        );
        let call = server.exec(&["sh", "-c", WALK, "sh", &wanted])?.text();
        let mut found: Vec<&str> = call.lines().collect();
        let count: usize = found.pop().unwrap_or_default().trim().parse()?;
        ensure!(count > 1000, "only {count} files were looked at");
        // Who is trusted with the host has its block devices.
        found.retain(|line| flags.is_empty() || !line.contains("/block/"));
        ensure!(found.is_empty(), "strangers show:\n{}", found.join("\n"));
        // The walk sees what is there: the server's own name.
        let own = server.exec(&["sh", "-c", WALK, "sh", server.name()])?.text();
        ensure!(own.contains("text of /proc/sys/kernel/hostname"), "the walk is blind: {own}");
    }
    Ok(())
}

fn its_controllers_are_those_of_version_2(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let groups = server.sh("find /sys/fs/cgroup -type d | wc -l")?;
    all_say(&server, "0", &["sed 1d /proc/cgroups | awk '{ print $2 }' | sort -u"])?;
    if template == "busybox" {
        all_say(&server, &groups, &["sed 1d /proc/cgroups | awk '{ print $3 }' | sort -u"])?;
    }
    Ok(())
}

fn pressure_is_its_groups(site: &Site, template: &str) -> Result<()> {
    if !std::path::Path::new("/proc/pressure").exists() {
        return Err(skip("this kernel counts no pressure"));
    }
    let server = site.template(template)?.server("web1").with("--cpus 0.2").start()?;
    // Who looks for the hierarchy takes the first; OpenJDK does.
    let first = server.sh("grep -m 1 ' - cgroup2 ' /proc/self/mountinfo | awk '{ print $5 }'")?;
    ensure!(first == "/sys/fs/cgroup", "the first mount of cgroup2 is {first}");
    // Averages of the last seconds change while they are read.
    let total = |file: &str| -> Result<u64> { Ok(server.sh(&format!("sed -n 's/^some.*total=//p' {file}"))?.parse()?) };
    let before = total("/sys/fs/cgroup/cpu.pressure")?;
    let seen = total("/proc/pressure/cpu")?;
    let after = total("/sys/fs/cgroup/cpu.pressure")?;
    ensure!((before..=after).contains(&seen), "{seen} is not between {before} and {after}");
    server.sh("cat /proc/pressure/memory /proc/pressure/io >/dev/null")?;
    Ok(())
}

fn directories_of_a_killed_service_come_back(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--cpus 1").start()?;
    let pid = site.fuse_supervisor().context("no supervisor")?;
    let node = "/sys/devices/system/node";
    let known = format!(
        "test $(cat {CPUS}/cpu0/topology/core_id) = 0 && test $(ls -d {CPUS}/cpu[0-9]* | wc -l) = 1 && \
         {{ ! test -e {node} || test $(cat {node}/node0/cpulist) = 0; }} && test $(cat /proc/cgroups | wc -l) -gt 1"
    );
    server.sh(&known)?;
    kill_hard(pid)?;
    // One dead mount of each, as a lid, and one that lives.
    let fuse = "grep ' - fuse' /proc/self/mountinfo | awk '$5 ~ /^.(proc|sys)/ { print $5 }'";
    server.until(&format!("test \"$({fuse} | sort | uniq -c | awk '{{ print $1 }}' | sort -u)\" = 2 && {known}"))?;
    if std::path::Path::new("/proc/pressure").exists() {
        server.sh("cat /proc/pressure/* >/dev/null")?;
    }
    Ok(())
}

/// Waits at the file `$ARGV[0]` until something was held up for `$ARGV[1]` µs of two seconds, at most for `$ARGV[2]` s.
const WAIT: &str = r#"open F, "+<", $ARGV[0] or die "open: $!"; syswrite F, "some $ARGV[1] 2000000\0" or die "write: $!";
    vec($set = "", fileno F, 1) = 1; print scalar select(undef, undef, $set, $ARGV[2])"#;

fn its_own_pressure_wakes_a_program(site: &Site) -> Result<()> {
    if !std::path::Path::new("/proc/pressure").exists() {
        return Err(skip("this kernel counts no pressure"));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let refused = mounts.lines().any(|line| line.contains(" - cgroup2 ") && line.contains("nsdelegate"));
    let template = site.template("debian-13")?;
    let (busy, idle) = (template.server("busy").with("--cpus 0.5").start()?, template.server("idle").start()?);
    busy.booted()?;
    idle.booted()?;
    busy.sh("systemd-run --quiet --unit=load sh -c 'while :; do :; done & while :; do :; done'")?;
    let wait = |server: &Running, file: &str, stall: &str, seconds: &str| -> Result<String> {
        Ok(server.exec(&["perl", "-e", WAIT, file, stall, seconds])?.success()?.text())
    };
    let woken = wait(&busy, "/sys/fs/cgroup/system.slice/load.service/cpu.pressure", "150000", "20")?;
    ensure!(woken == "1", "a program that waits at a service of the busy server was not woken: {woken}");
    if refused {
        let done = busy.exec(&["perl", "-e", WAIT, "/proc/pressure/cpu", "150000", "20"])?;
        done.complains(&["Operation not permitted"])?;
        return Ok(());
    }
    let woken = wait(&busy, "/proc/pressure/cpu", "150000", "20")?;
    ensure!(woken == "1", "the busy server's program was not woken: {woken}");
    // Pressure of others is none of its own.
    let woken = wait(&idle, "/proc/pressure/cpu", "1000000", "3")?;
    ensure!(woken == "0", "the idle server's program was woken: {woken}");
    Ok(())
}

fn who_is_given_a_device_sees_what_the_host_has(site: &Site) -> Result<()> {
    let stranger = Stranger::new(&site.suffix(), site.root().to_owned())?;
    let shown = format!("/sys/class/block/{}/size", stranger.device);
    let template = site.template("busybox")?;
    for (name, flags, shows) in [
        ("plain", String::new(), false),
        ("character", "--device /dev/fuse".to_owned(), false),
        ("block", format!("--device /dev/{}", stranger.device), true),
        ("trusted", "--privileged".to_owned(), true),
    ] {
        let server = template.server(name).with(&flags).start()?;
        server.sh(&format!("{} test -e {shown}", if shows { "" } else { "!" }))?;
        site.ok(["destroy", "--force", name])?;
    }
    Ok(())
}
