//! The console and the ttys: pseudo-terminals of the server's own devpts instance.
//!
//! Its own, so that `tty` prints a name that exists inside and a checkpoint can take them along;
//! the monitor gets the masters.

use std::os::fd::OwnedFd;
use std::path::Path;

use kernel::process::place_descriptor;
use kernel::pty::Master;
use rustix::fs::{Mode, OFlags};

use crate::failure::{During, Result};

const DEVPTS: &str = "/dev/pts";
const CONSOLE: &str = "/dev/console";

/// Opens the console and `ttys` ttys, shows them in /dev, and makes the console this process's
/// input and output. Returns the masters, console first.
pub fn open(ttys: u8) -> Result<Vec<OwnedFd>> {
    let mut masters = vec![open_one(CONSOLE)?];
    for number in 1..=ttys {
        masters.push(open_one(&format!("/dev/tty{number}"))?);
    }
    take_console(false)?;
    Ok(masters)
}

/// A new pty whose other side is linked at `path`. devpts has given it to root:tty, 0620.
///
/// A link and no mount: CRIU takes a terminal's number from the last name of the path by which it was opened.
fn open_one(path: &str) -> Result<OwnedFd> {
    let failed = || format!("make {path}");
    let master = Master::open_in(Path::new(DEVPTS)).during(failed)?;
    let slave = master.peer_path(Path::new(DEVPTS)).during(failed)?;
    let target = slave.strip_prefix("/dev").unwrap_or(&slave);
    std::os::unix::fs::symlink(target, path).during(failed)?;
    Ok(master.into())
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
