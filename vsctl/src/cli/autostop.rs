//! `vsctl autostop`

use std::time::Duration;

use anyhow::Result;

use super::{may_be_up, output, print_error, start, stop};
use crate::checkpoint;
use crate::failure::{self, Exit};
use crate::interrupt;
use crate::lifecycle::state::{self, State};
use crate::lifecycle::stop::Manner;
use crate::name::Name;
use crate::site::{Site, StopMode};
use crate::store;

/// Stop all servers, as at shutdown; with `stop_mode = "suspend"` in vsos.toml, suspend those that can be.
///
/// Suspended ones go on with `vsctl autostart`, as at the next boot.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds for an orderly shutdown; after them a server is killed.
    #[arg(long, value_name = "S", default_value = "60")]
    timeout: u64,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When the servers cannot be listed. That one could not be suspended, and was stopped, is told by the exit code.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let mut names = store::names(site)?;
    names.retain(|name| may_be_up(site, name));
    let (suspended, stopped): (Vec<Name>, Vec<Name>) = names.iter().cloned().partition(|name| can_be(site, name));
    if args.plan {
        let suspends = suspended.iter().map(|name| format!("suspend {name}"));
        let sentences: Vec<String> = suspends.chain(stopped.iter().map(|name| format!("stop {name}"))).collect();
        output::sentences(&sentences, args.json)?;
        return Ok(0);
    }
    let manner = Manner { timeout: Duration::from_secs(args.timeout), kill: false };
    // First, so that a dump that takes its time costs none of these an orderly end.
    let stopped = stop::stop_all(site, &stopped, &manner);
    let (mut left, mut refused) = (Vec::new(), 0);
    for name in suspended {
        if interrupt::before_more().is_err() {
            refused = Exit::Interrupted as i32;
            break;
        }
        if let Err(error) = checkpoint::suspend(site, &name, true) {
            if interrupt::is_interrupt(&error) {
                print_error(&error);
                refused = Exit::Interrupted as i32;
                break;
            }
            // It goes on, and the host goes down: an orderly end is what is left for it.
            print_error(&error);
            refused = failure::exit_of(&error) as i32;
            left.push(name);
        }
    }
    let ended = stop::stop_all(site, &left, &manner);
    if args.json {
        output::json(&start::states(site, &names)?)?;
    }
    Ok([stopped, ended, refused].into_iter().find(|code| *code != 0).unwrap_or_default())
}

fn can_be(site: &Site, name: &Name) -> bool {
    site.settings.stop_mode == StopMode::Suspend
        && matches!(state::of(site, name), Ok(State::Running))
        && store::load(site, name).is_ok_and(|server| server.spec.migratable)
}
