//! `vsctl template`

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;

use super::output::{self, Column};
use super::progress;
use crate::events::timestamp;
use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::site::Site;
use crate::size::show_bytes;
use crate::spec::Spec;
use crate::store;
use crate::template::definition::{Definition, Source};
use crate::template::progress::Progress;
use crate::template::record::Record;
use crate::template::{BuildOptions, Template, Templates, buildable};

/// Make, list and remove the templates that servers are made from.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Build(BuildArgs),
    Import(ImportArgs),
    List(ListArgs),
    Show(ShowArgs),
    Remove(RemoveArgs),
}

/// Make shipped templates: `vsctl template list -a` shows which there are.
#[derive(Debug, clap::Args)]
struct BuildArgs {
    /// The templates.
    #[arg(required = true, value_name = "TEMPLATE")]
    names: Vec<Name>,
    /// A Debian mirror instead of those of the host's apt.
    #[arg(long, value_name = "URI")]
    mirror: Option<String>,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Make a template of a tarball of a whole root: .tar, .tar.gz, .tar.xz or .tar.zst.
#[derive(Debug, clap::Args)]
struct ImportArgs {
    /// Name of the new template.
    name: Name,
    /// The tarball.
    file: PathBuf,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// List the templates that are ready, or with -a also those that can be built.
#[derive(Debug, clap::Args)]
#[command(alias = "ls")]
struct ListArgs {
    /// Also those that can be built.
    #[arg(short, long)]
    all: bool,
    /// No header.
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Show everything about templates.
#[derive(Debug, clap::Args)]
struct ShowArgs {
    /// The templates.
    #[arg(required = true, value_name = "TEMPLATE")]
    names: Vec<Name>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Remove templates that no server is made of.
#[derive(Debug, clap::Args)]
#[command(alias = "rm")]
struct RemoveArgs {
    /// The templates.
    #[arg(required = true, value_name = "TEMPLATE")]
    names: Vec<Name>,
    /// Print what would be done and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When a template cannot be made, read or removed.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let templates = Templates::below(&site.state());
    match args.verb {
        Verb::Build(args) => build(&args, &templates),
        Verb::Import(args) => import(&args, &templates),
        Verb::List(args) => list(&args, &templates),
        Verb::Show(args) => show(&args, site, &templates),
        Verb::Remove(args) => remove(&args, site, &templates),
    }
}

/// A template for scripts.
#[derive(Serialize)]
struct Told {
    name: Name,
    definition: Definition,
    record: Record,
    root: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    users: Option<Vec<Name>>,
}

impl Told {
    fn of(template: Template, users: Option<Vec<Name>>) -> Self {
        let root = template.root();
        Self { name: template.name, definition: template.definition, record: template.record, root, users }
    }
}

fn build(args: &BuildArgs, templates: &Templates) -> Result<i32> {
    let options = BuildOptions { mirror: args.mirror.clone() };
    let mut made = Vec::new();
    let code = super::for_each(&args.names, |name| {
        if args.plan {
            let (definition, _) = Definition::shipped(name.as_str())?;
            refuse_taken(templates, name)?;
            return output::sentences(&[format!("build template {name}: {}", source(&definition.source))], args.json);
        }
        let template = told(name, |progress| templates.build(name, &options, progress))?;
        made.push(Told::of(template, None));
        Ok(())
    })?;
    if args.json && !args.plan {
        output::json_of_each(&made, args.names.len())?;
    }
    Ok(code)
}

fn import(args: &ImportArgs, templates: &Templates) -> Result<i32> {
    let name = &args.name;
    if !args.file.is_file() {
        let message = format!("{} is no file", args.file.display());
        return Err(Failure::new(Exit::BadParameter, message).into());
    }
    if args.plan {
        refuse_taken(templates, name)?;
        output::sentences(&[format!("make template {name} of {}", args.file.display())], args.json)?;
        return Ok(0);
    }
    let template = told(name, |progress| templates.import(name, &args.file, progress))?;
    if args.json {
        output::json(&Told::of(template, None))?;
    }
    Ok(0)
}

fn refuse_taken(templates: &Templates, name: &Name) -> Result<()> {
    match templates.open(name) {
        Ok(_) => Err(Failure::new(Exit::Exists, format!("there is a template '{name}' already")).into()),
        Err(_) => Ok(()),
    }
}

fn source(source: &Source) -> String {
    match source {
        Source::Busybox {} => "from the host's static busybox".into(),
        Source::Mmdebstrap { suite, .. } => format!("by mmdebstrap, suite {suite}"),
        Source::Import { .. } => "from a tarball".into(),
    }
}

const COLUMNS: &[Column] = &[
    Column::left("name"),
    Column::left("distribution"),
    Column::left("init"),
    Column::right("size"),
    Column::left("made"),
    Column::left("description"),
];

fn list(args: &ListArgs, templates: &Templates) -> Result<i32> {
    let ready = templates.list()?;
    let missing: Vec<(&str, String)> = buildable()
        .into_iter()
        .filter(|(name, _)| ready.iter().all(|template| template.name.as_str() != *name))
        .collect();
    if args.json {
        let mut told: Vec<serde_json::Value> = Vec::new();
        for template in ready {
            told.push(serde_json::to_value(Told::of(template, None)).context("write JSON")?);
        }
        if args.all {
            told.extend(missing.iter().map(|(name, description)| {
                serde_json::json!({ "name": name, "definition": { "description": description }, "record": null })
            }));
        }
        output::json(&told)?;
        return Ok(0);
    }
    let mut rows: Vec<Vec<String>> = ready.iter().map(row).collect();
    if args.all {
        rows.extend(missing.into_iter().map(|(name, description)| {
            vec![name.into(), "-".into(), "-".into(), "-".into(), "not built".into(), description]
        }));
    }
    output::table(COLUMNS, rows, !args.no_header)?;
    Ok(0)
}

fn row(template: &Template) -> Vec<String> {
    let record = &template.record;
    vec![
        template.name.to_string(),
        record.distribution.name.clone(),
        String::from(template.definition.init.clone()),
        show_bytes(record.size_bytes),
        day(record.built_s),
        template.definition.description.clone(),
    ]
}

fn day(seconds: u64) -> String {
    timestamp(UNIX_EPOCH + Duration::from_secs(seconds)).split('T').next().unwrap_or_default().to_owned()
}

fn show(args: &ShowArgs, site: &Site, templates: &Templates) -> Result<i32> {
    let mut shown = Vec::new();
    let code = super::for_each(&args.names, |name| {
        let told = Told::of(templates.open(name)?, Some(users(site, name)?));
        if !args.json {
            output::text(&if shown.is_empty() { render(&told) } else { format!("\n{}", render(&told)) })?;
        }
        shown.push(told);
        Ok(())
    })?;
    if args.json {
        output::json_of_each(&shown, args.names.len())?;
    }
    Ok(code)
}

fn render(told: &Told) -> String {
    let (definition, record) = (&told.definition, &told.record);
    let users = told.users.as_deref().unwrap_or_default();
    let lines = [
        ("name", told.name.to_string()),
        ("description", definition.description.clone()),
        ("distribution", record.distribution.name.clone()),
        ("family", definition.family.clone()),
        ("init", String::from(definition.init.clone())),
        ("stop signal", definition.stop_signal.clone()),
        ("source", source(&definition.source)),
        ("origin", record.origin.clone()),
        ("made", timestamp(UNIX_EPOCH + Duration::from_secs(record.built_s))),
        ("size", format!("{} in {} files", show_bytes(record.size_bytes), record.entries)),
        ("digest", record.digest.clone()),
        ("root", told.root.display().to_string()),
        (
            "used by",
            if users.is_empty() { "-".into() } else { users.iter().map(Name::as_str).collect::<Vec<_>>().join(", ") },
        ),
    ];
    let mut text = String::new();
    let warnings = record.warnings.iter().map(|warning| ("warning", warning.clone()));
    for (key, value) in lines.into_iter().chain(warnings) {
        let _ = writeln!(text, "  {key:<12} {}", output::plain(&value));
    }
    text
}

fn remove(args: &RemoveArgs, site: &Site, templates: &Templates) -> Result<i32> {
    super::for_each(&args.names, |name| {
        if args.plan {
            let root = templates.open(name)?.root();
            let directory = root.parent().unwrap_or(&root).display().to_string();
            return output::sentences(&[format!("remove {directory}")], args.json);
        }
        templates.remove(name, || users(site, name))
    })
}

/// The servers that are made of a template. One whose spec cannot be read counts: nobody knows what it needs.
fn users(site: &Site, template: &Name) -> Result<Vec<Name>> {
    let mut users = store::names(site)?;
    users.retain(|name| {
        let text = std::fs::read_to_string(store::spec_file(site, name)).unwrap_or_default();
        Spec::parse(&text, "server.toml").map_or(true, |spec| spec.template == *template)
    });
    Ok(users)
}

/// Runs a build with its progress shown, and says how it ended.
fn told(name: &Name, work: impl FnOnce(&mut dyn Progress) -> Result<Template>) -> Result<Template> {
    let started = Instant::now();
    let made = progress::shown(name, work);
    if let Ok(template) = &made {
        let size = show_bytes(template.record.size_bytes);
        eprintln!("{name}: ready, {size}, {:.1} s", started.elapsed().as_secs_f64());
    }
    made
}
