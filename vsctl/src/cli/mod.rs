//! The command line: one file per command, which parses, calls one verb of the library and prints.

mod autostart;
mod autostop;
mod checkpoint;
mod completions;
mod console;
mod create;
mod destroy;
mod doctor;
mod edit;
mod enter;
mod events;
mod exec;
mod freeze;
mod host;
mod list;
mod man;
mod migrate;
pub mod output;
mod pid;
mod progress;
mod ps;
mod pull;
mod push;
mod rename;
mod restart;
mod service;
mod set;
mod show;
mod side_by_side;
mod start;
mod status;
mod stop;
mod suspend;
mod template;
mod top;
mod wait;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::failure::{self, Exit, Failure};
use crate::interrupt;
use crate::lifecycle::execute::Outcome;
use crate::lifecycle::state::{self, State};
use crate::name::Name;
use crate::site::Site;
use output::{CLOSED_CODE, Closed};

/// Provisions, runs and limits virtual servers.
#[derive(Debug, Parser)]
#[command(name = "vsctl", version, arg_required_else_help = true, infer_subcommands = false)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// More detail on standard error; twice for all of it.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(create::Args),
    Start(start::Args),
    Stop(stop::Args),
    Restart(restart::Args),
    Destroy(destroy::Args),
    Rename(rename::Args),
    Freeze(freeze::Args),
    Thaw(freeze::ThawArgs),
    Suspend(suspend::Args),
    Resume(suspend::ResumeArgs),
    Checkpoint(checkpoint::Args),
    Migrate(migrate::Args),
    #[command(hide = true)]
    MigrateReceive,
    Console(console::Args),
    Enter(enter::Args),
    Exec(exec::Args),
    Pull(pull::Args),
    Push(push::Args),
    Service(service::Args),
    #[command(visible_alias = "ls")]
    List(list::Args),
    Status(status::Args),
    Show(show::Args),
    Set(set::Args),
    Edit(edit::Args),
    Top(top::Args),
    Ps(ps::Args),
    Pid(pid::Args),
    Wait(wait::Args),
    Events(events::Args),
    Template(template::Args),
    Autostart(autostart::Args),
    Autostop(autostop::Args),
    Host(host::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
    Man(man::Args),
}

impl Command {
    fn run(self, site: &Site) -> Result<i32> {
        match self {
            Self::Create(args) => create::run(args, site),
            Self::Start(args) => start::run(args, site),
            Self::Stop(args) => stop::run(args, site),
            Self::Restart(args) => restart::run(args, site),
            Self::Destroy(args) => destroy::run(args, site),
            Self::Rename(args) => rename::run(args, site),
            Self::Freeze(args) => freeze::run(args, site),
            Self::Thaw(args) => freeze::run_thaw(args, site),
            Self::Suspend(args) => suspend::run(args, site),
            Self::Resume(args) => suspend::run_resume(args, site),
            Self::Checkpoint(args) => checkpoint::run(args, site),
            Self::Migrate(args) => migrate::run(&args, site),
            Self::MigrateReceive => crate::migrate::receive(site).map(|()| 0),
            Self::Console(args) => console::run(args, site),
            Self::Enter(args) => enter::run(args, site),
            Self::Exec(args) => exec::run(args, site),
            Self::Pull(args) => pull::run(args, site),
            Self::Push(args) => push::run(args, site),
            Self::Service(args) => service::run(args, site),
            Self::List(args) => list::run(args, site),
            Self::Status(args) => status::run(args, site),
            Self::Show(args) => show::run(args, site),
            Self::Set(args) => set::run(args, site),
            Self::Edit(args) => edit::run(args, site),
            Self::Top(args) => top::run(args, site),
            Self::Ps(args) => ps::run(args, site),
            Self::Pid(args) => pid::run(args, site),
            Self::Wait(args) => wait::run(args, site),
            Self::Events(args) => events::run(args, site),
            Self::Template(args) => template::run(args, site),
            Self::Autostart(args) => autostart::run(args, site),
            Self::Autostop(args) => autostop::run(args, site),
            Self::Host(args) => host::run(args, site),
            Self::Doctor(args) => doctor::run(args, site),
            Self::Completions(args) => completions::run(&args),
            Self::Man(args) => man::run(&args),
        }
    }

    /// Whether it is about this host; the others only tell of the program itself.
    fn is_about_host(&self) -> bool {
        !matches!(self, Self::Completions(_) | Self::Man(_))
    }
}

