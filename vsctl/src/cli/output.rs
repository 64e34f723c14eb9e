//! How results are printed: the same values as a table for people or as JSON.

use std::io::{self, Write};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::lifecycle::step::Step;

/// Prints a value as JSON.
///
/// # Errors
/// When standard output is closed.
pub fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("write JSON")?;
    writeln!(io::stdout().lock(), "{text}").context("write to standard output")
}

/// Prints a plan: a sentence a line, or the sentences as JSON.
///
/// # Errors
/// When standard output is closed.
pub fn plan(steps: &[Step], as_json: bool) -> Result<()> {
    let sentences: Vec<String> = steps.iter().map(ToString::to_string).collect();
    if as_json {
        return json(&sentences);
    }
    let mut out = io::stdout().lock();
    sentences.iter().try_for_each(|sentence| writeln!(out, "{sentence}")).context("write to standard output")
}
