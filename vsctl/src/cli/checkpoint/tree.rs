//! `vsctl checkpoint` of trees: processes outside any server.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::{CreateArgs, DeleteArgs, ListArgs, RestoreArgs, oldest_first, show_time};
use crate::checkpoint::Then;
use crate::checkpoint::tree::{self, Ended, Kept, Wish};
use crate::cli::exec::status_of;
use crate::cli::output::{self, Column};
use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::site::Site;
use crate::size::show_bytes;

/// Run a program of the host so that it can be put on the disk with all that it starts.
///
/// It gets a session of its own without a terminal, nothing as input, and files as output: what cannot be a file is refused. The command
/// waits for its end; its exit code is the program's, 128+N when signal N ended it, 126 when it may not be executed, 127 when there is none.
/// SIGHUP, SIGINT, SIGQUIT and SIGTERM are passed on to it. `vsctl checkpoint create --pid` puts it on the disk, and ends it.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// What its checkpoints are called, before the time.
    #[arg(long, value_name = "LABEL")]
    name: Option<Name>,
    /// A file to read, instead of nothing.
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// A file to whose end output and errors go [default: what the command has, which must be files].
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// A file that gets the program's pid.
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Runs `run`.
///
/// # Errors
/// When the program cannot be started.
pub fn run(args: RunArgs, site: &Site) -> Result<i32> {
    let RunArgs { name, input, output, pid_file, command } = args;
    status_of(tree::run(site, &Wish { command, name, input, output, pid_file }).map(ended))
}

/// The exit code of a tree; one that a checkpoint has ended says so.
fn ended(ended: Ended) -> i32 {
    if let Some(label) = ended.kept {
        eprintln!("vsctl: put on the disk as '{label}': `vsctl checkpoint restore --tree {label}` lets it go on");
    }
    ended.code
}

/// Runs `create --pid`.
///
/// # Errors
/// When the tree cannot be dumped; then it goes on.
pub fn create(args: &CreateArgs, pid: i32, site: &Site) -> Result<i32> {
    // Behind --pid the first word is the label.
    let label = match (&args.name, &args.label) {
        (label, None) => label.as_ref(),
        (_, Some(extra)) => {
            return Err(Failure::new(Exit::BadParameter, format!("'{extra}' is one word too many"))
                .hint("either a server and a label, or --pid and a label")
                .into());
        }
    };
    let then = if args.leave_running { Then::GoOn } else { Then::End };
    if args.plan {
        output::sentences(&tree::plan_create(site, pid, label, then)?, args.json)?;
        return Ok(0);
    }
    let made = tree::create(site, pid, label, then)?;
    if args.json { output::json(&report(&made)) } else { output::line(&made.label) }?;
    Ok(0)
}

fn report(kept: &Kept) -> serde_json::Value {
    let record = &kept.record;
    json!({
        "label": kept.label,
        "created_s": record.created_s,
        "pid": record.root(),
        "processes": record.processes.len(),
        "memory_bytes": record.bytes(),
        "command": record.processes[0].command,
    })
}

/// Runs `list --tree`.
///
/// # Errors
/// When they cannot be listed.
pub fn list(args: &ListArgs, site: &Site) -> Result<i32> {
    let (all, code) =
        oldest_first(&tree::labels(site)?, |label| Kept::open(site, label), |kept| kept.record.created_s)?;
    if args.json {
        output::json(&all.iter().map(report).collect::<Vec<_>>())?;
        return Ok(code);
    }
    let (left, right) = (Column::left, Column::right);
    let row = |kept: &Kept| {
        let record = &kept.record;
        vec![
            kept.label.to_string(),
            show_time(record.created_s),
            record.root().to_string(),
            record.processes.len().to_string(),
            show_bytes(record.bytes()),
            record.processes[0].command.escape_debug().to_string(),
        ]
    };
    let columns = [left("label"), left("created"), right("pid"), right("processes"), right("memory"), left("command")];
    output::table(&columns, all.iter().map(row).collect(), !args.no_header)?;
    Ok(code)
}

/// Runs `restore --tree`.
///
/// # Errors
/// When it cannot be brought back; then nothing of it runs.
pub fn restore(args: &RestoreArgs, label: &Name, site: &Site) -> Result<i32> {
    if args.plan {
        output::sentences(&tree::plan_restore(site, label)?, args.json)?;
        return Ok(0);
    }
    let (pid, root) = tree::restore(site, label)?;
    if args.detach { Ok(0) } else { tree::wait(site, pid, &root).map(ended) }
}

/// Runs `delete --tree`.
///
/// # Errors
/// Only that standard output is closed; other failures have been printed.
pub fn delete(args: &DeleteArgs, site: &Site) -> Result<i32> {
    crate::cli::for_each(&args.trees, |label| {
        if args.plan {
            return output::sentences(&[format!("remove {}", tree::find(site, label)?.display())], args.json);
        }
        tree::delete(site, label)
    })
}
