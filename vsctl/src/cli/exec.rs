//! `vsctl exec`

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;

use crate::enter::{self, CannotExecute, Program, Terminal, Wish};
use crate::name::Name;
use crate::site::Site;

/// Run a program in a server.
///
/// Its exit code is the program's; 128+N when signal N ended it, 126 when it may not be executed, 127 when there is none.
/// Standard input, output and error stay apart unless the program gets a terminal.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A user of the server, by name or number.
    #[arg(short, long, value_name = "USER", default_value = "root")]
    user: String,
    /// A variable for its environment; may be repeated.
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = enter::variable)]
    env: Vec<(String, String)>,
    /// The directory to run it in [default: the user's home].
    #[arg(short = 'w', long = "dir", value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Give it a terminal [default: when input and output are one].
    #[arg(short = 't', long)]
    tty: bool,
    /// Give it none.
    #[arg(short = 'T', long, conflicts_with = "tty")]
    no_tty: bool,
    /// The server.
    #[arg(value_name = "NAME")]
    name: Name,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Runs the command.
///
/// # Errors
/// When the server cannot be entered.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let terminal = match (args.tty, args.no_tty) {
        (true, _) => Terminal::Always,
        (_, true) => Terminal::Never,
        _ => Terminal::AsCaller,
    };
    let program = Program::Command(args.command);
    let wish = Wish { user: args.user, program, environment: args.env, directory: args.dir, terminal };
    status_of(enter::run(site, &args.name, &wish))
}

/// The exit code of a program that was run inside, or of one that could not be.
///
/// # Errors
/// Every other failure.
pub fn status_of(outcome: Result<i32>) -> Result<i32> {
    let error = match outcome {
        Ok(code) => return Ok(code),
        Err(error) => error,
    };
    match error.downcast_ref::<CannotExecute>().map(|refused| refused.code) {
        Some(code) => {
            super::print_error(&error);
            Ok(code)
        }
        None => Err(error),
    }
}
