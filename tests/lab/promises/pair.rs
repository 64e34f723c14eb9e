//! Two hosts on one segment.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::eventually,
    lab::{Host, definition::Init, pair, pair::Pair},
};

use super::{
    Lab,
    boot::{count, counted, counts_on},
    json, prepare,
};

pub const LIMIT: Duration = Duration::from_secs(120);

/// Each runs a server and commands the other, by name and without being asked for anything.
pub fn two_hosts_reach_each_other_by_name(lab: &Lab<'_>) -> Result<()> {
    lab.only_when_there_is_time()?;
    let (definition, image) = lab.found(|definition, _| definition.init == Init::Minimal)?;
    let pair = pair(&lab.workshop, definition, image, lab.payload)?;
    let hosts = &pair.hosts;
    for (host, name) in hosts.iter().zip(["a", "b"]) {
        prepare(host)?;
        host.sh(&format!("vsctl create on-{name} --template busybox --start"))?;
    }
    for (host, other) in hosts.iter().zip(["b", "a"]) {
        host.sh(&format!("ping -c 1 -W 10 {other}"))?;
        let answer = host.sh(&format!("ssh {other} 'uname -n; vsctl list -H -o name'"))?;
        ensure!(answer.split_whitespace().eq([other, &format!("on-{other}")]), "{answer}");
        ensure!(host.sh(&format!("vsctl exec on-{} -- echo alive", if other == "b" { "a" } else { "b" }))? == "alive");
    }
    Ok(())
}

/// The same networks on both hosts.
pub const NETWORKS: &str =
    "mkdir -p /etc/vsos && printf 'ipv4 = \"10.77.0.0/24\"\nipv6 = \"fd77::/64\"\n' >/etc/vsos/vsos.toml";

/// Sends the busybox template to `b` before there is a server, by hand.
pub const SEND_TEMPLATE: &str = "tar -C /var/lib/vsos/templates --format=posix --numeric-owner --xattrs --xattrs-include='*' -cf - busybox | \
          ssh b 'mkdir -p -m 700 /var/lib/vsos/templates && \
                 tar -C /var/lib/vsos/templates --numeric-owner --xattrs --xattrs-include=\\* -xpf -'";

/// Two hosts with systemd and the same networks, both with the busybox template.
pub fn pair_with_template(lab: &Lab<'_>) -> Result<Pair> {
    let (definition, image) = lab.found(|definition, _| definition.init == Init::Systemd)?;
    let pair = pair(&lab.workshop, definition, image, lab.payload)?;
    for host in &pair.hosts {
        host.sh(NETWORKS)?;
    }
    let [a, _] = &pair.hosts;
    prepare(a)?;
    a.sh(SEND_TEMPLATE)?;
    Ok(pair)
}

/// By ssh, with its template; and back. Then the current of its host is cut when that has
/// given the server up, and has not said so.
pub fn a_server_moves_between_two_hosts(lab: &Lab<'_>) -> Result<()> {
    let (definition, image) = lab.found(|definition, _| definition.init == Init::Minimal)?;
    let mut pair = pair(&lab.workshop, definition, image, lab.payload)?;
    let [a, b] = &mut pair.hosts;
    for host in [&*a, &*b] {
        host.sh(NETWORKS)?;
    }
    prepare(a)?;
    a.sh(
        "vsctl create web1 --template busybox --memory 64M --start && vsctl exec web1 -- sh -c 'echo kept >/root/file'",
    )?;
    let refused = a.run("vsctl migrate web1 b --offline --dry-run")?;
    ensure!(refused.code == 91 && refused.errors().contains("no template 'busybox'"), "{refused}");
    a.sh("vsctl migrate web1 b --offline --send-template").context("move it to b")?;
    is_at(b, a)?;
    b.sh("vsctl migrate web1 a --offline").context("move it back to a")?;
    is_at(a, b)?;
    // The seventh moment: its mark says that it has moved.
    a.sh("VSOS_FAULT=migrate:7:stop setsid vsctl migrate web1 b --offline >/tmp/out 2>&1 </dev/null & sleep 0.2")?;
    eventually("a command that stops", LIMIT, || {
        let found = a.sh("cat /proc/[0-9]*/stat 2>/dev/null | grep -c '(vsctl) T' || :").ok()?;
        (found != "0").then_some(())
    })
    .with_context(|| a.sh("cat /tmp/out; ps -ef | grep vsctl").unwrap_or_default())?;
    a.cut_power();
    a.switch_on()?;
    for (host, state) in [(&*a, "moved"), (&*b, "incoming")] {
        let status = json(host, "vsctl status web1 --json")?;
        ensure!(status["state"] == state, "{} says {status}", host.name());
        ensure!(host.run("vsctl start web1")?.code != 0, "it was started at {}", host.name());
        ensure!(host.run("vsctl doctor")?.text().contains("--continue"), "{}", host.name());
    }
    a.sh("vsctl migrate web1 b --continue")?;
    is_at(b, a)
}

