//! `vsctl wait`

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::failure::{Exit, Failure};
use crate::lifecycle::state::{self, State};
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// How often is looked: a look costs some file accesses, and a person notices no delay.
const LOOK: Duration = Duration::from_millis(20);

/// Wait until a server is in a state.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The server.
    name: Name,
    /// The state.
    #[arg(value_parser = states())]
    state: State,
    /// Give up after so many seconds.
    #[arg(long, value_name = "S")]
    timeout: Option<u64>,
}

fn states() -> impl TypedValueParser<Value = State> {
    PossibleValuesParser::new(State::ALL.iter().map(|state| state.as_str()))
        .map(|text| State::ALL.iter().copied().find(|state| state.as_str() == text).unwrap_or(State::Stopped))
}

/// Runs the command.
///
/// # Errors
/// When there is no such server, or it takes too long.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let started = Instant::now();
    loop {
        let now = state::of(site, &args.name)?;
        if now == args.state && (now != State::Incomplete || site.server(&args.name).exists()) {
            return Ok(0);
        }
        if now == State::Incomplete {
            // Also one that was destroyed while we waited: the wait would never end.
            store::load(site, &args.name)?;
        }
        if args.timeout.is_some_and(|timeout| started.elapsed() >= Duration::from_secs(timeout)) {
            let message = format!("'{}' is still {now} after {} s", args.name, started.elapsed().as_secs());
            return Err(Failure::new(Exit::Failed, message).into());
        }
        std::thread::sleep(LOOK);
    }
}
