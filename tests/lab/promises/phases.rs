//! A server that moves while it runs, and a side that is killed or told to end in each phase: it goes on at one host.

use anyhow::{Context, Result, bail, ensure};
use system_tests::{command::eventually, lab::Host};

use super::{
    Lab,
    boot::{count, counted, counts_on},
    json,
    pair::{LIMIT, nothing_at, pair_with_template},
};

/// A vsctl at the other side that meets the fault in a file, if there is one, and a way to it.
const MAY_FAIL: &str =
    "printf '#!/bin/sh\nexport VSOS_FAULT=$(cat /root/fault 2>/dev/null)\nvsctl \"$@\"\ntest $? != 137 || touch /root/met\n' >/root/faulty
    printf '#!/bin/sh\nexec ssh \"$1\" /root/faulty \"$3\"\n' >/root/shell; chmod +x /root/faulty /root/shell
    printf '[migrate]\nshell = [\"/root/shell\"]\n' >>/etc/vsos/vsos.toml";

/// Memory of which some changes all the time, so that there are rounds of it.
const CHANGES: &str = "vsctl exec web1 -- sh -c \"setsid sh -c 'while :; do part=\\$(head -c 50000 /dev/zero | tr \\\\0 x); sleep 0.1; done' >/dev/null 2>&1 </dev/null &\"";

/// Each side, and how many moments it has at least: who meets fewer has not seen all phases.
const SIDES: [(&str, u32); 2] = [("migrate", 12), ("migrate-receive", 9)];

/// No side has so many.
const MOMENTS_MAX: u32 = 30;

pub fn killed_in_each_phase_of_a_live_migration_it_goes_on_at_one_host(lab: &Lab<'_>) -> Result<()> {
    let pair = pair_with_template(lab)?;
    let hosts = &pair.hosts;
    for host in hosts {
        host.sh(MAY_FAIL)?;
    }
    hosts[0].sh("vsctl create web1 --template busybox --migratable --memory 64M --ip 10.77.0.9/24 --start")?;
    count(&hosts[0])?;
    hosts[0].sh(CHANGES)?;
    what_the_other_host_lacks_is_said(hosts).context("before anything was done")?;
    let mut at = 0;
    called_off(hosts, at).context("told to end")?;
    // In short every third of them, from the first.
    let step = if lab.is_thorough() { 1 } else { 3 };
    for (side, moments) in SIDES {
        let mut met = 0;
        for moment in (1..=MOMENTS_MAX).step_by(step) {
            let before = counted(&hosts[at])?;
            let (from, to) = (&hosts[at], &hosts[1 - at]);
            let (fault, name) = (format!("{side}:{moment}:kill"), to_name(at));
            let own = match side {
                "migrate" => format!("VSOS_FAULT={fault} "),
                _ => to.sh(&format!("echo {fault} >/root/fault")).map(|_| String::new())?,
            };
            to.sh("rm -f /root/met")?;
            let done = from.run(&format!("{own}vsctl migrate web1 {name} --live --max-downtime 0.01; exit $?"))?;
            let met_it = done.code == 137 || to.run("test -e /root/met")?.code == 0;
            to.sh("rm -f /root/fault")?;
            ensure!(met_it || done.code == 0 && done.errors().contains("sending memory, round 2"), "{fault}: {done}");
            at = settled(hosts, at).with_context(|| format!("{fault}: {done}"))?;
            counts_on(&hosts[at], before).with_context(|| format!("{fault}: {done}"))?;
            nothing_at(&hosts[1 - at]).with_context(|| format!("{fault}: {done}"))?;
            if !met_it {
                break;
            }
            met = moment;
        }
        ensure!((moments..MOMENTS_MAX).contains(&(met + step as u32 - 1)), "{side} has met {met} moments");
    }
    Ok(())
}

/// The other host of that with number `at`, by its name.
fn to_name(at: usize) -> &'static str {
    ["b", "a"][at]
}

fn state(host: &Host) -> Result<String> {
    let listed = host.sh("vsctl list -a -H -o name,state")?;
    let state = listed.lines().find_map(|line| line.strip_prefix("web1")).map(str::trim);
    Ok(state.unwrap_or("gone").to_owned())
}

