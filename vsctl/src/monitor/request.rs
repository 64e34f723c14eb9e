//! What commands ask of a monitor: one line on its socket, answered by `ok`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};
use kernel::pty::Size;

use super::{read_some, socket_file};
use crate::name::Name;
use crate::site::Site;

/// How long a command waits for a monitor's word.
const PATIENCE: Duration = Duration::from_secs(5);

/// A wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// The caller ends the server and takes it back; the monitor only waits for the end.
    HandOver,
    /// The connection becomes that console's.
    Console(usize),
    /// A window has another size.
    Resize {
        /// Which console.
        console: usize,
        /// Its size now.
        size: Size,
    },
}

impl Request {
    pub(super) fn line(self) -> String {
        match self {
            Self::HandOver => "hand-over\n".into(),
            Self::Console(number) => format!("console {number}\n"),
            Self::Resize { console, size } => format!("resize {console} {} {}\n", size.rows, size.columns),
        }
    }

    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        Some(match words[..] {
            ["hand-over"] => Self::HandOver,
            ["console", number] => Self::Console(number.parse().ok()?),
            ["resize", console, rows, columns] => Self::Resize {
                console: console.parse().ok()?,
                size: Size { rows: rows.parse().ok()?, columns: columns.parse().ok()? },
            },
            _ => return None,
        })
    }
}

/// Reads a caller's line; a line comes in one piece, since the caller writes it so.
pub(super) fn read(caller: &mut UnixStream) -> Option<Request> {
    let bytes = read_some(caller, 64);
    Request::parse(std::str::from_utf8(&bytes).ok()?)
}

/// Says yes; `None` when the caller is gone.
pub(super) fn agree(mut caller: UnixStream) -> Option<UnixStream> {
    caller.write_all(b"ok\n").ok()?;
    Some(caller)
}

/// Sends a wish and waits for the yes. `None` when the server has no living monitor.
pub(super) fn ask(site: &Site, name: &Name, request: Request) -> Result<Option<UnixStream>> {
    let path = socket_file(site, name);
    let mut stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(error).with_context(|| format!("connect to {}", path.display())),
    };
    // A monitor holds things of the guest's and could be made to hang: nobody waits for it for ever.
    let patience = Some(PATIENCE);
    stream.set_read_timeout(patience).and_then(|()| stream.set_write_timeout(patience)).context("limit the wait")?;
    stream.write_all(request.line().as_bytes()).context("talk to the monitor")?;
    if matches!(request, Request::Resize { .. }) {
        return Ok(Some(stream));
    }
    let mut answer = [0u8; 3];
    match stream.read_exact(&mut answer) {
        Ok(()) if answer == *b"ok\n" => Ok(Some(stream)),
        // It ended between the two.
        _ => Ok(None),
    }
}

/// A monitor that leaves the taking back to us.
#[derive(Debug)]
pub struct Handed(Option<UnixStream>);

impl Handed {
    /// Waits until the monitor is gone.
    pub fn wait_gone(self) {
        if let Some(stream) = self.0 {
            // Ends with the monitor: it says nothing more. One that hangs does no harm later: it finds its life taken back.
            let _ = BufReader::new(stream).skip_until(b'\0');
        }
    }
}

/// Tells the monitor that the caller stops the server and takes it back. No monitor is fine.
///
/// # Errors
/// When the monitor cannot be talked to.
pub fn hand_over(site: &Site, name: &Name) -> Result<Handed> {
    Ok(Handed(ask(site, name, Request::HandOver)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes_survive_the_wire() {
        let size = Size { rows: 40, columns: 132 };
        for request in [Request::HandOver, Request::Console(2), Request::Resize { console: 0, size }] {
            assert_eq!(Request::parse(&request.line()), Some(request));
        }
        for nonsense in ["", "dance", "console", "console -1", "resize 0 1", "hand-over now"] {
            assert_eq!(Request::parse(nonsense), None, "{nonsense}");
        }
    }
}
