//! Terminals: a pair with its settings, its size, and bytes on the way in both directions.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    path::Path,
};

use anyhow::{Context, Result};
use nix::{
    pty::{OpenptyResult, Winsize, openpty},
    sys::termios::{InputFlags, LocalFlags, SetArg, SpecialCharacterIndices, tcgetattr, tcsetattr},
};

use super::{Check, Kind, same};

pub const KINDS: &[Kind] = &[("terminal", terminal)];

fn settings(terminal: &OwnedFd) -> Result<(InputFlags, LocalFlags, u8)> {
    let found = tcgetattr(terminal).context("read a terminal's settings")?;
    let erase = found.control_chars[SpecialCharacterIndices::VERASE as usize];
    Ok((found.input_flags, found.local_flags, erase))
}

fn size(terminal: &OwnedFd) -> Result<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(terminal).context("read a terminal's size")?;
    Ok((size.ws_row, size.ws_col))
}

fn terminal(_: &Path) -> Result<Check> {
    let given = Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
    let OpenptyResult { master, slave } = openpty(&given, None).context("open a terminal")?;
    let mut changed = tcgetattr(&slave).context("read a terminal's settings")?;
    changed.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
    changed.input_flags.insert(InputFlags::IXOFF);
    changed.control_chars[SpecialCharacterIndices::VERASE as usize] = 5;
    tcsetattr(&slave, SetArg::TCSANOW, &changed).context("change a terminal's settings")?;
    let before = settings(&slave)?;
    let name = rustix::termios::ttyname(&slave, Vec::new()).context("a terminal has a name")?;
    let (mut outside, mut inside) = (File::from(master.try_clone()?), File::from(slave.try_clone()?));
    Ok(Box::new(move || {
        same("the settings", settings(&slave)?, before)?;
        same("the size", size(&slave)?, (33, 77))?;
        same("the size from outside", size(&master)?, (33, 77))?;
        same("the name", rustix::termios::ttyname(&slave, Vec::new())?, name.clone())?;
        let mut bytes = [0; 6];
        inside.write_all(b"shown\n")?;
        outside.read_exact(&mut bytes)?;
        same("what was shown", &bytes, b"shown\r")?;
        outside.read_exact(&mut bytes[..1])?;
        outside.write_all(b"typed")?;
        inside.read_exact(&mut bytes[..5])?;
        same("what was typed", &bytes[..5], b"typed")
    }))
}
