//! The life of a service: one table, `(state, event) → (state, action)`.
//!
//! ```text
//!            Start         dependencies up          ready
//!  stopped ───────► waiting ─────────────► starting ──────► running
//!     ▲                ▲ ▲                    │  │            │ │
//!     │          delay │ │ ended      ended   │  │ ended again│ │ stop
//!     │           over │ └─ restarting ◄─┐ ┌──┘  ▼            │ │
//!     │                └──── backoff ◄───┼─┼── (policy) ◄─────┘ │
//!     │                                  │ ▼                    ▼
//!     │                                  │ done / failed     stopping
//!     └──────────────────────────────────┴──── ended ──────────┘
//! ```
//! Pure: no clock, no process. What a pair does not name makes no sense there and changes nothing.

use crate::service::{Kind, Restart};

/// Where a service is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// No process, and none wanted.
    Stopped,
    /// Wanted; something that comes before it is not there yet.
    Waiting,
    /// Its process runs and is not ready (daemon with notify) or not done (oneshot).
    Starting,
    /// Its process runs and is ready.
    Running,
    /// Its process ended as it should.
    Done,
    /// Its process was asked to end.
    Stopping,
    /// Its process was asked to end, and is to be started again.
    Restarting,
    /// Its process ended; the pause before the next start.
    Backoff,
    /// Its process ended badly and is left so, or it could not be started.
    Failed,
}

/// What happens to a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Somebody wants it up.
    Start,
    /// Somebody wants it down.
    Stop,
    /// Somebody wants a new process.
    Restart,
    /// All that comes before it is there.
    DependenciesUp,
    /// Something that it requires will not come.
    DependencyFailed,
    /// Its process is ready.
    Ready,
    /// Its process did not get ready or done in time.
    StartTimeout,
    /// Its process did not end in time.
    StopTimeout,
    /// The pause is over.
    DelayOver,
    /// Its process ended, and that is all right.
    EndedWell,
    /// Its process ended, and its policy wants another.
    EndedAgain,
    /// Its process ended or could not be made, and its policy wants no other.
    EndedBadly,
}

/// What the supervisor has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Nothing,
    /// Look at what comes before it.
    Await,
    /// Make the process.
    Spawn,
    /// Send the stop signal and set the stop time-out.
    Terminate,
    /// Send SIGKILL.
    Kill,
    /// Set the timer of the pause.
    Delay,
}

impl State {
    /// The word that `vsinit list` prints.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Stopped => "stopped",
            State::Waiting => "waiting",
            State::Starting => "starting",
            State::Running => "running",
            State::Done => "done",
            State::Stopping => "stopping",
            State::Restarting => "restarting",
            State::Backoff => "backoff",
            State::Failed => "failed",
        }
    }

    /// The state and the action after `event`, or `None` when it makes no sense here.
    pub fn after(self, event: Event) -> Option<(State, Action)> {
        use {Action::*, Event as E, State::*};
        Some(match (self, event) {
            (Stopped | Done | Failed | Backoff, E::Start | E::Restart) => (Waiting, Await),
            (Stopping, E::Start | E::Restart) => (Restarting, Nothing),
            (Starting | Running, E::Restart) => (Restarting, Terminate),

            (Waiting, E::DependenciesUp) => (Starting, Spawn),
            (Waiting, E::DependencyFailed) => (Failed, Nothing),
            (Starting, E::Ready) => (Running, Nothing),
            // It ends by the signal, and then its policy decides.
            (Starting, E::StartTimeout) => (Starting, Kill),

            (Starting | Running, E::EndedWell) => (Done, Nothing),
            (Starting | Running, E::EndedAgain) => (Backoff, Delay),
            (Starting | Running, E::EndedBadly) => (Failed, Nothing),
            (Backoff, E::DelayOver) => (Waiting, Await),

            (Waiting | Backoff | Done | Failed, E::Stop) => (Stopped, Nothing),
            (Starting | Running, E::Stop) => (Stopping, Terminate),
            (Restarting, E::Stop) => (Stopping, Nothing),
            (Stopping, E::StopTimeout) => (Stopping, Kill),
            (Restarting, E::StopTimeout) => (Restarting, Kill),
            (Stopping, E::EndedWell | E::EndedAgain | E::EndedBadly) => (Stopped, Nothing),
            (Restarting, E::EndedWell | E::EndedAgain | E::EndedBadly) => (Waiting, Await),
            _ => return None,
        })
    }

    /// Whether there is a process.
    pub fn has_process(self) -> bool {
        matches!(self, State::Starting | State::Running | State::Stopping | State::Restarting)
    }

    /// Whether nothing more happens to it unless somebody asks.
    pub fn is_down(self) -> bool {
        matches!(self, State::Stopped | State::Done | State::Failed)
    }

    /// Whether the wish to start it has been answered, well or badly.
    pub fn is_settled(self) -> bool {
        self.is_down() || matches!(self, State::Running | State::Backoff)
    }

    /// Whether others may build on it.
    pub fn is_up(self) -> bool {
        matches!(self, State::Running | State::Done)
    }
}

/// The event that follows from the end of a process.
pub fn ended(kind: Kind, restart: Restart, success: bool) -> Event {
    match (restart, success) {
        (Restart::Always, _) if kind == Kind::Daemon => Event::EndedAgain,
        (Restart::OnFailure | Restart::Always, false) => Event::EndedAgain,
        (_, true) => Event::EndedWell,
        (Restart::Never, false) => Event::EndedBadly,
    }
}

