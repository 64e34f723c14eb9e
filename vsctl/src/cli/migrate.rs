//! `vsctl migrate`

use std::time::Duration;

use anyhow::Result;

use super::{output, progress};
use crate::failure::{Exit, Failure};
use crate::lifecycle::stop::Manner;
use crate::migrate;
use crate::name::Name;
use crate::site::Site;
use crate::size::show_bytes;

/// Move a server to another host: with all its files, its identity, addresses and limits.
///
/// The other host needs vsos of the same version, the same template, and the server's addresses in its networks. It is reached by
/// ssh as root; `migrate.shell` in vsos.toml names another program. Whatever is killed or cut, the server is one host's to run, and
/// nothing of it is lost: `vsctl doctor` says on both hosts what is left to do.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The server.
    name: Name,
    /// The host that it goes to, as ssh knows it.
    #[arg(value_name = "HOST")]
    host: String,
    /// Stop it, if it runs, and start it there.
    #[arg(long)]
    offline: bool,
    /// Seconds for an orderly shutdown; after them it is killed.
    #[arg(long, value_name = "S", default_value = "60")]
    timeout: u64,
    /// Say all that speaks against it, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// End a migration that was interrupted after the server had become the other host's.
    #[arg(long, conflicts_with_all = ["offline", "dry_run"])]
    r#continue: bool,
    /// Remove what the other host has of a server that was kept here.
    #[arg(long, conflicts_with_all = ["offline", "dry_run", "continue"])]
    abort: bool,
}

/// Runs the command.
///
/// # Errors
/// When it cannot be moved; then it is as it was, or the hint says how to go on.
pub fn run(args: &Args, site: &Site) -> Result<i32> {
    let (name, host) = (&args.name, args.host.as_str());
    if args.abort {
        return migrate::abort(site, name, host).map(|()| 0);
    }
    if args.r#continue {
        return progress::shown(name, |shown| migrate::proceed(site, name, host, shown)).map(|()| 0);
    }
    if !args.offline {
        let hint = "`--offline` stops it for the time of the move";
        return Err(Failure::new(Exit::Unsupported, "a running server cannot be moved yet").hint(hint).into());
    }
    if args.dry_run {
        let found = migrate::try_out(site, name, host)?;
        let (size, entries) = (show_bytes(found.size.bytes), found.size.entries);
        let how = if found.runs { "is stopped for it and started there" } else { "is not started there" };
        output::line(format_args!("{name} can move to {host}: {size} in {entries} files; it {how}"))?;
        return Ok(0);
    }
    let manner = Manner { timeout: Duration::from_secs(args.timeout), kill: false };
    progress::shown(name, |shown| migrate::offline(site, name, host, &manner, shown)).map(|()| 0)
}
