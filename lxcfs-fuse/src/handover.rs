//! Another program in the place of a supervisor that runs: what the one leaves and the other finds, across exec(2).
//!
//! The process stays, and with it its pid, its lock and whatever others hold of it; only the program changes. All that the old
//! program holds waits in a socket, which the new one has as its descriptor 0, one packet a message:
//!
//! ```text
//! `lock`                     with the lock of the run directory
//! `connection`               with the FUSE connection
//! `init`, then bytes         the kernel's INIT
//! `reply`, then bytes        the answer to it that the kernel has
//! `door`                     with the socket at which callers come
//! `caller`                   with the channel of who asked for this, and waits for `reloaded VERSION`
//! `lines NUMBER:SERVER …`    each with a listener and its slot, as a worker gets them
//! `keep ID INIT`             with consoles, as a monitor gives them
//! `visitor`                  with the channel of somebody who has come and said nothing yet
//! `end`
//! ```
//!
//! Limit: both must speak of the same things. A program says with `hand-over-format` which [`FORMAT`] it reads, and one
//! that says another never gets the place. Nothing else of it is tried: the new one may still not get a worker up.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kernel::channel::{self, Channel, Door};

use crate::parking::Parking;

/// The version of the packets above.
pub const FORMAT: &str = "1";

/// The word that asks a program for its [`FORMAT`].
pub const ASK_FORMAT: &str = "hand-over-format";

/// The word with which the next program is begun.
pub const FOLLOWING: &str = "following";

/// How long a program may take to say which format it reads.
const PATIENCE: Duration = Duration::from_secs(5);

/// Room for what waits in the socket, in bytes: consoles of ten thousand servers take about as much.
const ROOM_BYTES: usize = 16 << 20;

/// What a supervisor leaves to the next program, or has found.
#[derive(Debug)]
pub struct Estate {
    /// The lock of the run directory.
    pub lock: OwnedFd,
    /// The FUSE connection.
    pub connection: OwnedFd,
    /// The kernel's INIT.
    pub init: Vec<u8>,
    /// The answer to it that the kernel has: what was agreed with the first worker binds the others. `None` before that.
    pub reply: Option<Vec<u8>>,
    /// What is kept for the manager.
    pub parking: Parking,
}

