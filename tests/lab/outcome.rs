//! What came of each promise on each host, and the table that shows it.

use std::collections::{BTreeMap, BTreeSet};

/// How much of a reason stands in the summary; all of it is above the table.
const REASON_LINES: usize = 8;

/// What came of a promise on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Kept.
    Passed,
    /// Broken, or its result never came; why, as far as it is known.
    Failed(String),
    /// Cannot be kept there; the reason.
    Skipped(String),
}

/// Outcomes by promise and host, and what is to be said of the hosts themselves.
#[derive(Debug, Default)]
pub struct Outcomes {
    promises: BTreeMap<String, BTreeMap<String, Outcome>>,
    remarks: Vec<String>,
}

impl Outcomes {
    /// Adds one.
    pub fn add(&mut self, promise: &str, host: &str, outcome: Outcome) {
        self.promises.entry(promise.to_owned()).or_default().insert(host.to_owned(), outcome);
    }

    /// Whether a promise has an outcome on a host.
    fn has(&self, promise: &str, host: &str) -> bool {
        self.promises.get(promise).is_some_and(|hosts| hosts.contains_key(host))
    }

    /// Adds all of another.
    pub fn merge(&mut self, other: Self) {
        for (promise, hosts) in other.promises {
            self.promises.entry(promise).or_default().extend(hosts);
        }
        self.remarks.extend(other.remarks);
    }

    /// Adds lines about a host, which the end of the run shows.
    pub fn remark(&mut self, text: String) {
        self.remarks.push(text);
    }

    /// Gives a reason to what failed on a host without one.
    pub fn explain(&mut self, host: &str, why: &str) {
        for outcome in self.promises.values_mut().filter_map(|hosts| hosts.get_mut(host)) {
            if *outcome == Outcome::Failed(String::new()) {
                *outcome = Outcome::Failed(why.to_owned());
            }
        }
    }

    /// All that was remarked.
    pub fn remarks(&self) -> String {
        self.remarks.concat()
    }

    /// Those of `promises` without an outcome on a host.
    pub fn missing(&self, promises: &[String], host: &str) -> Vec<String> {
        promises.iter().filter(|promise| !self.has(promise, host)).cloned().collect()
    }

    /// How many passed, failed and were skipped.
    pub fn count(&self) -> (usize, usize, usize) {
        let mut count = (0, 0, 0);
        for outcome in self.promises.values().flat_map(BTreeMap::values) {
            match outcome {
                Outcome::Passed => count.0 += 1,
                Outcome::Failed(_) => count.1 += 1,
                Outcome::Skipped(_) => count.2 += 1,
            }
        }
        count
    }

    /// What failed, where, and the first lines of why: to be read where only the end of a run is kept.
    pub fn failures(&self) -> String {
        let mut text = String::new();
        for (promise, outcomes) in &self.promises {
            for (host, outcome) in outcomes {
                let Outcome::Failed(reason) = outcome else { continue };
                text.push_str(&format!("failed on {host}: {promise}\n"));
                for line in reason.lines().filter(|line| !line.trim().is_empty()).take(REASON_LINES) {
                    text.push_str(&format!("    {line}\n"));
                }
            }
        }
        text
    }

    /// The table: a line per promise, a column per host, and below it why something was skipped.
    pub fn table(&self) -> String {
        let hosts: BTreeSet<&str> = self.promises.values().flat_map(|hosts| hosts.keys().map(String::as_str)).collect();
        let width = self.promises.keys().map(String::len).max().unwrap_or(0).max("promise".len());
        let mut text = format!("{:width$}", "promise");
        hosts.iter().for_each(|host| text.push_str(&format!("  {host}")));
        let mut reasons = BTreeMap::<&str, usize>::new();
        for (promise, outcomes) in &self.promises {
            text.push_str(&format!("\n{promise:width$}"));
            for host in &hosts {
                let word = match outcomes.get(*host) {
                    None => "-",
                    Some(Outcome::Passed) => "ok",
                    Some(Outcome::Failed(_)) => "FAILED",
                    Some(Outcome::Skipped(reason)) => {
                        *reasons.entry(reason).or_default() += 1;
                        "skipped"
                    }
                };
                text.push_str(&format!("  {word:length$}", length = host.len()));
            }
            text.truncate(text.trim_end().len());
        }
        for (reason, times) in reasons {
            text.push_str(&format!("\nskipped, {times} times: {reason}"));
        }
        text
    }
}

