//! Somebody outside a server who talks to it while it moves.

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::eventually,
    lab::{Host, image::TEMPLATES_IN_HOST, payload::TESTS_IN_HOST},
};

use super::{
    Lab,
    pair::{LIMIT, nothing_at, pair_with_template},
};

/// What was answered, outside; and what was written down before, in the server.
const ANSWERED: &str = "/root/answered";
const KEPT: &str = "/root/kept";

/// A connection to a server that moves there and back, again and again: nothing that was answered is missing from its disk, and the connection is
/// the one that was made at first. With a small guest, and with a distribution.
pub fn a_connection_goes_along_and_nothing_is_lost(lab: &Lab<'_>) -> Result<()> {
    let pair = pair_with_template(lab)?;
    let [a, b] = &pair.hosts;
    for host in [a, b] {
        host.sh(&format!("cp -a {TEMPLATES_IN_HOST}/debian-13 /var/lib/vsos/templates/"))?;
    }
    // In short only the distribution: small guests move in other promises, too.
    for (template, moves, times) in [
        ("debian-13", &["--live", "--near-live"][..], 1),
        ("busybox", &["--near-live", "--live"], if lab.is_thorough() { 10 } else { 0 }),
    ] {
        if times > 0 {
            talks_on(a, b, template, &moves.repeat(times)).with_context(|| template.to_owned())?;
        }
    }
    Ok(())
}

fn talks_on(a: &Host, b: &Host, template: &str, moves: &[&str]) -> Result<()> {
    a.sh(&format!("vsctl create web1 --template {template} --migratable --memory 256M --ip 10.77.0.9/24 --start"))?;
    if template != "busybox" {
        eventually("its units", LIMIT, || a.sh("vsctl exec web1 -- systemctl is-system-running --wait").ok())?;
    }
    a.sh(&format!("vsctl push web1 {TESTS_IN_HOST} /root/dialogue && vsctl exec web1 -- chmod +x /root/dialogue"))?;
    let serve = format!("setsid /root/dialogue dialogue serve 7000 {KEPT} >/root/log 2>&1 </dev/null &");
    a.sh(&format!("vsctl exec web1 -- sh -c '{serve}'"))?;
    eventually("somebody who listens", LIMIT, || a.sh("vsctl exec web1 -- grep -q :1B58 /proc/net/tcp").ok())?;
    // From the address that both hosts know, since each has a bridge of its own.
    let ask = format!("setsid {TESTS_IN_HOST} dialogue ask 192.0.2.1 10.77.0.9:7000 {ANSWERED}");
    a.sh(&format!("rm -f {ANSWERED}; {ask} >/root/ask-log 2>&1 </dev/null & echo $! >/root/ask.pid"))?;
    more_answers(a, a)?;
    let mut at = (a, b);
    for how in moves {
        let (from, to) = at;
        let name = if std::ptr::eq(to, a) { "a" } else { "b" };
        from.sh(&format!("vsctl migrate web1 {name} {how}")).with_context(|| format!("move it to {name}"))?;
        // The way to it is the administrator's.
        a.sh(if name == "b" { "ip route add 10.77.0.9/32 via 192.0.2.2" } else { "ip route del 10.77.0.9/32" })?;
        more_answers(a, to).with_context(|| format!("at {name}, {how}"))?;
        nothing_at(from)?;
        at = (to, from);
    }
    let answered: u64 = last(a)?;
    a.sh("kill $(cat /root/ask.pid)")?;
    // One after the other, and nothing twice.
    let check = format!("awk '$1 != last + 1 {{ exit 1 }} {{ last = $1 }} END {{ print last }}' {KEPT}");
    let kept: u64 = at.0.sh(&format!("vsctl exec web1 -- {check}"))?.trim().parse()?;
    ensure!(kept >= answered, "{answered} were answered, and {kept} are on its disk");
    at.0.sh("vsctl destroy --force web1").map(drop)
}

/// The number that was answered last.
fn last(a: &Host) -> Result<u64> {
    let line = a.sh(&format!("tail -n 1 {ANSWERED}"))?;
    line.split(' ').next().unwrap_or_default().parse().with_context(|| format!("a number: {line:?}"))
}

/// Waits until more is answered, on the same connection: the program ends with it.
fn more_answers(a: &Host, at: &Host) -> Result<()> {
    let before = last(a).unwrap_or(0);
    eventually("more answers", LIMIT, || last(a).ok().filter(|now| *now > before + 5)).with_context(|| {
        let inside = "vsctl exec web1 -- sh -c 'cat /root/log; cat /proc/net/tcp; ps; ip neigh'";
        let outside = "nft list ruleset | grep -A6 returned; grep 7000 /proc/net/nf_conntrack; ip route; ip neigh";
        let seen = [(a, "cat /root/ask-log; ss -tino; ip route; ip neigh"), (at, inside), (at, outside)];
        seen.map(|(host, look)| host.run(look).map_or_else(|error| error.to_string(), |done| done.to_string()))
            .join("\n")
    })?;
    a.sh("kill -0 $(cat /root/ask.pid)").map(drop)
}
