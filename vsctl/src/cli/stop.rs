//! `vsctl stop`

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use kernel::process::wait_for_joined_threads;

use super::{failed, may_be_up, output, start};
use crate::lifecycle::journal;
use crate::lifecycle::state;
use crate::lifecycle::stop::{self, Manner};
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// How many servers are stopped at the same time.
const AT_ONCE: usize = 16;

/// Stop servers.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The servers.
    #[arg(required_unless_present = "all", value_name = "NAME")]
    names: Vec<Name>,
    /// All servers that are up.
    #[arg(long, conflicts_with = "names")]
    all: bool,
    /// Seconds for an orderly shutdown; after them it is killed.
    #[arg(long, value_name = "S", default_value = "60")]
    timeout: u64,
    /// Kill it at once.
    #[arg(long)]
    kill: bool,
    /// Print what would be taken back and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When a server does not stop.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let manner = Manner { timeout: Duration::from_secs(args.timeout), kill: args.kill };
    let mut names = args.names;
    if args.all {
        names = store::names(site)?;
        if !args.plan {
            names.iter().for_each(|name| store::try_forget_leaving(site, name));
        }
        names.retain(|name| may_be_up(site, name));
    }
    if args.plan {
        return super::for_each(&names, |name| {
            store::load(site, name)?;
            let mut steps = journal::standing(&state::journal_file(site, name))?;
            steps.reverse();
            let sentences: Vec<String> = steps.iter().map(|step| format!("take back: {step}")).collect();
            output::sentences(&sentences, args.json)
        });
    }
    let code = stop_all(site, &names, &manner);
    if args.json {
        output::json(&start::states(site, &names)?)?;
    }
    Ok(code)
}

/// Stops many at a time: most of a stop is waiting for the guest. Prints what fails; gives the code of the first.
pub fn stop_all(site: &Site, names: &[Name], manner: &Manner) -> i32 {
    if let [name] = names {
        return failed(stop::stop(site, name, manner));
    }
    let next = AtomicUsize::new(0);
    let code = Mutex::new(0);
    let work = || {
        while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
            let failed = failed(stop::stop(site, name, manner));
            let mut code = code.lock().unwrap_or_else(PoisonError::into_inner);
            if *code == 0 {
                *code = failed;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..names.len().min(AT_ONCE) {
            scope.spawn(work);
        }
    });
    wait_for_joined_threads();
    code.into_inner().unwrap_or_else(PoisonError::into_inner)
}