/// Does what docs/migration.md says, until the server runs at one host; says at which.
fn settled(hosts: &[Host; 2], at: usize) -> Result<usize> {
    let (from, to, name) = (&hosts[at], &hosts[1 - at], to_name(at));
    // A side that has lost the other takes back what it has by itself.
    for host in hosts {
        eventually("the other side to end", LIMIT, || host.sh("! pgrep -f '^vsctl migrate'").ok())?;
    }
    let mut seen = Vec::new();
    for _ in 0..4 {
        // What was interrupted is known to doctor, which lets go on what stood still for it.
        for host in hosts {
            host.run("vsctl doctor --fix")?;
        }
        let states = [state(from)?, state(to)?];
        seen.push(states.join(" and "));
        match [states[0].as_str(), states[1].as_str()] {
            ["running", "gone"] => return Ok(at),
            ["gone", "running"] => return Ok(1 - at),
            ["moved", _] => from.sh(&format!("vsctl migrate web1 {name} --continue"))?,
            [_, "incoming"] => from.sh(&format!("vsctl migrate web1 {name} --abort"))?,
            _ => bail!("nobody knows what to do when it is {}", seen.join(", then ")),
        };
    }
    bail!("it is {}", seen.join(", then "))
}

/// `SIGTERM`, as ^C and a hang-up: heard as long as it is this host's, and not from then on.
fn called_off(hosts: &[Host; 2], at: usize) -> Result<()> {
    let (from, to) = (&hosts[at], &hosts[1 - at]);
    for (moment, stood) in [(3, false), (5, true), (8, true)] {
        let before = counted(from)?;
        let said = told_to_end(from, to_name(at), moment)?;
        let is_told = said.contains("interrupted (SIGTERM)") && said.contains("runs here again") == stood;
        ensure!(is_told && said.ends_with("\n130"), "moment {moment}: {said}");
        counts_on(from, before).with_context(|| format!("moment {moment}"))?;
        for host in hosts {
            let found = host.run("vsctl doctor")?;
            ensure!(found.text().contains("nothing was left behind"), "moment {moment}: {found}");
        }
        nothing_at(to).with_context(|| format!("moment {moment}"))?;
    }
    // Of the programs that are run none hears it, either.
    let before = counted(from)?;
    let said = told_to_end(from, to_name(at), 9)?;
    ensure!(said.ends_with("\n0") && said.contains(" goes on at b after "), "{said}");
    counts_on(to, before)?;
    nothing_at(from)?;
    to.sh("vsctl migrate web1 a --near-live")?;
    counts_on(from, before)?;
    nothing_at(to)
}

/// Stops a migration at `moment`, tells it and all that it runs to end, and lets it go on; gives what it says, and its exit code.
fn told_to_end(from: &Host, to: &str, moment: u32) -> Result<String> {
    from.sh("rm -f /tmp/code")?;
    from.sh(&format!(
        "setsid sh -c 'trap : TERM; VSOS_FAULT=migrate:{moment}:stop vsctl migrate web1 {to} --live; echo $? >/tmp/code' >/tmp/out 2>&1 </dev/null &"
    ))?;
    eventually("a command that stops", LIMIT, || {
        from.sh("grep -q '^State:.*T' /proc/$(pgrep -o -f '^vsctl migrate')/status").ok()
    })
    .with_context(|| from.sh("cat /tmp/out").unwrap_or_default())?;
    from.sh(
        "command=$(pgrep -o -f '^vsctl migrate'); kill -TERM -$(ps -o pgid= $command | tr -d ' '); kill -CONT $command",
    )?;
    eventually("the command to end", LIMIT, || from.sh("test -s /tmp/code").ok())?;
    from.sh("cat /tmp/out /tmp/code")
}

/// By each of these alone it is refused, and nothing is done.
fn what_the_other_host_lacks_is_said([a, b]: &[Host; 2]) -> Result<()> {
    let cpuinfo = "grep -q ' avx2 ' /proc/cpuinfo && sed 's/ avx2 / /' /proc/cpuinfo >/root/cpuinfo";
    for (lack, again, words) in [
        (
            &*format!("{cpuinfo} && mount --bind /root/cpuinfo /proc/cpuinfo"),
            "umount /proc/cpuinfo",
            ["the processors cannot avx2", "begun to use"],
        ),
        (
            "cp /etc/vsos/vsos.toml /root/good; printf '[checkpoint]\ncriu = \"/root/no-criu\"\n' >>/etc/vsos/vsos.toml",
            "mv /root/good /etc/vsos/vsos.toml",
            ["there is no /root/no-criu", ""],
        ),
        ("vsctl create other --template busybox --ip 10.77.0.9/24", "vsctl destroy other", ["10.77.0.9", "other"]),
    ] {
        b.sh(lack)?;
        let before = counted(a)?;
        for way in ["--live", "--near-live", "--live --dry-run"] {
            let refused = a.run(&format!("vsctl migrate web1 b {way}"))?;
            let is_told = words.iter().all(|word| refused.errors().contains(word));
            ensure!(refused.code != 0 && is_told && !refused.errors().contains("runs here again"), "{way}: {refused}");
        }
        counts_on(a, before)?;
        ensure!(json(a, "vsctl status web1 --json")?["state"] == "running");
        b.sh(again)?;
        nothing_at(b)?;
    }
    Ok(())
}
