//! The current is cut, at any moment; the host comes up, and nothing that was confirmed is lost.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::eventually,
    lab::{Host, definition::Init},
};

use super::{Lab, json, prepare};

const LIMIT: Duration = Duration::from_secs(120);

/// Confirmed a moment before the cut: created servers, their specs, settings that were changed, files that were pushed.
pub fn what_a_command_confirmed_outlives_a_power_cut(lab: &Lab<'_>) -> Result<()> {
    let mut host = lab.host(Init::Minimal)?;
    prepare(&host)?;
    // Twice, with other things confirmed last: what a later command syncs by chance must not save an earlier one.
    host.sh("vsctl create web1 --template busybox --memory 64M --start && echo precious >/tmp/file && \
         vsctl push web1 /tmp/file /root/file")?;
    host.cut_power();
    host.switch_on()?;
    let spec = host.sh("cat /var/lib/vsos/servers/web1/server.toml")?;
    ensure!(spec.contains("64M"), "the spec of web1 after the cut: {spec:?}");
    mend(&host)?;
    host.sh("vsctl start web1")?;
    let file = host.sh("vsctl exec web1 -- cat /root/file").context("read what was pushed")?;
    ensure!(file == "precious", "what was pushed: {file:?}");
    host.sh("vsctl set web1 memory=96M && vsctl create web2 --template busybox && vsctl rename web2 web3")?;
    host.cut_power();
    host.switch_on()?;
    mend(&host)?;
    let names = names(&host)?;
    ensure!(names == ["web1", "web3"], "servers after the second cut: {names:?}");
    host.sh("vsctl start web1 web3")?;
    let limit = host.sh("vsctl exec web1 -- head -n 1 /proc/meminfo")?;
    ensure!(limit.contains(&(96 * 1024).to_string()), "the memory that was set: {limit}");
    Ok(())
}

/// Cut while a command is at a step of its plan. Steps are taken from all parts of the four plans; each cut costs a boot.
pub fn cut_at_any_step_doctor_mends_it(lab: &Lab<'_>) -> Result<()> {
    let mut host = lab.host(Init::Minimal)?;
    prepare(&host)?;
    host.sh("vsctl create keep --template busybox --memory 64M --start && vsctl exec keep -- sh -c 'echo 1 >/root/kept; sync'")?;
    for (plan, before, command, parts) in [
        ("create", "", "vsctl create web1 --template busybox", 2..=2),
        ("start", "vsctl create web1 --template busybox", "vsctl start web1", 1..=2),
        ("set", "vsctl create web1 --template busybox", "vsctl set web1 memory=80M", 1..=1),
        ("destroy", "vsctl create web1 --template busybox --start", "vsctl destroy --force web1", 2..=2),
    ] {
        for part in if lab.is_thorough() { 1..=2 } else { parts } {
            at_step(&mut host, plan, before, command, part).with_context(|| format!("cut in part {part} of {plan}"))?;
        }
    }
    Ok(())
}

/// Cuts the current when a third, or two thirds, of the steps of `command` have been made.
fn at_step(host: &mut Host, plan: &str, before: &str, command: &str, part: usize) -> Result<()> {
    if !before.is_empty() {
        host.sh(before)?;
    }
    let told = json(host, &format!("{command} --plan --json"))?;
    let steps = told.as_array().map_or(0, Vec::len);
    let step = (steps * part / 3).max(1);
    // In the background: it stops at the step, and so does what waits for it.
    host.sh(&format!("VSOS_FAULT={plan}:{step}:stop setsid {command} >/tmp/out 2>&1 </dev/null & sleep 0.2"))?;
    let stopped = eventually(&format!("a process that stops at step {step} of {steps} of {plan}"), LIMIT, || {
        let found = host.sh("cat /proc/[0-9]*/stat 2>/dev/null | grep -c '(vsctl) T' || :").ok()?;
        (found != "0").then_some(())
    });
    stopped.with_context(|| host.sh("cat /tmp/out; ps -ef | grep vsctl").unwrap_or_default())?;
    host.cut_power();
    host.switch_on()?;
    let found = host.run("vsctl doctor")?;
    mend(host)?;
    let names = names(host)?;
    ensure!(names.contains(&"keep".to_owned()), "the other server is gone: {names:?}\n{found}");
    ensure!(names.len() <= 2, "{names:?}");
    // Whole or not there: a server of that name works now, and goes without a rest.
    if names.contains(&"web1".to_owned()) {
        host.sh("vsctl start web1")?;
    } else {
        host.sh("vsctl create web1 --template busybox --start")?;
    }
    ensure!(host.sh("vsctl exec web1 -- echo alive")? == "alive");
    host.sh("vsctl destroy --force web1 && vsctl start keep")?;
    ensure!(host.sh("vsctl exec keep -- cat /root/kept")? == "1", "what the other server had written is lost");
    let left = host.sh("ls /var/lib/vsos/servers /var/lib/vsos/ids /sys/fs/cgroup/vsos")?;
    ensure!(!left.contains("web1"), "left of web1: {left}");
    Ok(())
}

/// After a cut and without a hand: systemd starts the unit, and the unit the server.
pub fn a_server_with_autostart_runs_again(lab: &Lab<'_>) -> Result<()> {
    let mut host = lab.host(Init::Systemd)?;
    prepare(&host)?;
    host.sh("systemctl enable vsos && vsctl create web1 --template busybox --autostart --start && vsctl create web2 --template busybox --start && sync")?;
    host.cut_power();
    host.switch_on()?;
    eventually("web1 runs again", LIMIT, || {
        let state = json(&host, "vsctl status web1 --json").ok()?;
        (state["state"] == "running").then_some(())
    })?;
    let other = json(&host, "vsctl status web2 --json")?;
    ensure!(other["state"] == "stopped", "without autostart: {other}");
    ensure!(host.sh("vsctl exec web1 -- echo alive")? == "alive");
    Ok(())
}

/// Asks doctor to mend, and that a second look finds nothing.
fn mend(host: &Host) -> Result<()> {
    host.sh("vsctl doctor --fix")?;
    let again = host.run("vsctl doctor")?;
    ensure!(again.text().contains("nothing was left behind"), "after `doctor --fix`: {again}");
    Ok(())
}

fn names(host: &Host) -> Result<Vec<String>> {
    let text = host.sh("vsctl list -a -H -o name")?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}
