//! `vsctl autostart`

use anyhow::Result;

use super::side_by_side::side_by_side;
use super::{may_be_down, output, print_error, start};
use crate::checkpoint;
use crate::failure;
use crate::lifecycle::start::Options;
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// Start the servers that have `autostart = true`, as at boot; suspended ones go on where they were.
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
        match is_marked(site, &name) {
            Ok(true) => marked.push(name),
            Ok(false) => {}
            // Nobody knows what it says; the others need not wait for its owner.
            Err(error) => {
                broken = failure::exit_of(&error) as i32;
                print_error(&error);
            }
        }
    }
    // One between two hosts is the doctor's matter.
    marked.retain(|name| may_be_down(site, name) && !matches!(store::migration(site, name), Ok(Some(_))));
    let (suspended, stopped): (Vec<Name>, Vec<Name>) =
        marked.iter().cloned().partition(|name| checkpoint::is_suspended(site, name));
    if args.plan {
        let resumes = suspended.iter().map(|name| format!("resume {name}"));
        let sentences: Vec<String> = resumes.chain(stopped.iter().map(|name| format!("start {name}"))).collect();
        output::sentences(&sentences, args.json)?;
        return Ok(broken);
    }
    let failed = side_by_side(&suspended, |name| checkpoint::resume(site, name))?;
    if failed.is_interrupted() {
        return Ok(failed.code());
    }
    let resumed = failed.code();
    let started = start::start_all(site, &stopped, Options::default());
    let code = if resumed == 0 { started } else { resumed };
    if args.json {
        output::json(&marked)?;
    }
    Ok(if code == 0 { broken } else { code })
}

/// Whether it goes up with the host: as its spec says, because the host went down under it, or because it stood still for a migration
/// that was interrupted.
fn is_marked(site: &Site, name: &Name) -> Result<bool> {
    Ok(store::load(site, name)?.spec.autostart
        || checkpoint::is_suspended(site, name) && checkpoint::goes_with_host(site, name)?
        || store::leaving(site, name)?.is_some_and(|leaving| leaving.pausing.is_some()))
}
