//! `vsctl autostop`

use std::time::Duration;

use anyhow::Result;

use super::side_by_side::side_by_side;
use super::{may_be_up, output, start, stop};
use crate::checkpoint;
use crate::failure::Exit;
use crate::lifecycle::freeze;
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
    // One that stands still on its way to another host is none of these: `autostart` lets it go on.
    let names: Vec<Name> = store::names(site)?.into_iter().filter(|name| may_be_up(site, name)).collect();
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
    let failed = side_by_side(&suspended, |name| suspend(site, name))?;
    if failed.is_interrupted() {
        return Ok(failed.code());
    }
    // There may be room for one where there was none for several.
    let is_full = |code: &i32| *code == Exit::NoSpace as i32;
    let (full, mut refused): (Vec<_>, Vec<_>) = failed.0.into_iter().partition(|(_, code)| is_full(code));
    for (name, _) in full {
        let once_more = side_by_side(&[name], |name| suspend(site, name))?;
        if once_more.is_interrupted() {
            return Ok(once_more.code());
        }
        refused.extend(once_more.0);
    }
    // It goes on, and the host goes down: an orderly end is what is left for it.
    let left: Vec<Name> = refused.iter().map(|(name, _)| name.clone()).collect();
    let refused = refused.first().map_or(0, |(_, code)| *code);
    let ended = stop::stop_all(site, &left, &manner);
    if args.json {
        output::json(&start::states(site, &names)?)?;
    }
    Ok([stopped, ended, refused].into_iter().find(|code| *code != 0).unwrap_or_default())
}

/// What a frozen one has in memory would be lost otherwise; at boot it runs.
fn suspend(site: &Site, name: &Name) -> Result<()> {
    if state::of(site, name)? == State::Frozen {
        freeze::thaw(site, name)?;
    }
    checkpoint::suspend(site, name, true)
}

fn can_be(site: &Site, name: &Name) -> bool {
    site.settings.stop_mode == StopMode::Suspend
        && matches!(state::of(site, name), Ok(State::Running | State::Frozen))
        && store::load(site, name).is_ok_and(|server| server.spec.migratable)
}
