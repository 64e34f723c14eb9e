//! `vsctl autostart`

use anyhow::Result;

use super::{output, print_error, start};
use crate::failure;
use crate::lifecycle::start::Options;
use crate::lifecycle::state;
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// Start the servers that have `autostart = true`, as at boot.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print what would be started and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When the servers cannot be listed.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let mut broken = 0;
    let mut marked: Vec<Name> = Vec::new();
    for name in store::names(site)? {
        match store::load(site, &name) {
            Ok(server) if server.spec.autostart => marked.push(name),
            Ok(_) => {}
            // Nobody knows what it says of autostart; the others need not wait for its owner.
            Err(error) => {
                broken = failure::exit_of(&error) as i32;
                print_error(&error);
            }
        }
    }
    marked.retain(|name| !matches!(state::of(site, name), state::State::Running | state::State::Frozen));
    if args.plan {
        let sentences: Vec<String> = marked.iter().map(|name| format!("start {name}")).collect();
        output::sentences(&sentences, args.json)?;
        return Ok(broken);
    }
    let code = start::start_all(site, &marked, Options::default());
    if args.json {
        output::json(&marked)?;
    }
    Ok(if code == 0 { broken } else { code })
}