/// Why promises failed, by their names, from what the test binary prints below its results.
pub fn reasons<'a>(report: impl Iterator<Item = &'a str>) -> BTreeMap<&'a str, String> {
    let mut found = BTreeMap::<&str, String>::new();
    let mut current = None;
    for line in report {
        let title = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" ----"));
        match (title, current) {
            (Some(name), _) => current = Some(name),
            // The list of names, with which the binary ends.
            (None, _) if line == "failures:" => current = None,
            (None, Some(name)) => found.entry(name).or_default().push_str(&format!("{line}\n")),
            (None, None) => {}
        }
    }
    found.values_mut().for_each(|reason| *reason = reason.trim().to_owned());
    found
}

/// Reads a line of the test binary's output: `test NAME ... ok`, `FAILED`, or `ignored (REASON)`.
pub fn read_line(line: &str) -> Option<(&str, Outcome)> {
    let (name, word) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let outcome = match word.split(' ').next()? {
        "ok" => Outcome::Passed,
        "FAILED" => Outcome::Failed(String::new()),
        "ignored" => {
            let reason = word.trim_start_matches("ignored").trim();
            let reason = reason.strip_prefix('(').and_then(|reason| reason.strip_suffix(')')).unwrap_or(reason);
            Outcome::Skipped(reason.trim_start_matches("skipped: ").to_owned())
        }
        _ => return None,
    };
    Some((name.trim_end(), outcome))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_tests_are_understood() {
        assert_eq!(read_line("test a::b@busybox ... ok"), Some(("a::b@busybox", Outcome::Passed)));
        assert_eq!(read_line("test a::b      ... FAILED"), Some(("a::b", Outcome::Failed(String::new()))));
        let skipped = Outcome::Skipped("no mirror (really)".into());
        assert_eq!(read_line("test a ... ignored (skipped: no mirror (really))"), Some(("a", skipped)));
        assert_eq!(read_line("running 3 tests"), None);
        assert_eq!(read_line("test result: ok. 3 passed"), None);
    }

    #[test]
    fn the_table_has_a_line_per_promise_and_says_what_was_not_run() {
        let mut outcomes = Outcomes::default();
        outcomes.add("starts", "debian-12", Outcome::Passed);
        outcomes.add("starts", "debian-13", Outcome::Failed("no room\n\nfor it".into()));
        outcomes.add("stops", "debian-13", Outcome::Skipped("no tree".into()));
        let expected = "\
promise  debian-12  debian-13
starts   ok         FAILED
stops    -          skipped
skipped, 1 times: no tree";
        assert_eq!(outcomes.table(), expected);
        assert_eq!(outcomes.count(), (1, 1, 1));
        assert_eq!(outcomes.missing(&["starts".into(), "stops".into()], "debian-12"), ["stops"]);
        assert_eq!(outcomes.failures(), "failed on debian-13: starts\n    no room\n    for it\n");
    }

    #[test]
    fn what_is_remarked_of_hosts_outlives_the_merge() {
        let (mut all, mut of_host) = (Outcomes::default(), Outcomes::default());
        of_host.add("starts", "debian-12", Outcome::Passed);
        of_host.add("stops", "debian-12", Outcome::Failed(String::new()));
        of_host.add("ends", "debian-12", Outcome::Failed("no room".into()));
        of_host.explain("debian-12", "it hung");
        of_host.remark("debian-12 hung\n".into());
        all.merge(of_host);
        assert_eq!(all.remarks(), "debian-12 hung\n");
        assert_eq!(all.count(), (1, 2, 0));
        let failures = "failed on debian-12: ends\n    no room\nfailed on debian-12: stops\n    it hung\n";
        assert_eq!(all.failures(), failures);
    }

    #[test]
    fn a_failure_is_told_apart_from_the_next_one() {
        let report = [
            "running 3 tests",
            "",
            "failures:",
            "",
            "---- a::b ----",
            "why",
            "",
            "",
            "---- a ----",
            "because",
            "",
            "",
            "failures:",
            "    a::b",
            "    a",
            "",
        ];
        assert_eq!(
            reasons(report.into_iter()),
            BTreeMap::from([("a::b", "why".to_owned()), ("a", "because".to_owned())])
        );
    }
}
