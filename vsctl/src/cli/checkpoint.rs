//! `vsctl checkpoint`

use anyhow::Result;
use serde_json::json;

use super::output::{self, Column};
use crate::checkpoint::Then;
use crate::checkpoint::kept::{self, Kept};
use crate::events::timestamp;
use crate::name::Name;
use crate::site::Site;
use crate::size::show_bytes;
use crate::store;

/// Keep states of servers, disk and memory together, and set servers back to them.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Create(CreateArgs),
    List(ListArgs),
    Restore(RestoreArgs),
    Delete(DeleteArgs),
}

/// Keep a server as it is now, and print the label.
///
/// Of a running server (`migratable`) processes and disk are kept, and it is stopped; with --leave-running it goes on where it was. Of
/// a suspended one the same is kept, of a stopped one its disk only; both stay as they are.
#[derive(Debug, clap::Args)]
struct CreateArgs {
    /// The server.
    name: Name,
    /// What it is called: letters, digits, '-', '_' and '.'; without, the time in UTC.
    label: Option<Name>,
    /// Let a running server go on instead of stopping it.
    #[arg(long)]
    leave_running: bool,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// List the checkpoints of a server, oldest first.
#[derive(Debug, clap::Args)]
#[command(alias = "ls")]
struct ListArgs {
    /// The server.
    name: Name,
    /// No header.
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Set a server that is down back to a checkpoint, which stays.
///
/// Its present disk is lost. If processes were kept it then runs, and they go on; else it is stopped.
#[derive(Debug, clap::Args)]
struct RestoreArgs {
    /// The server.
    name: Name,
    /// The checkpoint.
    label: Name,
    /// Also a suspended server, which loses what it has in memory now.
    #[arg(long)]
    discard: bool,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print the plan as JSON.
    #[arg(long, requires = "plan")]
    json: bool,
}

/// Remove checkpoints of a server.
#[derive(Debug, clap::Args)]
#[command(alias = "rm")]
struct DeleteArgs {
    /// The server.
    name: Name,
    /// The checkpoints.
    #[arg(required = true, value_name = "LABEL")]
    labels: Vec<Name>,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print the plan as JSON.
    #[arg(long, requires = "plan")]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When a checkpoint cannot be made, read, brought back or removed.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    match args.verb {
        Verb::Create(args) => create(args, site),
        Verb::List(args) => list(&args, site),
        Verb::Restore(args) => restore(&args, site),
        Verb::Delete(args) => delete(&args, site),
    }
}

fn create(args: CreateArgs, site: &Site) -> Result<i32> {
    let label = args.label.unwrap_or_else(kept::label_of_now);
    let then = if args.leave_running { Then::GoOn } else { Then::End };
    if args.plan {
        output::sentences(&kept::plan_create(site, &args.name, &label, then)?, args.json)?;
        return Ok(0);
    }
    let made = kept::create(site, &args.name, &label, then)?;
    if args.json { output::json(&report(&made)) } else { output::line(&label) }?;
    Ok(0)
}

fn report(kept: &Kept) -> serde_json::Value {
    let record = &kept.record;
    json!({
        "label": kept.label,
        "created_s": record.created_s,
        "kind": kind(kept),
        "memory_bytes": record.memory_bytes,
        "disk_bytes": record.disk_bytes,
    })
}

fn kind(kept: &Kept) -> &'static str {
    if kept.has_memory() { "memory+disk" } else { "disk" }
}

fn list(args: &ListArgs, site: &Site) -> Result<i32> {
    store::load_record(site, &args.name)?;
    let mut all = Vec::new();
    let code = super::for_each(&kept::labels(site, &args.name)?, |label| {
        all.push(Kept::open(site, &args.name, label)?);
        Ok(())
    })?;
    all.sort_by_key(|kept| kept.record.created_s);
    if args.json {
        output::json(&all.iter().map(report).collect::<Vec<_>>())?;
        return Ok(code);
    }
    let left = |title| Column { title, right: false };
    let right = |title| Column { title, right: true };
    let row = |kept: &Kept| {
        let created = std::time::UNIX_EPOCH + std::time::Duration::from_secs(kept.record.created_s);
        let memory = kept.record.memory_bytes.map_or_else(|| "-".to_owned(), show_bytes);
        let created = timestamp(created)[.."2026-11-28T15:59:21".len()].replace('T', " ");
        vec![kept.label.to_string(), created, kind(kept).to_owned(), memory, show_bytes(kept.record.disk_bytes)]
    };
    let columns = [left("label"), left("created"), left("kind"), right("memory"), right("disk")];
    output::table(&columns, all.iter().map(row).collect(), !args.no_header)?;
    Ok(code)
}

fn restore(args: &RestoreArgs, site: &Site) -> Result<i32> {
    if args.plan {
        output::sentences(&kept::plan_restore(site, &args.name, &args.label, args.discard)?, args.json)?;
    } else {
        kept::restore(site, &args.name, &args.label, args.discard)?;
    }
    Ok(0)
}

fn delete(args: &DeleteArgs, site: &Site) -> Result<i32> {
    super::for_each(&args.labels, |label| {
        if args.plan {
            let found = kept::find(site, &args.name, label)?;
            return output::sentences(&[format!("remove {}", found.display())], args.json);
        }
        kept::delete(site, &args.name, label)
    })
}
