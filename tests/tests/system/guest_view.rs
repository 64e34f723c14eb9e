//! What a guest sees: a machine of its own.

use std::{fs, time::Instant};

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use system_tests::{promises, server::Running, site::Site};

promises![
    its_use_shows_in_meminfo,
    one_cpu_means_one_everywhere,
    a_cpuset_means_its_cpus,
    without_limits_it_sees_the_hosts_size,
    dev_holds_only_what_it_may_use,
    consoles_and_ttys_are_there,
    mounts_from_the_host_appear_inside,
    the_load_is_its_own,
    systemd_boots_to_running,
    sshd_answers,
    login_on_the_console_works,
    each_server_of_a_distribution_has_its_own_identity;
    each of ["busybox", "debian-13"]:
    pid_1_is_its_own_and_only_its_processes_show,
    its_host_name_is_its_own,
    its_uptime_counts_from_its_start,
    memory_shows_its_limit,
    cpus_show_its_limit,
    dmesg_is_denied,
    its_devpts_is_its_own,
    it_sees_its_own_control_group_only,
    no_path_of_the_host_is_among_its_mounts,
    swap_is_told_alike_everywhere
];

fn pid_1_is_its_own_and_only_its_processes_show(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let inside = server.sh("ls /proc | grep -c '^[0-9]'")?.parse::<usize>()?;
    let host = fs::read_dir("/proc")?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()));
    ensure!(inside < host.count(), "it sees {inside} processes");
    // Not by its name: the host's may be a systemd as well.
    let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid"));
    ensure!(space(&server.init_pid()?.to_string())? != space("self")?, "its PID 1 is the host's");
    let processes = server.sh("ps -e 2>/dev/null || ps")?;
    ensure!(!processes.contains("kthreadd"), "{processes}");
    let nspid = fs::read_to_string(format!("/proc/{}/status", server.init_pid()?))?;
    let nspid = nspid.lines().find(|line| line.starts_with("NSpid:")).context("no NSpid")?;
    ensure!(nspid.split_whitespace().last() == Some("1"), "{nspid}");
    Ok(())
}

fn its_host_name_is_its_own(site: &Site, template: &str) -> Result<()> {
    let template = site.template(template)?;
    let before = nix::unistd::gethostname()?;
    let plain = template.server("web1").start()?;
    ensure!(plain.sh("cat /proc/sys/kernel/hostname")? == "web1");
    ensure!(plain.sh("hostname 2>/dev/null || uname -n")? == "web1");
    ensure!(plain.file("/etc/hostname")? == "web1");
    let named = template.server("web2").with("--hostname www.example.org").start()?;
    ensure!(named.sh("uname -n")?.starts_with("www"), "{}", named.sh("uname -n")?);
    ensure!(nix::unistd::gethostname()? == before, "the host's name changed");
    Ok(())
}

fn its_uptime_counts_from_its_start(site: &Site, template: &str) -> Result<()> {
    let template = site.template(template)?;
    let host_uptime = clock_gettime(ClockId::CLOCK_BOOTTIME)?.tv_sec();
    let started = Instant::now();
    let server = template.server("web1").start()?;
    let uptime: f64 = server.sh("cut -d ' ' -f 1 /proc/uptime")?.parse()?;
    let passed = started.elapsed().as_secs_f64();
    // It cannot be older than the command that started it; on a host that just booted this says little.
    ensure!(uptime >= 0.0 && uptime <= passed + 0.1, "up {uptime} s, started {passed} s ago; host {host_uptime} s");
    let offsets = server.sh("cat /proc/self/timens_offsets")?;
    ensure!(offsets.contains("boottime"), "no time namespace: {offsets}");
    let status = server.status()?;
    ensure!(status["uptime_s"].as_f64().is_some_and(|up| up <= started.elapsed().as_secs_f64() + 1.0), "{status}");
    Ok(())
}

fn kib(server: &Running, key: &str) -> Result<u64> {
    let text = server.sh(&format!("awk '/^{key}:/ {{ print $2 }}' /proc/meminfo"))?;
    text.parse().with_context(|| format!("{key} is {text:?}"))
}

fn memory_shows_its_limit(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").with("--memory 256M").start()?;
    ensure!(kib(&server, "MemTotal")? == 256 << 10, "{}", kib(&server, "MemTotal")?);
    ensure!(kib(&server, "MemFree")? <= 256 << 10 && kib(&server, "MemAvailable")? <= 256 << 10);
    ensure!(free_kib(&server)? == 256 << 10);
    Ok(())
}

/// The total that free(1) shows.
fn free_kib(server: &Running) -> Result<u64> {
    let free = server.sh("free -k 2>/dev/null || free")?;
    let total = free.lines().find(|line| line.starts_with("Mem:")).and_then(|line| line.split_whitespace().nth(1));
    total.and_then(|total| total.parse().ok()).with_context(|| format!("no total in {free}"))
}

