//! What survives a migration, kind by kind.

use anyhow::{Context, Result, ensure};
use system_tests::{
    lab::{Host, payload::TESTS_IN_HOST},
    survivor::{AS_IT_WAS, NOT_HELD},
};

use super::{ALLOW, Lab, pair::pair_with_template};

/// A server with one thing of each kind goes there while it runs, and on before its memory has come; with LAB=all also back, standing still.
pub fn every_kind_survives_a_migration(lab: &Lab<'_>) -> Result<()> {
    let pair = pair_with_template(lab)?;
    let [a, b] = &pair.hosts;
    for host in [a, b] {
        host.sh("sysctl -q vm.nr_hugepages=4")?;
        host.sh(ALLOW)?;
    }
    a.sh("vsctl create web1 --template busybox --migratable --ip 10.77.0.9/24 --ip fd77::9/64 --start")?;
    a.sh("vsctl exec web1 -- mkdir -p /opt /srv/survivor")?;
    a.sh(&format!("vsctl push web1 {TESTS_IN_HOST} /opt/survivor"))?;
    let hold = "setsid /opt/survivor survivor hold /srv/survivor >/dev/null 2>/run/survivor-log </dev/null &";
    a.sh(&format!("vsctl exec web1 -- sh -c '{hold}'"))?;
    let there =
        "for i in $(seq 100); do test -S /srv/survivor/ask && exit; sleep 0.5; done; cat /run/survivor-log; exit 1";
    a.sh(&format!("vsctl exec web1 -- sh -c '{there}'"))?;
    let held = all_are_well(a, "before anything")?;
    ensure!(held >= 58, "only {held} kinds are held");
    // The way back has the same steps: with LAB=all.
    let ways = [(a, b, "b", "--live --postcopy"), (b, a, "a", "--near-live")];
    for (from, to, name, how) in ways.into_iter().take(if lab.repeats == 1 { 1 } else { 2 }) {
        from.sh(&format!("vsctl migrate web1 {name} {how}")).with_context(|| format!("move it to {name}"))?;
        let now = all_are_well(to, &format!("at {name} after {how}"))?;
        ensure!(now == held, "{now} kinds of {held} are at {name}");
    }
    Ok(())
}

/// Each kind is as it was, or cannot be had there; returns how many are.
fn all_are_well(host: &Host, when: &str) -> Result<usize> {
    let report = host.sh("vsctl exec web1 -- /opt/survivor survivor ask /srv/survivor")?;
    let (well, rest): (Vec<&str>, Vec<&str>) = report.lines().partition(|line| line.ends_with(AS_IT_WAS));
    let lost: Vec<&str> = rest.into_iter().filter(|line| !line.contains(NOT_HELD)).collect();
    ensure!(lost.is_empty(), "{when}:\n  {}", lost.join("\n  "));
    Ok(well.len())
}
