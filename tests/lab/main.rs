//! The lab: keeps the promises in virtual machines with stock kernels and pure cgroup v2, and those that need more than
//! one machine, or one whose power is cut. `make lab`, `make lab-shell` and `make bench-lab` call it; docs/lab.md tells about it.

#![forbid(unsafe_code)]

mod measures;
mod outcome;
mod promises;
mod run;
mod shell;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail, ensure};
use system_tests::lab::{Payload, Workshop};

/// What the command line asks for.
struct Options {
    /// `run`, `shell` or `measure`.
    action: String,
    /// The host of a shell.
    host: Option<String>,
    /// Every promise on every host.
    all: bool,
    /// Only promises with this in their names.
    filter: String,
    /// The system-test binary.
    tests: PathBuf,
    /// The program that makes servers work while they are measured.
    load: Option<PathBuf>,
    /// The document that measures are written into.
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    match begin() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn begin() -> Result<ExitCode> {
    let options = Options::parse(std::env::args().skip(1))?;
    // The trees in the images keep their owners and modes, which only root can give.
    ensure!(nix::unistd::geteuid().is_root(), "needs root");
    let tree = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| tree.join("target"), PathBuf::from);
    let workshop = Workshop::open(&tree, &target)?;
    let payload = Payload::pack(&workshop, &options.tests)?;
    match options.action.as_str() {
        "run" => run::run(&workshop, &payload, &options),
        "measure" => measures::run(&workshop, &payload, &options),
        _ => shell::open(&workshop, &payload, &options),
    }
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let action = words.next().unwrap_or_default();
        let mut options = Self {
            action: action.clone(),
            host: None,
            all: false,
            filter: String::new(),
            tests: PathBuf::new(),
            load: None,
            write: None,
        };
        if action == "shell" {
            options.host = Some(words.next().context("say which host")?);
        }
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} takes a value"));
            match word.as_str() {
                "--all" => options.all = true,
                "--filter" => options.filter = value()?,
                "--tests" => options.tests = value()?.into(),
                "--load" => options.load = Some(value()?.into()),
                "--write" => options.write = Some(value()?.into()),
                _ => bail!("unknown flag {word}"),
            }
        }
        let known = ["run", "shell", "measure"].contains(&action.as_str());
        ensure!(known, "say run, shell or measure: `make lab`, `make lab-shell` and `make bench-lab` do");
        ensure!(options.tests.is_file(), "the tests are missing: use make lab");
        Ok(options)
    }
}
