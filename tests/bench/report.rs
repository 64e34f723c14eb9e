//! The table of the bench, as Markdown, with the machine and the day.

use std::fmt::Write;

use anyhow::Result;
use system_tests::command::Invocation;

use crate::sample::Sample;

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

    /// A time of ours whose peer cannot be had here.
    pub fn alone(measure: &str, peer: &str, ours: Sample, wanted: &str) -> Self {
        Self {
            measure: measure.into(),
            peer: peer.into(),
            ours: shown(&ours, "ms"),
            theirs: "not available here".into(),
            ratio: NONE.into(),
            wanted: wanted.into(),
            verdict: "not measured",
        }
    }

    /// A time of ours with a bound in milliseconds.
    pub fn bounded(measure: &str, ours: Sample, wanted_ms: f64) -> Self {
        Self {
            measure: measure.into(),
            peer: NONE.into(),
            verdict: verdict(ours.median().map(|median| median <= wanted_ms)),
            ours: shown(&ours, "ms"),
            theirs: NONE.into(),
            ratio: NONE.into(),
            wanted: format!("≤ {wanted_ms} ms"),
        }
    }

    fn compared(measure: &str, peer: &str, ours: &Sample, theirs: &Sample, wanted: f64, unit: &str) -> Self {
        let ratio = ours.median().zip(theirs.median()).map(|(ours, theirs)| ours / theirs);
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

    /// Adds a line for a peer that cannot be had.
    pub fn add_missing(&mut self, measure: &str, peer: &str, wanted: &str) {
        self.add(Row { ours: "see above".into(), ..Row::alone(measure, peer, Sample::default(), wanted) });
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
    let incus = of(
        "command -v incus >/dev/null && incus --version || apt-cache policy incus 2>/dev/null | grep -q Candidate: && echo 'not installed' || echo 'not available here'",
    );
    Ok(format!(
        "# Benchmarks\n\n\
         Written by `make bench`; do not edit. Wall time of whole commands, ours and the peer's in turns, medians.\n\
         LXC runs the same busybox root and services on an overlay, privileged, with a veth, limits and seccomp, without\n\
         user namespace and lxcfs, which ours have. Ratios count; the milliseconds are this machine's.\n\n\
         | | |\n|---|---|\n| day | {day} |\n| tree | {commit} |\n| machine | {cpus} × {cpu}, {memory} |\n\
         | system | {system}, kernel {kernel} |\n| LXC | {lxc} |\n| Incus | {incus} |\n"
    ))
}
