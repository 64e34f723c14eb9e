//! The user's own terminal.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use kernel::pty::{self, RawMode, Size};
use rustix::termios;

/// Standard input, output and error of this process.
pub fn standard() -> [BorrowedFd<'static>; 3] {
    [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()]
}

/// Which of standard input, output and error are terminals.
pub fn which() -> [bool; 3] {
    standard().map(termios::isatty)
}

/// The size of the user's window, from whichever descriptor shows it.
pub fn size() -> Option<Size> {
    standard().into_iter().find_map(|descriptor| pty::size(descriptor).ok())
}

/// The user's terminal in raw mode while this lives; nothing when standard input is none.
///
/// # Errors
/// When the terminal refuses.
pub fn raw() -> Result<Option<RawMode<OwnedFd>>> {
    if !which()[0] {
        return Ok(None);
    }
    Ok(Some(RawMode::new(copy(rustix::stdio::stdin())?)?))
}

/// Gives `terminal` the modes of the user's, so that the keys mean what the user is used to.
pub fn lend_modes(terminal: impl AsFd) {
    if let Ok(modes) = termios::tcgetattr(rustix::stdio::stdin()) {
        // Without it the kernel's usual modes stay.
        let _ = termios::tcsetattr(terminal, termios::OptionalActions::Now, &modes);
    }
}

/// Another number for the same open file, close-on-exec set.
///
/// # Errors
/// When there are no numbers left.
pub fn copy(descriptor: BorrowedFd<'_>) -> Result<OwnedFd> {
    descriptor.try_clone_to_owned().context("copy a descriptor")
}
