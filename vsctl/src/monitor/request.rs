//! What commands ask of a monitor: one line on its socket, answered by `ok`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kernel::pty::Size;
use nix::libc;

use super::socket_file;
use crate::lifecycle::calls::{self, Calls};
use crate::name::Name;
use crate::site::Site;

/// How long a command waits for a monitor's word.
const PATIENCE: Duration = Duration::from_secs(5);

/// … and how often it looks for one that begins.
const MOMENT: Duration = Duration::from_millis(1);

/// A wish.
#[derive(Debug)]
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
    /// Calls of a process that joined, to be kept and answered.
    Keep(Calls),
}

impl Request {
    pub(super) fn line(&self) -> String {
        match self {
            Self::HandOver => "hand-over\n".into(),
            Self::Keep(_) => "keep\n".into(),
            Self::Console(number) => format!("console {number}\n"),
            Self::Resize { console, size } => format!("resize {console} {} {}\n", size.rows, size.columns),
        }
    }

    fn parse(line: &str, descriptors: Vec<OwnedFd>) -> Option<Self> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        Some(match words[..] {
            ["keep"] => Self::Keep(Calls::try_from(descriptors).ok()?),
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
pub(super) fn read(caller: &UnixStream) -> Option<Request> {
    let mut line = [0; 64];
    let (length, descriptors) = kernel::channel::receive(caller.as_fd(), &mut line).ok()?;
    Request::parse(std::str::from_utf8(&line[..length]).ok()?, descriptors)
}

/// Says yes; `None` when the caller is gone.
pub(super) fn agree(mut caller: UnixStream) -> Option<UnixStream> {
    caller.write_all(b"ok\n").ok()?;
    Some(caller)
}

/// Sends a wish and waits for the yes. `None` when the server has no living monitor.
pub(super) fn ask(site: &Site, name: &Name, request: Request) -> Result<Option<UnixStream>> {
    let Some(mut stream) = connect(site, name)? else { return Ok(None) };
    // A monitor holds things of the guest's and could be made to hang: nobody waits for it for ever.
    let patience = Some(PATIENCE);
    stream.set_read_timeout(patience).and_then(|()| stream.set_write_timeout(patience)).context("limit the wait")?;
    let descriptors = match &request {
        Request::Keep(calls) => calls.descriptors().to_vec(),
        _ => Vec::new(),
    };
    match kernel::channel::send(stream.as_fd(), request.line().as_bytes(), &descriptors) {
        // It ended between the two.
        Err(error) if error.raw_os_error() == Some(libc::EPIPE) => return Ok(None),
        sent => sent.context("talk to the monitor")?,
    }
    if matches!(request, Request::Resize { .. } | Request::Keep(_)) {
        return Ok(Some(stream));
    }
    let mut answer = [0u8; 3];
    match stream.read_exact(&mut answer) {
        Ok(()) if answer == *b"ok\n" => Ok(Some(stream)),
        // … or here.
        _ => Ok(None),
    }
}

/// `None` when there is no living monitor. One that has just started its server has its lock, and a moment later its socket.
fn connect(site: &Site, name: &Name) -> Result<Option<UnixStream>> {
    let path = socket_file(site, name);
    let began = Instant::now();
    loop {
        match UnixStream::connect(&path) {
            Ok(stream) => return Ok(Some(stream)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
            Err(error) => return Err(error).with_context(|| format!("connect to {}", path.display())),
        }
        if began.elapsed() > PATIENCE || !super::is_alive(site, name)? {
            return Ok(None);
        }
        std::thread::sleep(MOMENT);
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

/// Has the calls of a process that joined server `id` kept and answered. Waits for nothing.
///
/// # Errors
/// When neither a monitor nor `lxcfs-fuse` is there.
pub fn keep(site: &Site, name: &Name, id: u32, calls: Calls) -> Result<()> {
    let [listener, slot] = calls.descriptors().map(|fd| fd.try_clone_to_owned());
    let copy = Calls { listener: listener.context("copy a descriptor")?, slot: slot.context("copy a descriptor")? };
    if let Ok(Some(_)) = ask(site, name, Request::Keep(copy)) {
        return Ok(());
    }
    calls::park(site, id, &calls).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes_survive_the_wire() {
        let size = Size { rows: 40, columns: 132 };
        for request in [Request::HandOver, Request::Console(2), Request::Resize { console: 0, size }] {
            let read = Request::parse(&request.line(), Vec::new());
            assert_eq!(format!("{read:?}"), format!("{:?}", Some(request)));
        }
        let (one, other) = UnixStream::pair().unwrap();
        let calls = Calls::try_from(vec![one.into(), other.into()]).unwrap();
        let line = Request::Keep(calls).line();
        let (one, other) = UnixStream::pair().unwrap();
        assert!(matches!(Request::parse(&line, vec![one.into(), other.into()]), Some(Request::Keep(_))));
        for nonsense in ["", "dance", "keep", "console", "console -1", "resize 0 1", "hand-over now"] {
            assert!(Request::parse(nonsense, Vec::new()).is_none(), "{nonsense}");
        }
    }
}
