//! `vsctl autostop`

use std::time::Duration;

use anyhow::Result;

use super::side_by_side::{Failed, side_by_side};
use super::{may_be_up, output, start, stop};
use crate::checkpoint;
use crate::failure::Exit;
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
    let failed = side_by_side(&suspended, |name| checkpoint::suspend(site, name, true))?;
    let (interrupted, refused): (Failed, Failed) =
        failed.into_iter().partition(|(_, code)| *code == Exit::Interrupted as i32);
    // It goes on, and the host goes down: an orderly end is what is left for it. Not so where somebody has called it off.
    let left: Vec<Name> = refused.iter().filter(|_| interrupted.is_empty()).map(|(name, _)| name.clone()).collect();
    let refused = interrupted.iter().chain(&refused).next().map_or(0, |(_, code)| *code);
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