/// Runs the command that `arguments` ask for.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<Failure>());
            if let Some(hint) = cause.and_then(Failure::hint_text) {
                eprintln!("hint: {hint}");
            }
            let code = if error.use_stderr() { Exit::BadParameter as u8 } else { 0 };
            return ExitCode::from(code);
        }
    };
    start_log(cli.verbose);
    finish(run(cli.command))
}

fn run(command: Command) -> Result<i32> {
    if command.is_about_host() && !rustix::process::geteuid().is_root() {
        return Err(Failure::new(Exit::Failed, "only root can do this").hint("sudo vsctl ...").into());
    }
    command.run(&Site::from_environment()?)
}

/// Runs a monitor: see [`crate::monitor`].
pub fn run_monitor(arguments: &[OsString]) -> ExitCode {
    let arguments: Vec<String> = arguments.iter().map(|text| text.to_string_lossy().into_owned()).collect();
    finish(crate::monitor::main(&arguments))
}

/// Runs a monitor's attempt to heal its server: see [`crate::monitor::heal`].
pub fn run_heal(arguments: &[OsString]) -> ExitCode {
    let arguments: Vec<String> = arguments.iter().map(|text| text.to_string_lossy().into_owned()).collect();
    finish(crate::monitor::heal(&arguments))
}

fn start_log(verbose: u8) {
    let level = ["warn", "info", "debug"][usize::from(verbose.min(2))];
    let mut builder = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level));
    builder.format_target(false).format_timestamp(None);
    if verbose >= 2 {
        // What takes how long, for who asks for all of it.
        let begun = std::time::Instant::now();
        builder.format(move |out, record| {
            let elapsed_ms = begun.elapsed().as_secs_f64() * 1e3;
            writeln!(out, "[{elapsed_ms:8.2} ms] {}", record.args())
        });
    }
    builder.init();
}

fn finish(outcome: Result<i32>) -> ExitCode {
    match outcome {
        Ok(code) => ExitCode::from(code as u8),
        Err(error) if error.is::<Closed>() => ExitCode::from(CLOSED_CODE as u8),
        Err(error) => {
            print_error(&error);
            ExitCode::from(failure::exit_of(&error) as u8)
        }
    }
}

/// Prints an error and what belongs to it, once.
pub fn print_error(error: &anyhow::Error) {
    let (sentence, outcome) = Outcome::apart(error);
    let mut said = format!("vsctl: {}\n", harmless(&sentence));
    said.extend(outcome.map(|outcome| format!("  {}\n", harmless(&outcome))));
    said.extend(failure::hint_of(error).map(|hint| format!("  hint: {}\n", harmless(hint))));
    // At once: others may be printing, too. Without anybody who could read it there is nobody to be told.
    let _ = std::io::stderr().write_all(said.as_bytes());
}

/// The exit code of work on one of several; a failure is printed.
fn failed(outcome: Result<()>) -> i32 {
    outcome.map_or_else(
        |error| {
            print_error(&error);
            failure::exit_of(&error) as i32
        },
        |()| 0,
    )
}

/// Without what a terminal would obey: names that a guest or another host has chosen may be in it.
fn harmless(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\n' && c != '\t' { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}

/// Whether a server is to be stopped. One of which that is unknown counts: stopping it says why it is.
fn may_be_up(site: &Site, name: &Name) -> bool {
    state::of(site, name).map_or(true, State::is_up)
}

/// Whether a server is to be started. One of which that is unknown counts: starting it says why it is.
fn may_be_down(site: &Site, name: &Name) -> bool {
    !matches!(state::of(site, name), Ok(State::Running | State::Frozen))
}

/// Runs `verb` for each name, goes on past failures, and gives the code of the first one.
///
/// # Errors
/// Only that standard output is closed; other failures have been printed.
pub fn for_each<T>(names: &[T], mut verb: impl FnMut(&T) -> Result<()>) -> Result<i32> {
    let mut first = None;
    for name in names {
        interrupt::before_more()?;
        if let Err(error) = verb(name) {
            if error.is::<Closed>() || interrupt::is_interrupt(&error) {
                return Err(error);
            }
            first.get_or_insert(failure::exit_of(&error) as i32);
            print_error(&error);
        }
    }
    Ok(first.unwrap_or(0))
}
