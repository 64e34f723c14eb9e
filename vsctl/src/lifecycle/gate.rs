//! A gate between a server that is whole again and one that runs: it goes on when somebody says so, and is taken back when nobody can
//! say it any more.
//!
//! The monitor waits at one end; the command that has started it holds the other, and closes it with its own end, however that comes.

use std::io::{self, Read, Write};
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

    /// Opens it. Who stands there no more has said why elsewhere.
    pub fn open(self) {
        let _ = (&self.0).write_all(&[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_passed_when_it_is_opened_and_never_else() {
        let (gate, keeper) = pair().unwrap();
        let passing = std::thread::spawn(move || gate.pass());
        assert!(keeper.is_reached().unwrap());
        keeper.open();
        passing.join().unwrap().unwrap();

        let (gate, keeper) = pair().unwrap();
        let passing = std::thread::spawn(move || gate.pass());
        assert!(keeper.is_reached().unwrap());
        drop(keeper);
        assert!(passing.join().unwrap().unwrap_err().to_string().contains("nobody"));

        let (gate, keeper) = pair().unwrap();
        drop(gate);
        assert!(!keeper.is_reached().unwrap());
    }
}
