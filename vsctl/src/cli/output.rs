//! How results are printed: the same values as a table for people or as JSON. The only place that writes to standard
//! output.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::lifecycle::step::Step;

/// The exit code of a command whose reader went away: that of one that SIGPIPE ended.
pub const CLOSED_CODE: i32 = 128 + 13;

/// Nobody reads standard output any more, as in `vsctl list | head -1`. Not worth a word.
#[derive(Debug)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("nobody reads the output")
    }
}

impl std::error::Error for Closed {}

/// Writes text to standard output, at once.
///
/// # Errors
/// [`Closed`] when nobody reads it.
pub fn text(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Closed.into()),
        other => other.context("write to standard output"),
    }
}

/// Writes a line.
///
/// # Errors
/// [`Closed`] when nobody reads it.
pub fn line(line: impl fmt::Display) -> Result<()> {
    text(&format!("{line}\n"))
}

/// Prints a value as JSON.
///
/// # Errors
/// [`Closed`] when nobody reads it.
pub fn json(value: &(impl Serialize + ?Sized)) -> Result<()> {
    line(serde_json::to_string_pretty(value).context("write JSON")?)
}

/// Prints a value as JSON on one line, for what comes bit by bit.
///
/// # Errors
/// [`Closed`] when nobody reads it.
pub fn json_line(value: &(impl Serialize + ?Sized)) -> Result<()> {
    line(serde_json::to_string(value).context("write JSON")?)
}

/// Prints one value as itself, several as an array: what a command that takes several names says of them.
///
/// # Errors
/// [`Closed`] when nobody reads it.
pub fn json_of_each(values: &[impl Serialize], asked: usize) -> Result<()> {
    match values {
        [one] if asked == 1 => json(one),
        [] if asked == 1 => Ok(()),
        _ => json(values),
    }
}

/// Prints a plan: a sentence a line, or the sentences as JSON.
///
/// # Errors
/// [`Closed`] when nobody reads it.
pub fn plan(steps: &[Step], as_json: bool) -> Result<()> {
    sentences(&steps.iter().map(ToString::to_string).collect::<Vec<_>>(), as_json)
}

/// Prints the sentences of a plan.
///
/// # Errors
/// [`Closed`] when nobody reads it.
pub fn sentences(sentences: &[String], as_json: bool) -> Result<()> {
    if as_json {
        return json(sentences);
    }
    text(&sentences.iter().map(|sentence| format!("{sentence}\n")).collect::<String>())
}

/// A column of a table.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// Its name; printed in capitals.
    pub title: &'static str,
    /// Numbers stand below each other to the right.
    pub right: bool,
}

impl Column {
    /// One of words.
    pub const fn left(title: &'static str) -> Self {
        Self { title, right: false }
    }

    /// One of numbers.
    pub const fn right(title: &'static str) -> Self {
        Self { title, right: true }
    }
}

/// Prints rows below each other; the header is left out when it is not wanted.
///
/// # Errors
/// [`Closed`] when nobody reads it.
pub fn table(columns: &[Column], rows: Vec<Vec<String>>, header: bool) -> Result<()> {
    text(&render(columns, rows, header))
}

/// The text of a table: no borders, two blanks between columns, none at the end of a line.
pub fn render(columns: &[Column], rows: Vec<Vec<String>>, header: bool) -> String {
    let titles = header.then(|| columns.iter().map(|column| column.title.to_uppercase()).collect());
    // Made safe here, at the one way out: names and commands of a guest could hold what drives a terminal.
    let rows = rows.into_iter().map(|row| row.iter().map(|cell| plain(cell)).collect());
    let lines: Vec<Vec<String>> = titles.into_iter().chain(rows).collect();
    let width = |index: usize| lines.iter().map(|line| line[index].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        for ((cell, column), width) in line.iter().zip(columns).zip(&widths) {
            let blanks = width - cell.chars().count();
            let (before, after) = if column.right { (blanks, 0) } else { (0, blanks) };
            text.extend(std::iter::repeat_n(' ', before));
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', after + 2));
        }
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    }
    text
}

/// Text without what a terminal would obey: control characters become `?`.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A time span for people: `42s`, `5m10s`, `3h12m`, `12d4h`.
pub fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, ..) => format!("{hours}h{minutes:02}m"),
        _ => format!("{days}d{hours:02}h"),
    }
}

/// Colours where a person looks: standard output is a terminal and `NO_COLOR` is not set (no-color.org).
#[derive(Debug, Clone, Copy)]
pub struct Paint(bool);

impl Paint {
    /// As standard output and the environment want it.
    pub fn of_output() -> Self {
        Self(io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()))
    }

    /// None at all.
    pub fn none() -> Self {
        Self(false)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    /// Good news.
    pub fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    /// News to look at.
    pub fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }

    /// Bad news.
    pub fn red(self, text: &str) -> String {
        self.with("31", text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_plain_text_with_aligned_columns() {
        let columns = [Column::left("name"), Column::right("tasks")];
        let rows = vec![vec!["web1".into(), "12".into()], vec!["a\u{1b}[2J".into(), "1000".into()]];
        assert_eq!(render(&columns, rows.clone(), true), "NAME   TASKS\nweb1      12\na?[2J   1000\n");
        assert_eq!(render(&columns, rows[..1].to_vec(), false), "web1  12\n");
        assert_eq!(render(&columns, Vec::new(), true), "NAME  TASKS\n");
        assert_eq!(render(&columns, Vec::new(), false), "");
    }

    #[test]
    fn spans_are_short() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (310, "5m10s"), (11_520, "3h12m"), (1_051_200, "12d04h")] {
            assert_eq!(span(seconds), text);
        }
    }
}
