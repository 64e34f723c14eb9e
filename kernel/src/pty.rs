//! Pseudo-terminals of a given devpts instance, and the user's own terminal in raw mode (pty(7), termios(3)).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, Termios, Winsize};

use crate::Result;
use crate::error::{During, Error};

/// The size of a terminal's window in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// The device number of every master (Documentation/admin-guide/devices.txt).
const PTMX: (u32, u32) = (5, 2);

/// The master side of a pseudo-terminal.
#[derive(Debug)]
pub struct Master(OwnedFd);

impl Master {
    /// A new pseudo-terminal of the devpts instance mounted at `devpts`, unlocked; nobody's controlling terminal.
    pub fn open_in(devpts: &Path) -> Result<Master> {
        let path = devpts.join("ptmx");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::empty()).during("open", path.display())?;
        rustix::pty::unlockpt(&fd).during("unlock pty of", path.display())?;
        Ok(Master(fd))
    }

    /// Takes a descriptor that a stranger gave for a master, when it is one.
    ///
    /// Asks no file system (`AT_STATX_DONT_SYNC`): a file of a stranger's FUSE mount cannot make the caller wait. It could
    /// when it is closed: hence the descriptor comes back with the refusal.
    pub fn recognise(fd: OwnedFd) -> std::result::Result<Master, OwnedFd> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        match rustix::fs::statx(&fd, "", flags, StatxFlags::TYPE) {
            Ok(found)
                if FileType::from_raw_mode(found.stx_mode.into()) == FileType::CharacterDevice
                    && (found.stx_rdev_major, found.stx_rdev_minor) == PTMX =>
            {
                Ok(Master(fd))
            }
            _ => Err(fd),
        }
    }

    /// The other side, opened without a path (`TIOCGPTPEER`): safe whatever is mounted at /dev/pts by now.
    pub fn peer(&self) -> Result<OwnedFd> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        rustix::pty::ioctl_tiocgptpeer(&self.0, flags).during("open", "pty peer")
    }

    /// The number of the pseudo-terminal in its devpts instance.
    pub fn number(&self) -> Result<u32> {
        let name = rustix::pty::ptsname(&self.0, Vec::new()).during("read", "pty number")?;
        let name = name.to_string_lossy();
        let digits = name.rsplit('/').next().unwrap_or("");
        digits.parse().map_err(|_| {
            Error::refused(
                "parse",
                format_args!("pty name {name}"),
                std::io::ErrorKind::InvalidData,
                "no number at its end",
            )
        })
    }

    /// The path of the other side, where its devpts instance is mounted at `devpts`.
    pub fn peer_path(&self, devpts: &Path) -> Result<PathBuf> {
        Ok(devpts.join(self.number()?.to_string()))
    }

    /// Sets the window size; the foreground processes get `SIGWINCH`.
    pub fn set_size(&self, size: Size) -> Result<()> {
        set_size(&self.0, size)
    }

    /// The window size.
    pub fn size(&self) -> Result<Size> {
        size(&self.0)
    }
}

/// Sets the window size of any terminal.
pub fn set_size(terminal: impl AsFd, size: Size) -> Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size).during("set size of", "terminal")
}

/// The window size of any terminal. ENOTTY: it is none.
pub fn size(terminal: impl AsFd) -> Result<Size> {
    let size = rustix::termios::tcgetwinsize(terminal).during("read size of", "terminal")?;
    Ok(Size { rows: size.ws_row, columns: size.ws_col })
}

impl AsFd for Master {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Master {
    fn from(fd: OwnedFd) -> Self {
        Master(fd)
    }
}

impl From<Master> for OwnedFd {
    fn from(master: Master) -> Self {
        master.0
    }
}

/// A terminal in raw mode as long as this lives: every key goes through, nothing is echoed.
#[derive(Debug)]
pub struct RawMode<Terminal: AsFd> {
    terminal: Terminal,
    before: Termios,
}

impl<Terminal: AsFd> RawMode<Terminal> {
    /// Puts `terminal` to raw mode. ENOTTY: it is no terminal.
    pub fn new(terminal: Terminal) -> Result<Self> {
        let before = rustix::termios::tcgetattr(&terminal).during("read modes of", "terminal")?;
        let mut raw = before.clone();
        raw.make_raw();
        // Drain: what was already written must still be shown by the old rules.
        rustix::termios::tcsetattr(&terminal, OptionalActions::Drain, &raw).during("set raw mode of", "terminal")?;
        Ok(Self { terminal, before })
    }
}

impl<Terminal: AsFd> Drop for RawMode<Terminal> {
    fn drop(&mut self) {
        // A terminal that has gone away needs no restoring. Flush: keys typed for the guest are not for the shell.
        let _ = rustix::termios::tcsetattr(&self.terminal, OptionalActions::Flush, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::termios::LocalModes;

    #[test]
    fn master_and_peer_talk_and_share_a_size() {
        let master = Master::open_in(Path::new("/dev/pts")).or_else(|_| {
            // Where the host's devpts/ptmx has mode 0 and we are not root, /dev/ptmx is the same instance.
            Master::open_in(Path::new("/dev"))
        });
        let master = master.unwrap();
        let peer = master.peer().unwrap();
        master.set_size(Size { rows: 50, columns: 132 }).unwrap();
        assert_eq!(size(&peer).unwrap(), Size { rows: 50, columns: 132 });
        rustix::io::write(&peer, b"hello\n").unwrap();
        let mut buffer = [0_u8; 32];
        let length = rustix::io::read(&master, &mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"hello\r\n");
        assert_eq!(
            master.peer_path(Path::new("/x")).unwrap(),
            Path::new("/x").join(master.number().unwrap().to_string())
        );
    }

    #[test]
    fn only_a_master_is_recognised() {
        let master = Master::open_in(Path::new("/dev/pts")).or_else(|_| Master::open_in(Path::new("/dev"))).unwrap();
        let peer = master.peer().unwrap();
        assert!(Master::recognise(master.into()).is_ok());
        assert!(Master::recognise(peer).is_err());
        for path in ["/dev/null", "/etc/passwd", "/proc/self/stat", "/"] {
            assert!(Master::recognise(std::fs::File::open(path).unwrap().into()).is_err(), "{path}");
        }
    }

    #[test]
    fn raw_mode_ends_with_its_guard() {
        let master = Master::open_in(Path::new("/dev/pts")).or_else(|_| Master::open_in(Path::new("/dev"))).unwrap();
        let peer = master.peer().unwrap();
        let echoes = |fd: &OwnedFd| rustix::termios::tcgetattr(fd).unwrap().local_modes.contains(LocalModes::ECHO);
        assert!(echoes(&peer));
        let guard = RawMode::new(peer.as_fd()).unwrap();
        assert!(!echoes(&peer));
        drop(guard);
        assert!(echoes(&peer));
    }
}
