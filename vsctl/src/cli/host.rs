//! `vsctl host`

use anyhow::Result;

use super::output;
use crate::failure::{Exit, Failure};
use crate::lifecycle::facilities::Facilities;
use crate::lifecycle::{journal, state};
use crate::site::Site;
use crate::store;

/// Set up or take back what all servers share: cgroup, bridge, firewall, forwarding, FUSE overlay.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Set it up; the first start does so, too.
    Up(Flags),
    /// Take it back; no server may run.
    Down(Flags),
}

#[derive(Debug, clap::Args)]
struct Flags {
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
/// What the host lacks, or which server runs.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let facilities = Facilities(site);
    match args.verb {
        Verb::Up(flags) if flags.plan => {
            let steps = if facilities.are_up() { Vec::new() } else { facilities.plan()? };
            output::plan(&steps, flags.json)?;
        }
        Verb::Up(_) => facilities.ensure()?,
        Verb::Down(flags) => {
            let up = store::names(site)?.into_iter().find(|name| state::of(site, name).is_up());
            if let Some(name) = up {
                return Err(Failure::new(Exit::AlreadyRunning, format!("'{name}' needs it"))
                    .hint("vsctl stop --all")
                    .into());
            }
            if flags.plan {
                let mut steps = journal::standing(&site.run().join("host/journal"))?;
                steps.reverse();
                let sentences: Vec<String> = steps.iter().map(|step| format!("take back: {step}")).collect();
                output::sentences(&sentences, flags.json)?;
            } else {
                facilities.remove()?;
            }
        }
    }
    Ok(0)
}
