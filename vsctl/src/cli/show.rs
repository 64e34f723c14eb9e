//! `vsctl show`

use std::path::PathBuf;

use anyhow::Result;
use kernel::cgroup::Usage;
use serde::Serialize;

use super::output;
use crate::lifecycle::state::{self, State};
use crate::lifecycle::world::World;
use crate::monitor;
use crate::name::Name;
use crate::observe::{Report, Seen};
use crate::site::Site;
use crate::size::show_bytes;
use crate::spec::{NetworkMode, Spec};
use crate::store::{self, Record};
use crate::volume;

/// Show everything about servers: spec, record, state, names on the host, files and use.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The servers.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// All that is known of one server.
#[derive(Debug, Serialize)]
struct Whole {
    #[serde(flatten)]
    report: Report,
    has_monitor: bool,
    spec: Spec,
    record: Record,
    usage: Option<Usage>,
    on_host: OnHost,
    files: Files,
}

/// What it is called on the host.
#[derive(Debug, Serialize)]
struct OnHost {
    cgroup: String,
    link: Option<String>,
    bridge: Option<String>,
    table: Option<String>,
    first_id: Option<u32>,
}

/// Where its files are.
#[derive(Debug, Serialize)]
struct Files {
    spec: PathBuf,
    volume: PathBuf,
    console_log: PathBuf,
    run: PathBuf,
    journal: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// When there is no such server, or its files cannot be used.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let world = World::new(site);
    let mut wholes = Vec::new();
    let mut first = true;
    let code = super::for_each(&args.names, |name| {
        let whole = whole(site, &world, name)?;
        if args.json {
            wholes.push(whole);
            return Ok(());
        }
        if !std::mem::take(&mut first) {
            output::text("\n")?;
        }
        output::text(&render(&whole))
    })?;
    if args.json {
        output::json_of_each(&wholes, args.names.len())?;
    }
    Ok(code)
}

fn whole(site: &Site, world: &World<'_>, name: &Name) -> Result<Whole> {
    let seen = Seen::look(world, name.clone())?;
    let report = seen.report()?;
    let server = store::load(site, name)?;
    let bridged = server.spec.net == NetworkMode::Bridge;
    Ok(Whole {
        has_monitor: seen.state.is_up() && monitor::is_alive(site, name)?,
        usage: seen.usage().cloned(),
        on_host: OnHost {
            cgroup: site.server_cgroup(name),
            link: bridged.then(|| site.link(server.record.id)),
            bridge: bridged.then(|| site.bridge()),
            table: bridged.then(|| site.table()),
            first_id: server.first_id(site),
        },
        files: Files {
            spec: store::spec_file(site, name),
            volume: volume::directory(site, name),
            console_log: monitor::log_file(site, name),
            run: site.server_run(name),
            journal: state::journal_file(site, name),
        },
        spec: server.spec,
        record: server.record,
        report,
    })
}

fn render(whole: &Whole) -> String {
    let Whole { report, spec, record, .. } = whole;
    let mut out = Lines::default();
    out.line("name", &report.name);
    out.line("state", report.state);
    out.some("pid", report.pid);
    out.some("uptime", report.uptime_s.map(output::span));
    if report.state != State::Stopped {
        out.line("monitor", if whole.has_monitor { "alive" } else { "none" });
    }
    out.line("hostname", &report.hostname);
    out.line("addresses", joined(&report.addresses));
    out.section("use");
    if let Some(usage) = &whole.usage {
        out.some("cpu time", report.cpu_usage_usec.map(|usec| format!("{:.2}s", usec as f64 / 1e6)));
        out.line("memory", of(show_bytes(usage.memory_bytes), report.memory.limit_bytes.map(show_bytes)));
        out.line("swap", of(show_bytes(usage.swap_bytes), usage.swap_limit_bytes.map(show_bytes)));
        out.line("tasks", of(usage.tasks, usage.pids_limit));
        out.line("read", show_bytes(usage.io_read_bytes));
        out.line("written", show_bytes(usage.io_write_bytes));
    }
    out.section("spec");
    for line in spec.to_toml().lines() {
        if let Some((key, value)) = line.split_once(" = ") {
            out.line(key, value);
        }
    }
    out.section("record");
    out.line("id", record.id);
    out.line("uuid", &record.uuid);
    let created = std::time::UNIX_EPOCH + std::time::Duration::from_secs(record.created_s);
    out.line("created", crate::events::timestamp(created));
    out.line("template", &record.template_digest);
    out.line("reserved", joined(&record.addresses));
    out.section("on the host");
    out.line("cgroup", &whole.on_host.cgroup);
    out.some("link", whole.on_host.link.as_ref());
    out.some("bridge", whole.on_host.bridge.as_ref());
    out.some("nft table", whole.on_host.table.as_ref());
    out.some("first id", whole.on_host.first_id);
    out.section("files");
    let files = &whole.files;
    out.line("spec", files.spec.display());
    out.line("volume", files.volume.display());
    out.line("console log", files.console_log.display());
    out.line("runtime", files.run.display());
    out.text
}

fn joined(values: &[ipnet::IpNet]) -> String {
    if values.is_empty() { "-".into() } else { values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ") }
}

fn of(used: impl ToString, limit: Option<impl ToString>) -> String {
    let limit = limit.map_or_else(|| "no limit".into(), |limit| limit.to_string());
    format!("{} of {limit}", used.to_string())
}

/// Lines of a key and a value, in sections of which only those with lines are shown.
#[derive(Default)]
struct Lines {
    text: String,
    section: Option<&'static str>,
}

impl Lines {
    fn section(&mut self, title: &'static str) {
        self.section = Some(title);
    }

    fn line(&mut self, key: &str, value: impl ToString) {
        if let Some(title) = self.section.take() {
            self.text.push_str(&format!("\n{title}\n"));
        }
        self.text.push_str(&format!("  {key:<12} {}\n", output::plain(&value.to_string())));
    }

    fn some(&mut self, key: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.line(key, value);
        }
    }
}
