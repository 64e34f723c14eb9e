//! `vsctl restart`

use std::time::Duration;

use anyhow::Result;

use super::{may_be_up, output, start, stop};
use crate::lifecycle::batch::Batch;
use crate::lifecycle::facilities::Facilities;
use crate::lifecycle::state;
use crate::lifecycle::step::Step;
use crate::lifecycle::stop::Manner;
use crate::lifecycle::{journal, start as begin};
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// Stop servers and start them again; one that is stopped is only started.
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
    /// How far to wait: as for `start`.
    #[arg(long, value_enum, default_value = "init")]
    wait: start::Wait,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print the plan as JSON.
    #[arg(long, requires = "plan")]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When a server does not stop or does not start.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    if args.plan {
        let mut shared = Facilities(site).missing()?;
        return super::for_each(&args.names, |name| plan(site, name, &mut shared, args.json));
    }
    let mut code = 0;
    let mut is_here = |name: &&Name| match store::load(site, name) {
        Ok(_) => true,
        Err(error) => {
            if code == 0 {
                code = crate::failure::exit_of(&error) as i32;
            }
            super::print_error(&error);
            false
        }
    };
    let names: Vec<Name> = args.names.iter().filter(&mut is_here).cloned().collect();
    let up: Vec<Name> = names.iter().filter(|name| may_be_up(site, name)).cloned().collect();
    let manner = Manner { timeout: Duration::from_secs(args.timeout), kill: args.kill };
    let stopped = stop::stop_all(site, &up, &manner);
    // One that did not stop is running still, and starting it says so.
    let started =
        start::start_all(site, &names, begin::Options { until: args.wait.into(), ..begin::Options::default() });
    Ok([code, stopped, started].into_iter().find(|code| *code != 0).unwrap_or(0))
}

/// With what all servers share in the plan of the first that is started, where it is still to be made.
fn plan(site: &Site, name: &Name, shared: &mut Vec<Step>, as_json: bool) -> Result<()> {
    let server = store::load(site, name)?;
    let mut standing = journal::standing(&state::journal_file(site, name))?;
    standing.reverse();
    let mut sentences: Vec<String> = standing.iter().map(|step| format!("take back: {step}")).collect();
    let own = begin::plan(site, &Batch::default(), &server, false)?.1;
    sentences.extend(shared.drain(..).chain(own).map(|step| step.to_string()));
    output::sentences(&sentences, as_json)
}
