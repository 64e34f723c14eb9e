//! `vsctl console`

use anyhow::Result;

use crate::enter::console::{self, Options};
use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::site::Site;

/// The console of a server, as on a serial line.
///
/// ^a q detaches, ^a a sends ^a. Who logs in there logs in as on a machine; `vsctl enter` needs no password.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The server.
    #[arg(value_name = "NAME")]
    name: Name,
    /// tty N in place of the console.
    #[arg(short, long, value_name = "N", default_value = "0", hide_default_value = true)]
    tty: usize,
    /// Print what the console has shown, also of earlier runs, and return.
    #[arg(long, conflicts_with = "wait")]
    log: bool,
    /// Wait until the server runs, also again after it has ended.
    #[arg(long)]
    wait: bool,
}

/// Runs the command.
///
/// # Errors
/// When the server has no console now.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    if !args.log {
        return console::run(site, &args.name, Options { number: args.tty, wait: args.wait });
    }
    if args.tty != 0 {
        return Err(Failure::new(Exit::BadParameter, "only the console has a log, the ttys have none").into());
    }
    console::print_log(site, &args.name).map(|()| 0)
}
