//! Makes a plan happen, or takes it back. Knows no server: a plan is a list of steps.

use std::env;
use std::fmt;
use std::process;

use anyhow::{Context, Result, anyhow};
use log::{debug, warn};

use super::journal::{Journal, Lasting};
use super::step::Step;

/// What the steps act upon.
pub trait Host {
    /// Makes the step.
    ///
    /// # Errors
    /// When it failed; then nothing of it is left.
    fn apply(&mut self, step: &Step) -> Result<()>;
    /// Takes the step back; gone already is no error.
    ///
    /// # Errors
    /// When it still stands.
    fn undo(&mut self, step: &Step) -> Result<()>;
}

/// Runs `steps` in order; on failure takes back everything that stands in the journal, last first.
///
/// `number` is that of the first step: a plan may be run in parts.
///
/// # Errors
/// The step that failed, and what could not be taken back.
pub fn run(plan: &str, number: usize, steps: &[Step], host: &mut dyn Host, journal: &mut Journal) -> Result<()> {
    let before = journal.standing().len();
    if journal.lasting() == Lasting::Disk {
        journal.begin(steps)?;
    }
    for (index, step) in steps.iter().enumerate() {
        if journal.lasting() == Lasting::Boot {
            journal.begin(std::slice::from_ref(step))?;
        }
        debug!("{step}");
        let Err(cause) = fault(plan, number + index).and_then(|()| host.apply(step)) else { continue };
        // The failed step left nothing, and what it met there is not ours to remove.
        journal.keep(before + index)?;
        let count = journal.standing().len();
        let outcome = match take_back("undo", host, journal) {
            Ok(()) => format!("taken back: {count} of {count} steps"),
            Err(left) => format!("not all could be taken back: {left:#}"),
        };
        return Err(cause.context(step.to_string()).context(Outcome(outcome)));
    }
    Ok(())
}

/// What became of the finished steps of a plan that failed; the printer shows it on a line of its own.
#[derive(Debug)]
pub struct Outcome(pub String);

impl Outcome {
    /// The sentence of `error`, cause after cause, and apart from it what became of the finished steps.
    pub fn apart(error: &anyhow::Error) -> (String, Option<String>) {
        let outcome = error.downcast_ref::<Self>().map(ToString::to_string);
        let causes = error.chain().map(ToString::to_string).filter(|cause| Some(cause) != outcome.as_ref());
        (causes.collect::<Vec<_>>().join(": "), outcome)
    }

    /// An error that is told in the place of another, with the `outcome` of that.
    pub fn beside(error: anyhow::Error, outcome: Option<String>) -> anyhow::Error {
        match outcome {
            Some(outcome) => error.context(Self(outcome)),
            None => error,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// Takes back what stands in the journal, last first, and goes on past failures.
///
/// # Errors
/// The steps that still stand; they stay in the journal.
pub fn take_back(plan: &str, host: &mut dyn Host, journal: &mut Journal) -> Result<()> {
    let standing = journal.standing().to_vec();
    let mut left = Vec::new();
    for (index, step) in standing.iter().enumerate().rev() {
        debug!("take back: {step}");
        if let Err(error) = fault(plan, standing.len() - index).and_then(|()| host.undo(step)) {
            warn!("take back: {step}: {error:#}");
            left.push((step.clone(), error));
        } else if left.is_empty() {
            // Only up to the first obstinate step: it must not be lost, and undoing the others twice is harmless.
            journal.keep(index)?;
        }
    }
    if left.is_empty() {
        return Ok(());
    }
    let text = left.iter().map(|(step, error)| format!("{step}: {error:#}")).collect::<Vec<_>>().join("; ");
    let steps: Vec<Step> = left.into_iter().rev().map(|(step, _)| step).collect();
    // Put down again before the old ones go: there is no moment at which an obstinate step is in no journal.
    let before = journal.standing().len();
    journal.begin(&steps)?;
    journal.replace(before)?;
    Err(anyhow!("{text}"))
}

/// For tests of crashes: `VSOS_FAULT=PLAN:N:kill|fail|stop` ends the process with SIGKILL before step N, makes it fail,
/// or stops it there until SIGCONT, so that a test can end the whole host at that moment. Several have commas between them.
///
/// # Errors
/// As the test wishes.
pub fn fault(plan: &str, number: usize) -> Result<()> {
    let Some(wish) = env::var_os("VSOS_FAULT") else { return Ok(()) };
    let wishes = wish.to_string_lossy();
    let here = wishes.split(',').find_map(|wish| match wish.split(':').collect::<Vec<_>>()[..] {
        [name, at, what] if name == plan && at.parse() == Ok(number) => Some(what),
        _ => None,
    });
    match here {
        None => Ok(()),
        Some("kill") => {
            signal_self(nix::libc::SIGKILL)?;
            unreachable!("SIGKILL cannot be handled")
        }
        Some("stop") => signal_self(nix::libc::SIGSTOP),
        Some(_) => Err(anyhow!("VSOS_FAULT={wishes}")),
    }
}

fn signal_self(signal: i32) -> Result<()> {
    let own = kernel::process::PidFd::open(process::id() as i32);
    own.and_then(|own| own.signal(signal)).with_context(|| format!("send signal {signal} to the own process"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::files::FilesStep;

    /// Refuses step number `fail_at` and holds what the others made.
    #[derive(Default)]
    struct Fake {
        fail_at: usize,
        obstinate: Option<Step>,
        made: Vec<Step>,
    }

    impl Host for Fake {
        fn apply(&mut self, step: &Step) -> Result<()> {
            if self.made.len() == self.fail_at {
                return Err(anyhow!("no"));
            }
            self.made.push(step.clone());
            Ok(())
        }
        fn undo(&mut self, step: &Step) -> Result<()> {
            if self.obstinate.as_ref() == Some(step) {
                return Err(anyhow!("busy"));
            }
            self.made.retain(|made| made != step);
            Ok(())
        }
    }

    fn steps() -> Vec<Step> {
        let make = |n: usize| Step::Files(FilesStep::MakeDirectory { path: format!("/{n}").into(), mode: 0o700 });
        (0..6).map(make).collect()
    }

    #[test]
    fn a_failed_plan_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let steps = steps();
        for (fail_at, lasting) in (0..steps.len()).flat_map(|n| [(n, Lasting::Boot), (n, Lasting::Disk)]) {
            let mut journal = Journal::open(&directory.path().join(fail_at.to_string()), lasting).unwrap();
            let mut host = Fake { fail_at, ..Fake::default() };
            let error = run("test", 1, &steps, &mut host, &mut journal).unwrap_err();
            assert!(format!("{error:#}").contains(&steps[fail_at].to_string()));
            assert!(host.made.is_empty() && journal.standing().is_empty());
        }
    }

    #[test]
    fn an_obstinate_step_is_kept_and_does_not_stop_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let steps = steps();
        let mut journal = Journal::open(&directory.path().join("journal"), Lasting::Boot).unwrap();
        let mut host = Fake { fail_at: 99, obstinate: Some(steps[2].clone()), ..Fake::default() };
        run("test", 1, &steps, &mut host, &mut journal).unwrap();
        let error = take_back("test", &mut host, &mut journal).unwrap_err();
        assert!(error.to_string().contains("busy"));
        assert_eq!(host.made, [steps[2].clone()]);
        assert_eq!(journal.standing(), [steps[2].clone()]);
        host.obstinate = None;
        take_back("test", &mut host, &mut journal).unwrap();
        assert!(host.made.is_empty());
    }
}
