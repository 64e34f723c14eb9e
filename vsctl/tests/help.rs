//! The help of every command is a promise: a change shows as a diff of `golden/help.txt`.
//!
//! `GOLDEN=write cargo test -p vsctl --test help` writes the file anew.

#![forbid(unsafe_code)]

use std::fmt::Write;
use std::fs;
use std::path::Path;

use clap::CommandFactory;

/// Wide enough that few lines break, and always the same.
const COLUMNS: usize = 100;

fn collect(command: &mut clap::Command, path: &str, text: &mut String) {
    let help = command.render_long_help().to_string();
    let _ = writeln!(text, "==== {path}\n{}\n", help.trim_end());
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    for name in names.iter().filter(|name| *name != "help") {
        if let Some(sub) = command.find_subcommand_mut(name) {
            collect(sub, &format!("{path} {name}"), text);
        }
    }
}

#[test]
fn the_help_is_what_was_agreed() {
    let mut command = vsctl::cli::Cli::command().term_width(COLUMNS);
    command.build();
    let mut text = String::new();
    collect(&mut command, "vsctl", &mut text);
    let text: String = text.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/help.txt");
    if std::env::var_os("GOLDEN").is_some_and(|value| value == "write") {
        fs::write(&file, &text).expect("write the golden file");
    }
    let golden = fs::read_to_string(&file).unwrap_or_default();
    if let Some((line, (old, new))) = (1..).zip(golden.lines().zip(text.lines())).find(|(_, (old, new))| old != new) {
        panic!("{}:{line}\n  it was: {old}\n  it is:  {new}\nGOLDEN=write writes it anew", file.display());
    }
    assert_eq!(
        golden.lines().count(),
        text.lines().count(),
        "the help has more or fewer lines than {}",
        file.display()
    );
}
