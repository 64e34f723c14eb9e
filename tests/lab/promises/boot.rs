//! A host with systemd comes up and goes down, and shares its control groups and links with our servers.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::eventually,
    lab::{Host, definition::Init},
};

use super::{Lab, json, prepare};

const LIMIT: Duration = Duration::from_secs(120);

/// The unit starts them at boot, and at shutdown each server's own init stops its services.
pub fn servers_come_up_and_go_down_with_the_host(lab: &Lab<'_>) -> Result<()> {
    let mut host = lab.host(Init::Systemd)?;
    prepare(&host)?;
    host.sh("systemctl enable vsos && vsctl create web1 --template busybox --autostart")?;
    host.sh("systemctl start vsos")?;
    // A service that takes its time to end, and then writes that it was asked to.
    let service = "exec = [\"/bin/sh\", \"-c\", \"trap 'sleep 1; date +%s >/root/ended; exit 0' TERM; while :; do sleep 0.1; done\"]\n";
    host.put("/tmp/slow.toml", service.as_bytes())?;
    host.sh("vsctl push web1 /tmp/slow.toml /etc/vsinit/slow.toml && vsctl restart web1")?;
    eventually("the slow service", LIMIT, || host.sh("vsctl service web1 list | grep slow | grep -q running").ok())?;
    host.power_off()?;
    host.switch_on()?;
    running(&host, "web1")?;
    let ended = host.sh("vsctl exec web1 -- cat /root/ended");
    ensure!(ended.is_ok(), "its services were not asked to end at the shutdown of the host: {ended:?}");
    let failed = host.sh("systemctl --failed --no-legend")?;
    ensure!(failed.is_empty(), "units that failed: {failed}");
    Ok(())
}

/// Reloads and units of systemd with limits of their own change nothing for the servers, and the servers nothing for them.
pub fn systemd_and_servers_leave_each_other_alone(lab: &Lab<'_>) -> Result<()> {
    let host = lab.host(Init::Systemd)?;
    prepare(&host)?;
    host.sh("vsctl create web1 --template busybox --memory 64M --cpus 0.5 --pids 50 --start")?;
    let limits = "cd /sys/fs/cgroup/vsos/web1 && cat memory.max cpu.max pids.max cgroup.controllers";
    let before = host.sh(limits)?;
    ensure!(before.starts_with(&(64 << 20).to_string()), "{before}");
    host.sh("systemctl daemon-reload && systemctl daemon-reexec")?;
    host.sh("systemd-run --unit=other --property=MemoryMax=32M --property=CPUQuota=20% sleep 600")?;
    host.sh("systemctl stop other && systemctl daemon-reload")?;
    ensure!(host.sh(limits)? == before, "limits after systemd has been at work: {}", host.sh(limits)?);
    // One that starts after all that has them too.
    host.sh("vsctl create web2 --template busybox --memory 64M --cpus 0.5 --pids 50 --start")?;
    let second = host.sh(&limits.replace("web1", "web2"))?;
    ensure!(second == before, "{second}");
    // udev has seen the links come; they keep the names and addresses that they were given.
    ensure!(host.sh("vsctl exec web1 -- ip -4 -o address show dev eth0")?.contains("inet "));
    let units = host.sh("systemctl --failed --no-legend")?;
    ensure!(units.is_empty(), "units that failed: {units}");
    let journal = host.sh("journalctl -b --no-pager -p warning | grep -i -E 'vsos|cgroup' || :")?;
    ensure!(journal.is_empty(), "systemd complains: {journal}");
    // The end of the session that started them is not theirs: no monitor and no server belongs to it.
    let group =
        host.sh("cat /proc/$(vsctl status web1 --json | sed -n 's/.*\"pid\": *\\([0-9]*\\).*/\\1/p')/cgroup")?;
    ensure!(group.contains("/vsos/web1"), "{group}");
    let beside = host
        .sh("for pid in $(pgrep -x vsctl) $(pgrep -x lxcfs-fuse); do cat /proc/$pid/cgroup; done | sort | uniq -c")?;
    ensure!(beside.lines().count() == 1 && beside.ends_with("0::/vsos/.host"), "monitors and FUSE: {beside}");
    host.sh("vsctl destroy --force web1 web2")?;
    ensure!(host.run("test -e /sys/fs/cgroup/vsos")?.code == 1, "the group outlives the last server");
    Ok(())
}

/// The disk of a host with two kernels, booted with each.
pub fn another_kernel_boots_the_same_servers(lab: &Lab<'_>) -> Result<()> {
    let (definition, image) = lab.found(|_, image| image.kernels().count() > 1)?;
    let mut host = Host::boot(&lab.workshop, definition, image, lab.payload, "promise-kernels")?;
    prepare(&host)?;
    host.sh("vsctl create web1 --template busybox --start && vsctl exec web1 -- sh -c 'uname -r >/root/kernel'")?;
    let older = host.kernels().pop().unwrap_or_default();
    let newer = host.kernel().to_owned();
    host.reboot_into(&older)?;
    host.sh("vsctl start web1")?;
    ensure!(host.sh("vsctl exec web1 -- uname -r")? == older);
    ensure!(host.sh("vsctl exec web1 -- cat /root/kernel")? == newer);
    Ok(())
}

/// Counts in its memory, in a server, away from whoever calls.
const COUNT: &str = "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i >/run/new; mv /run/new /run/count; sleep 0.1; done' \
                     >/dev/null 2>&1 </dev/null &";