fn is_at(host: &Host, other: &Host) -> Result<()> {
    ensure!(host.sh("vsctl exec web1 -- cat /root/file")? == "kept", "its file is another");
    ensure!(other.sh("vsctl list -a -H -o name; ls /var/lib/vsos/ids /var/lib/vsos/addresses | grep -v :")?.is_empty());
    for host in [host, other] {
        let found = host.run("vsctl doctor")?;
        ensure!(found.text().contains("nothing was left behind"), "{found}");
    }
    Ok(())
}

/// Memory of which much stays as it is and some changes all the time: a file of a server's own tmpfs, and variables of a shell.
const FILL: &str = "cd /dev/shm && head -c 8000000 /dev/urandom >still && md5sum <still >sum
    setsid sh -c 'all=; while [ ${#all} -lt 2000000 ]; do all=$all$(head -c 30000 /dev/zero | tr \\\\0 x); done
                  while :; do part=$(echo $all | head -c 100000); sleep 0.2; done' >/dev/null 2>&1 </dev/null &";

/// Suspended, moved and restored, with what it has in memory; and whatever fails or is killed on the way, it goes on at one host.
pub fn a_running_server_goes_on_at_another_host(lab: &Lab<'_>) -> Result<()> {
    let pair = pair_with_template(lab)?;
    let [a, b] = &pair.hosts;
    // It has the first number there, and so the ids on the host that ours has here.
    b.sh("vsctl create other --template busybox --ip 10.77.0.200/24")?;
    let flags = "--template busybox --migratable --memory 64M --ip 10.77.0.9/24 --ip fd77::9/64";
    a.sh(&format!("vsctl create web1 {flags} --start"))?;
    count(a)?;
    const MOVE: &str = "vsctl migrate web1 b --near-live";
    let tried = a.sh(&format!("{MOVE} --dry-run"))?;
    ensure!(tried.contains("goes on there"), "{tried}");
    for moment in (3..=7).step_by(if lab.is_thorough() { 1 } else { 2 }) {
        let before = counted(a)?;
        let failed = a.run(&format!("VSOS_FAULT=migrate:{moment}:fail {MOVE}"))?;
        // At the third it has not stood still yet.
        let stood = failed.errors().contains("runs here again");
        ensure!(failed.code != 0 && stood == (moment > 3), "moment {moment}: {failed}");
        counts_on(a, before).with_context(|| format!("failed at moment {moment}"))?;
        nothing_at(b)?;
    }
    // The fifth moment of the other side: before it brings the processes back.
    b.sh("printf '#!/bin/sh\nexport VSOS_FAULT=migrate-receive:5:fail\nexec vsctl \"$@\"\n' >/root/faulty; chmod +x /root/faulty")?;
    a.sh("printf '#!/bin/sh\nexec ssh \"$1\" /root/faulty \"$3\"\n' >/root/shell; chmod +x /root/shell")?;
    a.sh("cp /etc/vsos/vsos.toml /root/good; printf '[migrate]\nshell = [\"/root/shell\"]\n' >>/etc/vsos/vsos.toml")?;
    let before = counted(a)?;
    let failed = a.run(MOVE)?;
    ensure!(failed.errors().contains("migrate-receive:5") && failed.errors().contains("runs here again"), "{failed}");
    counts_on(a, before).context("failed at the other side")?;
    nothing_at(b)?;
    a.sh("mv /root/good /etc/vsos/vsos.toml")?;
    // Its processes are there, whole, when the command that moves them is killed.
    let before = counted(a)?;
    let killed = a.run(&format!("VSOS_FAULT=migrate:7:kill {MOVE}"))?;
    ensure!(killed.code != 0, "it was not killed: {killed}");
    ensure!(json(a, "vsctl status web1 --json")?["state"] == "suspended");
    eventually("the other side to take the processes back", LIMIT, || {
        b.run("grep -q . /sys/fs/cgroup/vsos/web1/cgroup.procs").ok().filter(|found| found.code != 0)
    })?;
    ensure!(json(b, "vsctl status web1 --json")?["state"] == "incoming");
    a.sh("vsctl migrate web1 b --abort && vsctl resume web1")?;
    counts_on(a, before).context("killed when it was whole there")?;
    nothing_at(b)?;
    let seen = "vsctl exec web1 -- sh -c 'cat /sys/class/net/eth0/address; ip -o address show dev eth0 scope global | sed s/valid.*//; ip route'";
    let uptime = |host: &Host| -> Result<f64> {
        let text = host.sh("vsctl exec web1 -- cut -d' ' -f1 /proc/uptime")?;
        text.trim().parse().with_context(|| format!("an uptime: {text:?}"))
    };
    for (from, to, name) in [(a, b, "b"), (b, a, "a")] {
        let (before, looks, up) = (counted(from)?, from.sh(seen)?, uptime(from)?);
        from.sh(&format!("vsctl migrate web1 {name} --near-live")).with_context(|| format!("move it to {name}"))?;
        counts_on(to, before).with_context(|| format!("at {name}"))?;
        ensure!(to.sh(seen)? == looks, "it looked so: {looks}; and now: {}", to.sh(seen)?);
        ensure!(uptime(to)? >= up, "its uptime went back from {up}");
        // Its ids are those of its number here.
        let pid = json(to, "vsctl status web1 --json")?["pid"].clone();
        let first = json(to, "vsctl show web1 --json")?["on_host"]["first_id"].to_string();
        let map = to.sh(&format!("cat /proc/{pid}/uid_map"))?;
        ensure!(map.split_whitespace().nth(1) == Some(&first), "{map} does not begin at {first}");
        to.sh("vsctl exec web1 -- ping -c 1 -w 20 10.77.0.1")?;
        let left = from.sh("vsctl list -a -H -o name | grep -v other; true")?;
        ensure!(left.is_empty(), "left at the other host: {left}");
        for host in [a, b] {
            let found = host.run("vsctl doctor")?;
            ensure!(found.text().contains("nothing was left behind"), "{found}");
        }
    }
    // While it runs, with memory that changes while it is sent.
    a.put("/tmp/fill", FILL.as_bytes())?;
    a.sh("vsctl push web1 /tmp/fill /root/fill && vsctl exec web1 -- sh /root/fill")?;
    for (from, to, name) in [(a, b, "b"), (b, a, "a")] {
        let before = counted(from)?;
        let failed = from.run(&format!("VSOS_FAULT=migrate:4:fail vsctl migrate web1 {name} --live"))?;
        ensure!(failed.errors().contains("VSOS_FAULT"), "{failed}");
        let found = from.run("vsctl doctor")?;
        ensure!(found.text().contains("nothing was left behind"), "{found}");
        counts_on(from, before).context("failed after memory was sent")?;
        let done = from.run(&format!("RUST_LOG=info vsctl migrate web1 {name} --live --max-downtime 0.01s"))?;
        ensure!(done.code == 0 && done.errors().contains("sending memory, round 2"), "{done}");
        counts_on(to, before).with_context(|| format!("at {name}"))?;
        let sums =
            to.sh("vsctl exec web1 -- sh -c 'cd /dev/shm && for n in 1 2 3 4; do md5sum <still; done; cat sum'")?;
        let mut sums: Vec<&str> = sums.lines().collect();
        sums.dedup();
        ensure!(sums.len() == 1, "its memory is another: {sums:?}");
        for host in [a, b] {
            let found = host.run("vsctl doctor")?;
            ensure!(found.text().contains("nothing was left behind"), "{found}");
            let left = host.sh("ls -d /var/lib/vsos/servers/*/volume/memory 2>/dev/null || :")?;
            ensure!(left.is_empty(), "left: {left}");
        }
    }
    // Given up, and not told: it goes on there from the images.
    let before = counted(a)?;
    let killed = a.run(&format!("VSOS_FAULT=migrate:8:kill {MOVE}"))?;
    ensure!(killed.code != 0 && json(a, "vsctl status web1 --json")?["state"] == "moved", "{killed}");
    a.sh("vsctl migrate web1 b --continue")?;
    counts_on(b, before).context("after --continue")?;
    // Suspended it moves as it is, and boots anew where that is wanted.
    b.sh("vsctl suspend web1 && vsctl migrate web1 a --offline")?;
    ensure!(json(a, "vsctl status web1 --json")?["state"] == "suspended");
    a.sh("vsctl resume web1")?;
    counts_on(a, before).context("moved while it was suspended")?;
    // Where it is asked for, the next rung is tried: here a fault meets the first two, of two connections each.
    b.sh("printf '#!/bin/sh\ntest $(wc -c </root/tried) -ge 4 || { printf x >>/root/tried; export VSOS_FAULT=migrate-receive:5:fail; }
          exec vsctl \"$@\"\n' >/root/faulty; : >/root/tried")?;
    a.sh("printf '[migrate]\nshell = [\"/root/shell\"]\n' >>/etc/vsos/vsos.toml")?;
    let done = a.run("vsctl migrate web1 b --live --fallback")?;
    let errors = done.errors();
    let told: Vec<&str> = errors.lines().filter(|line| line.contains("is not possible")).collect();
    ensure!(done.code == 0 && told.len() == 2, "{done}");
    for (line, [rung, next]) in told.iter().zip([["--live", "--near-live"], ["--near-live", "--offline"]]) {
        let reason = format!("{rung} is not possible, trying {next}: ");
        ensure!(line.contains(&reason) && line.contains("migrate-receive:5"), "{done}");
    }
    ensure!(json(b, "vsctl status web1 --json")?["state"] == "running");
    nothing_at(a)
}

