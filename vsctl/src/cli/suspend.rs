//! `vsctl suspend` and `vsctl resume`

use anyhow::Result;

use super::output;
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
    super::for_each(&args.names, |name| match args.plan {
        true => output::sentences(&checkpoint::plan_suspend(site, name)?, args.json),
        false => checkpoint::suspend(site, name, false),
    })
}

/// Runs `resume`.
///
/// # Errors
/// When a server is not suspended, or cannot be restored; then it stays suspended.
pub fn run_resume(args: ResumeArgs, site: &Site) -> Result<i32> {
    super::for_each(&args.names, |name| match args.plan {
        true => output::sentences(&checkpoint::plan_resume(site, name)?, args.json),
        false => checkpoint::resume(site, name),
    })
}
