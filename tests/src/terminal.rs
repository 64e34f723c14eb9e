//! A terminal that a promise types on: a pty whose other end is the controlling terminal of one command.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::fd::OwnedFd,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::{
    command::{LIMIT, patient},
    site::Site,
};

/// A command on a terminal. Dropped, it is killed.
pub struct Terminal {
    master: File,
    child: Child,
    command: String,
    seen: String,
}

impl Terminal {
    /// Runs `vsctl` in `site` on a new terminal of 80 columns and 24 rows.
    pub fn open(site: &Site, arguments: &[&str]) -> Result<Self> {
        let program = crate::site::programs()?.join("vsctl");
        let mut command = Command::new("setsid");
        // setsid makes the terminal the controlling one, which takes unsafe code to do here.
        command.args(["--ctty", "--wait"]).arg(program).args(arguments);
        command.env("VSOS_ROOT", site.root()).env("TERM", "vt100");
        let opened = Self::run(command, &format!("vsctl {}", arguments.join(" ")))?;
        site.note(format!("$ vsctl {} (on a terminal)", arguments.join(" ")));
        Ok(opened)
    }

    fn run(mut command: Command, shown: &str) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).context("open a pty")?;
        grantpt(&master).context("grant the pty")?;
        unlockpt(&master).context("unlock the pty")?;
        let name = ptsname(&master, Vec::new()).context("name the pty")?;
        let peer = open_peer(Path::new(name.to_str()?))?;
        tcsetwinsize(&master, size(24, 80)).context("size the pty")?;
        let stdio = |peer: &File| -> Result<Stdio> { Ok(Stdio::from(OwnedFd::from(peer.try_clone()?))) };
        command.stdin(stdio(&peer)?).stdout(stdio(&peer)?).stderr(stdio(&peer)?);
        let child = command.spawn().with_context(|| format!("run {shown}"))?;
        Ok(Self { master: File::from(master), child, command: shown.to_owned(), seen: String::new() })
    }

    /// Types `text` as it is; a line ends with `\r`, as the key does.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes()).with_context(|| format!("type on {}", self.command))
    }

    /// Waits until `text` appears after what was expected before, and returns all up to and with it.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        let end = Instant::now() + patient(LIMIT);
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                return Ok(std::mem::replace(&mut self.seen, rest));
            }
            if !self.read(end)? {
                bail!("{:?} did not appear on the terminal of {}; seen: {:?}", text, self.command, self.seen);
            }
        }
    }

    /// Changes the window's size, as a user who drags its corner does.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        tcsetwinsize(&self.master, size(rows, columns)).context("resize the pty")
    }

    /// Waits for the command's end and returns its exit status.
    pub fn finish(&mut self) -> Result<i32> {
        let end = Instant::now() + patient(LIMIT);
        loop {
            if let Some(status) = self.child.try_wait().context("wait for the command")? {
                return Ok(status.code().unwrap_or(-1));
            }
            ensure!(Instant::now() < end, "{} did not end; seen: {:?}", self.command, self.seen);
            // Its last words have to be read, or it waits for ever.
            self.read(Instant::now() + Duration::from_millis(20))?;
        }
    }

    /// All that was seen and not yet expected.
    pub fn seen(&self) -> &str {
        &self.seen
    }

    /// Reads what is there; false at `end` or when the other end is closed.
    fn read(&mut self, end: Instant) -> Result<bool> {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).context("wait on the pty")?;
        let mut descriptors = [PollFd::new(&self.master, PollFlags::IN)];
        if poll(&mut descriptors, Some(&timeout)).context("wait on the pty")? == 0 {
            return Ok(false);
        }
        let mut buffer = [0; 4096];
        // EIO is how a pty says that nobody has its other end open.
        let count = self.master.read(&mut buffer).unwrap_or(0);
        self.seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        if count == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(count > 0)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Only setsid is killed here; the command behind it is hung up when the master closes.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn open_peer(path: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = nix::libc::O_NOCTTY;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).context("open the pty's other end")
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_is_answered_and_the_exit_status_comes_back() {
        let mut command = Command::new("setsid");
        command.args([
            "--ctty",
            "--wait",
            "sh",
            "-c",
            "stty -echo; echo ready; read word; echo got-$word; stty size; exit 3",
        ]);
        let mut terminal = Terminal::run(command, "sh").unwrap();
        terminal.expect("ready").unwrap();
        terminal.resize(40, 100).unwrap();
        terminal.send("it\r").unwrap();
        terminal.expect("got-it").unwrap();
        terminal.expect("40 100").unwrap();
        assert_eq!(terminal.finish().unwrap(), 3);
    }
}