/// Nothing of `web1` is at `host`.
pub fn nothing_at(host: &Host) -> Result<()> {
    let found = host.run("vsctl doctor")?;
    ensure!(found.text().contains("nothing was left behind"), "{found}");
    let left =
        host.sh("vsctl list -a -H -o name; ls /var/lib/vsos/addresses; ls /sys/fs/cgroup/vsos 2>/dev/null || :")?;
    ensure!(!left.contains("web1") && !left.contains("10.77.0.9"), "left: {left}");
    Ok(())
}

/// A copy of the template instead of an overlay, a server without ids of its own, one without a network, devices and limits.
pub fn servers_of_other_kinds_go_on_at_another_host(lab: &Lab<'_>) -> Result<()> {
    lab.only_when_there_is_time()?;
    let pair = pair_with_template(lab)?;
    let [a, b] = &pair.hosts;
    for flags in ["--volume dir --memory 64M --pids 77 --cpus 1.5", "--privileged", "--net none", "--device /dev/kmsg"]
    {
        a.sh(&format!("vsctl create web1 --template busybox --migratable {flags} --start"))?;
        count(a)?;
        let limits = |host: &Host| {
            let files = "memory.max memory.swap.max pids.max cpu.max";
            host.sh(&format!(
                "vsctl exec web1 -- sh -c 'cd /sys/fs/cgroup; cat {files}; ls /dev; stat -c %t:%T.%a /dev/kmsg || :'"
            ))
        };
        let (before, held) = (counted(a)?, limits(a)?);
        // The way back has the same steps.
        let (ways, times) =
            ([(a, b, "b", "--live"), (b, a, "a", "--near-live")], if lab.is_thorough() { 2 } else { 1 });
        for (from, to, name, how) in ways.into_iter().take(times) {
            from.sh(&format!("vsctl migrate web1 {name} {how}")).with_context(|| format!("{flags}, to {name}"))?;
            counts_on(to, before).with_context(|| format!("{flags}, at {name}"))?;
            let now = limits(to)?;
            ensure!(now == held, "{flags}: at {name} {now}\nbefore {held}");
            nothing_at(from).with_context(|| flags.to_owned())?;
        }
        let at = if times == 1 { b } else { a };
        at.sh("vsctl destroy --force web1")?;
    }
    Ok(())
}
