//! `vsctl ps`

use anyhow::Result;
use serde::Serialize;

use super::output::{self, Column};
use crate::failure::{Exit, Failure};
use crate::lifecycle::state;
use crate::lifecycle::world::World;
use crate::name::Name;
use crate::processes::{self, Process};
use crate::site::Site;
use crate::size::show_bytes;
use crate::store;

/// Show processes with the server that each belongs to.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only these servers; all that run when none is named.
    #[arg(value_name = "NAME")]
    names: Vec<Name>,
    /// No header.
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

const COLUMNS: &[Column] = &[
    Column::left("server"),
    Column::right("pid"),
    Column::right("inside"),
    Column::left("user"),
    Column::left("state"),
    Column::right("rss"),
    Column::right("time"),
    Column::left("command"),
];

#[derive(Serialize)]
struct Owned {
    server: Name,
    #[serde(flatten)]
    process: Process,
}

/// Runs the command.
///
/// # Errors
/// When a server does not exist or does not run.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let world = World::new(site);
    let names = if args.names.is_empty() { running(site)? } else { args.names };
    let mut found = Vec::new();
    let mut first = 0;
    for name in &names {
        match of(&world, name) {
            Ok(processes) => {
                found.extend(processes.into_iter().map(|process| Owned { server: name.clone(), process }));
            }
            Err(error) => {
                super::print_error(&error);
                if first == 0 {
                    first = crate::failure::exit_of(&error) as i32;
                }
            }
        }
    }
    if args.json {
        output::json(&found)?;
    } else if first == 0 || !found.is_empty() {
        output::table(COLUMNS, found.iter().map(row).collect(), !args.no_header)?;
    }
    Ok(first)
}

fn running(site: &Site) -> Result<Vec<Name>> {
    let mut names = store::entries(&site.run().join("servers"))?;
    // One of which that is unknown stays: looking at it says why it is.
    names.retain(|name| !matches!(state::status(site, name), Ok(None)));
    names.sort();
    Ok(names)
}

fn of(world: &World<'_>, name: &Name) -> Result<Vec<Process>> {
    let server = store::load(world.site, name)?;
    let status = state::status(world.site, name)?
        .ok_or_else(|| Failure::new(Exit::NotRunning, format!("'{name}' is not running")))?;
    let group = world.group(&world.site.server_cgroup(name))?;
    let first_id = server.first_id(world.site).unwrap_or(0);
    processes::of(&group, status.pid, first_id)
}

fn row(owned: &Owned) -> Vec<String> {
    let Owned { server, process } = owned;
    vec![
        server.to_string(),
        process.pid.to_string(),
        process.pid_inside.to_string(),
        process.user.clone(),
        process.state.to_string(),
        show_bytes(process.rss_bytes),
        clock(process.cpu_ms / 1000),
        process.command.clone(),
    ]
}

/// CPU time as ps(1) shows it.
fn clock(seconds: u64) -> String {
    match seconds / 3600 {
        0 => format!("{}:{:02}", seconds / 60, seconds % 60),
        hours => format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60),
    }
}
