//! A server that goes on at another host before its memory is there.

use anyhow::{Context, Result, ensure};
use system_tests::{command::eventually, lab::Host};

use super::{
    Lab,
    boot::{count, counted, counts_on},
    json,
    pair::{LIMIT, nothing_at, pair_with_template},
};

/// A program with memory of its own that nobody touches, and that it gives away when it is told to: its sum says whether it is what it was.
/// On its disk there is only that sum: the line is slow.
const HOLDS: &str = "head -c 9000000 /dev/urandom >/root/held; md5sum </root/held >/root/expected; rm -f /root/end /root/sum
    setsid sh -c '(cat /root/held; rm /root/held; while [ ! -e /root/end ]; do sleep 1; done) | tail -c 9000000 | md5sum >/root/sum.new; mv /root/sum.new /root/sum' \
        >/dev/null 2>&1 </dev/null &";
/// In kB (proc_pid_status(5)).
const HELD: &str =
    "vsctl exec web1 -- sh -c 'test ! -e /root/held && grep VmRSS: /proc/$(pidof tail)/status' | tr -dc 0-9";
const CREATE: &str = "vsctl create web1 --template busybox --migratable --memory 64M --ip 10.77.0.9/24 --start";
/// Lets a target take memory later.
pub const ALLOW: &str = "sysctl -q vm.unprivileged_userfaultfd=1";

const REFUSE: &str = "sysctl -q vm.unprivileged_userfaultfd=0";

/// Nothing is there still that was brought by somebody.
const NO_CRIU: &str = "! pgrep -x criu && ! ls /var/lib/vsos/servers/*/lazy-pages.socket 2>&1";

/// Refused where it cannot be; there with `--near-live`, and back with `--live`; with a failure at the other side, and the command killed
/// when the server had been given up. On a slow line it runs before its memory is there; and whatever ends meanwhile, it ends there and
/// boots anew.
pub fn memory_comes_when_it_runs_already(lab: &Lab<'_>) -> Result<()> {
    // That it comes is seen in a shorter one, too: what survives a migration.
    lab.only_when_there_is_time()?;
    let pair = pair_with_template(lab)?;
    let [a, b] = &pair.hosts;
    begin(a)?;
    let refused = a.run("vsctl migrate web1 b --near-live --postcopy")?;
    let is_told = refused.errors().contains("vm.unprivileged_userfaultfd is 0") && refused.code == 5;
    ensure!(is_told && !refused.errors().contains("suspending"), "{refused}");
    [a, b].into_iter().try_for_each(|host| host.sh(ALLOW).map(drop))?;

    let before = counted(a)?;
    let failed = a.run("VSOS_FAULT=migrate:7:fail vsctl migrate web1 b --near-live --postcopy")?;
    ensure!(failed.code != 0 && failed.errors().contains("runs here again"), "{failed}");
    counts_on(a, before).context("failed when it was restored there")?;
    nothing_at(b).context("failed when it was restored there")?;
    clean(a)?;

    for (from, to, name, way) in [(a, b, "b", "--near-live"), (b, a, "a", "--live")] {
        let before = counted(from)?;
        let done = from.run(&format!("vsctl migrate web1 {name} {way} --postcopy"))?;
        ensure!(done.code == 0 && done.errors().contains("sending memory: "), "{done}");
        counts_on(to, before).with_context(|| format!("at {name}"))?;
        nothing_at(from)?;
        clean(to)?;
    }
    is_what_it_was(a).context("there and back")?;

    // Whoever has it whole on the disk can send it again, as long as it has not gone on.
    hold(a)?;
    let before = counted(a)?;
    let killed = a.run("VSOS_FAULT=migrate:8:kill vsctl migrate web1 b --near-live --postcopy")?;
    ensure!(killed.code != 0 && json(a, "vsctl status web1 --json")?["state"] == "moved", "{killed}");
    eventually("processes that are taken back", LIMIT, || b.sh("! pgrep -f '^vsctl migrate-receive'").ok())?;
    let refused = b.run("vsctl resume web1")?;
    ensure!(refused.code != 0, "{refused}");
    // What fails there then is not lost, either.
    b.sh(REFUSE)?;
    let failed = a.run("vsctl migrate web1 b --continue")?;
    ensure!(failed.code != 0 && failed.errors().contains("--continue"), "{failed}");
    let refused = b.run("vsctl resume web1")?;
    ensure!(refused.errors().contains("has not come from the other host"), "{refused}");
    b.sh(ALLOW)?;
    a.sh("vsctl migrate web1 b --continue")?;
    counts_on(b, before).context("after --continue")?;
    nothing_at(a)?;
    clean(b)?;
    is_what_it_was(b).context("after --continue")?;
    b.sh("vsctl destroy --force web1")?;

    // Forty seconds for its memory.
    begin(a)?;
    a.sh("tc qdisc add dev $(ip -o route get 192.0.2.2 | sed 's/.* dev \\([^ ]*\\).*/\\1/') root netem rate 2mbit")?;
    runs_before_it_is_there([a, b])?;
    let command = "kill -9 $(pgrep -o -f '^vsctl migrate web1 b')";
    let faults = [
        ("the other side killed", &[(b, "kill -9 $(pgrep -o -f '^vsctl migrate-receive')")][..]),
        ("its monitor killed, and the command", &[(b, "kill -9 $(pgrep -o -f '^vsctl monitor web1')"), (a, command)]),
        ("the command killed", &[(a, command)]),
        ("who brings it killed", &[(b, "kill -9 $(pgrep -o -f '^criu lazy-pages')")]),
    ];
    for (what, faults) in faults {
        begin(a)?;
        lost_on_the_way([a, b], faults).context(what)?;
    }
    Ok(())
}

