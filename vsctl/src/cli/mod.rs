//! The command line: one file per command, which parses, calls one verb of the library and prints.

mod create;
mod destroy;
mod enter;
mod exec;
pub mod output;
mod start;
mod stop;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::failure::{self, Exit};
use crate::lifecycle::execute::Outcome;
use crate::site::Site;

/// Provisions, runs, limits and moves virtual servers.
#[derive(Debug, Parser)]
#[command(name = "vsctl", version, arg_required_else_help = true, infer_subcommands = false)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// More detail on standard error; twice for all of it.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(create::Args),
    Enter(enter::Args),
    Exec(exec::Args),
    Start(start::Args),
    Stop(stop::Args),
    Destroy(destroy::Args),
}

impl Command {
    fn run(self, site: &Site) -> Result<i32> {
        match self {
            Self::Create(args) => create::run(args, site),
            Self::Enter(args) => enter::run(args, site),
            Self::Exec(args) => exec::run(args, site),
            Self::Start(args) => start::run(args, site),
            Self::Stop(args) => stop::run(args, site),
            Self::Destroy(args) => destroy::run(args, site),
        }
    }
}

/// Runs the command that `arguments` ask for.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            let code = if error.use_stderr() { Exit::BadParameter as u8 } else { 0 };
            return ExitCode::from(code);
        }
    };
    start_log(cli.verbose);
    let outcome = Site::from_environment().and_then(|site| cli.command.run(&site));
    finish(outcome)
}

/// Runs a monitor: see [`crate::monitor`].
pub fn run_monitor(arguments: &[OsString]) -> ExitCode {
    let arguments: Vec<String> = arguments.iter().map(|text| text.to_string_lossy().into_owned()).collect();
    finish(crate::monitor::main(&arguments))
}

fn start_log(verbose: u8) {
    let level = ["warn", "info", "debug"][usize::from(verbose.min(2))];
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level))
        .format_target(false)
        .format_timestamp(None)
        .init();
}

fn finish(outcome: Result<i32>) -> ExitCode {
    match outcome {
        Ok(code) => ExitCode::from(code as u8),
        Err(error) => {
            print_error(&error);
            ExitCode::from(failure::exit_of(&error) as u8)
        }
    }
}

/// Prints an error and what belongs to it, once.
pub fn print_error(error: &anyhow::Error) {
    let outcome = error.downcast_ref::<Outcome>().map(ToString::to_string);
    let chain = error.chain().map(ToString::to_string).filter(|cause| Some(cause) != outcome.as_ref());
    eprintln!("vsctl: {}", chain.collect::<Vec<_>>().join(": "));
    if let Some(outcome) = outcome {
        eprintln!("  {outcome}");
    }
    if let Some(hint) = failure::hint_of(error) {
        eprintln!("  hint: {hint}");
    }
}

/// Runs `verb` for each name, goes on past failures, and gives the code of the first one.
///
/// # Errors
/// The last failure; earlier ones have been printed.
pub fn for_each<T>(names: &[T], mut verb: impl FnMut(&T) -> Result<()>) -> Result<i32> {
    let mut first = None;
    for name in names {
        if let Err(error) = verb(name) {
            first.get_or_insert(failure::exit_of(&error) as i32);
            print_error(&error);
        }
    }
    Ok(first.unwrap_or(0))
}
