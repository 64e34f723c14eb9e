//! `vsctl push`

use std::path::PathBuf;

use anyhow::Result;

use super::output;
use crate::name::Name;
use crate::site::Site;
use crate::transfer::{self, End};

/// Copy a file or directory into a server, running or not.
///
/// As cp -r does: into DST where that is a directory, else as DST. The copies are root's and keep their modes; they are on the
/// disk when the command returns.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The server.
    #[arg(value_name = "NAME")]
    name: Name,
    /// A path on the host, or - for standard input.
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// A path in the server.
    #[arg(value_name = "DST")]
    target: PathBuf,
    /// Print what would be copied and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long, requires = "plan")]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When the source or the target's directory is missing, or the disk is full.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let sentences = transfer::push(site, &args.name, &End::from(args.source), &args.target, args.plan)?;
    if args.plan {
        output::sentences(&sentences, args.json)?;
    }
    Ok(0)
}
