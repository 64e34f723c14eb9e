//! `vsctl enter`

use anyhow::Result;

use super::exec::status_of;
use crate::enter::{self, Program, Terminal, Wish};
use crate::name::Name;
use crate::site::Site;

/// A login shell in a server.
///
/// On a terminal it is a shell like any other: the window's size follows, job control works, and hanging up ends it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The server.
    #[arg(value_name = "NAME")]
    name: Name,
    /// A user of the server, by name or number.
    #[arg(short, long, value_name = "USER", default_value = "root")]
    user: String,
}

/// Runs the command; its exit code is the shell's.
///
/// # Errors
/// When the server cannot be entered.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let wish = Wish {
        user: args.user,
        program: Program::LoginShell,
        environment: Vec::new(),
        directory: None,
        terminal: Terminal::AsCaller,
    };
    status_of(enter::run(site, &args.name, &wish))
}