/// The event that a waiting service gets from the states of those before it, if any yet.
///
/// `None` among `requires` is a service that does not exist.
pub fn dependencies(
    requires: impl Iterator<Item = Option<State>>,
    mut after: impl Iterator<Item = State>,
) -> Option<Event> {
    let mut all_up = true;
    for state in requires {
        match state {
            None | Some(State::Failed | State::Stopped) => return Some(Event::DependencyFailed),
            Some(state) => all_up &= state.is_up(),
        }
    }
    (all_up && after.all(State::is_settled)).then_some(Event::DependenciesUp)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 9] = [
        State::Stopped,
        State::Waiting,
        State::Starting,
        State::Running,
        State::Done,
        State::Stopping,
        State::Restarting,
        State::Backoff,
        State::Failed,
    ];
    const EVENTS: [Event; 12] = [
        Event::Start,
        Event::Stop,
        Event::Restart,
        Event::DependenciesUp,
        Event::DependencyFailed,
        Event::Ready,
        Event::StartTimeout,
        Event::StopTimeout,
        Event::DelayOver,
        Event::EndedWell,
        Event::EndedAgain,
        Event::EndedBadly,
    ];

    fn every_pair() -> impl Iterator<Item = (State, Event, State, Action)> {
        STATES.into_iter().flat_map(|state| {
            EVENTS.into_iter().filter_map(move |event| {
                let (next, action) = state.after(event)?;
                Some((state, event, next, action))
            })
        })
    }

    #[test]
    fn a_process_is_made_only_where_there_is_none_and_signalled_only_where_there_is_one() {
        for (state, event, next, action) in every_pair() {
            let place = format!("{state:?} {event:?} → {next:?} {action:?}");
            match action {
                Action::Spawn => assert!(!state.has_process() && next.has_process(), "{place}"),
                Action::Terminate | Action::Kill => {
                    assert!(state.has_process() && next.has_process(), "{place}");
                }
                _ => {}
            }
        }
    }

    #[test]
    fn a_process_is_forgotten_only_when_it_has_ended() {
        for (state, event, next, action) in every_pair() {
            let ended = matches!(event, Event::EndedWell | Event::EndedAgain | Event::EndedBadly);
            let place = format!("{state:?} {event:?} → {next:?} {action:?}");
            assert_eq!(state.has_process() && !next.has_process(), ended, "{place}");
        }
    }

    #[test]
    fn the_end_of_a_process_is_heard_in_every_state_that_has_one() {
        for state in STATES {
            for event in [Event::EndedWell, Event::EndedAgain, Event::EndedBadly] {
                assert_eq!(state.after(event).is_some(), state.has_process(), "{state:?}");
            }
        }
    }

    #[test]
    fn stop_always_leads_down() {
        for state in STATES {
            let mut now = state;
            for event in [Event::Stop, Event::StopTimeout, Event::EndedAgain, Event::Stop] {
                now = now.after(event).map_or(now, |(next, _)| next);
            }
            assert!(now.is_down(), "{state:?} ends in {now:?}");
        }
    }

    #[test]
    fn start_always_leads_to_a_process_when_the_dependencies_are_there() {
        for state in STATES {
            let mut now = state;
            for event in [Event::Start, Event::EndedWell, Event::Start, Event::DependenciesUp] {
                now = now.after(event).map_or(now, |(next, _)| next);
            }
            assert!(now.has_process(), "{state:?} ends in {now:?}");
        }
    }

    #[test]
    fn every_waiting_or_paused_state_has_a_way_on() {
        for (_, _, next, action) in every_pair() {
            assert_eq!(action == Action::Await, next == State::Waiting);
            assert_eq!(action == Action::Delay, next == State::Backoff);
        }
    }

    #[test]
    fn policies() {
        use {Kind::*, Restart::*};
        let cases = [
            (Daemon, Always, true, Event::EndedAgain),
            (Daemon, Always, false, Event::EndedAgain),
            (Daemon, OnFailure, true, Event::EndedWell),
            (Daemon, OnFailure, false, Event::EndedAgain),
            (Daemon, Never, true, Event::EndedWell),
            (Daemon, Never, false, Event::EndedBadly),
            (Oneshot, OnFailure, true, Event::EndedWell),
            (Oneshot, OnFailure, false, Event::EndedAgain),
            (Oneshot, Never, true, Event::EndedWell),
            (Oneshot, Never, false, Event::EndedBadly),
        ];
        for (kind, restart, success, expected) in cases {
            assert_eq!(ended(kind, restart, success), expected, "{kind:?} {restart:?} {success}");
        }
    }

    #[test]
    fn what_comes_before() {
        use State::*;
        let check = |requires: &[Option<State>], after: &[State], expected| {
            let found = dependencies(requires.iter().copied(), after.iter().copied());
            assert_eq!(found, expected, "{requires:?} {after:?}");
        };
        check(&[], &[], Some(Event::DependenciesUp));
        check(&[Some(Running), Some(Done)], &[Failed, Stopped, Backoff], Some(Event::DependenciesUp));
        check(&[Some(Starting)], &[], None);
        check(&[Some(Backoff)], &[], None);
        check(&[], &[Waiting], None);
        check(&[None], &[Waiting], Some(Event::DependencyFailed));
        check(&[Some(Starting), Some(Failed)], &[], Some(Event::DependencyFailed));
    }
}
