//! `vsctl freeze` and `vsctl thaw`

use anyhow::Result;

use super::output;
use crate::lifecycle::freeze;
use crate::lifecycle::state::Action;
use crate::name::Name;
use crate::site::Site;

/// Hold all processes of running servers, in memory.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The servers.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print the plan as JSON.
    #[arg(long, requires = "plan")]
    json: bool,
}

/// Let the processes of frozen servers go on.
#[derive(Debug, clap::Args)]
pub struct ThawArgs {
    #[command(flatten)]
    args: Args,
}

/// Runs `freeze`.
///
/// # Errors
/// When a server does not run, or does not stand still.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    super::for_each(&args.names, |name| {
        if args.plan {
            freeze::check(site, name, Action::Freeze)?;
            return output::plan(&freeze::plan(site, name), args.json);
        }
        freeze::freeze(site, name)
    })
}

/// Runs `thaw`.
///
/// # Errors
/// When a server is not frozen.
pub fn run_thaw(args: ThawArgs, site: &Site) -> Result<i32> {
    let args = args.args;
    super::for_each(&args.names, |name| {
        if args.plan {
            freeze::check(site, name, Action::Thaw)?;
            let sentences: Vec<String> =
                freeze::plan(site, name).iter().map(|step| format!("take back: {step}")).collect();
            return output::sentences(&sentences, args.json);
        }
        freeze::thaw(site, name)
    })
}
