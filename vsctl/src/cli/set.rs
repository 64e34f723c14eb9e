//! `vsctl set`

use anyhow::Result;
use serde::Serialize;

use super::output;
use crate::edit::{self, Change, Effect, Plan, When};
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// Change keys of a server's spec, for good; on a running server at once where that can be done.
#[derive(Debug, clap::Args)]
#[command(after_help = "The keys are those of server.toml(5). Lists are written with commas between.")]
pub struct Args {
    /// The server.
    name: Name,
    /// New values; KEY= takes a key away.
    #[arg(required = true, value_name = "KEY=VALUE")]
    changes: Vec<Change>,
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
/// When a value cannot be used, or the kernel refuses it; then nothing has changed.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    if args.plan {
        let server = store::load(site, &args.name)?;
        let text = edit::text(site, &args.name)?;
        let plan = edit::plan(site, &server, &text, &edit::with_changes(&text, &args.changes)?)?;
        output::plan(&plan.steps, args.json)?;
        return Ok(0);
    }
    let plan = edit::set(site, &args.name, &args.changes)?;
    tell(&args.name, &plan, args.json)?;
    Ok(0)
}

#[derive(Serialize)]
struct Told<'a> {
    name: &'a Name,
    changed: &'a [Effect],
}

/// Says which keys have changed, and from when on that counts.
///
/// # Errors
/// When standard output is closed.
pub fn tell(name: &Name, plan: &Plan, as_json: bool) -> Result<()> {
    if as_json {
        return output::json(&Told { name, changed: &plan.effects });
    }
    if plan.effects.is_empty() {
        let saved = if plan.steps.is_empty() { "unchanged" } else { "saved; no key has another value" };
        return output::line(format_args!("{name}: {saved}"));
    }
    for effect in &plan.effects {
        let when = match effect.when {
            When::Now => "now".to_owned(),
            When::NextStart => "at the next start".to_owned(),
            When::Restart => format!("needs a restart: vsctl restart {name}"),
        };
        output::line(format_args!("{effect}  ({when})"))?;
    }
    Ok(())
}
