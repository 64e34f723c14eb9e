//! From the shortest interruption down, one rung after the other, as long as a lower one can do what a higher one could not.

use std::fmt;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::source::Memory;
use crate::failure::{self, Failure};
use crate::interrupt::{before_more, is_interrupt};
use crate::lifecycle::execute::Outcome;
use crate::lifecycle::state::{self, State};
use crate::name::Name;
use crate::site::Site;
use crate::template::progress::Progress;

/// How a server that runs is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rung {
    /// Its memory is sent while it runs.
    Live(Memory),
    /// It stands still while its memory is sent.
    NearLive(Memory),
    /// It is stopped and started.
    Offline,
}

/// What of a failed attempt concerns the server's processes, and only them: a context of its error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hindrance {
    /// In whatever way they are taken along, it cannot be done.
    Unfit,
    /// There is no room for so much of what they have in memory.
    Room,
    /// It was tried and has failed; with less at once it may not.
    Attempt,
}

impl Hindrance {
    /// That of `error`, if it has one. All else hinders every rung.
    pub fn of(error: &anyhow::Error) -> Option<Self> {
        error.downcast_ref::<Self>().copied()
    }

    /// That of several things that speak against it at once: none if one of them hinders every rung.
    pub fn of_all(each: impl IntoIterator<Item = Option<Self>>) -> Option<Self> {
        let worse = |one: Self, other: Self| if other == Self::Unfit { other } else { one };
        each.into_iter().collect::<Option<Vec<Self>>>()?.into_iter().reduce(worse)
    }
}

impl fmt::Display for Hindrance {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Unfit => "its programs cannot be taken along",
            Self::Room => "there is no room for what its programs have in memory",
            Self::Attempt => "taking its programs along has failed",
        })
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Live(Memory::First) => "--live",
            Self::Live(Memory::Later) => "--live --postcopy",
            Self::NearLive(Memory::First) => "--near-live",
            Self::NearLive(Memory::Later) => "--near-live --postcopy",
            Self::Offline => "--offline",
        })
    }
}

/// The next rung on which `hindrance` may be none.
fn below(rung: Rung, hindrance: Hindrance) -> Option<Rung> {
    match (rung, hindrance) {
        // It needs more of both hosts, and more can fail.
        (Rung::Live(Memory::Later), _) => Some(Rung::Live(Memory::First)),
        (Rung::NearLive(Memory::Later), _) => Some(Rung::NearLive(Memory::First)),
        // What is sent ahead may have to be sent, and be kept, again.
        (Rung::Live(Memory::First), Hindrance::Attempt | Hindrance::Room) => Some(Rung::NearLive(Memory::First)),
        // Both need the same of processes and hosts.
        (Rung::Live(Memory::First), Hindrance::Unfit) | (Rung::NearLive(Memory::First), _) => Some(Rung::Offline),
        (Rung::Offline, _) => None,
    }
}

/// Makes `attempt`s from the rung `rung` down until one succeeds or none could. Without `by_itself` there is one, and the hint of its
/// failure names the flag.
///
/// # Errors
/// That of the last attempt; those before it were told.
pub fn climb_down<T>(
    site: &Site,
    name: &Name,
    mut rung: Rung,
    by_itself: bool,
    progress: &mut dyn Progress,
    mut attempt: impl FnMut(Rung, &mut dyn Progress) -> Result<T>,
) -> Result<T> {
    loop {
        let error = match attempt(rung, progress) {
            Ok(made) => return Ok(made),
            Err(error) => error,
        };
        if is_interrupt(&error) || before_more().is_err() {
            return Err(error);
        }
        let Some(next) = Hindrance::of(&error).and_then(|hindrance| below(rung, hindrance)) else { return Err(error) };
        if !by_itself {
            return Err(hinted(&error, next));
        }
        // One that has ended meanwhile, or does not go on here, is not moved.
        if !matches!(state::of(site, name)?, State::Running) {
            return Err(error);
        }
        progress.warn(&format!("{rung} is not possible, trying {next}: {}", Outcome::apart(&error).0));
        rung = next;
    }
}

