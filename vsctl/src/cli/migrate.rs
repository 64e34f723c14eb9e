//! `vsctl migrate`

use std::time::Duration;

use anyhow::Result;

use super::{output, progress};
use crate::failure::{Exit, Failure};
use crate::lifecycle::stop::Manner;
use crate::migrate::{self, Memory, Pause, Rung};
use crate::name::Name;
use crate::site::Site;
use crate::size::show_bytes;

/// Move a server to another host: with all its files, its identity, addresses and limits.
///
/// The other host needs a vsos that speaks the same protocol, the same template (or --send-template), and the server's addresses in its
/// networks. It is reached by ssh as root, who is asked nothing; `migrate.shell` in vsos.toml names another program. Whatever is killed or
/// cut, the server is one host's to run, and nothing of it is lost but what --postcopy risks: `vsctl doctor` says on both hosts what is left
/// to do. ^C, a hang-up and SIGTERM call it off in order, as long as the server is this host's, and are not heard after that.
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
    /// Suspend it, if it runs, and let it go on there: programs and what they have in memory go along (`migratable`).
    #[arg(long, conflicts_with = "offline")]
    near_live: bool,
    /// The same, after most of its memory was sent while it ran: it stands still for a moment only.
    #[arg(long, conflicts_with_all = ["offline", "near_live"])]
    live: bool,
    /// With --live or --near-live, let it go on before all of its memory is there, and bring that when it is asked for. Until the command
    /// ends, its memory is on both hosts: when either fails, or the connection, it is lost, and the server boots anew from its disk. The other
    /// host needs vm.unprivileged_userfaultfd=1.
    #[arg(long, conflicts_with = "offline")]
    postcopy: bool,
    /// When --live or --near-live cannot be done, or fails and it goes on here, try the next of --near-live and --offline.
    #[arg(long, conflicts_with = "offline")]
    fallback: bool,
    /// With --live, for how many seconds it may stand still: memory is sent round by round until no more than that is expected. What more rounds
    /// do not lead to is said, and it goes all the same.
    #[arg(long, value_name = "S", default_value = "1", value_parser = seconds, conflicts_with_all = ["offline", "near_live"])]
    max_downtime: Duration,
    /// With --offline, seconds for an orderly shutdown; after them it is killed.
    #[arg(long, value_name = "S", default_value = "60")]
    timeout: u64,
    /// Send its template before it, if there is none of that name there.
    #[arg(long)]
    send_template: bool,
    /// Say all that speaks against it, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// End a migration that was interrupted after the server had become the other host's.
    #[arg(long, conflicts_with_all = ["offline", "near_live", "live", "postcopy", "fallback", "send_template", "dry_run"])]
    r#continue: bool,
    /// Remove what the other host has of a server that was kept here.
    #[arg(long, conflicts_with_all = ["offline", "near_live", "live", "postcopy", "fallback", "send_template", "dry_run", "continue"])]
    abort: bool,
}

/// Seconds, with or without an `s`.
fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 =
        text.strip_suffix('s').unwrap_or(text).parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
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
    let memory = if args.postcopy { Memory::Later } else { Memory::First };
    let rung = match (args.live, args.near_live, args.offline) {
        (true, ..) => Rung::Live(memory),
        (_, true, _) => Rung::NearLive(memory),
        (.., true) => Rung::Offline,
        _ => {
            let hint = "`--live` and `--near-live` let it go on there (`migratable`), `--offline` stops it";
            return Err(Failure::new(Exit::BadParameter, "how is it to be moved?").hint(hint).into());
        }
    };
    let pause = |rung| match rung {
        Rung::Live(memory) => Pause::Live(args.max_downtime, memory),
        Rung::NearLive(memory) => Pause::Suspend(memory),
        Rung::Offline => Pause::Stop(Manner { timeout: Duration::from_secs(args.timeout), kill: false }),
    };
    if args.dry_run {
        let found = progress::shown(name, |shown| {
            migrate::climb_down(site, name, rung, args.fallback, shown, |rung, _| {
                migrate::try_out(site, name, host, &pause(rung), args.send_template).map(|found| (found, rung))
            })
        })?;
        let (found, rung) = found;
        let (size, entries) = (show_bytes(found.size.bytes - found.memory_bytes), found.size.entries);
        let memory = match found.memory_bytes {
            0 => String::new(),
            bytes => format!(", and up to {} of memory", show_bytes(bytes)),
        };
        let how = match (found.runs, found.is_whole, rung) {
            (true, false, _) => "is stopped for it and started there",
            (true, true, Rung::Live(_)) => "goes on there, after most of its memory was sent while it runs",
            (true, true, _) => "is suspended for it and goes on there",
            (false, ..) if found.starts => "goes on there, since it ran until an attempt was interrupted",
            (false, true, _) => "stays suspended",
            (false, false, _) => "is not started there",
        };
        output::line(format_args!("{name} can move to {host}: {size} in {entries} files{memory}; it {how}"))?;
        if let Some(template) = found.template {
            let (size, entries) = (show_bytes(template.bytes), template.entries);
            output::line(format_args!("its template goes before it: {size} in {entries} files"))?;
        }
        return Ok(0);
    }
    progress::shown(name, |shown| {
        migrate::climb_down(site, name, rung, args.fallback, shown, |rung, shown| {
            migrate::go(site, name, host, &pause(rung), args.send_template, shown)
        })
    })
    .map(|()| 0)
}
