//! A gate between a server that is whole again and one that runs: it goes on when somebody says so, and is taken back when nobody can
//! say it any more.
//!
//! The monitor waits at one end; the command that has started it holds the other, and closes it with its own end, however that comes.
//!
//! Behind it, a server whose memory is on its way still has it for a [`Lifeline`].

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};

use crate::failure::{Exit, Failure};

/// The monitor's end.
#[derive(Debug)]
pub struct Gate(UnixStream);

/// The end of who decides.
#[derive(Debug)]
pub struct Keeper(UnixStream);

/// Both ends. Neither may keep the other's: a fork has copied them.
///
/// # Errors
/// When no descriptor is left.
pub fn pair() -> io::Result<(Gate, Keeper)> {
    UnixStream::pair().map(|(gate, keeper)| (Gate(gate), Keeper(keeper)))
}

impl Gate {
    /// Says that all is whole, and waits for the word.
    ///
    /// # Errors
    /// When it will never come.
    pub fn pass(&self) -> Result<()> {
        let gone = || Failure::new(Exit::Failed, "nobody is there any more to say that it may go on");
        (&self.0).write_all(&[0]).map_err(|_| gone())?;
        (&self.0).read_exact(&mut [0]).map_err(|_| gone().into())
    }
}

impl Keeper {
    /// Waits until somebody stands at the gate; false when nobody will.
    ///
    /// # Errors
    /// When that cannot be known.
    pub fn is_reached(&self) -> Result<bool> {
        match (&self.0).read_exact(&mut [0]) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error).context("wait for a server to be whole"),
        }
    }

    /// Opens it. Who stands there no more has said why elsewhere. What is returned matters to a server whose memory is still on its way.
    pub fn open(self) -> Lifeline {
        let _ = (&self.0).write_all(&[0]);
        Lifeline(self.0)
    }
}

impl AsFd for Keeper {
    /// Can be read when somebody stands at the gate, or nobody will.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a server that runs before its memory is there hangs on: cut, it is ended by its monitor.
#[derive(Debug)]
pub struct Lifeline(UnixStream);

impl Lifeline {
    /// All of it has come.
    pub fn settle(self) {
        let _ = (&self.0).write_all(&[0]);
    }
}

impl From<Gate> for OwnedFd {
    fn from(gate: Gate) -> Self {
        gate.0.into()
    }
}

/// Whether the lifeline whose end `fd` is, and which can be read, has been settled; it was cut else.
pub fn is_settled(fd: &OwnedFd) -> bool {
    rustix::io::read(fd, &mut [0_u8]).is_ok_and(|length| length == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_passed_when_it_is_opened_and_never_else() {
        let (gate, keeper) = pair().unwrap();
        let passing = std::thread::spawn(move || gate.pass());
        assert!(keeper.is_reached().unwrap());
        let lifeline = keeper.open();
        passing.join().unwrap().unwrap();
        drop(lifeline);

        let (gate, keeper) = pair().unwrap();
        let passing = std::thread::spawn(move || gate.pass());
        assert!(keeper.is_reached().unwrap());
        drop(keeper);
        assert!(passing.join().unwrap().unwrap_err().to_string().contains("nobody"));

        let (gate, keeper) = pair().unwrap();
        drop(gate);
        assert!(!keeper.is_reached().unwrap());
    }

    #[test]
    fn a_lifeline_is_settled_or_cut() {
        for settles in [true, false] {
            let (gate, keeper) = pair().unwrap();
            let lifeline = keeper.open();
            gate.pass().unwrap();
            let end = OwnedFd::from(gate);
            if settles {
                lifeline.settle();
            } else {
                drop(lifeline);
            }
            assert_eq!(is_settled(&end), settles);
        }
    }
}
