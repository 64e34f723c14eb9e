//! How long a command takes on a host, by its own clock: the way to it takes an emulated processor a while too.

use std::time::Duration;

use anyhow::{Context, Result};
use system_tests::lab::Host;

/// How long one command may take: hundreds of MiB pass through an emulated processor.
const LIMIT: Duration = Duration::from_secs(900);

/// Runs a shell command that must succeed, and returns how long it took.
///
/// # Errors
/// When it fails.
pub fn timed(host: &Host, command: &str) -> Result<Duration> {
    let script = format!(
        "set -e; began=$(date +%s%N); {{ {command}; }} >/dev/null; ended=$(date +%s%N); echo $((ended - began))"
    );
    let text = host.ssh(&script).limit(LIMIT).succeed().with_context(|| format!("on {}", host.name()))?.text();
    let nanoseconds = text.trim().parse().with_context(|| format!("a time: {text:?}"))?;
    Ok(Duration::from_nanos(nanoseconds))
}

/// What CRIU itself was at work for, by its log: from the first line to the last, without the time that it waited for whoever had
/// asked for it (it says `Running STAGE scripts`, and the next line is written when they have ended).
///
/// # Errors
/// When it is no log of CRIU's.
pub fn at_work(log: &str) -> Result<Duration> {
    let mut lines = Vec::new();
    for line in log.lines() {
        let stamp = line.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        // Some lines go over several.
        let Some((seconds, rest)) = stamp else { continue };
        let Ok(seconds) = seconds.trim().parse::<f64>() else { continue };
        // Between the two, that the question is asked over its RPC.
        if rest.trim() == "RPC" {
            continue;
        }
        lines.push((seconds, rest.contains("Running ") && rest.trim_end().ends_with(" scripts")));
    }
    let (first, last) = lines.first().zip(lines.last()).context("it is no log of CRIU's")?;
    let waited: f64 = lines.windows(2).filter(|two| two[0].1).map(|two| two[1].0 - two[0].0).sum();
    Ok(Duration::from_secs_f64((last.0 - first.0 - waited).max(0.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_criu_waits_for_us_is_not_its_own() {
        let log = "\
(00.000100) Version: 4.1.1 (gitid 0)
(00.500000) Running setup-namespaces scripts
(00.500100) \tRPC
(02.500000) pid 1 uid_map
(02.600000)      1: Running in a namespace
(03.000100) Running post-restore scripts
(03.000200) \tRPC
(03.100100) Restore finished successfully. Tasks resumed.";
        let own = at_work(log).unwrap().as_secs_f64();
        assert!((own - 1.0).abs() < 1e-6, "{own}");
        assert!(at_work("nothing").is_err());
    }
}
