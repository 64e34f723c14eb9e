//! The bench: vsos side by side with the peers that are installed, in one run, as medians and ratios.
//!
//! It measures whole commands, as a user runs them, in turns (ours, theirs, ours, …), so that a slow moment of the
//! machine meets both. It judges nothing but the table of wanted ratios, and writes a figure that falls short as such.
//!
//! All that it makes carries the word `vsosbench` or lies in its own directory, and is removed at its end, at an error
//! and at ^C; what an earlier run that was killed has left is removed at its start.

#![forbid(unsafe_code)]

mod interrupt;
mod lxc;
mod memory;
mod once;
mod ours;
mod report;
mod sample;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};

use crate::{
    interrupt::Interrupt,
    lxc::Lxc,
    ours::Ours,
    report::{Report, Row},
    sample::Sample,
};

/// What the command line asks for.
struct Options {
    /// How many servers run at once in the mass start.
    servers: usize,
    /// How often each single command is measured.
    rounds: usize,
    /// How many servers are defined for `list`.
    defined: usize,
    /// Where the report goes, besides the screen.
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root");
    }
    let interrupt = Interrupt::catch()?;
    let ours = Ours::new()?;
    let lxc = Lxc::find(&ours)?;
    let mut report = Report::new()?;
    single_commands(&options, &ours, lxc.as_ref(), &interrupt, &mut report)?;
    create_and_start(&options, &ours, &interrupt, &mut report)?;
    many_at_once(&options, &ours, lxc.as_ref(), &interrupt, &mut report)?;
    list_of_many(&options, &ours, &interrupt, &mut report)?;
    once::measure(&ours, options.rounds, &interrupt, &mut report)?;
    let text = report.render();
    println!("{text}");
    if let Some(file) = options.write {
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// Start, exec and kill of one server, in turns with LXC.
fn single_commands(
    options: &Options,
    ours: &Ours,
    lxc: Option<&Lxc>,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<()> {
    let (mut start, mut exec, mut kill) = (Pair::default(), Pair::default(), Pair::default());
    ours.create("one")?;
    if let Some(lxc) = lxc {
        lxc.create("one", 1)?;
    }
    // The first round warms caches and is thrown away.
    for round in 0..=options.rounds {
        interrupt.check()?;
        let keep = |sample: &mut Sample, took| {
            if round > 0 {
                sample.add(took)
            }
        };
        keep(&mut start.ours, ours.start(&["one"])?);
        keep(&mut exec.ours, ours.exec_true("one")?);
        keep(&mut kill.ours, ours.kill(&["one"])?);
        if let Some(lxc) = lxc {
            keep(&mut start.lxc, lxc.start("one")?);
            keep(&mut exec.lxc, lxc.exec_true("one")?);
            keep(&mut kill.lxc, lxc.kill("one")?);
        }
    }
    ours.destroy(&["one"])?;
    if let Some(lxc) = lxc {
        lxc.destroy("one")?;
    }
    report.add(Row::times("`start` to init running", "`lxc-start`", start.ours, start.lxc, 1.0));
    report.add(Row::times("`exec NAME -- true`", "`lxc-attach`", exec.ours, exec.lxc, 0.7));
    report.add(Row::times("`stop --kill`", "`lxc-stop -k`", kill.ours, kill.lxc, 0.7));
    report.add_missing("`start` to init running", "`incus start`", "≤ 0.1 ×");
    report.add_missing("`exec NAME -- true`", "`incus exec`", "≤ 0.15 ×");
    Ok(())
}

/// `create --start` from a template. LXC has no such command for a shared root.
fn create_and_start(options: &Options, ours: &Ours, interrupt: &Interrupt, report: &mut Report) -> Result<()> {
    let mut sample = Sample::default();
    for round in 0..=options.rounds {
        interrupt.check()?;
        let took = ours.create_and_start("one")?;
        if round > 0 {
            sample.add(took);
        }
        ours.destroy(&["one"])?;
    }
    report.add(Row::alone("`create --start` from a template", "`incus launch`", sample, "≤ 0.1 ×"));
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
    for name in &words {
        ours.create(name)?;
        interrupt.check()?;
    }
    time.ours.add_share(ours.start(&words)?, options.servers);
    memory.ours.add_kib(memory::private_kib(|process| process.is_ours(ours.root()))?, options.servers);
    ours.destroy(&words)?;
    if let Some(lxc) = lxc {
        for (index, name) in words.iter().enumerate() {
            lxc.create(name, index + 1)?;
            interrupt.check()?;
        }
        time.lxc.add_share(lxc.start_in_a_loop(&words)?, options.servers);
        memory.lxc.add_kib(memory::private_kib(|process| process.is_lxc_monitor(lxc.directory()))?, options.servers);
        for name in &words {
            lxc.kill(name)?;
            lxc.destroy(name)?;
        }
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
    report.add(Row::bounded(&format!("`list -a` of {} defined servers", options.defined), sample, 50.0));
    Ok(())
}

/// A measure of ours and of the peer.
#[derive(Default)]
struct Pair {
    ours: Sample,
    lxc: Sample,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self { servers: 200, rounds: 30, defined: 1000, write: None };
        while let Some(word) = words.next() {
            let value = words.next().with_context(|| format!("{word} wants a value"))?;
            let number = || value.parse::<usize>().with_context(|| format!("{word} {value}"));
            match word.as_str() {
                "--servers" => options.servers = number()?.max(1),
                "--rounds" => options.rounds = number()?.max(1),
                "--defined" => options.defined = number()?.max(1),
                "--write" => options.write = Some(value.into()),
                _ => bail!("{word}? known are --servers N, --rounds N, --defined N, --write FILE"),
            }
        }
        Ok(options)
    }
}
