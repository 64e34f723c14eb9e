//! `vsctl destroy`

use anyhow::Result;

use super::output;
use crate::lifecycle::create;
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// Destroy servers with all their files.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The servers.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,
    /// Also those that run.
    #[arg(long)]
    force: bool,
    /// Print what would be taken back and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print the plan as JSON.
    #[arg(long, requires = "plan")]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When a server cannot be destroyed.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    super::for_each(&args.names, |name| {
        if args.plan {
            let mut steps = create::plan_destroy(site, name, &store::load_record(site, name)?);
            steps.reverse();
            let sentences: Vec<String> = steps.iter().map(|step| format!("take back: {step}")).collect();
            return output::sentences(&sentences, args.json);
        }
        create::destroy(site, name, args.force)
    })
}