fn its_use_shows_in_meminfo(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--memory 256M").start()?;
    let before = kib(&server, "MemFree")?;
    server.sh("dd if=/dev/zero of=/dev/shm/ballast bs=1M count=64 2>/dev/null")?;
    let after = kib(&server, "MemFree")?;
    ensure!(before.saturating_sub(after) >= 60 << 10, "MemFree went from {before} to {after} kB");
    ensure!(kib(&server, "Shmem")? >= 60 << 10, "Shmem is {} kB", kib(&server, "Shmem")?);
    Ok(())
}

fn cpus_show_its_limit(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").with("--cpus 1").start()?;
    ensure!(server.sh("grep -c ^processor /proc/cpuinfo")? == "1");
    ensure!(server.sh("grep -c '^cpu[0-9]' /proc/stat")? == "1");
    ensure!(server.sh("cat /sys/devices/system/cpu/online")? == "0");
    Ok(())
}

fn one_cpu_means_one_everywhere(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let half = template.server("half").with("--cpus 0.5").start()?;
    ensure!(half.sh("grep -c ^processor /proc/cpuinfo")? == "1", "half a CPU is shown as one");
    let set = template.server("set").with("--cpuset 0").start()?;
    for server in [&half, &set] {
        ensure!(server.sh("grep -c '^cpu[0-9]' /proc/stat")? == "1");
    }
    for server in [&half, &set] {
        ensure!(server.sh("nproc")? == "1", "nproc says {}", server.sh("nproc")?);
    }
    Ok(())
}

fn a_cpuset_means_its_cpus(site: &Site) -> Result<()> {
    let host = std::thread::available_parallelism()?.get();
    if host < 2 {
        return Err(system_tests::promise::skip("this host has one CPU"));
    }
    let server = site.template("busybox")?.server("web1").with("--cpuset 1").start()?;
    ensure!(server.sh("awk '/^Cpus_allowed_list/ { print $2 }' /proc/1/status")? == "1");
    ensure!(server.sh("grep -c ^processor /proc/cpuinfo")? == "1");
    Ok(())
}

fn without_limits_it_sees_the_hosts_size(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let host = fs::read_to_string("/proc/meminfo")?;
    let total: u64 = host.split_whitespace().nth(1).context("no MemTotal")?.parse()?;
    ensure!(kib(&server, "MemTotal")? <= total, "more memory than the host has");
    let cpus = server.sh("grep -c ^processor /proc/cpuinfo")?.parse::<usize>()?;
    ensure!(cpus >= 1 && cpus <= std::thread::available_parallelism()?.get());
    Ok(())
}

fn dmesg_is_denied(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let said = server.sh_fails("dmesg")?;
    ensure!(said.to_lowercase().contains("not permitted") || said.to_lowercase().contains("denied"), "{said}");
    server.sh_fails("head -c 1 /dev/kmsg")?;
    Ok(())
}

fn its_devpts_is_its_own(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let mut terminal =
        server.terminal(&["exec", "-t", "web1", "--", "sh", "-c", "tty; test -c $(tty) && echo it-exists"])?;
    let seen = terminal.expect("it-exists")?;
    ensure!(seen.contains("/dev/pts/"), "{seen:?}");
    ensure!(terminal.finish()? == 0);
    let mounts = server.file("/proc/mounts")?;
    ensure!(mounts.lines().any(|line| line.starts_with("devpts /dev/pts ")), "{mounts}");
    // What the host has open is not there.
    let inside = server.sh("ls /dev/pts")?;
    let unknown = inside.split_whitespace().filter(|name| *name != "ptmx").count();
    ensure!(unknown <= 8, "whose are these terminals? {inside}");
    Ok(())
}

fn dev_holds_only_what_it_may_use(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let known = [
        "null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "tty0", "tty1", "tty2", "tty3", "tty4",
        "fuse", "net/tun",
    ];
    let nodes = server.sh("find /dev -xdev \\( -type c -o -type b \\) | sed 's|^/dev/||'")?;
    let strange: Vec<&str> = nodes.lines().filter(|node| !known.contains(node) && !node.starts_with("pts/")).collect();
    ensure!(strange.is_empty(), "what are these? {strange:?}");
    for node in ["null", "zero", "full", "random", "urandom"] {
        server.sh(&format!("head -c 1 /dev/{node} >/dev/null"))?;
    }
    server.sh("echo gone >/dev/null; ls -l /dev/fd /dev/stdin /dev/stdout /dev/stderr")?;
    Ok(())
}

fn consoles_and_ttys_are_there(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    for node in ["console", "tty1", "tty2", "tty3", "tty4"] {
        server.sh(&format!("test -c /dev/{node} && test -w /dev/{node}"))?;
    }
    Ok(())
}

fn it_sees_its_own_control_group_only(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let groups = server.file("/proc/1/cgroup")?;
    ensure!(groups.lines().any(|line| line.starts_with("0::/")), "{groups}");
    ensure!(!groups.contains("vsos") && !groups.contains(".."), "the host's names show: {groups}");
    let mounts = server.sh("grep ' /sys/fs/cgroup ' /proc/mounts")?;
    ensure!(mounts.contains("cgroup2"), "{mounts}");
    server.sh("cat /sys/fs/cgroup/cgroup.procs >/dev/null")?;
    Ok(())
}

