//! `vsctl checkpoint`

mod tree;

use anyhow::{Context, Result};
use serde_json::json;

use super::output::{self, Column};
use crate::checkpoint::Then;
use crate::checkpoint::kept::{self, Kept};
use crate::events::timestamp;
use crate::name::Name;
use crate::site::Site;
use crate::size::show_bytes;
use crate::store;

/// Keep states of servers, disk and memory together, and set servers back to them; and processes of the host.
///
/// A tree is a process of the host's with all below it, outside any server: `run` starts one that can be kept, `create --pid` puts one on
/// the disk, `restore --tree` lets it go on, also after the host was booted anew.
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
    Run(tree::RunArgs),
}

/// Keep a server as it is now, and print the label.
///
/// Of a running server (`migratable`) processes and disk are kept, and it is stopped; with --leave-running it goes on where it was. Of
/// a suspended one the same is kept, of a stopped one its disk only; both stay as they are.
///
/// With --pid it is a process of the host's with all below it, which end with it, or go on with --leave-running.
#[derive(Debug, clap::Args)]
#[command(override_usage = "vsctl checkpoint create [OPTIONS] NAME [LABEL]\n       \
                            vsctl checkpoint create [OPTIONS] --pid PID [LABEL]")]
struct CreateArgs {
    /// The server.
    #[arg(required_unless_present = "pid")]
    name: Option<Name>,
    /// What it is called: letters, digits, '-', '_' and '.'; without, the time in UTC, behind the name that `run` gave a tree.
    label: Option<Name>,
    /// The process at the root of a tree, instead of a server.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Let a running server, or the tree, go on instead of ending it.
    #[arg(long)]
    leave_running: bool,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// List the checkpoints of a server, or those of trees, oldest first.
#[derive(Debug, clap::Args)]
#[command(
    alias = "ls",
    override_usage = "vsctl checkpoint list [OPTIONS] NAME\n       vsctl checkpoint list [OPTIONS] --tree"
)]
struct ListArgs {
    /// The server.
    #[arg(required_unless_present = "tree", conflicts_with = "tree")]
    name: Option<Name>,
    /// Those of trees.
    #[arg(long)]
    tree: bool,
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
///
/// With --tree the processes of a tree go on with the numbers that they had. The command waits for the end of its root, as `run` does.
#[derive(Debug, clap::Args)]
#[command(override_usage = "vsctl checkpoint restore [OPTIONS] NAME LABEL\n       \
                            vsctl checkpoint restore [OPTIONS] --tree LABEL")]
struct RestoreArgs {
    /// The server.
    #[arg(required_unless_present = "tree", conflicts_with = "tree")]
    name: Option<Name>,
    /// The checkpoint.
    #[arg(required_unless_present = "tree", conflicts_with = "tree")]
    label: Option<Name>,
    /// The checkpoint of a tree, instead of a server's.
    #[arg(long, value_name = "LABEL")]
    tree: Option<Name>,
    /// Do not wait for the end of the tree.
    #[arg(long, requires = "tree", conflicts_with = "name")]
    detach: bool,
    /// Also a suspended server, which loses what it has in memory now.
    #[arg(long, conflicts_with = "tree")]
    discard: bool,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print the plan as JSON.
    #[arg(long, requires = "plan")]
    json: bool,
}

/// Remove checkpoints of a server, or of trees.
#[derive(Debug, clap::Args)]
#[command(
    alias = "rm",
    override_usage = "vsctl checkpoint delete [OPTIONS] NAME LABEL...\n       \
                      vsctl checkpoint delete [OPTIONS] --tree LABEL..."
)]
struct DeleteArgs {
    /// The server.
    #[arg(required_unless_present = "trees", conflicts_with = "trees")]
    name: Option<Name>,
    /// The checkpoints.
    #[arg(required_unless_present = "trees", conflicts_with = "trees", value_name = "LABEL")]
    labels: Vec<Name>,
    /// Checkpoints of trees, instead of a server's.
    #[arg(long = "tree", value_name = "LABEL", num_args = 1..)]
    trees: Vec<Name>,
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
        Verb::Create(args) => match args.pid {
            Some(pid) => tree::create(&args, pid, site),
            None => create(args, site),
        },
        Verb::List(args) if args.tree => tree::list(&args, site),
        Verb::List(args) => list(&args, site),
        Verb::Restore(args) => match &args.tree {
            Some(label) => tree::restore(&args, label, site),
            None => restore(&args, site),
        },
        Verb::Delete(args) if !args.trees.is_empty() => tree::delete(&args, site),
        Verb::Delete(args) => delete(&args, site),
        Verb::Run(args) => tree::run(args, site),
    }
}

