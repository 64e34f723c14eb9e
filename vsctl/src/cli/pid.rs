//! `vsctl pid`

use anyhow::Result;
use serde::Serialize;

use super::output;
use crate::name::Name;
use crate::processes;
use crate::site::Site;

/// Tell which server a process of the host belongs to.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Process ids on the host.
    #[arg(required = true, value_name = "PID")]
    pids: Vec<i32>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Owner {
    pid: i32,
    server: Name,
    pid_inside: i32,
}

/// Runs the command.
///
/// # Errors
/// When there is no such process, or it is no server's.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let mut owners = Vec::new();
    let code = super::for_each(&args.pids, |pid| {
        let (server, pid_inside) = processes::owner(site, *pid)?;
        if args.json {
            owners.push(Owner { pid: *pid, server, pid_inside });
            return Ok(());
        }
        output::line(format_args!("{pid} {server} {pid_inside}"))
    })?;
    if args.json {
        output::json_of_each(&owners, args.pids.len())?;
    }
    Ok(code)
}
