//! `vsctl events`

use anyhow::Result;

use super::output;
use crate::events::{self, Event};
use crate::name::Name;
use crate::site::Site;

/// Show what happened to servers.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only these servers.
    #[arg(value_name = "NAME")]
    names: Vec<Name>,
    /// Go on with what happens from now on, instead of what happened.
    #[arg(short, long)]
    follow: bool,
    /// Only the last N.
    #[arg(short = 'n', long, value_name = "N", conflicts_with = "follow")]
    last: Option<usize>,
    /// Print JSON, an event a line.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When the log cannot be read.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let wanted = |event: &Event| args.names.is_empty() || args.names.contains(&event.server);
    let print = |event: &Event| if args.json { output::json_line(event) } else { output::line(sentence(event)) };
    if args.follow {
        events::follow(site, |event| if wanted(&event) { print(&event) } else { Ok(()) })?;
        return Ok(0);
    }
    let events: Vec<Event> = events::read(site)?.into_iter().filter(wanted).collect();
    let skipped = args.last.map_or(0, |last| events.len().saturating_sub(last));
    events[skipped..].iter().try_for_each(print)?;
    Ok(0)
}

fn sentence(event: &Event) -> String {
    let detail = event.detail.as_ref().map(|detail| format!(" ({})", output::plain(detail))).unwrap_or_default();
    format!("{} {} {}{detail}", event.time, event.server, event.event.as_str())
}
