//! `vsctl list`

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::str::FromStr;

use anyhow::Result;
use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::output::{self, Column};
use crate::failure::{self, Exit, Failure};
use crate::lifecycle::state::State;
use crate::lifecycle::world::World;
use crate::name::Name;
use crate::observe::{self, Seen};
use crate::site::Site;
use crate::size::show_bytes;
use crate::store;

/// List servers: those that are up, or with -a all of them.
#[derive(Debug, clap::Args)]
#[command(after_help = COLUMNS_HELP.as_str())]
pub struct Args {
    /// Also those that are stopped, suspended, incomplete, or between two hosts.
    #[arg(short, long)]
    all: bool,
    /// Columns, with commas between.
    #[arg(short = 'o', long, value_name = "COLS", value_delimiter = ',', default_value = DEFAULT)]
    columns: Vec<Chosen>,
    /// Sort by this column; with '-' before it the other way round.
    #[arg(short, long, value_name = "COL", default_value = "name", allow_hyphen_values = true)]
    sort: Order,
    /// No header.
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Names only, one a line.
    #[arg(short = '1', long)]
    names: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

const DEFAULT: &str = "name,state,pid,cpus,memory,limit,tasks,ipv4,uptime";

static COLUMNS_HELP: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
    let lines = FIELDS.iter().map(|field| format!("  {:<10} {}", field.title, field.help));
    format!("Columns:\n{}", lines.collect::<Vec<_>>().join("\n"))
});

/// A value of one column.
#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Absent,
    Text(String),
    Number { shown: String, value: f64, json: Value },
}

impl Cell {
    fn text(text: impl ToString) -> Self {
        Self::Text(text.to_string())
    }

    fn number(shown: String, value: impl Into<Value> + Copy) -> Self {
        let json: Value = value.into();
        Self::Number { shown, value: json.as_f64().unwrap_or_default(), json }
    }

    fn count(value: Option<u64>) -> Self {
        value.map_or(Self::Absent, |value| Self::number(value.to_string(), value))
    }

    fn bytes(value: Option<u64>) -> Self {
        value.map_or(Self::Absent, |value| Self::number(show_bytes(value), value))
    }

    fn list(values: Vec<String>) -> Self {
        if values.is_empty() { Self::Absent } else { Self::Text(values.join(",")) }
    }

    fn shown(self) -> String {
        match self {
            Self::Absent => "-".into(),
            Self::Text(text) | Self::Number { shown: text, .. } => text,
        }
    }

    fn json(self) -> Value {
        match self {
            Self::Absent => Value::Null,
            Self::Text(text) => Value::String(text),
            Self::Number { json, .. } => json,
        }
    }

    /// What is absent comes first.
    fn order(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Absent, Self::Absent) => Ordering::Equal,
            (Self::Absent, _) => Ordering::Less,
            (_, Self::Absent) => Ordering::Greater,
            (Self::Number { value: one, .. }, Self::Number { value: two, .. }) => one.total_cmp(two),
            (one, two) => one.clone().shown().cmp(&two.clone().shown()),
        }
    }
}

