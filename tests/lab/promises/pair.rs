//! Two hosts on one segment.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::eventually,
    lab::{Host, definition::Init, pair},
};

use super::{Lab, json, prepare};

const LIMIT: Duration = Duration::from_secs(120);

/// Each runs a server and commands the other, by name and without being asked for anything.
pub fn two_hosts_reach_each_other_by_name(lab: &Lab<'_>) -> Result<()> {
    let (definition, image) = lab.found(|definition, _| definition.init == Init::Minimal)?;
    let hosts = pair(lab.workshop, definition, image, lab.payload)?;
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

/// By ssh, with a template that was copied as the documentation says; and back. Then the current of its host is cut when that has
/// given the server up, and has not said so.
pub fn a_server_moves_between_two_hosts(lab: &Lab<'_>) -> Result<()> {
    let (definition, image) = lab.found(|definition, _| definition.init == Init::Minimal)?;
    let [mut a, b] = pair(lab.workshop, definition, image, lab.payload)?;
    for host in [&a, &b] {
        host.sh("mkdir -p /etc/vsos && printf 'ipv4 = \"10.77.0.0/24\"\nipv6 = \"fd77::/64\"\n' >/etc/vsos/vsos.toml")?;
    }
    prepare(&a)?;
    a.sh(
        "vsctl create web1 --template busybox --memory 64M --start && vsctl exec web1 -- sh -c 'echo kept >/root/file'",
    )?;
    let refused = a.run("vsctl migrate web1 b --offline --dry-run")?;
    ensure!(refused.code == 91 && refused.errors().contains("no template 'busybox'"), "{refused}");
    a.sh(
        "tar -C /var/lib/vsos/templates --format=posix --numeric-owner --xattrs --xattrs-include='*' -cf - busybox | \
          ssh b 'mkdir -p -m 700 /var/lib/vsos/templates && \
                 tar -C /var/lib/vsos/templates --numeric-owner --xattrs --xattrs-include=\\* -xpf -'",
    )?;
    a.sh("vsctl migrate web1 b --offline").context("move it to b")?;
    is_at(&b, &a)?;
    b.sh("vsctl migrate web1 a --offline").context("move it back to a")?;
    is_at(&a, &b)?;
    // The sixth moment: its mark says that it has moved.
    a.sh("VSOS_FAULT=migrate:6:stop setsid vsctl migrate web1 b --offline >/tmp/out 2>&1 </dev/null & sleep 0.2")?;
    eventually("a command that stops", LIMIT, || {
        let found = a.sh("cat /proc/[0-9]*/stat 2>/dev/null | grep -c '(vsctl) T' || :").ok()?;
        (found != "0").then_some(())
    })
    .with_context(|| a.sh("cat /tmp/out; ps -ef | grep vsctl").unwrap_or_default())?;
    a.cut_power();
    a.switch_on()?;
    for (host, state) in [(&a, "moved"), (&b, "incoming")] {
        let status = json(host, "vsctl status web1 --json")?;
        ensure!(status["state"] == state, "{} says {status}", host.name());
        ensure!(host.run("vsctl start web1")?.code != 0, "it was started at {}", host.name());
        ensure!(host.run("vsctl doctor")?.text().contains("--continue"), "{}", host.name());
    }
    a.sh("vsctl migrate web1 b --continue")?;
    is_at(&b, &a)
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
