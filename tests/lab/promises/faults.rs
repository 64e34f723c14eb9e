//! What the other host may do to a migration: its processes end, its line is cut or bad, its disk is full.

use anyhow::{Context, Result, ensure};
use system_tests::{command::eventually, lab::Host};

use super::{
    Lab,
    boot::{count, counted, counts_on},
    pair::{LIMIT, nothing_at, pair_with_template},
    postcopy::hold,
};

/// A vsctl of `b` that stops when processes are whole there and wait at the gate, before it has said so; `a` reaches it with the
/// shell that goes with it.
const STOPS_AT_GATE: &str = "printf '#!/bin/sh\nexport VSOS_FAULT=migrate-receive:6:stop\nexec vsctl \"$@\"\n' >/root/faulty; chmod +x /root/faulty";
const REACHES_FAULTY: &str =
    "printf '#!/bin/sh\necho $$ >/root/ssh\nexec ssh \"$1\" /root/faulty \"$3\"\n' >/root/shell; chmod +x /root/shell
    cp /etc/vsos/vsos.toml /root/good; printf '[migrate]\nshell = [\"/root/shell\"]\n' >>/etc/vsos/vsos.toml";
/// The oldest: the monitor that waits at the gate still has its name.
const RECEIVER: &str = "pgrep -o -f '^vsctl migrate-receive'";

/// The other side killed and the connection cut while processes wait for the word to go on; a disk without room for memory; a slow line
/// that loses packets.
pub fn faults_of_the_other_host_leave_it_at_one(lab: &Lab<'_>) -> Result<()> {
    let pair = pair_with_template(lab)?;
    let [a, b] = &pair.hosts;
    a.sh("vsctl create web1 --template busybox --migratable --memory 64M --ip 10.77.0.9/24 --start")?;
    count(a)?;
    b.sh(STOPS_AT_GATE)?;
    a.sh(REACHES_FAULTY)?;
    for (what, host, fault) in [
        ("the other side killed", b, format!("kill -9 $({RECEIVER})")),
        ("the connection cut", a, "kill -9 $(cat /root/ssh)".to_owned()),
    ] {
        at_the_gate([a, b], host, &fault).context(what)?;
    }
    a.sh("mv /root/good /etc/vsos/vsos.toml")?;
    // The volume has room there, and what it has in memory has not.
    hold(a)?;
    b.sh("mount -t tmpfs -o size=6m,mode=700 small /var/lib/vsos/servers")?;
    for (way, stood) in [("--live", false), ("--near-live", true)] {
        let before = counted(a)?;
        let failed = a.run(&format!("vsctl migrate web1 b {way}"))?;
        let is_told =
            failed.errors().contains("the disk is full") && failed.errors().contains("runs here again") == stood;
        ensure!(failed.code != 0 && is_told, "{way}: {failed}");
        counts_on(a, before).context(way)?;
        nothing_at(b).context(way)?;
    }
    b.sh("umount /var/lib/vsos/servers")?;
    // Ten megabytes over a line of ten megabits, with 40 ms there and back, of whose packets some do not arrive.
    line(a, b, "delay 20ms loss 0.5% rate 10mbit")?;
    let before = counted(a)?;
    let done = a.run("RUST_LOG=info vsctl migrate web1 b --live").context("over a slow line")?;
    let (ahead, rest) = (told(&done.errors(), "round 1: ")?, told(&done.errors(), "to send")?);
    ensure!(done.code == 0 && ahead > 8.0 && rest < ahead / 2.0, "{ahead} MiB, and {rest} when it stood still: {done}");
    counts_on(b, before).context("over a slow line")?;
    nothing_at(a)?;
    nothing_comes_through([a, b]).context("a line on which nothing comes through")
}

/// Makes the line between the two what netem(8) is told, on both sides.
fn line(a: &Host, b: &Host, netem: &str) -> Result<()> {
    for (host, other) in [(a, "192.0.2.2"), (b, "192.0.2.1")] {
        let device = format!("$(ip -o route get {other} | sed 's/.* dev \\([^ ]*\\).*/\\1/')");
        host.sh(&format!("tc qdisc replace dev {device} root netem {netem}"))?;
    }
    Ok(())
}

