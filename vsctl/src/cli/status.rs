//! `vsctl status`

use anyhow::Result;

use super::output;
use crate::lifecycle::world::World;
use crate::name::Name;
use crate::observe::Seen;
use crate::site::Site;
use crate::store;

/// Say in one line how servers are.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The servers.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,
    /// Print JSON: name, state, pid, uptime_s, addresses, memory, cpus, tasks and more.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When there is no such server.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let world = World::new(site);
    let mut reports = Vec::new();
    let code = super::for_each(&args.names, |name| {
        let seen = Seen::look(&world, name.clone())?;
        if args.json {
            reports.push(seen.report()?);
            return Ok(());
        }
        if !store::record_file(site, name).exists() {
            // Says how it came about, with the hint that belongs to it.
            store::load(site, name)?;
        }
        output::line(format_args!("{name} {}", seen.state))
    })?;
    if args.json {
        output::json_of_each(&reports, args.names.len())?;
    }
    Ok(code)
}
