//! What was measured, as Markdown. Pure.

use std::fmt::Write;

use anyhow::{Context, Result};
use system_tests::sample::Sample;

/// Between these two lines of a document stands what is written by `make bench-lab`.
const BEGIN: &str = "<!-- written by `make bench-lab`; do not edit -->";
const END: &str = "<!-- end -->";

/// One table: its head, its lines.
pub struct Table {
    columns: Vec<&'static str>,
    lines: Vec<Vec<String>>,
}

impl Table {
    /// A table without lines.
    pub fn new(columns: &[&'static str]) -> Self {
        Self { columns: columns.to_vec(), lines: Vec::new() }
    }

    /// Adds a line, one cell for each column.
    pub fn add(&mut self, cells: Vec<String>) {
        self.lines.push(cells);
    }

    /// As Markdown.
    pub fn render(&self) -> String {
        let mut text = format!("| {} |\n|{}\n", self.columns.join(" | "), "---|".repeat(self.columns.len()));
        for line in &self.lines {
            writeln!(text, "| {} |", line.join(" | ")).expect("writing to a String cannot fail");
        }
        text
    }
}

/// A median in seconds, and how many values it is of. The sample is in milliseconds.
pub fn seconds(sample: &Sample) -> String {
    match sample.median() {
        Some(median) if sample.count() == 1 => format!("{:.2} s", median / 1e3),
        Some(median) => format!("{:.2} s (of {})", median / 1e3, sample.count()),
        None => "–".into(),
    }
}

/// Of a median, how much of it is for 100 MiB of `bytes`. Of less than half of that it would say nothing.
pub fn per_100_mib(sample: &Sample, bytes: u64) -> String {
    let hundreds = bytes as f64 / f64::from(100 << 20);
    let per = sample.median().filter(|_| hundreds >= 0.5).map(|median| median / 1e3 / hundreds);
    per.map_or("–".into(), |per| format!("{per:.2} s"))
}

/// How one value is to another, and whether that is at most what is wanted.
pub fn ratio(ours: Option<f64>, other: Option<f64>, wanted: f64) -> [String; 2] {
    let ratio = ours.zip(other).map(|(ours, other)| ours / other);
    let verdict = match ratio {
        Some(ratio) if ratio <= wanted => "yes",
        Some(_) => "**falls short**",
        None => "not measured",
    };
    [ratio.map_or("–".into(), |ratio| format!("{ratio:.2}")), format!("≤ {wanted}: {verdict}")]
}

/// The document with `text` between the two lines that mark its place.
///
/// # Errors
/// When it has no such place.
pub fn replace(document: &str, text: &str) -> Result<String> {
    let (before, rest) = document.split_once(BEGIN).with_context(|| format!("it has no line {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("it has no line {END}"))?;
    Ok(format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", text.trim()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let document = format!("# A\n\n{BEGIN}\nold\n{END}\n\n## B\n");
        let new = replace(&document, "\nnew\n").unwrap();
        assert_eq!(new, format!("# A\n\n{BEGIN}\n\nnew\n\n{END}\n\n## B\n"));
        assert_eq!(replace(&new, "new").unwrap(), new);
        assert!(replace("# A\n", "new").is_err());
        assert!(replace(&format!("{END}{BEGIN}"), "new").is_err());
    }

    #[test]
    fn a_figure_that_falls_short_is_shown_as_such() {
        assert_eq!(ratio(Some(1.0), Some(4.0), 0.4), ["0.25", "≤ 0.4: yes"]);
        assert_eq!(ratio(Some(3.0), Some(4.0), 0.4), ["0.75", "≤ 0.4: **falls short**"]);
        assert_eq!(ratio(None, Some(4.0), 0.4), ["–", "≤ 0.4: not measured"]);
        let mut sample = Sample::default();
        assert_eq!(seconds(&sample), "–");
        [3, 1, 2].map(Duration::from_secs).into_iter().for_each(|took| sample.add(took));
        assert_eq!(seconds(&sample), "2.00 s (of 3)");
        assert_eq!([per_100_mib(&sample, 400 << 20), per_100_mib(&sample, 1 << 20)], ["0.50 s", "–"]);
        let mut table = Table::new(&["a", "b"]);
        table.add(vec!["1".into(), "2".into()]);
        assert_eq!(table.render(), "| a | b |\n|---|---|\n| 1 | 2 |\n");
    }
}
