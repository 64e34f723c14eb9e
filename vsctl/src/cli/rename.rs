//! `vsctl rename`

use anyhow::Result;

use super::output;
use crate::edit;
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// Give a stopped server another name; data, number and addresses stay.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Its name.
    old: Name,
    /// Its new name.
    new: Name,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When the server runs, or the new name is taken.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    if args.plan {
        let server = store::load(site, &args.old)?;
        output::plan(&edit::plan_rename(site, &server, &args.new)?, args.json)?;
        return Ok(0);
    }
    edit::rename(site, &args.old, &args.new)?;
    if args.json {
        output::json(&serde_json::json!({ "name": args.new, "was": args.old }))?;
    }
    Ok(0)
}
