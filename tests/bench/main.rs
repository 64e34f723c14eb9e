//! The bench: vsos side by side with the peers that are installed, in one run, as medians and ratios.
//!
//! It measures whole commands, as a user runs them, and readings of statistics files, as a guest does (`files`), in turns (ours, theirs, ours, …), so that a slow moment of the
//! machine meets both, and a moment apart, so that what the kernel still does for the one is not counted for the other. It judges nothing but the table of wanted ratios, and writes a figure that falls short as such.
//!
//! All that it makes carries the word `vsosbench` or lies in its own directory, and is removed at its end, at an error
//! and at ^C; what an earlier run that was killed has left is removed at its start.

#![forbid(unsafe_code)]

mod files;
mod floor;
mod incus;
mod interrupt;
mod lxc;
mod memory;
mod mounted;
mod once;
mod ours;
mod reader;
mod report;

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail};
use system_tests::sample::Sample;

use crate::{
    incus::Incus,
    interrupt::Interrupt,
    lxc::Lxc,
    ours::Ours,
    report::{Report, Row},
};

/// How often many servers are started at once.
const ROUNDS_OF_MANY: usize = 3;

/// What the kernel takes to clean up behind a server, with much to spare.
const SETTLE: Duration = Duration::from_millis(200);

/// What the command line asks for.
struct Options {
    /// How many servers run at once in the mass start.
    servers: usize,
    /// How often each single command is measured.
    rounds: usize,
    /// How many servers are defined for `list`.
    defined: usize,
    /// How often each statistics file is read, and how many servers there are when that is done again.
    reads: usize,
    registered: usize,
    /// Whether only the statistics files are measured.
    files_only: bool,
    /// Where the report goes, besides the screen.
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match (reader::act(&words), &words[..]) {
        (Some(done), _) => done,
        (None, [word, directory]) if word == floor::FLOOR => floor::serve(directory),
        _ => run(words),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: Vec<String>) -> Result<()> {
    let options = Options::parse(words.into_iter())?;
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root");
    }
    let interrupt = Interrupt::catch()?;
    let ours = Ours::new()?;
    let mut report = Report::new()?;
    if !options.files_only {
        commands(&options, &ours, &interrupt, &mut report)?;
    }
    files::measure(&options, &ours, &interrupt, &mut report)?;
    let text = report.render();
    println!("{text}");
    if let Some(file) = options.write {
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// Whole commands, side by side with LXC and Incus.
fn commands(options: &Options, ours: &Ours, interrupt: &Interrupt, report: &mut Report) -> Result<()> {
    let lxc = Lxc::find(ours)?;
    let incus = match Incus::start(ours) {
        Ok(incus) => Some(incus),
        // A peer that does not run here is no reason to lose our own figures.
        Err(error) => {
            report.note(format!("Incus is not available here: {}", once::first_line(&error)));
            None
        }
    };
    single_commands(options, ours, lxc.as_ref(), incus.as_ref(), interrupt, report)?;
    create_and_start(options, ours, incus.as_ref(), interrupt, report)?;
    // Its daemon is no company for what comes next, which it takes no part in.
    drop(incus);
    many_at_once(options, ours, lxc.as_ref(), interrupt, report)?;
    list_of_many(options, ours, interrupt, report)?;
    once::measure(ours, options.rounds, interrupt, report)
}

/// Lets the kernel take down the network namespaces of what was killed before, which it does after the command: nobody
/// is to pay for the one who came before.
fn settle() {
    std::thread::sleep(SETTLE);
}

/// Start, exec and kill of one server, in turns with LXC and Incus.
fn single_commands(
    options: &Options,
    ours: &Ours,
    lxc: Option<&Lxc>,
    incus: Option<&Incus>,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<()> {
    let (mut start, mut exec, mut kill) = (Pair::default(), Pair::default(), Pair::default());
    let (mut monitor, mut daemon) = (Sample::default(), Sample::default());
    ours.create("one")?;
    if let Some(lxc) = lxc {
        lxc.create("one", 1)?;
    }
    if let Some(incus) = incus {
        incus.create("one")?;
    }
    // The first round warms caches and is thrown away.
    for round in 0..=options.rounds {
        interrupt.check()?;
        let keep = |sample: &mut Sample, took| {
            if round > 0 {
                sample.add(took)
            }
        };
        settle();
        keep(&mut start.ours, ours.start(&["one"])?);
        keep(&mut exec.ours, ours.exec_true("one")?);
        keep(&mut kill.ours, ours.kill(&["one"])?);
        if let Some(lxc) = lxc {
            settle();
            keep(&mut start.lxc, lxc.start("one")?);
            keep(&mut exec.lxc, lxc.exec_true("one")?);
            keep(&mut kill.lxc, lxc.kill("one")?);
        }
        if let Some(incus) = incus {
            settle();
            keep(&mut start.incus, incus.run("one")?);
            keep(&mut exec.incus, incus.exec_true("one")?);
            if round > 0 {
                monitor.add_kib(memory::private_kib(|process| process.is_lxc_monitor(incus::directory()))?, 1);
                daemon
                    .add_kib(memory::private_kib(|process| process.is_run_for(incus::DAEMON, incus::directory()))?, 1);
            }
            keep(&mut kill.incus, incus.kill("one")?);
        }
    }
    ours.destroy(&["one"])?;
    if let Some(lxc) = lxc {
        lxc.destroy("one")?;
    }
    if let Some(incus) = incus {
        incus.destroy("one")?;
        report.note(format!(
            "Incus: `incus stop --force` {:.1} ms; private memory of one container's monitor {:.0} KiB, of its daemon {:.0} KiB",
            kill.incus.median().unwrap_or_default(),
            monitor.median().unwrap_or_default(),
            daemon.median().unwrap_or_default()
        ));
    }
    let (start_again, exec_again) = (start.ours.clone(), exec.ours.clone());
    report.add(Row::times("`start` to init running", "`lxc-start`", start.ours, start.lxc, 1.0));
    report.add(Row::times("`exec NAME -- true`", "`lxc-attach`", exec.ours, exec.lxc, 0.7));
    report.add(Row::times("`stop --kill`", "`lxc-stop -k`", kill.ours, kill.lxc, 0.7));
    report.add(Row::times("`start` to init running", "`incus start`", start_again, start.incus, 0.1));
    report.add(Row::times("`exec NAME -- true`", "`incus exec`", exec_again, exec.incus, 0.15));
    Ok(())
}

/// `create --start` from a template, in turns with Incus. LXC has no such command for a shared root.
fn create_and_start(
    options: &Options,
    ours: &Ours,
    incus: Option<&Incus>,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<()> {
    let mut pair = Pair::default();
    for round in 0..=options.rounds {
        interrupt.check()?;
        settle();
        let took = ours.create_and_start("one")?;
        if round > 0 {
            pair.ours.add(took);
        }
        ours.destroy(&["one"])?;
        if let Some(incus) = incus {
            settle();
            let took = incus.create_and_start("one")?;
            if round > 0 {
                pair.incus.add(took);
            }
            incus.destroy("one")?;
        }
    }
    report.add(Row::times("`create --start` from a template", "`incus launch`", pair.ours, pair.incus, 0.1));
    Ok(())
}

/// Many servers by one command, against LXC in a shell loop; and what each of them costs in memory.
fn many_at_once(
    options: &Options,
    ours: &Ours,
    lxc: Option<&Lxc>,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<()> {
    let names: Vec<String> = (1..=options.servers).map(|number| format!("many{number}")).collect();
    let words: Vec<&str> = names.iter().map(String::as_str).collect();
    let (mut time, mut memory) = (Pair::default(), Pair::default());
    for (index, name) in words.iter().enumerate() {
        interrupt.check()?;
        ours.create(name)?;
        lxc.map_or(Ok(()), |lxc| lxc.create(name, index + 1))?;
    }
    // The first round warms caches and is thrown away.
    for round in 0..=ROUNDS_OF_MANY {
        interrupt.check()?;
        settle();
        let took = ours.start(&words)?;
        if round > 0 {
            time.ours.add_share(took, options.servers);
            memory.ours.add_kib(memory::private_kib(|process| process.is_ours(ours.root()))?, options.servers);
        }
        ours.kill(&words)?;
        let Some(lxc) = lxc else { continue };
        settle();
        let took = lxc.start_in_a_loop(&words)?;
        if round > 0 {
            time.lxc.add_share(took, options.servers);
            memory
                .lxc
                .add_kib(memory::private_kib(|process| process.is_lxc_monitor(lxc.directory()))?, options.servers);
        }
        for name in &words {
            lxc.kill(name)?;
        }
    }
    ours.destroy(&words)?;
    for name in &words {
        lxc.map_or(Ok(()), |lxc| lxc.destroy(name))?;
    }
    let what = format!("{} servers by one command, per server", options.servers);
    report.add(Row::times(&what, "`lxc-start` in a shell loop", time.ours, time.lxc, 0.5));
    let what = "private memory of all our processes per server";
    report.add(Row::memory(what, "LXC's monitor", memory.ours, memory.lxc, 0.4));
    Ok(())
}

/// `list -a` with many servers defined.
fn list_of_many(options: &Options, ours: &Ours, interrupt: &Interrupt, report: &mut Report) -> Result<()> {
    let names: Vec<String> = (1..=options.defined).map(|number| format!("defined{number}")).collect();
    for name in &names {
        interrupt.check()?;
        ours.create(name)?;
    }
    let mut sample = Sample::default();
    for _ in 0..options.rounds {
        sample.add(ours.list()?);
    }
    for hundred in names.chunks(100) {
        ours.destroy(&hundred.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    report.add(Row::bounded(&format!("`list -a` of {} defined servers", options.defined), sample, 50.0, "ms"));
    Ok(())
}

/// A measure of ours and of the peers.
#[derive(Default)]
struct Pair {
    ours: Sample,
    lxc: Sample,
    incus: Sample,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            servers: 200,
            rounds: 30,
            defined: 1000,
            reads: 2000,
            registered: 500,
            files_only: false,
            write: None,
        };
        while let Some(word) = words.next() {
            if word == "--files" {
                options.files_only = true;
                continue;
            }
            let value = words.next().with_context(|| format!("{word} wants a value"))?;
            let number = || value.parse::<usize>().with_context(|| format!("{word} {value}"));
            match word.as_str() {
                "--servers" => options.servers = number()?.max(1),
                "--rounds" => options.rounds = number()?.max(1),
                "--defined" => options.defined = number()?.max(1),
                "--reads" => options.reads = number()?.max(100),
                "--registered" => options.registered = number()?.max(2),
                "--write" => options.write = Some(value.into()),
                _ => bail!(
                    "{word}? known are --files, --servers N, --rounds N, --defined N, --reads N, --registered N, --write FILE"
                ),
            }
        }
        Ok(options)
    }
}