/// Asks `program` whether it can follow this one.
///
/// # Errors
/// When it cannot, with the reason.
pub fn can_follow(program: &Path) -> anyhow::Result<()> {
    let name = program.display();
    let mut asked = Command::new(program);
    asked.arg(ASK_FORMAT).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = asked.spawn().with_context(|| format!("run {name}"))?;
    let begun = Instant::now();
    while child.try_wait().with_context(|| format!("wait for {name}"))?.is_none() {
        if begun.elapsed() > PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{name} does not answer within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().with_context(|| format!("read from {name}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || said.trim_end() != FORMAT {
        bail!("{name} is no lxcfs-fuse that reads what this one leaves (format {FORMAT})");
    }
    Ok(())
}

/// Becomes `program`, which finds everything with [`find`]. Returns only when that cannot be, and nothing has changed then.
pub fn become_program(program: &Path, run: &Path, estate: &Estate, caller: &Channel) -> anyhow::Error {
    let become_it = || -> anyhow::Result<std::convert::Infallible> {
        let (ours, theirs) = channel::pair()?;
        rustix::net::sockopt::set_socket_send_buffer_size_force(&ours, ROOM_BYTES).context("make room in a socket")?;
        // What does not fit is an error, and not a wait for a reader who is not there yet.
        rustix::io::ioctl_fionbio(&ours, true).context("use a socket without waiting")?;
        estate.leave(&ours, caller)?;
        let path = |path: &Path| CString::new(path.as_os_str().as_bytes());
        let [name, verb, flag] = ["lxcfs-fuse", "supervise", "--run"].map(Path::new);
        let words =
            [name, verb, flag, run, Path::new(FOLLOWING)].map(path).into_iter().collect::<Result<Vec<_>, _>>()?;
        rustix::stdio::dup2_stdin(&theirs).context("place a socket")?;
        Ok(nix::unistd::execv(&path(program)?, &words)?)
    };
    let Err(error) = become_it();
    if let Err(error) = release_stdin() {
        log::warn!("{error:#}");
    }
    error.context(format!("become {}", program.display()))
}

/// What the program before this one has left, and who asked for it.
///
/// # Errors
/// When it is not whole.
pub fn find() -> anyhow::Result<(Estate, Channel)> {
    let channel = Channel::from(rustix::stdio::stdin().try_clone_to_owned().context("take what was left")?);
    release_stdin()?;
    Estate::find(&channel)
}

/// Puts /dev/null in the place of the socket.
fn release_stdin() -> anyhow::Result<()> {
    let null = File::open("/dev/null").context("open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("replace standard input")
}

impl Estate {
    fn leave(&self, to: &Channel, caller: &Channel) -> Result<(), kernel::Error> {
        to.send(b"lock", &[self.lock.as_fd()])?;
        to.send(b"connection", &[self.connection.as_fd()])?;
        to.send(&[b"init ", &self.init[..]].concat(), &[])?;
        to.send(&[b"reply ", self.reply.as_deref().unwrap_or_default()].concat(), &[])?;
        to.send(b"caller", &[caller.as_fd()])?;
        self.parking.leave(to)?;
        to.send(b"end", &[])
    }

    fn find(from: &Channel) -> anyhow::Result<(Estate, Channel)> {
        let (mut lock, mut connection, mut init, mut reply, mut caller, mut door) =
            (None, None, None, None, None, None);
        let mut kept = Vec::new();
        loop {
            let Some((mut bytes, mut descriptors)) = from.receive_within(0)? else {
                bail!("there is no end to what was left")
            };
            let word = bytes.iter().position(|&byte| byte == b' ').unwrap_or(bytes.len());
            match (&bytes[..word], descriptors.len()) {
                (b"lock", 1) => lock = descriptors.pop(),
                (b"connection", 1) => connection = descriptors.pop(),
                (b"init", 0) => init = Some(bytes.split_off(word + 1)),
                (b"reply", 0) => reply = Some(bytes.split_off(word + 1)),
                (b"caller", 1) => caller = descriptors.pop(),
                (b"door", 1) => door = descriptors.pop(),
                (b"lines" | b"keep" | b"visitor", 1..) => kept.push((bytes, descriptors)),
                (b"end", 0) => break,
                _ => bail!("'{}' was left, which nobody knows", bytes.escape_ascii()),
            }
        }
        let mut parking = Parking::at(Door::from(door.context("no door was left")?));
        kept.into_iter().try_for_each(|(words, descriptors)| parking.find(&words, descriptors))?;
        let estate = Estate {
            lock: lock.context("no lock was left")?,
            connection: connection.context("no connection was left")?,
            init: init.context("no INIT was left")?,
            reply: Some(reply.context("no answer to INIT was left")?),
            parking,
        };
        Ok((estate, Channel::from(caller.context("no caller was left")?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parking::tests::{file, inode};

    fn estate(directory: &Path) -> Estate {
        let path = directory.join("listeners");
        let mut parking = Parking::at(Door::open(&path).unwrap());
        for (words, descriptors) in [("park 7", 2), ("park 8", 2), ("keep 7 1000", 3)] {
            let files: Vec<OwnedFd> = (0..descriptors).map(|_| file()).collect();
            let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            channel::knock(&path).unwrap().send(words.as_bytes(), &files).unwrap();
        }
        assert_eq!(parking.serve().lines, [1, 2]);
        // Who has come and has not said anything yet.
        let silent = channel::knock(&path).unwrap();
        assert!(parking.serve().lines.is_empty());
        std::mem::forget(silent);
        // With blanks and zeros, as the kernel sends them.
        Estate { lock: file(), connection: file(), init: b"a b\0 c".to_vec(), reply: Some(vec![0, b' ', 1]), parking }
    }

    #[test]
    fn what_is_left_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let left = estate(directory.path());
        let (ours, theirs) = channel::pair().unwrap();
        let asking = file();
        left.leave(&ours, &Channel::from(asking.try_clone().unwrap())).unwrap();
        let (found, caller) = Estate::find(&theirs).unwrap();
        assert_eq!((inode(&found.lock), inode(&found.connection)), (inode(&left.lock), inode(&left.connection)));
        assert_eq!((&found.init, &found.reply, inode(caller)), (&left.init, &left.reply, inode(asking)));
        assert_eq!(found.parking.kept(), left.parking.kept());
        assert_eq!(found.parking.kept().len(), 3 + 1);
        // The door is the same one: who comes there is heard by the finder.
        let mut parking = found.parking;
        channel::knock(&directory.path().join("listeners"))
            .unwrap()
            .send(b"park 9", &[file().as_fd(), file().as_fd()])
            .unwrap();
        assert_eq!(parking.serve().lines, [3]);
    }

    #[test]
    fn what_is_cut_off_is_not_taken() {
        let directory = tempfile::tempdir().unwrap();
        let left = estate(directory.path());
        let (ours, theirs) = channel::pair().unwrap();
        left.leave(&ours, &Channel::from(file())).unwrap();
        drop(ours);
        let mut packets = Vec::new();
        loop {
            let (bytes, descriptors) = theirs.receive().unwrap();
            if bytes.is_empty() {
                break;
            }
            packets.push((bytes, descriptors));
        }
        for missing in 0..packets.len() {
            let (ours, theirs) = channel::pair().unwrap();
            let kept = packets.iter().enumerate().filter(|(number, _)| *number != missing).map(|(_, packet)| packet);
            for (bytes, descriptors) in kept {
                ours.send(bytes, &descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
            }
            // To keep nothing for servers is no fault.
            let is_needed =
                !["lines", "keep", "visitor"].iter().any(|word| packets[missing].0.starts_with(word.as_bytes()));
            assert_eq!(Estate::find(&theirs).is_err(), is_needed, "{}", packets[missing].0.escape_ascii());
        }
    }
}