/// The same outside any server, with a number that nobody has after a boot.
const TREE: &str = "echo 20000 >/proc/sys/kernel/ns_last_pid; \
                    setsid vsctl checkpoint run --output /root/said --pid-file /root/job.pid -- \
                    sh -c 'i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done' >/dev/null 2>&1 </dev/null &";

/// A server of `host` that counts, and goes to the disk when the host is shut down.
fn counts(host: &Host) -> Result<()> {
    host.sh("mkdir -p /etc/vsos && echo 'stop_mode = \"suspend\"' >/etc/vsos/vsos.toml")?;
    prepare(host)?;
    host.sh("vsctl create web1 --template busybox --migratable --start")?;
    count(host)
}

/// Lets the server `web1` count.
pub fn count(host: &Host) -> Result<()> {
    host.put("/tmp/count", COUNT.as_bytes())?;
    host.sh("vsctl push web1 /tmp/count /root/count && vsctl exec web1 -- sh /root/count")?;
    eventually("a count", LIMIT, || counted(host).ok()).map(drop)
}

/// How far it has counted.
pub fn counted(host: &Host) -> Result<u64> {
    Ok(host.sh("vsctl exec web1 -- cat /run/count")?.trim().parse()?)
}

/// It counts on from what it had counted, and more slowly than one that begins anew could.
pub fn counts_on(host: &Host, before: u64) -> Result<()> {
    let now = counted(host)?;
    ensure!(now >= before, "it has counted {now}, and had counted {before}");
    eventually("more", LIMIT, || counted(host).ok().filter(|later| *later > now)).map(drop)
}

/// Shut down with the host to the disk, and back with its next boot, whatever `autostart` says.
pub fn a_suspended_server_outlives_the_boot_of_its_host(lab: &Lab<'_>) -> Result<()> {
    let mut host = lab.host(Init::Systemd)?;
    counts(&host)?;
    host.sh("vsctl create web2 --template busybox --start")?;
    host.sh("systemctl enable --now vsos")?;
    eventually("a hundred", LIMIT, || counted(&host).ok().filter(|count| *count > 100))?;
    host.sh(TREE)?;
    let said = || -> Result<u64> { Ok(host.sh("tail -n 1 /root/said")?.trim().parse()?) };
    eventually("a tree that counts", LIMIT, || said().ok().filter(|count| *count > 5))?;
    host.sh("vsctl checkpoint create --pid $(cat /root/job.pid) job")?;
    // What a frozen one has in memory is kept, too.
    host.sh(
        "vsctl create web3 --template busybox --migratable --start && vsctl exec web3 -- sh -c 'echo kept >/run/kept'",
    )?;
    host.sh("vsctl freeze web3")?;
    let (before, said_before) = (counted(&host)?, said()?);
    host.power_off()?;
    host.switch_on()?;
    running(&host, "web1")?;
    counts_on(&host, before)?;
    running(&host, "web3")?;
    ensure!(host.sh("vsctl exec web3 -- cat /run/kept")? == "kept");
    host.sh("vsctl checkpoint restore --tree job --detach")?;
    let said = || -> Result<u64> { Ok(host.sh("tail -n 1 /root/said")?.trim().parse()?) };
    eventually("a tree that counts on", LIMIT, || said().ok().filter(|count| *count > said_before))?;
    host.sh("kill -0 $(cat /root/job.pid) && awk '$1 != last + 1 { exit 1 } { last = $1 }' /root/said")?;
    // One that is not migratable was stopped in order, and nobody asked for it at boot.
    let other = json(&host, "vsctl status web2 --json")?;
    ensure!(other["state"] == "stopped", "{other}");
    let found = host.sh("vsctl doctor")?;
    ensure!(!found.contains("interrupted"), "{found}");
    Ok(())
}

/// The same into another kernel, and back, on each host that has two.
pub fn a_suspended_server_goes_on_under_another_kernel(lab: &Lab<'_>) -> Result<()> {
    // That there is one.
    lab.found(|_, image| image.kernels().count() > 1)?;
    for (definition, image) in lab.hosts.iter().filter(|(_, image)| image.kernels().count() > 1) {
        let place = format!("promise-suspended-kernels-{}", definition.name);
        let host = Host::boot(&lab.workshop, definition, image, lab.payload, &place)?;
        goes_on_under_each_kernel(host).with_context(|| definition.name.clone())?;
    }
    Ok(())
}

fn goes_on_under_each_kernel(mut host: Host) -> Result<()> {
    let (newer, older) = (host.kernel().to_owned(), host.kernels().pop().unwrap_or_default());
    // A CRIU that can dump nothing under the newer one is seen on the way there only.
    let mut way = vec![older, newer];
    if host.sh("vsctl doctor")?.contains("without UDP-Lite") {
        host.reboot_into(&way.remove(0))?;
    }
    counts(&host)?;
    for kernel in way {
        let before = counted(&host)?;
        host.sh("vsctl autostop")?;
        host.reboot_into(&kernel)?;
        ensure!(host.sh("uname -r")? == kernel);
        host.sh("vsctl autostart")?;
        ensure!(host.sh("vsctl exec web1 -- uname -r")? == kernel);
        counts_on(&host, before)?;
    }
    Ok(())
}

fn running(host: &Host, name: &str) -> Result<()> {
    eventually(&format!("{name} runs"), LIMIT, || {
        let status = json(host, &format!("vsctl status {name} --json")).ok()?;
        (status["state"] == "running").then_some(())
    })
}
