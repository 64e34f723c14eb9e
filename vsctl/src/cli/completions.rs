//! `vsctl completions`

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;

use super::output;

/// Print the completions for a shell.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell.
    #[arg(value_parser = clap::builder::EnumValueParser::<Shell>::new())]
    shell: Shell,
}

/// Runs the command.
///
/// # Errors
/// When standard output is closed.
pub fn run(args: &Args) -> Result<i32> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "vsctl", &mut text);
    output::text(&String::from_utf8_lossy(&text))?;
    Ok(0)
}
