//! `vsctl suspend` and `vsctl resume`

use anyhow::Result;

use super::output;
use super::side_by_side::side_by_side;
use crate::checkpoint;
use crate::name::Name;
use crate::site::Site;

/// Put the processes of running servers on the disk, and end them.
///
/// They go on with `vsctl resume`, also after the host was booted anew. A server can be suspended that was started with `migratable = true` in
/// its spec (`vsctl set NAME migratable=true`, then `vsctl restart NAME`). ^C lets it go on. With --plan it is looked for what no checkpoint can hold, and nothing is frozen.
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

/// Let suspended servers go on where they were.
#[derive(Debug, clap::Args)]
pub struct ResumeArgs {
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

/// Runs `suspend`.
///
/// # Errors
/// When a server does not run, or cannot be dumped; then it goes on.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    if args.plan {
        return super::for_each(&args.names, |name| {
            output::sentences(&checkpoint::plan_suspend(site, name)?, args.json)
        });
    }
    all(&args.names, |name| checkpoint::suspend(site, name, false))
}

/// Runs `resume`.
///
/// # Errors
/// When a server is not suspended, or cannot be restored; then it stays suspended.
pub fn run_resume(args: ResumeArgs, site: &Site) -> Result<i32> {
    if args.plan {
        return super::for_each(&args.names, |name| {
            output::sentences(&checkpoint::plan_resume(site, name)?, args.json)
        });
    }
    all(&args.names, |name| checkpoint::resume(site, name))
}

fn all(names: &[Name], work: impl Fn(&Name) -> Result<()>) -> Result<i32> {
    Ok(side_by_side(names, work)?.code())
}
