//! `vsctl stop`

use std::time::Duration;

use anyhow::Result;

use super::output;
use crate::lifecycle::journal;
use crate::lifecycle::state;
use crate::lifecycle::stop::{self, Manner};
use crate::name::Name;
use crate::site::Site;

/// Stop servers.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The servers.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,
    /// Seconds for an orderly shutdown; after them it is killed.
    #[arg(long, value_name = "S", default_value = "60")]
    timeout: u64,
    /// Kill it at once.
    #[arg(long)]
    kill: bool,
    /// Print what would be taken back and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When a server does not stop.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let manner = Manner { timeout: Duration::from_secs(args.timeout), kill: args.kill };
    super::for_each(&args.names, |name| {
        if args.plan {
            let mut steps = journal::standing(&state::journal_file(site, name))?;
            steps.reverse();
            return output::plan(&steps, args.json);
        }
        stop::stop(site, name, &manner)
    })
}