fn no_path_of_the_host_is_among_its_mounts(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let root = site.root().display().to_string();
    for line in server.file("/proc/self/mountinfo")?.lines() {
        let point = line.split(' ').nth(4).unwrap_or_default();
        ensure!(!point.contains(&root), "{line}");
    }
    server.sh_fails(&format!("ls {root}"))?;
    Ok(())
}

fn swap_is_told_alike_everywhere(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").with("--memory 128M --swap 64M").start()?;
    let total = kib(&server, "SwapTotal")?;
    ensure!(total <= 64 << 10, "SwapTotal is {total} kB");
    let swaps = server.file("/proc/swaps")?;
    let listed: u64 =
        swaps.lines().skip(1).filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum();
    ensure!(listed == total, "meminfo says {total} kB, swaps says {listed} kB:\n{swaps}");
    Ok(())
}

fn mounts_from_the_host_appear_inside(site: &Site) -> Result<()> {
    let shared = site.path("shared");
    fs::create_dir(&shared)?;
    fs::write(shared.join("from-host"), "hello")?;
    let flags = format!("--mount {0}:/mnt/rw --mount {0}:/mnt/ro:ro", shared.display());
    let server = site.template("busybox")?.server("web1").with(&flags).start()?;
    ensure!(server.file("/mnt/rw/from-host")? == "hello" && server.file("/mnt/ro/from-host")? == "hello");
    server.sh("echo reply >/mnt/rw/from-guest")?;
    ensure!(fs::read_to_string(shared.join("from-guest"))?.trim() == "reply");
    let said = server.sh_fails("echo no >/mnt/ro/x")?;
    ensure!(said.contains("Read-only"), "{said}");
    Ok(())
}

fn the_load_is_its_own(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let load = server.file("/proc/loadavg")?;
    let words: Vec<&str> = load.split_whitespace().collect();
    ensure!(words.len() == 5 && words[..3].iter().all(|word| word.parse::<f64>().is_ok()), "{load:?}");
    let (_, tasks) = words[3].split_once('/').context("no tasks")?;
    ensure!(tasks.parse::<u32>()? < 50, "it has few tasks, not the host's: {load:?}");
    Ok(())
}

fn systemd_boots_to_running(site: &Site) -> Result<()> {
    let server = site.template("debian-13")?.server("web1").start()?;
    let state = server.booted()?;
    let failed = server.exec(&["systemctl", "--failed", "--no-legend", "--plain"])?;
    ensure!(state == "running", "it is {state}:\n{failed}");
    let journal = server.sh("journalctl -b --no-pager | wc -l")?;
    ensure!(journal.parse::<u32>()? > 10, "the journal has {journal} lines");
    server.sh("systemctl is-active systemd-journald")?;
    server.sh(
        "systemctl is-active systemd-networkd || systemctl is-active networking || ip -4 address show eth0 | grep inet",
    )?;
    Ok(())
}

fn sshd_answers(site: &Site) -> Result<()> {
    use std::{io::Read, net::TcpStream};
    let server = site.template("debian-13")?.server("web1").start()?;
    server.booted()?;
    let address = std::net::SocketAddr::new(server.ipv4()?.parse()?, 22);
    let banner = system_tests::command::eventually("a banner of sshd", system_tests::server::GUEST_LIMIT, || {
        let mut stream = TcpStream::connect(address).ok()?;
        let mut banner = [0; 7];
        stream.read_exact(&mut banner).ok()?;
        Some(banner)
    })?;
    ensure!(&banner == b"SSH-2.0", "{banner:?}");
    Ok(())
}

fn login_on_the_console_works(site: &Site) -> Result<()> {
    let draft = site.template("debian-13")?.server("web1").with("--password-stdin");
    let call = site.vsctl(draft.command()).input("open sesame\n");
    site.keep(call)?.success()?;
    let server = system_tests::server::Server::adopt(site, "web1").start()?;
    let mut console = server.terminal(&["console", "web1"])?;
    console.send("\r")?;
    console.expect("login:")?;
    console.send("root\r")?;
    console.expect("assword:")?;
    console.send("open sesame\r")?;
    console.expect("root@web1")?;
    console.send("tty; echo done-$((40+2))\r")?;
    let seen = console.expect("done-42")?;
    ensure!(seen.contains("/dev/console") || seen.contains("/dev/pts"), "{seen:?}");
    console.send("\u{1}q")?;
    ensure!(console.finish()? == 0);
    Ok(())
}

fn each_server_of_a_distribution_has_its_own_identity(site: &Site) -> Result<()> {
    let template = site.template("debian-13")?;
    let one = template.server("web1").start()?;
    let two = template.server("web2").start()?;
    for file in ["/etc/machine-id", "/etc/ssh/ssh_host_ed25519_key.pub"] {
        let (first, second) = (one.file(file)?, two.file(file)?);
        ensure!(!first.is_empty() && first != second, "{file} is the same in both");
    }
    Ok(())
}
