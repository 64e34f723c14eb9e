//! `vsctl start`

use std::collections::VecDeque;
use std::rc::Rc;

use anyhow::Result;

use super::{may_be_down, output, print_error};
use crate::failure;
use crate::lifecycle::batch::Batch;
use crate::lifecycle::facilities::Facilities;
use crate::lifecycle::start::{self, Options, Starting, Until};
use crate::lifecycle::state;
use crate::lifecycle::step::Step;
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// Start servers.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The servers.
    #[arg(required_unless_present = "all", value_name = "NAME")]
    names: Vec<Name>,
    /// All servers that are stopped.
    #[arg(long, conflicts_with = "names")]
    all: bool,
    /// Wait until init can take signals, until the guest says that it is ready, or not at all.
    #[arg(long, value_enum, default_value = "init")]
    wait: Wait,
    /// Only a root shell on the console.
    #[arg(long)]
    rescue: bool,
    /// Boot suspended servers anew, and lose what they had in memory.
    #[arg(long)]
    discard: bool,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// How far a start waits.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Wait {
    /// Until init can take signals.
    Init,
    /// Until the guest says that it is ready.
    Ready,
    /// Not at all.
    None,
}

impl From<Wait> for Until {
    fn from(wait: Wait) -> Self {
        match wait {
            Wait::Init => Self::Init,
            Wait::Ready => Self::Ready,
            Wait::None => Self::Nothing,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// When a server does not start.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let mut names = args.names;
    if args.all {
        names = store::names(site)?;
        names.retain(|name| may_be_down(site, name));
    }
    if args.plan {
        let batch = Batch::default();
        // What all servers share is made by the first of them.
        let mut shared = Facilities(site).missing()?;
        return super::for_each(&names, |name| {
            let server = store::load(site, name)?;
            let own = start::plan(site, &batch, &server, args.rescue)?.1;
            let steps: Vec<Step> = shared.drain(..).chain(own).collect();
            output::plan(&steps, args.json)
        });
    }
    let code = start_all(site, &names, Options { until: args.wait.into(), rescue: args.rescue, discard: args.discard });
    if args.json {
        output::json(&states(site, &names)?)?;
    }
    Ok(code)
}

/// What became of servers, for scripts.
///
/// # Errors
/// When the state of one cannot be known.
pub fn states(site: &Site, names: &[Name]) -> Result<Vec<serde_json::Value>> {
    let state = |name| Ok(serde_json::json!({ "name": name, "state": state::of(site, name)? }));
    names.iter().map(state).collect()
}

/// Starts many at a time, so that one's waiting is another's work.
pub fn start_all(site: &Site, names: &[Name], options: Options) -> i32 {
    // One waits for the kernel a third of its time: grace periods, other processes.
    let most = 3 * std::thread::available_parallelism().map_or(1, usize::from);
    let mut waiting: VecDeque<Starting> = VecDeque::new();
    let batch = Rc::<Batch>::default();
    // Each server's process begins as a copy of this one.
    kernel::process::give_memory_back();
    let mut code = 0;
    let mut note = |outcome: Result<()>| {
        if let Err(error) = outcome {
            print_error(&error);
            if code == 0 {
                code = failure::exit_of(&error) as i32;
            }
        }
    };
    for name in names {
        if waiting.len() >= most {
            waiting.pop_front().into_iter().for_each(|starting| note(starting.finish(site)));
        }
        match start::begin(site, &batch, name, options) {
            Ok(starting) => waiting.push_back(starting),
            Err(error) => note(Err(error)),
        }
    }
    waiting.into_iter().for_each(|starting| note(starting.finish(site)));
    code
}
