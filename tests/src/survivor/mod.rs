//! A program that holds one thing of each kind that a guest may have, and says by name which is not as it was: what a checkpoint
//! has lost. It runs inside a server, as another face of the test binary, which is pushed there.
//!
//! ```text
//! TESTS survivor hold DIR [KIND …]   makes one of each kind (or of those named) in DIR, and waits at the socket DIR/ask
//! TESTS survivor ask DIR             has the holder look at all of them: one line for each kind
//! TESTS survivor limb DIR MANNER     a child of a holder, see `limb`
//! TESTS survivor spawner DIR         starts one child after the other, see `spawner`
//! ```
//!
//! A family of kinds has a file, and each kind there a function that makes one and returns what looks at it. Looking changes nothing:
//! it may be asked for again, so that a promise knows first that all was well before.

mod clocks;
mod descriptors;
mod files;
mod limb;
mod memory;
mod processes;
mod refused;
mod settings;
mod sockets;
mod spawner;
mod system_v;
mod terminals;

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
};

use anyhow::{Context, Result, anyhow, bail};

use crate::promise::Skip;

/// Says whether a thing is as it was.
type Check = Box<dyn FnMut() -> Result<()>>;
/// A kind: its name, and what makes one in a directory of its own. [`Skip`] where the guest has nothing to make it with.
type Kind = (&'static str, fn(&Path) -> Result<Check>);

/// What stands behind the name of a kind that is as it was.
pub const AS_IT_WAS: &str = "as it was";
/// What stands behind the name of a kind that the guest cannot have.
pub const NOT_HELD: &str = "not held";

/// In the order in which they are made: a process's children begin before it blocks signals or chooses its dumps, or they would inherit that.
const FAMILIES: &[&[Kind]] = &[
    processes::KINDS,
    system_v::KINDS,
    memory::KINDS,
    files::KINDS,
    sockets::KINDS,
    terminals::KINDS,
    clocks::KINDS,
    descriptors::KINDS,
    settings::KINDS,
];

/// Runs what the command line asks for, when it is about survivors.
///
/// # Errors
/// When a thing cannot be made, or the holder cannot be asked.
pub fn run(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["hold", place, only @ ..] => hold(Path::new(place), only),
        ["ask", place] => ask(Path::new(place)),
        ["limb", place, manner] => limb::be(Path::new(place), manner),
        ["spawner", place] => spawner::be(Path::new(place)),
        _ => bail!("survivor hold DIR [KIND …], ask DIR, limb DIR MANNER, or spawner DIR"),
    }
}

/// The names of the kinds that no checkpoint holds.
pub fn refused() -> impl Iterator<Item = &'static str> {
    refused::KINDS.iter().map(|(name, _)| *name)
}

fn hold(place: &Path, only: &[&str]) -> Result<()> {
    let all = FAMILIES.iter().copied().flatten();
    let chosen: Vec<&Kind> = match only {
        [] => all.collect(),
        _ => all.chain(refused::KINDS).filter(|(name, _)| only.contains(name)).collect(),
    };
    let mut held = Vec::new();
    for (name, make) in chosen {
        let directory = place.join(name);
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        let made = match make(&directory) {
            Err(error) if error.is::<Skip>() => Err(error),
            made => Ok(made.with_context(|| format!("make {name}"))?),
        };
        held.push((name, made));
    }
    // When that is there, all is.
    let asked = UnixListener::bind(place.join("ask")).context("bind the socket")?;
    for stream in asked.incoming() {
        let mut report = String::new();
        for (name, held) in &mut held {
            report += &match held {
                Err(why) => format!("{name}: {NOT_HELD}: {why}\n"),
                Ok(check) => match check() {
                    Ok(()) => format!("{name}: {AS_IT_WAS}\n"),
                    Err(error) => format!("{name}: {}\n", format!("{error:#}").replace('\n', " / ")),
                },
            };
        }
        stream.and_then(|mut stream| stream.write_all(report.as_bytes())).context("answer")?;
    }
    Ok(())
}

fn ask(place: &Path) -> Result<()> {
    let mut stream = UnixStream::connect(place.join("ask")).context("ask the survivor")?;
    let mut report = String::new();
    stream.read_to_string(&mut report).context("listen to the survivor")?;
    print!("{report}");
    Ok(())
}

/// An error that names what was expected and what is there, unless they are equal.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, now: T, before: T) -> Result<()> {
    if now == before { Ok(()) } else { Err(anyhow!("{what} is {now:?}, and was {before:?}")) }
}
