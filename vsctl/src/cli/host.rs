//! `vsctl host`

use anyhow::Result;

use super::side_by_side::side_by_side;
use super::{may_be_up, output};
use crate::checkpoint;
use crate::failure::{Exit, Failure};
use crate::lifecycle::facilities::{self, Facilities};
use crate::lifecycle::journal;
use crate::lifecycle::state;
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// What all servers share: cgroup, bridge, firewall, forwarding, FUSE overlay; and all servers at once.
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
    /// Let the installed lxcfs-fuse go on in the place of the one that runs, and load the firewall's rules anew, as after an upgrade;
    /// servers do not notice.
    Reload(Flags),
    /// Suspend every server that runs, as before the host gets another kernel; one that cannot be suspended, or is frozen, stays as it
    /// is, and is told.
    ///
    /// `vsctl autostart` lets them go on at the next boot, `vsctl host resume-all` now.
    SuspendAll(Flags),
    /// Let every suspended server go on where it was.
    ResumeAll(Flags),
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

fn each(
    verb: &str,
    names: impl Iterator<Item = Name>,
    flags: &Flags,
    act: impl Fn(&Name) -> Result<()>,
) -> Result<i32> {
    let names: Vec<Name> = names.collect();
    if flags.plan {
        let sentences: Vec<String> = names.iter().map(|name| format!("{verb} {name}")).collect();
        output::sentences(&sentences, flags.json)?;
        return Ok(0);
    }
    Ok(side_by_side(&names, act)?.code())
}

/// Runs the command.
///
/// # Errors
/// What the host lacks, or which server runs.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let facilities = Facilities(site);
    match args.verb {
        Verb::Up(flags) if flags.plan => output::plan(&facilities.missing()?, flags.json)?,
        Verb::Up(_) => facilities.ensure()?,
        Verb::Reload(flags) => {
            if !facilities.are_up()? {
                return Err(Failure::new(Exit::NotRunning, "nothing is set up here").hint("vsctl host up").into());
            }
            if flags.plan {
                let program = site.program("lxcfs-fuse")?;
                let sentences =
                    [format!("load the rules of table {}", site.table()), format!("reload {}", program.display())];
                output::sentences(&sentences, flags.json)?;
            } else {
                facilities::reload(site)?;
            }
        }
        Verb::SuspendAll(flags) => {
            // A frozen one, too, and one of which nobody knows: that it cannot be suspended is told.
            let is_up = |name: &Name| may_be_up(site, name);
            return each("suspend", store::names(site)?.into_iter().filter(is_up), &flags, |name| {
                checkpoint::suspend(site, name, true)
            });
        }
        Verb::ResumeAll(flags) => {
            let is_suspended = |name: &Name| checkpoint::is_suspended(site, name);
            return each("resume", store::names(site)?.into_iter().filter(is_suspended), &flags, |name| {
                checkpoint::resume(site, name)
            });
        }
        Verb::Down(flags) => {
            for name in store::names(site)? {
                if state::of(site, &name)?.is_up() {
                    return Err(Failure::new(Exit::AlreadyRunning, format!("'{name}' needs it"))
                        .hint("vsctl stop --all")
                        .into());
                }
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
