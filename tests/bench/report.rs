//! The table of the bench, as Markdown, with the machine and the day.

use std::fmt::Write;

use anyhow::Result;
use system_tests::{command::Invocation, sample::Sample};

/// One line of the table.
pub struct Row {
    measure: String,
    peer: String,
    ours: String,
    theirs: String,
    ratio: String,
    wanted: String,
    verdict: &'static str,
}

/// What was measured, and where.
pub struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
    head: String,
}

/// No figure.
const NONE: &str = "–";

impl Row {
    /// Times of both, and the ratio that is wanted at most.
    pub fn times(measure: &str, peer: &str, ours: Sample, theirs: Sample, wanted: f64) -> Self {
        Self::compared(measure, peer, &ours, &theirs, wanted, "ms")
    }

    /// Memory of both.
    pub fn memory(measure: &str, peer: &str, ours: Sample, theirs: Sample, wanted: f64) -> Self {
        Self::compared(measure, peer, &ours, &theirs, wanted, "KiB")
    }

    /// A value of ours with a bound.
    pub fn bounded(measure: &str, ours: Sample, wanted: f64, unit: &str) -> Self {
        Self {
            measure: measure.into(),
            peer: NONE.into(),
            verdict: verdict(ours.median().map(|median| median <= wanted)),
            ours: shown(&ours, unit),
            theirs: NONE.into(),
            ratio: NONE.into(),
            wanted: format!("≤ {wanted} {unit}"),
        }
    }

    /// Times of both in microseconds, of which neither the median nor the slowest in a hundred may be more than the wanted
    /// ratio.
    pub fn reads(measure: &str, peer: &str, ours: &Sample, theirs: &Sample, wanted: f64) -> Self {
        let rare = ratio(ours.ninety_ninth(), theirs.ninety_ninth());
        let row = Self::median_of_reads(measure, peer, ours, theirs, wanted);
        let met = ratio(ours.median(), theirs.median()).zip(rare).map(|(usual, rare)| usual.max(rare) <= wanted);
        Self { verdict: verdict(met), ..row }
    }

    /// Times of both in microseconds, of which the median counts.
    pub fn median_of_reads(measure: &str, peer: &str, ours: &Sample, theirs: &Sample, wanted: f64) -> Self {
        let row = Self::compared(measure, peer, ours, theirs, wanted, "µs");
        let with_rare = |sample: &Sample| match (sample.median(), sample.ninety_ninth()) {
            (Some(median), Some(rare)) => format!("{median:.1} µs (p99 {rare:.1})"),
            _ => "not available here".into(),
        };
        let rare = ratio(ours.ninety_ninth(), theirs.ninety_ninth());
        let rare = rare.map_or(String::new(), |rare| format!(" (p99 {rare:.2})"));
        Self { ours: with_rare(ours), theirs: with_rare(theirs), ratio: row.ratio + &rare, ..row }
    }

    /// How many a second for both, and the ratio that is wanted at least.
    pub fn rates(measure: &str, peer: &str, ours: &Sample, theirs: &Sample, wanted: f64) -> Self {
        let row = Self::compared(measure, peer, ours, theirs, wanted, "/s");
        let met = ratio(ours.median(), theirs.median()).map(|ratio| ratio >= wanted);
        Self { wanted: format!("≥ {wanted} ×"), verdict: verdict(met), ..row }
    }

    /// Values of both, and the ratio that is wanted at most.
    pub fn compared(measure: &str, peer: &str, ours: &Sample, theirs: &Sample, wanted: f64, unit: &str) -> Self {
        let ratio = ratio(ours.median(), theirs.median());
        Self {
            measure: measure.into(),
            peer: peer.into(),
            ours: shown(ours, unit),
            theirs: shown(theirs, unit),
            ratio: ratio.map_or(NONE.into(), |ratio| format!("{ratio:.2} ×")),
            wanted: format!("≤ {wanted} ×"),
            verdict: verdict(ratio.map(|ratio| ratio <= wanted)),
        }
    }
}

fn ratio(ours: Option<f64>, theirs: Option<f64>) -> Option<f64> {
    ours.zip(theirs).map(|(ours, theirs)| ours / theirs)
}

fn verdict(met: Option<bool>) -> &'static str {
    match met {
        Some(true) => "yes",
        Some(false) => "**falls short**",
        None => "not measured",
    }
}

fn shown(sample: &Sample, unit: &str) -> String {
    match (sample.median(), sample.ninth_decile()) {
        (Some(median), Some(_)) if sample.count() == 1 => format!("{median:.1} {unit}"),
        (Some(median), Some(ninth)) => format!("{median:.1} {unit} (p90 {ninth:.1})"),
        _ => "not available here".into(),
    }
}

impl Report {
    /// An empty report about this machine.
    pub fn new() -> Result<Self> {
        Ok(Self { rows: Vec::new(), notes: Vec::new(), head: head()? })
    }

    /// Adds a line.
    pub fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Adds a remark below the table.
    pub fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// The whole as Markdown.
    pub fn render(&self) -> String {
        let mut text = format!("{}\n| measure | ours | peer | theirs | ratio | wanted | met |\n", self.head);
        text.push_str("|---|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let Row { measure, peer, ours, theirs, ratio, wanted, verdict } = row;
            writeln!(text, "| {measure} | {ours} | {peer} | {theirs} | {ratio} | {wanted} | {verdict} |")
                .expect("writing to a String cannot fail");
        }
        text.push('\n');
        for note in &self.notes {
            writeln!(text, "- {note}").expect("writing to a String cannot fail");
        }
        text
    }
}

/// The machine, the day, and what the table means.
fn head() -> Result<String> {
    let of =
        |script: &str| Invocation::new("sh").args(["-c", script]).run().map(|done| done.text()).unwrap_or_default();
    let cpu = of("sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1");
    let cpus = of("grep -c ^processor /proc/cpuinfo");
    let memory = of("awk '/^MemTotal/ { printf \"%.0f GiB\", $2 / 1048576 }' /proc/meminfo");
    let system = of(". /etc/os-release; echo \"$PRETTY_NAME\"");
    let (kernel, day) = (of("uname -r"), of("date -u +%Y-%m-%d"));
    let commit = of("git describe --always --dirty 2>/dev/null");
    let lxc = of("lxc-start --version 2>/dev/null || echo none");
    let lxcfs = of("command -v lxcfs >/dev/null && lxcfs -v 2>&1 | tr -d '\"' || echo none");
    let incus = of("if command -v incus >/dev/null; then incus --version; else echo 'not available here'; fi");
    Ok(format!(
        "# Benchmarks\n\n\
         Written by `make bench`; do not edit. Wall time of whole commands, ours and the peer's in turns, 200 ms apart, medians.\n\
         LXC runs the same busybox root and services on an overlay, privileged, with a veth, limits and seccomp, without\n\
         user namespace and lxcfs, which ours have. Incus runs it from an image in a pool of directories, unprivileged, with\n\
         a veth and limits, by a daemon in namespaces of its own. Readings of files are open, read and close in one process of the server's, ours\n\
         and Debian's lxcfs in turns on the same control groups. Ratios count; the times are this machine's.\n\n\
         | | |\n|---|---|\n| day | {day} |\n| tree | {commit} |\n| machine | {cpus} × {cpu}, {memory} |\n\
         | system | {system}, kernel {kernel} |\n| LXC | {lxc} |\n| lxcfs | {lxcfs} |\n| Incus | {incus} |\n"
    ))
}