/// The error with the hint that `--fallback` would try `next`.
fn hinted(error: &anyhow::Error, next: Rung) -> anyhow::Error {
    let (sentence, outcome) = Outcome::apart(error);
    let own = failure::hint_of(error).map(|hint| format!("{hint}; or ")).unwrap_or_default();
    let hint = format!("{own}`--fallback` tries {next} by itself");
    let hinted = anyhow::Error::new(Failure::new(failure::exit_of(error), sentence).hint(hint));
    Outcome::beside(hinted, outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;
    use crate::template::progress::Silent;
    use anyhow::{Context, anyhow};

    #[test]
    fn each_hindrance_leads_to_the_next_rung_that_does_without() {
        for (rung, unfit, again) in [
            (Rung::Live(Memory::Later), Some(Rung::Live(Memory::First)), Some(Rung::Live(Memory::First))),
            (Rung::NearLive(Memory::Later), Some(Rung::NearLive(Memory::First)), Some(Rung::NearLive(Memory::First))),
            (Rung::Live(Memory::First), Some(Rung::Offline), Some(Rung::NearLive(Memory::First))),
            (Rung::NearLive(Memory::First), Some(Rung::Offline), Some(Rung::Offline)),
            (Rung::Offline, None, None),
        ] {
            assert_eq!(below(rung, Hindrance::Unfit), unfit, "{rung}");
            assert_eq!(below(rung, Hindrance::Attempt), again, "{rung}");
            assert_eq!(below(rung, Hindrance::Room), again, "{rung}");
        }
    }

    #[test]
    fn of_several_hindrances_the_worst_counts() {
        use Hindrance::{Room, Unfit};
        for (each, of_all) in [
            (&[Some(Room)][..], Some(Room)),
            (&[Some(Room), Some(Unfit), Some(Room)], Some(Unfit)),
            (&[Some(Unfit), None], None),
            (&[], None),
        ] {
            assert_eq!(Hindrance::of_all(each.iter().copied()), of_all, "{each:?}");
        }
    }

    fn refused() -> anyhow::Error {
        anyhow!(Failure::new(Exit::Unsupported, "no criu").hint("install it")).context(Hindrance::Unfit)
    }

    #[test]
    fn a_hindrance_is_found_below_what_became_of_the_server() {
        let error = refused().context("cannot move 'web1'").context(Outcome("'web1' runs here again".into()));
        assert_eq!(Hindrance::of(&error), Some(Hindrance::Unfit));
        assert_eq!(Hindrance::of(&anyhow!("the address is taken")), None);
    }

    #[test]
    fn without_the_flag_one_attempt_is_made_and_the_hint_names_it() {
        let (site, name) = (Site::at("/nowhere".as_ref()).unwrap(), "web1".parse().unwrap());
        let mut tried = Vec::new();
        let error = climb_down(&site, &name, Rung::Live(Memory::First), false, &mut Silent, |rung, _| {
            tried.push(rung);
            Err::<(), _>(refused().context(Outcome("it goes on".into())))
        })
        .unwrap_err();
        assert_eq!(tried, [Rung::Live(Memory::First)]);
        assert_eq!(failure::exit_of(&error), Exit::Unsupported);
        assert_eq!(failure::hint_of(&error), Some("install it; or `--fallback` tries --offline by itself"));
        let (sentence, outcome) = Outcome::apart(&error);
        assert_eq!(
            (sentence.as_str(), outcome.as_deref()),
            ("its programs cannot be taken along: no criu", Some("it goes on"))
        );
    }

    #[test]
    fn what_hinders_every_rung_ends_it_with_its_own_words() {
        let (site, name) = (Site::at("/nowhere".as_ref()).unwrap(), "web1".parse().unwrap());
        let taken = |_, _: &mut dyn Progress| Err::<(), _>(anyhow!("taken")).context("cannot move it");
        let error = climb_down(&site, &name, Rung::Live(Memory::First), true, &mut Silent, taken).unwrap_err();
        assert_eq!((format!("{error:#}").as_str(), failure::hint_of(&error)), ("cannot move it: taken", None));
    }
}
