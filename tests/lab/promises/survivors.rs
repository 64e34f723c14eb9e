//! What survives a migration, kind by kind.

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::eventually,
    lab::{Host, image::TEMPLATES_IN_HOST, payload::TESTS_IN_HOST},
    survivor::{AS_IT_WAS, NOT_HELD},
};

use super::{
    ALLOW, Lab,
    pair::{LIMIT, pair_with_template},
};

/// Servers with one thing of each kind go there while they run: a small one before its memory has come; with LAB=all also back, standing
/// still, and two distributions.
pub fn every_kind_survives_a_migration(lab: &Lab<'_>) -> Result<()> {
    let pair = pair_with_template(lab)?;
    let [a, b] = &pair.hosts;
    for host in [a, b] {
        host.sh("sysctl -q vm.nr_hugepages=4")?;
        host.sh(ALLOW)?;
        host.sh(&format!("cp -a {TEMPLATES_IN_HOST}/debian-1[23] /var/lib/vsos/templates/"))?;
    }
    let (there, back) = (["--live --postcopy", "--live", "--live"], "--near-live");
    for (template, how) in ["busybox", "debian-13", "debian-12"].into_iter().zip(there) {
        // The way back has the same steps.
        let ways = [(a, b, "b", how), (b, a, "a", back)];
        let count = match (lab.is_thorough(), template) {
            (true, _) => 2,
            (false, "busybox") => 1,
            // Their kinds survive a suspend in the same run.
            (false, _) => 0,
        };
        survive(template, &ways[..count]).with_context(|| template.to_owned())?;
    }
    Ok(())
}

fn survive(template: &str, ways: &[(&Host, &Host, &str, &str)]) -> Result<()> {
    let (Some((a, ..)), Some((_, last, ..))) = (ways.first(), ways.last()) else { return Ok(()) };
    a.sh(&format!("vsctl create web1 --template {template} --migratable --ip 10.77.0.9/24 --ip fd77::9/64 --start"))?;
    if template != "busybox" {
        eventually("its units", LIMIT, || a.sh("vsctl exec web1 -- systemctl is-system-running --wait").ok())?;
    }
    a.sh("vsctl exec web1 -- mkdir -p /opt /srv/survivor")?;
    a.sh(&format!("vsctl push web1 {TESTS_IN_HOST} /opt/survivor"))?;
    let hold = match template {
        "busybox" => "setsid /opt/survivor survivor hold /srv/survivor >/dev/null 2>/run/survivor-log </dev/null &",
        _ => "systemd-run --quiet --unit=survivor /opt/survivor survivor hold /srv/survivor",
    };
    a.sh(&format!("vsctl exec web1 -- sh -c '{hold}'"))?;
    let there =
        "for i in $(seq 100); do test -S /srv/survivor/ask && exit; sleep 0.5; done; cat /run/survivor-log; exit 1";
    a.sh(&format!("vsctl exec web1 -- sh -c '{there}'"))?;
    let held = all_are_well(a, "before anything")?;
    ensure!(held >= 57, "only {held} kinds are held");
    let network =
        |host: &Host| host.sh("vsctl exec web1 -- sh -c 'ip -o address | sed s/valid_lft.*//; ip route; ip -6 route'");
    let addresses = network(a)?;
    for (from, to, name, how) in ways {
        from.sh(&format!("vsctl migrate web1 {name} {how}")).with_context(|| format!("move it to {name}"))?;
        let now = all_are_well(to, &format!("at {name} after {how}"))?;
        ensure!(now == held, "{now} kinds of {held} are at {name}");
        let found = network(to)?;
        ensure!(found == addresses, "at {name}: {found}\nbefore: {addresses}");
    }
    last.sh("vsctl destroy --force web1").map(drop)
}

/// Each kind is as it was, or cannot be had there; returns how many are.
fn all_are_well(host: &Host, when: &str) -> Result<usize> {
    let report = host.sh("vsctl exec web1 -- /opt/survivor survivor ask /srv/survivor")?;
    let (well, rest): (Vec<&str>, Vec<&str>) = report.lines().partition(|line| line.ends_with(AS_IT_WAS));
    let lost: Vec<&str> = rest.into_iter().filter(|line| !line.contains(NOT_HELD)).collect();
    ensure!(lost.is_empty(), "{when}:\n  {}", lost.join("\n  "));
    Ok(well.len())
}
