//! `vsctl service`

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use init::control::{self, Reply, Request};
use serde_json::json;

use super::output::{self, Column};
use crate::aside::{self, Found};
use crate::failure::{Exit, Failure};
use crate::lifecycle::boot::OWN_INIT;
use crate::lifecycle::state::{self, State};
use crate::monitor;
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// The services of a server whose init is vsinit.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The server.
    #[arg(value_name = "NAME")]
    name: Name,
    /// What to do.
    #[arg(value_enum, value_name = "ACTION", default_value = "list")]
    action: Action,
    /// The services.
    #[arg(value_name = "SERVICE", required_if_eq_any = [
        ("action", "start"), ("action", "stop"), ("action", "restart"), ("action", "log"),
    ])]
    services: Vec<String>,
    /// How many lines of a log.
    #[arg(short = 'n', long, value_name = "N", default_value = "100")]
    lines: u32,
    /// Print what would be asked of the server and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Action {
    /// All services and their states.
    List,
    /// Start a service and what it requires.
    Start,
    /// Stop a service and what requires it.
    Stop,
    /// Stop a service alone and start it.
    Restart,
    /// The last lines of a service's log.
    Log,
}

/// How long an answer may take for which vsinit need not wait itself.
const QUICK: Duration = Duration::from_secs(10);

/// Runs the command.
///
/// # Errors
/// Exit 31 when the server does not run, 5 when its init is another than vsinit.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let pid = supervisor(site, &args.name)?;
    let (json, lines) = (args.json, args.lines);
    let verb = match args.action {
        Action::List => return list(&args, pid).map(|()| 0),
        Action::Log => return super::for_each(&args.services, |service| log(pid, service.clone(), lines, json)),
        Action::Start => "start",
        Action::Stop => "stop",
        Action::Restart => "restart",
    };
    if args.plan {
        let sentence = |service| format!("{verb} service '{service}' in '{}'", args.name);
        let sentences: Vec<String> = args.services.iter().map(sentence).collect();
        return output::sentences(&sentences, json).map(|()| 0);
    }
    super::for_each(&args.services, |service| {
        let name = service.clone();
        let request = match args.action {
            Action::Start => Request::Start { name },
            Action::Stop => Request::Stop { name },
            _ => Request::Restart { name },
        };
        ask(pid, &request).map(drop).with_context(|| format!("cannot {verb} '{service}' in '{}'", args.name))
    })
}

/// The pid of the server's vsinit.
fn supervisor(site: &Site, name: &Name) -> Result<i32> {
    store::load(site, name)?;
    let Some(status) = state::status(site, name)? else {
        let failure = Failure::new(Exit::NotRunning, format!("'{name}' is not running"));
        return Err(failure.hint(format!("`vsctl start {name}`")).into());
    };
    if state::of(site, name)? == State::Frozen {
        let failure = Failure::new(Exit::NotRunning, format!("'{name}' is frozen and cannot answer"));
        return Err(failure.hint(format!("`vsctl thaw {name}`")).into());
    }
    if status.init != OWN_INIT {
        let message = format!("the init of '{name}' is {}, not vsinit: it has services of its own kind", status.init);
        let failure = Failure::new(Exit::Unsupported, message);
        return Err(failure.hint(format!("use its own tools: `vsctl exec {name} -- systemctl`, for one")).into());
    }
    Ok(status.pid)
}

/// How long vsinit may take to answer: nothing has to be waited for but services that start or stop.
fn patience(request: &Request) -> Duration {
    match request {
        Request::List | Request::Log { .. } => QUICK,
        _ => control::REPLY_TIMEOUT,
    }
}

/// What answers there is the guest's, and so is the way to it.
fn ask(pid: i32, request: &Request) -> Result<Reply> {
    let limit = patience(request);
    let found = aside::fetch(limit, &[], || {
        let socket = monitor::guest_control(pid).context("vsinit has no control socket")?;
        let reply = control::call_descriptor(socket.as_fd(), request)?;
        let bytes = serde_json::to_vec(&reply).context("pass the reply on")?;
        Ok(Found { bytes, ..Found::default() })
    });
    match serde_json::from_slice(&found.context("ask vsinit")?.bytes).context("read the reply")? {
        Reply::Failed { message } => Err(Failure::new(Exit::Failed, message).into()),
        reply => Ok(reply),
    }
}

fn list(args: &Args, pid: i32) -> Result<()> {
    let Reply::Services { mut services } = ask(pid, &Request::List)? else {
        bail!("vsinit did not answer with a list")
    };
    if !args.services.is_empty() {
        services.retain(|service| args.services.contains(&service.name));
    }
    if args.json {
        return output::json(&services);
    }
    let column = |title, right| Column { title, right };
    let columns = [
        column("service", false),
        column("state", false),
        column("pid", true),
        column("since", true),
        column("restarts", true),
        column("last", false),
    ];
    let dash = || "-".to_owned();
    let rows = services.into_iter().map(|service| {
        let pid = service.pid.map_or_else(dash, |pid| pid.to_string());
        let last = service.last.unwrap_or_else(dash);
        vec![service.name, service.state, pid, output::span(service.since_s), service.restarts.to_string(), last]
    });
    output::table(&columns, rows.collect(), true)
}

fn log(pid: i32, service: String, lines: u32, as_json: bool) -> Result<()> {
    let Reply::Log { text } = ask(pid, &Request::Log { name: service.clone(), lines })? else {
        bail!("vsinit did not answer with a log");
    };
    if as_json {
        return output::json(&json!({ "service": service, "lines": text.lines().collect::<Vec<_>>() }));
    }
    // The guest's words; a terminal shall not obey them.
    let shown = |line: &str| line.split('\t').map(output::plain).collect::<Vec<_>>().join("\t") + "\n";
    output::text(&text.lines().map(shown).collect::<String>())
}