/// A column that can be asked for.
#[derive(Debug)]
struct Field {
    title: &'static str,
    right: bool,
    help: &'static str,
    value: fn(&Seen<'_>) -> Cell,
}

const fn left(title: &'static str, help: &'static str, value: fn(&Seen<'_>) -> Cell) -> Field {
    Field { title, right: false, help, value }
}

const fn right(title: &'static str, help: &'static str, value: fn(&Seen<'_>) -> Cell) -> Field {
    Field { title, right: true, help, value }
}

static FIELDS: &[Field] = &[
    left("name", "the server's name", |seen| Cell::text(&seen.name)),
    right("id", "its number", |seen| Cell::count(seen.defined().map(|server| server.record.id.into()))),
    left("state", "incomplete, stopped, ready, running, frozen, suspended, incoming or moved", |seen| {
        Cell::text(seen.state)
    }),
    right("pid", "init's process id on the host", |seen| Cell::count(seen.pid().map(|pid| pid as u64))),
    right("cpus", "CPUs that it may use", |seen| {
        seen.cpus().map_or(Cell::Absent, |cpus| Cell::number(cpus.to_string(), cpus))
    }),
    right("cpu", "CPU time used since its start, in seconds", |seen| {
        let used = seen.cpu_usec().map(|usec| usec as f64 / 1e6);
        used.map_or(Cell::Absent, |seconds| Cell::number(format!("{seconds:.1}"), seconds))
    }),
    right("memory", "memory in use", |seen| Cell::bytes(seen.usage().map(|usage| usage.memory_bytes))),
    right("limit", "most memory", |seen| Cell::bytes(seen.memory_limit_bytes())),
    right("tasks", "processes and threads", |seen| Cell::count(seen.usage().map(|usage| usage.tasks))),
    left("ipv4", "its IPv4 addresses", |seen| addresses(seen, |address| matches!(address, IpNet::V4(_)))),
    left("ipv6", "its IPv6 addresses", |seen| addresses(seen, |address| matches!(address, IpNet::V6(_)))),
    right("uptime", "time since its start", |seen| {
        seen.uptime_s().map_or(Cell::Absent, |seconds| Cell::number(output::span(seconds), seconds))
    }),
    left("template", "what its root was made from", |seen| {
        seen.defined().map_or(Cell::Absent, |server| Cell::text(&server.spec.template))
    }),
    left("migratable", "whether its processes can be suspended and moved, from its next start on", |seen| {
        seen.defined().map_or(Cell::Absent, |server| Cell::text(if server.spec.migratable { "yes" } else { "no" }))
    }),
    left("autostart", "whether it starts with the host", |seen| {
        seen.defined().map_or(Cell::Absent, |server| Cell::text(if server.spec.autostart { "yes" } else { "no" }))
    }),
    left("hostname", "host name inside", |seen| {
        seen.defined().map_or(Cell::Absent, |server| Cell::text(server.spec.hostname_or(&seen.name)))
    }),
];

/// Columns for which neither spec nor record need be read.
const WITHOUT_SPEC: &[&str] = &["name", "state", "pid", "cpu", "memory", "tasks", "uptime"];

fn addresses(seen: &Seen<'_>, wanted: fn(&IpNet) -> bool) -> Cell {
    Cell::list(seen.addresses().iter().filter(|address| wanted(address)).map(|net| net.addr().to_string()).collect())
}

/// A column as it was typed.
#[derive(Debug, Clone, Copy)]
struct Chosen(&'static Field);

impl FromStr for Chosen {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        let text = text.trim().to_ascii_lowercase();
        FIELDS.iter().find(|field| field.title == text).map(Self).ok_or_else(|| {
            let known: Vec<_> = FIELDS.iter().map(|field| field.title).collect();
            Failure::new(Exit::BadParameter, format!("there is no column '{text}'; there are {}", known.join(", ")))
        })
    }
}

#[derive(Debug, Clone, Copy)]
struct Order {
    by: Chosen,
    reverse: bool,
}

impl FromStr for Order {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        let (column, reverse) = text.strip_prefix('-').map_or((text, false), |column| (column, true));
        Ok(Self { by: column.parse()?, reverse })
    }
}

/// Runs the command.
///
/// # Errors
/// When the servers cannot be listed. One that cannot be read is shown as far as it can be.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let world = World::new(site);
    let (mut seen, unknown) = look(&world, args.all)?;
    let Chosen(by) = args.sort.by;
    let shown = args.columns.iter().filter(|_| !args.names).map(|Chosen(field)| field.title);
    if shown.chain([by.title]).any(|title| !WITHOUT_SPEC.contains(&title)) {
        observe::load_all(&seen);
    }
    if by.title != "name" {
        seen.sort_by_cached_key(|seen| SortKey((by.value)(seen)));
    }
    if args.sort.reverse {
        seen.reverse();
    }
    if args.names {
        output::text(&seen.iter().map(|seen| format!("{}\n", seen.name)).collect::<String>())?;
    } else if args.json {
        let object = |seen: &Seen<'_>| -> Map<String, Value> {
            args.columns.iter().map(|Chosen(field)| (field.title.to_owned(), (field.value)(seen).json())).collect()
        };
        output::json(&json!(seen.iter().map(object).collect::<Vec<_>>()))?;
    } else {
        let columns: Vec<Column> =
            args.columns.iter().map(|Chosen(field)| Column { title: field.title, right: field.right }).collect();
        let row = |seen: &Seen<'_>| args.columns.iter().map(|Chosen(field)| (field.value)(seen).shown()).collect();
        output::table(&columns, seen.iter().map(row).collect(), !args.no_header)?;
    }
    Ok(tell_problems(&seen, &unknown))
}

/// Servers by name, and why the state of others is unknown. Only those with something in the runtime directory can be up;
/// the others need no closer look.
fn look<'a>(world: &'a World<'a>, all: bool) -> Result<(Vec<Seen<'a>>, Vec<anyhow::Error>)> {
    let run = world.site.run();
    let mut here: BTreeSet<Name> = store::entries(&run.join("servers"))?.into_iter().collect();
    here.extend(store::entries(&run.join("journal"))?);
    let (mut seen, mut unknown) = (Vec::new(), Vec::new());
    for name in &here {
        match Seen::look(world, name.clone()) {
            Ok(found) => seen.push(found),
            Err(error) => unknown.push(error),
        }
    }
    if all {
        let others = store::entries(&world.site.servers())?.into_iter().filter(|name| !here.contains(name));
        seen.extend(others.map(|name| Seen::look_down(world, name)));
        // Runtime files without a server are the doctor's matter.
        seen.retain(|seen| seen.state != State::Incomplete || world.site.server(&seen.name).exists());
        seen.sort_by(|one, two| one.name.cmp(&two.name));
    } else {
        seen.retain(|seen| seen.state.is_up());
    }
    Ok((seen, unknown))
}

/// What kept columns empty, each once, after the list; gives the exit code.
fn tell_problems(seen: &[Seen<'_>], unknown: &[anyhow::Error]) -> i32 {
    let mut code = 0;
    let seen = seen.iter().filter(|seen| seen.state != State::Incomplete).filter_map(Seen::problem);
    for error in seen.chain(unknown) {
        super::print_error(error);
        code = failure::exit_of(error) as i32;
    }
    code
}

/// Cells with their order, for sorting.
struct SortKey(Cell);

impl PartialEq for SortKey {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for SortKey {}

impl PartialOrd for SortKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SortKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.order(&other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_sorted_as_numbers_and_what_is_absent_first() {
        let mut cells = vec![Cell::bytes(Some(2 << 30)), Cell::Absent, Cell::bytes(Some(900 << 20))];
        cells.sort_by(Cell::order);
        assert_eq!(cells.into_iter().map(Cell::shown).collect::<Vec<_>>(), ["-", "900M", "2G"]);
    }

    #[test]
    fn an_unknown_column_is_named() {
        assert!("nmae".parse::<Chosen>().unwrap_err().to_string().contains("nmae"));
        let order: Order = "-memory".parse().unwrap();
        assert!(order.reverse && order.by.0.title == "memory");
    }
}
