//! A large file that a server writes to while it moves.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use system_tests::{server::Running, site::Site};

use super::{hosts::hosts, kill, sent_once};

/// Writes numbers into the blocks of a file, one after the other, and into another which was the last.
const WRITER: &str = "head -c 33554432 /dev/urandom >/root/large; n=0
    while sleep 0.02; do
        n=$((n+1)); printf '%08d' $n | dd of=/root/large bs=65536 seek=$((n*37%512)) conv=notrunc 2>/dev/null
        echo $n >/root/new; mv /root/new /root/last
    done";

pub fn of_a_large_file_the_blocks_that_change_are_sent(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh(&format!("setsid sh -c '{}' >/dev/null 2>&1 </dev/null &", WRITER.replace('\'', "'\\''")))?;
    server.until("test -s /root/last")?;
    let mut moving = sent_once(site)?;
    let written = server.sh("cat /root/last")?.trim().parse::<u32>()?;
    server.until(&format!("test $(cat /root/last) -gt {}", written + 20))?;
    kill(moving.pid(), Signal::SIGCONT)?;
    let moved = moving.wait()?.success()?;
    drop(server);
    let there = Running::adopt(&hosts.to, "web1");
    let last = there.sh("cat /root/last")?.trim().parse::<u32>().context("a number")?;
    let said = moved.errors();
    let rest = said.lines().find_map(|line| line.split_once(" of blocks in 1 files"));
    let rest = rest.with_context(|| format!("nothing is told of blocks: {said}"))?.0;
    let mebibytes = rest.rsplit(' ').next().and_then(|size| size.strip_suffix('M')?.parse::<f64>().ok());
    ensure!(mebibytes.is_some_and(|size| (20.0 / 16.0..16.0).contains(&size)), "{rest}");
    // The shell may have been killed between a block and its number.
    let content = fs::read(hosts.to.path("var/lib/vsos/servers/web1/volume/upper/root/large"))?;
    let number = |n: u32| String::from_utf8_lossy(&content[(n * 37 % 512) as usize * 65536..][..8]).parse::<u32>();
    for n in last.saturating_sub(500).max(1)..=last {
        let found = number(n)?;
        ensure!(found == n || found == last + 1, "block of {n}: {found}, and the last is {last}");
    }
    hosts.nothing_at(site)
}