fn create(args: CreateArgs, site: &Site) -> Result<i32> {
    let name = server(&args.name)?;
    let label = args.label.unwrap_or_else(kept::label_of_now);
    let then = if args.leave_running { Then::GoOn } else { Then::End };
    if args.plan {
        output::sentences(&kept::plan_create(site, name, &label, then)?, args.json)?;
        return Ok(0);
    }
    let made = kept::create(site, name, &label, then)?;
    if args.json { output::json(&report(&made)) } else { output::line(&label) }?;
    Ok(0)
}

/// The server that clap has seen to.
fn server(name: &Option<Name>) -> Result<&Name> {
    name.as_ref().context("no server is named")
}

/// A moment in UTC; `time_s`: seconds since 1970.
fn show_time(time_s: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(time_s);
    timestamp(time)[.."2026-11-28T15:59:21".len()].replace('T', " ")
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

/// What `open` finds of each label, the oldest first, and the exit code of a list that lacks what cannot be opened.
fn oldest_first<T>(
    labels: &[Name],
    open: impl Fn(&Name) -> Result<T>,
    created_s: impl Fn(&T) -> u64,
) -> Result<(Vec<T>, i32)> {
    let mut all = Vec::new();
    let code = super::for_each(labels, |label| {
        all.push(open(label)?);
        Ok(())
    })?;
    all.sort_by_key(created_s);
    Ok((all, code))
}

fn list(args: &ListArgs, site: &Site) -> Result<i32> {
    let name = server(&args.name)?;
    store::load_record(site, name)?;
    let (all, code) =
        oldest_first(&kept::labels(site, name)?, |label| Kept::open(site, name, label), |kept| kept.record.created_s)?;
    if args.json {
        output::json(&all.iter().map(report).collect::<Vec<_>>())?;
        return Ok(code);
    }
    let (left, right) = (Column::left, Column::right);
    let row = |kept: &Kept| {
        let memory = kept.record.memory_bytes.map_or_else(|| "-".to_owned(), show_bytes);
        let created = show_time(kept.record.created_s);
        vec![kept.label.to_string(), created, kind(kept).to_owned(), memory, show_bytes(kept.record.disk_bytes)]
    };
    let columns = [left("label"), left("created"), left("kind"), right("memory"), right("disk")];
    output::table(&columns, all.iter().map(row).collect(), !args.no_header)?;
    Ok(code)
}

fn restore(args: &RestoreArgs, site: &Site) -> Result<i32> {
    let (name, label) = (server(&args.name)?, args.label.as_ref().context("no label")?);
    if args.plan {
        output::sentences(&kept::plan_restore(site, name, label, args.discard)?, args.json)?;
    } else {
        kept::restore(site, name, label, args.discard)?;
    }
    Ok(0)
}

fn delete(args: &DeleteArgs, site: &Site) -> Result<i32> {
    let name = server(&args.name)?;
    super::for_each(&args.labels, |label| {
        if args.plan {
            let found = kept::find(site, name, label)?;
            return output::sentences(&[format!("remove {}", found.display())], args.json);
        }
        kept::delete(site, name, label)
    })
}
