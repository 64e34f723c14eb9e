//! Two hosts made ready to measure: the same networks and templates, and a listener that hears every server.

use std::time::Duration;

use anyhow::{Context, Result};
use system_tests::{
    command::eventually,
    lab::{Host, image::TEMPLATES_IN_HOST, pair::Pair},
};

use crate::promises::{ALLOW, NETWORKS, SEND_TEMPLATE};

/// Where hosts have the program of `tests/load`.
pub const LOAD: &str = "/usr/lib/vsos-lab/load";
/// Where datagrams go: the first host on the segment, which the second forwards to.
const EAR: &str = "192.0.2.1:9000";
const HEARD: &str = "/run/heard";
const LIMIT: Duration = Duration::from_secs(120);

/// A server to measure with: its name, template, and what it does.
#[derive(Clone, Copy)]
pub struct Kind {
    /// In words.
    pub what: &'static str,
    /// Of which it is made.
    pub template: &'static str,
    /// Memory that it holds, in MiB.
    pub mib: u32,
    /// How much of that it changes in a second, in KiB.
    pub changes_kib: u32,
    /// How often it is measured.
    pub rounds: usize,
}

/// Prepares both hosts, and begins to listen.
///
/// # Errors
/// What a command says.
pub fn prepare(pair: &Pair) -> Result<()> {
    let [a, _] = &pair.hosts;
    for host in &pair.hosts {
        host.sh(NETWORKS)?;
        host.sh(ALLOW)?;
        host.sh(&format!(
            "mkdir -p -m 700 /var/lib/vsos/templates && cp -a {TEMPLATES_IN_HOST}/debian-13 /var/lib/vsos/templates/"
        ))?;
    }
    a.sh("vsctl template build busybox")?;
    a.sh(SEND_TEMPLATE)?;
    a.sh(&format!("setsid {LOAD} listen {EAR} >{HEARD} 2>&1 </dev/null &")).map(drop)
}

impl Kind {
    /// Makes `web1` at `host`, and waits until it is heard.
    ///
    /// # Errors
    /// When it does not start, or says nothing.
    pub fn begin(&self, host: &Host, ear: &Host) -> Result<()> {
        let memory = self.mib + 512;
        host.sh(&format!(
            "vsctl create web1 --template {} --migratable --memory {memory}M --ip 10.77.0.9/24 --start",
            self.template
        ))?;
        if self.template != "busybox" {
            eventually("its units", LIMIT, || host.sh("vsctl exec web1 -- systemctl is-system-running --wait").ok())?;
        }
        host.sh(&format!(
            "vsctl push web1 {LOAD} /root/load && vsctl exec web1 -- \
             sh -c 'setsid /root/load serve {EAR} {} {} >/dev/null 2>&1 </dev/null &'",
            self.mib, self.changes_kib
        ))?;
        hears(ear)
    }
}

/// Waits until datagrams have come from now on.
fn hears(ear: &Host) -> Result<()> {
    let before = heard(ear)?.len();
    let more = || heard(ear).ok().filter(|lines| lines[before..].iter().any(|line| line == "."));
    eventually("datagrams from the server", LIMIT, more).map(drop)
}

fn heard(ear: &Host) -> Result<Vec<String>> {
    Ok(ear.sh(&format!("cat {HEARD}"))?.lines().map(str::to_owned).collect())
}

/// Does `act`, and returns how long it says that it took, and the longest time that nothing was heard meanwhile.
///
/// # Errors
/// What `act` says; when nothing is heard afterwards.
pub fn silence(ear: &Host, act: impl FnOnce() -> Result<Duration>) -> Result<(Duration, Duration)> {
    hears(ear)?;
    let before = heard(ear)?.len();
    let took = act()?;
    hears(ear)?;
    let lines = heard(ear)?;
    let longest = longest(&lines[before..]).with_context(|| format!("what was heard: {lines:?}"))?;
    Ok((took, longest))
}

/// The longest silence in what the listener wrote; none that it took for one is zero.
fn longest(lines: &[String]) -> Result<Duration> {
    let mut longest = 0;
    for line in lines.iter().filter(|line| *line != ".") {
        longest = longest.max(line.parse().with_context(|| format!("it says {line:?}"))?);
    }
    Ok(Duration::from_millis(longest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_silence_counts() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(longest(&lines(".\n31\n.\n2040\n40\n.")).unwrap(), Duration::from_millis(2040));
        assert_eq!(longest(&lines(".\n.")).unwrap(), Duration::ZERO);
        assert!(longest(&lines("lab-load: address in use")).is_err());
    }
}
