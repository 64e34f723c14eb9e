//! For how long somebody outside gets no answer from a server that moves: to a ping every 10 ms, and on a TCP connection.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::eventually,
    lab::{Host, pair::Pair, payload::TESTS_IN_HOST},
};

use super::timed::timed;

/// How the server is moved there; back it goes by the second.
pub const WAYS: [&str; 2] = ["--near-live", "--live"];

/// The longest time without an answer, of one move each.
#[derive(Default)]
pub struct Outside {
    /// To a ping.
    pub ping: [Duration; WAYS.len()],
    /// To a line on a TCP connection: with the time that TCP itself waits until it tries again.
    pub echo: [Duration; WAYS.len()],
}

const PINGS: &str = "/run/pings";
const ANSWERED: &str = "/run/answered";
const LIMIT: Duration = Duration::from_secs(120);

/// From the address that both hosts know. Whoever is outside asks as soon as he has an answer, 20 ms later.
const BEGIN: &str = "rm -f /run/pings /run/answered
    setsid ping -D -i 0.01 -I 192.0.2.1 10.77.0.9 >/run/pings 2>&1 </dev/null & echo $! >/run/ping.pid";

/// Measures the server `web1`, which is at the first host, and is there again afterwards.
///
/// # Errors
/// What a command says.
pub fn measure(pair: &Pair) -> Result<Outside> {
    let [a, b] = &pair.hosts;
    let mut outside = Outside::default();
    a.sh(&format!("vsctl push web1 {TESTS_IN_HOST} /root/dialogue && vsctl exec web1 -- chmod +x /root/dialogue"))?;
    // It ends when who has asked is killed.
    let serve = "while :; do /root/dialogue dialogue serve 7000 /run/kept; sleep 0.1; done";
    a.sh(&format!("vsctl exec web1 -- sh -c 'setsid sh -c \"{serve}\" >/dev/null 2>&1 </dev/null &'"))?;
    for (at, way) in WAYS.into_iter().enumerate() {
        let listens = "vsctl exec web1 -- grep -q '00000000:1B58 00000000:0000 0A' /proc/net/tcp";
        eventually("somebody who listens", LIMIT, || a.sh(listens).ok())?;
        a.sh(BEGIN)?;
        let ask = format!("setsid {TESTS_IN_HOST} dialogue ask 192.0.2.1 10.77.0.9:7000 {ANSWERED}");
        a.sh(&format!("{ask} >/run/ask-log 2>&1 </dev/null & echo $! >/run/ask.pid"))?;
        more_answers(a)?;
        // The way to it is the administrator's, who is told when it is about to go on there.
        let told = "while read -r line; do case $line in *'handing over'*) ip route add 10.77.0.9/32 via 192.0.2.2;; esac; done";
        timed(
            a,
            &format!("{{ vsctl migrate web1 b {way}; echo $? >/run/code; }} 2>&1 | {told}; test $(cat /run/code) = 0"),
        )?;
        more_answers(a).with_context(|| format!("after {way}"))?;
        a.sh("kill $(cat /run/ping.pid) $(cat /run/ask.pid)")?;
        outside.ping[at] = longest_gap(&a.sh(&format!("grep 'bytes from' {PINGS}"))?)?;
        outside.echo[at] = slowest(&a.sh(&format!("cat {ANSWERED}"))?)?;
        b.sh(&format!("vsctl migrate web1 a {}", WAYS[1]))?;
        a.sh("ip route del 10.77.0.9/32")?;
        eprintln!(
            "lab: outside, {way}: no ping for {:.2} s, no echo for {:.2} s",
            outside.ping[at].as_secs_f64(),
            outside.echo[at].as_secs_f64()
        );
    }
    Ok(outside)
}

/// Waits until both are answered from now on.
fn more_answers(a: &Host) -> Result<()> {
    let counts = || -> Option<[u64; 2]> {
        let text = a.sh(&format!("grep -c 'bytes from' {PINGS}; cat {ANSWERED} | wc -l")).ok()?;
        let mut lines = text.lines().map(|line| line.trim().parse());
        Some([lines.next()?.ok()?, lines.next()?.ok()?])
    };
    let before = counts().unwrap_or_default();
    let more = || counts().filter(|now| now.iter().zip(before).all(|(now, before)| *now > before + 5));
    eventually("answers", LIMIT, more).map(drop).with_context(|| {
        a.run("tail -n 3 /run/pings /run/ask-log; ip route; ip neigh")
            .map_or_else(|_| String::new(), |done| done.text())
    })
}

/// Of lines of ping(8) with times (`-D`), the longest time between two.
fn longest_gap(lines: &str) -> Result<Duration> {
    let mut times = Vec::new();
    for line in lines.lines() {
        let stamp = line
            .strip_prefix('[')
            .and_then(|rest| rest.split_once(']'))
            .and_then(|(stamp, _)| stamp.parse::<f64>().ok());
        times.push(stamp.with_context(|| format!("a time: {line:?}"))?);
    }
    ensure!(times.len() > 1, "{} pings were answered", times.len());
    let longest = times.windows(2).map(|two| two[1] - two[0]).fold(0.0, f64::max);
    Ok(Duration::from_secs_f64(longest))
}

/// Of lines with a number and milliseconds, the most of these.
fn slowest(lines: &str) -> Result<Duration> {
    let took = |line: &str| line.split(' ').nth(1).and_then(|took| took.parse().ok());
    let took = lines
        .lines()
        .map(|line| took(line).with_context(|| format!("a time: {line:?}")))
        .collect::<Result<Vec<u64>>>()?;
    took.into_iter().max().map(Duration::from_millis).context("nothing was answered")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_time_without_an_answer_counts() {
        let pings = "[10.01] 64 bytes from a: icmp_seq=1\n[10.02] 64 bytes from a: icmp_seq=2\n[12.52] 64 bytes from a: icmp_seq=251";
        assert_eq!(longest_gap(pings).unwrap().as_millis(), 2500);
        assert!(longest_gap("[10.01] 64 bytes from a").is_err() && longest_gap("ping: no route\nping").is_err());
        assert_eq!(slowest("1 3\n2 4012\n3 2").unwrap(), Duration::from_millis(4012));
        assert!(slowest("").is_err() && slowest("1 x").is_err());
    }
}