/// While the server stands still nothing comes through any more, and neither side hears that the other is gone.
fn nothing_comes_through([a, b]: [&Host; 2]) -> Result<()> {
    for host in [a, b] {
        host.sh("printf '[migrate]\\nsilence = 10\\n' >>/etc/vsos/vsos.toml")?;
    }
    let before = counted(b)?;
    b.sh("rm -f /tmp/code; setsid sh -c 'vsctl migrate web1 a --near-live; echo $? >/tmp/code' >/tmp/out 2>&1 </dev/null &")?;
    eventually("what is sent while it stands still", LIMIT, || b.sh("grep 'sending what has changed' /tmp/out").ok())?;
    line(a, b, "loss 100%")?;
    eventually("the command to end", LIMIT, || b.sh("test -s /tmp/code").ok())?;
    let said = b.sh("cat /tmp/out /tmp/code")?;
    let is_told = said.contains("has said nothing for 10 s") && said.contains("runs here again");
    ensure!(is_told && !said.ends_with("\n0"), "{said}");
    counts_on(b, before)?;
    eventually("the other side to end", LIMIT, || a.sh(&format!("! {RECEIVER}")).ok())?;
    nothing_at(a)?;
    line(a, b, "delay 1ms")?;
    b.sh("vsctl migrate web1 a --live")?;
    counts_on(a, before)?;
    nothing_at(b)
}

/// How much `said` tells of with `word`, in MiB: before it, or behind it if it ends with a colon and a space.
fn told(said: &str, word: &str) -> Result<f64> {
    let (before, after) = said.split_once(word).with_context(|| format!("nothing is told of {word:?}: {said}"))?;
    let size =
        if word.ends_with(": ") { after.split_whitespace().next() } else { before.split_whitespace().next_back() };
    let size = size.unwrap_or_default();
    let factor = [("K", 1.0 / 1024.0), ("M", 1.0)]
        .into_iter()
        .find_map(|(unit, factor)| Some((size.strip_suffix(unit)?, factor)));
    let (number, factor) = factor.with_context(|| format!("it is no size: {size:?}"))?;
    Ok(number.parse::<f64>()? * factor)
}

/// Has the server's processes wait at the gate of `b`, does `fault` to `host`, and looks for the server at `a` alone.
fn at_the_gate([a, b]: [&Host; 2], host: &Host, fault: &str) -> Result<()> {
    let before = counted(a)?;
    a.sh("rm -f /tmp/code; setsid sh -c 'vsctl migrate web1 b --near-live; echo $? >/tmp/code' >/tmp/out 2>&1 </dev/null &")?;
    eventually("processes at the gate", LIMIT, || {
        b.sh(&format!("grep -q '^State:.*T' /proc/$({RECEIVER})/status")).ok()
    })
    .with_context(|| {
        let looks = "ps -eo pid,ppid,pgid,stat,wchan:20,etimes,args | grep -v ' \\[' | tail -n 40";
        let seen = [(a, "cat /tmp/out"), (a, looks), (b, looks)].map(|(host, look)| host.sh(look).unwrap_or_default());
        seen.join("\n--\n")
    })?;
    let waiting = b.sh("cat /sys/fs/cgroup/vsos/web1/cgroup.procs")?;
    ensure!(!waiting.is_empty(), "nobody waits at the gate");
    host.sh(fault)?;
    eventually("the command to end", LIMIT, || a.sh("test -s /tmp/code").ok())?;
    let said = a.sh("cat /tmp/out /tmp/code")?;
    ensure!(said.contains("runs here again") && !said.ends_with("\n0"), "{said}");
    counts_on(a, before)?;
    // One that was only stopped finds that nobody wants it any more.
    b.sh(&format!("kill -CONT $({RECEIVER}) 2>/dev/null || :"))?;
    eventually("the other side to end", LIMIT, || b.sh(&format!("! {RECEIVER}")).ok())?;
    a.sh("vsctl migrate web1 b --abort")?;
    nothing_at(b)
}
