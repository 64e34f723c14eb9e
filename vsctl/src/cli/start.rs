//! `vsctl start`

use std::collections::VecDeque;

use anyhow::Result;

use super::{output, print_error};
use crate::failure;
use crate::lifecycle::start::{self, Options, Starting, Until};
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// Start servers.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The servers.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,
    /// Wait until init can take signals, until the guest says that it is ready, or not at all.
    #[arg(long, value_enum, default_value = "init")]
    wait: Wait,
    /// Only a root shell on the console.
    #[arg(long)]
    rescue: bool,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Wait {
    Init,
    Ready,
    None,
}

/// Runs the command.
///
/// # Errors
/// When a server does not start.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    if args.plan {
        return super::for_each(&args.names, |name| {
            let server = store::load(site, name)?;
            output::plan(&start::plan(site, &server, args.rescue)?.1, args.json)
        });
    }
    let until = match args.wait {
        Wait::Init => Until::Init,
        Wait::Ready => Until::Ready,
        Wait::None => Until::Nothing,
    };
    Ok(start_all(site, &args.names, Options { until, rescue: args.rescue }))
}

/// Starts many at a time, so that one's waiting is another's work.
pub fn start_all(site: &Site, names: &[Name], options: Options) -> i32 {
    let most = 2 * std::thread::available_parallelism().map_or(1, usize::from);
    let mut waiting: VecDeque<Starting> = VecDeque::new();
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
        match start::begin(site, name, options) {
            Ok(starting) => waiting.push_back(starting),
            Err(error) => note(Err(error)),
        }
    }
    waiting.into_iter().for_each(|starting| note(starting.finish(site)));
    code
}