fn begin(host: &Host) -> Result<()> {
    host.sh(CREATE)?;
    count(host)?;
    hold(host)
}

/// Has `web1` hold nine megabytes that are in no file: pages of a program's own, so that they go with the first round.
pub fn hold(host: &Host) -> Result<()> {
    host.put("/tmp/holds", HOLDS.as_bytes())?;
    host.sh("vsctl push web1 /tmp/holds /root/holds && vsctl exec web1 -- sh /root/holds")?;
    let is_there = |kib: &String| kib.parse().is_ok_and(|kib: u64| kib > 9_000_000 / 1024);
    eventually("the memory to be there", LIMIT, || host.sh(HELD).ok().filter(is_there)).map(drop)
}

/// What it held in memory is what it had read.
fn is_what_it_was(host: &Host) -> Result<()> {
    host.sh("vsctl exec web1 -- touch /root/end")?;
    let sum = eventually("its sum", LIMIT, || host.sh("vsctl exec web1 -- cat /root/sum").ok())?;
    let expected = host.sh("vsctl exec web1 -- cat /root/expected")?;
    ensure!(sum == expected, "its memory has the sum {sum}, and had {expected}");
    Ok(())
}

/// Begins to move it, and returns when its memory is on its way.
fn on_its_way([a, b]: [&Host; 2]) -> Result<()> {
    a.sh("rm -f /tmp/code; setsid sh -c 'vsctl migrate web1 b --near-live --postcopy; echo $? >/tmp/code' >/tmp/out 2>&1 </dev/null &")?;
    eventually("memory on its way", LIMIT, || a.sh("grep -q 'sending memory' /tmp/out").ok())
        .with_context(|| a.sh("cat /tmp/out /tmp/code").unwrap_or_default())?;
    ensure!(json(b, "vsctl status web1 --json")?["state"] == "running", "it does not run yet");
    Ok(())
}

/// It does what it did before, and is not put on the disk, or moved on, without the memory that it lacks.
fn runs_before_it_is_there([a, b]: [&Host; 2]) -> Result<()> {
    let before = counted(a)?;
    on_its_way([a, b])?;
    counts_on(b, before).context("before its memory is there")?;
    for command in ["vsctl suspend web1", "vsctl checkpoint create web1 --leave-running", "vsctl migrate web1 a --live"]
    {
        let refused = b.run(command)?;
        ensure!(refused.code == 9 && refused.errors().contains("not all memory"), "{refused}");
    }
    ensure!(a.sh("test ! -e /tmp/code").is_ok(), "its memory was there too soon: {}", a.sh("cat /tmp/out")?);
    eventually("the end of the command", LIMIT, || a.sh("test -s /tmp/code").ok())?;
    ensure!(a.sh("cat /tmp/code")? == "0", "{}", a.sh("cat /tmp/out")?);
    is_what_it_was(b).context("on a slow line")?;
    nothing_at(a)?;
    clean(b)?;
    b.sh("vsctl suspend web1 && vsctl resume web1").context("when its memory is there")?;
    b.sh("vsctl destroy --force web1").map(drop)
}

fn clean(host: &Host) -> Result<()> {
    eventually("the end of what brought its memory", LIMIT, || host.sh(NO_CRIU).ok()).with_context(|| {
        host.sh("pgrep -a criu; ls -la /var/lib/vsos/servers/*/; cat /var/lib/vsos/servers/*/criu-pages.log")
            .unwrap_or_default()
    })?;
    let found = host.run("vsctl doctor")?;
    ensure!(found.text().contains("nothing was left behind"), "{found}");
    Ok(())
}

/// Does `faults` while its memory is on its way: it ends at `b`, is told to have, and boots anew.
fn lost_on_the_way([a, b]: [&Host; 2], faults: &[(&Host, &str)]) -> Result<()> {
    let told = || b.sh("vsctl events | grep -c 'its memory did not come' || :");
    let before = told()?;
    on_its_way([a, b])?;
    for (host, fault) in faults {
        host.sh(fault)?;
    }
    eventually("its end there", LIMIT, || {
        // Its monitor takes it back; without one, the next command does.
        let state = json(b, "vsctl status web1 --json").ok()?["state"].clone();
        (state == "stopped" || state == "ready" && b.sh("vsctl stop web1").is_ok()).then_some(())
    })?;
    ensure!(faults.len() > 1 || told()? != before, "nobody is told why");
    eventually("the end of the command", LIMIT, || a.sh("! pgrep -f '^vsctl migrate web1 b'").ok())?;
    ensure!(json(a, "vsctl status web1 --json")?["state"] == "moved");
    eventually("the end of who sends it", LIMIT, || a.sh("! pgrep -x criu").ok())?;
    a.sh("vsctl migrate web1 b --continue").context("afterwards")?;
    b.sh("vsctl exec web1 -- sh -c 'test -e /root/expected && ! test -e /run/count'")
        .context("it has not booted anew")?;
    nothing_at(a)?;
    clean(b)?;
    b.sh("vsctl destroy --force web1").map(drop)
}
