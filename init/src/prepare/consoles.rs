//! The console and the ttys: pseudo-terminals of the server's own devpts instance.
//!
//! Its own, so that `tty` prints a name that exists inside and a checkpoint can take them along;
//! the monitor gets the masters.

use std::os::fd::OwnedFd;
use std::path::Path;

use kernel::mount::Tree;
use kernel::process::place_descriptor;
use kernel::pty::Master;
use rustix::fs::{Mode, OFlags};

use crate::failure::{During, Result};

const DEVPTS: &str = "/dev/pts";
const CONSOLE: &str = "/dev/console";

/// Opens the console and `ttys` ttys, shows them in /dev, and makes the console this process's
/// input and output. Returns the masters, console first, and the names of the ttys' ptys.
pub fn open(ttys: u8) -> Result<(Vec<OwnedFd>, Vec<String>)> {
    let (console, _) = open_one(CONSOLE)?;
    let mut masters = vec![console];
    let mut names = Vec::new();
    for number in 1..=ttys {
        let (master, name) = open_one(&format!("/dev/tty{number}"))?;
        masters.push(master);
        names.push(name);
    }
    take_console(false)?;
    Ok((masters, names))
}

/// A new pty whose other side is shown at `path`. devpts has given it to root:tty, 0620.
fn open_one(path: &str) -> Result<(OwnedFd, String)> {
    let failed = || format!("make {path}");
    let master = Master::open_in(Path::new(DEVPTS)).during(failed)?;
    let number = master.number().during(failed)?;
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)).during(failed)?;
    let slave = Path::new(DEVPTS).join(number.to_string());
    Tree::clone_of(&slave).and_then(|tree| tree.attach(Path::new(path))).during(failed)?;
    Ok((master.into(), format!("pts/{number}")))
}

/// Makes the console standard input, output and error, without becoming its session's leader.
///
/// `nonblocking` is for a PID 1 that stays: nobody may stop it by not reading the console. An
/// init that takes over gets a plain one.
pub fn take_console(nonblocking: bool) -> Result<()> {
    let mut flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    flags.set(OFlags::NONBLOCK, nonblocking);
    let console = rustix::fs::open(CONSOLE, flags, Mode::empty()).during(|| format!("open {CONSOLE}"))?;
    for number in 0..=2 {
        place_descriptor(&console, number).during(|| format!("use {CONSOLE}"))?;
    }
    Ok(())
}
