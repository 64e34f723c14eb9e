//! Runs code in a child process and brings back what went wrong; a child that hangs is ended.

use std::error::Error;
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use kernel::channel;
use kernel::process::{CloneOptions, Fork, PidFd, fork};

use libtest_mimic::Completion;

use crate::Outcome;

/// Far above what any test takes; only a hang reaches it.
const HANG_MS: u64 = 60_000;

/// How a child says that its test was skipped.
const SKIPPED: &[u8] = b"skipped: ";

/// A test that cannot run on this host, and why.
#[derive(Debug)]
struct Skipped(&'static str);

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl Error for Skipped {}

/// Ends a test that cannot run here; it is counted as ignored.
pub fn skip(why: &'static str) -> Outcome {
    Err(Skipped(why).into())
}

/// Runs `test` in a child of its own.
pub fn run(test: impl FnOnce() -> Outcome) -> Result<Completion, String> {
    let told = |error: kernel::Error| chain(&error);
    let (ours, theirs) = channel::pair().map_err(told)?;
    match fork(&CloneOptions::default()).map_err(told)? {
        Fork::Child => {
            drop(ours);
            // A panic must not run on into the harness, which would be there twice then.
            let outcome = catch_unwind(AssertUnwindSafe(test));
            leave(outcome.unwrap_or_else(|_| Err("the test panicked".into())), &theirs)
        }
        Fork::Parent { pidfd, .. } => {
            drop(theirs);
            let (words, _) = wait(&ours, &pidfd)?;
            let status = pidfd.reap().map_err(told)?;
            match (words.as_slice(), status.success()) {
                (b"passed", true) => Ok(Completion::Completed),
                (words, true) if words.starts_with(SKIPPED) => {
                    Ok(Completion::ignored_with(String::from_utf8_lossy(&words[SKIPPED.len()..])))
                }
                (b"", _) => Err(format!("the child ended without a word: {status}")),
                (words, _) => Err(String::from_utf8_lossy(words).into_owned()),
            }
        }
    }
}

/// Ends the calling child, after telling `channel` what became of it. Runs no destructor of the parent's values.
fn leave(outcome: Outcome, channel: &channel::Channel) -> ! {
    let (words, code) = match outcome {
        Ok(()) => ("passed".to_owned(), 0),
        Err(error) if error.is::<Skipped>() => (format!("{}{error}", String::from_utf8_lossy(SKIPPED)), 0),
        Err(error) => (chain(error.as_ref()), 1),
    };
    let _ = channel.send(words.as_bytes(), &[]);
    std::process::exit(code)
}

/// Receives one packet from a child, or ends it.
fn wait(channel: &channel::Channel, child: &PidFd) -> Result<(Vec<u8>, Vec<std::os::fd::OwnedFd>), String> {
    match channel.receive_within(HANG_MS) {
        Ok(Some(packet)) => Ok(packet),
        Ok(None) => {
            let _ = child.signal(libc::SIGKILL);
            let _ = child.reap();
            Err("the child hung and was ended".to_owned())
        }
        Err(error) => Err(chain(&error)),
    }
}

/// The error and its sources in one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        write!(text, ": {cause}").expect("writing to a String cannot fail");
        source = cause.source();
    }
    text
}

/// Fails with a sentence when `condition` does not hold.
pub fn ensure(condition: bool, sentence: impl Into<String>) -> Outcome {
    if condition { Ok(()) } else { Err(sentence.into().into()) }
}

/// Fails unless the two are equal.
pub fn ensure_equal<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Outcome {
    ensure(found == expected, format!("{what}: found {found:?}, expected {expected:?}"))
}

/// The errno with which `result` failed, 0 when it did not.
pub fn errno<T>(result: kernel::Result<T>) -> i32 {
    result.err().map_or(0, |error| error.raw_os_error().unwrap_or(-1))
}
