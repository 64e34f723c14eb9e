//! Whose turn it is: one server that reads without end does not keep others waiting.
//!
//! The kernel has one queue for all servers. Each answering thread takes the next request from it, and whether it answers
//! at once is decided here. While several servers ask, each has one answer made at a time; what it asks beyond that waits, and
//! one more thread answers those, a request of each waiting server in turn. So the kernel's queue is always taken from, and a
//! request of another server never finds more before it than what is just being made. A server that asks alone has all threads.
//!
//! Limit: shares out threads, not the time that an answer takes.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard};

/// Two servers that ask within this time are in each other's way.
const TOGETHER_MS: u64 = 100;

/// The requests that wait, and how many are being answered.
#[derive(Debug)]
pub struct Turns<T> {
    state: Mutex<State<T>>,
    came: Condvar,
}

#[derive(Debug)]
struct State<T> {
    /// By server, those that wait not included.
    answering: HashMap<u64, usize>,
    /// By server, the one whose turn comes next in front.
    waiting: VecDeque<(u64, VecDeque<T>)>,
    last: u64,
    changed_ms: u64,
}

impl<T> Default for Turns<T> {
    fn default() -> Turns<T> {
        let state = State { answering: HashMap::new(), waiting: VecDeque::new(), last: 0, changed_ms: 0 };
        Turns { state: Mutex::new(state), came: Condvar::new() }
    }
}

impl<T> Turns<T> {
    /// A request of `server` has come at `now_ms`. It comes back if the caller shall answer it, with [`Turns::answered`]
    /// after that; else it waits.
    pub fn ask(&self, server: u64, now_ms: u64, request: T) -> Option<T> {
        let mut state = self.state();
        if state.last != server {
            (state.last, state.changed_ms) = (server, now_ms);
        }
        let is_alone = now_ms.saturating_sub(state.changed_ms) >= TOGETHER_MS;
        let answering = state.answering.entry(server).or_default();
        if is_alone || *answering == 0 {
            *answering += 1;
            return Some(request);
        }
        match state.waiting.iter_mut().find(|(number, _)| *number == server) {
            Some((_, requests)) => requests.push_back(request),
            None => state.waiting.push_back((server, VecDeque::from([request]))),
        }
        drop(state);
        self.came.notify_one();
        None
    }

    /// A request that came back from [`Turns::ask`] is answered.
    pub fn answered(&self, server: u64) {
        let mut state = self.state();
        if let Some(answering) = state.answering.get_mut(&server) {
            *answering -= 1;
            if *answering == 0 {
                state.answering.remove(&server);
            }
        }
    }

    /// Waits for the next request that waits.
    pub fn next(&self) -> T {
        let mut state = self.state();
        loop {
            if let Some((server, mut requests)) = state.waiting.pop_front() {
                let request = requests.pop_front();
                if !requests.is_empty() {
                    state.waiting.push_back((server, requests));
                }
                if let Some(request) = request {
                    return request;
                }
            } else {
                state = self.came.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.state().waiting.is_empty()
    }

    /// Takes out what waits and is picked.
    pub fn take(&self, is_picked: impl Fn(&T) -> bool) -> Vec<T> {
        let mut state = self.state();
        let mut taken = Vec::new();
        for (_, requests) in &mut state.waiting {
            for request in std::mem::take(requests) {
                if is_picked(&request) { taken.push(request) } else { requests.push_back(request) }
            }
        }
        state.waiting.retain(|(_, requests)| !requests.is_empty());
        taken
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alone_a_server_has_all_threads() {
        let turns = Turns::default();
        // The first to come is a change, too.
        turns.ask(7, 1_000, "first");
        assert_eq!(turns.ask(7, 1_000, "a"), None);
        for request in ["b", "c", "d"] {
            assert_eq!(turns.ask(7, 1_000 + TOGETHER_MS, request), Some(request));
        }
        assert_eq!(turns.next(), "a");
    }

    #[test]
    fn together_each_has_one_and_the_others_get_in_between() {
        let turns = Turns::default();
        for _ in 0..100 {
            turns.ask(7, 1_000, "7");
        }
        // However long the queue of the one is, the other is answered at once.
        assert_eq!(turns.ask(8, 1_000, "8"), Some("8"));
        assert_eq!(turns.ask(8, 1_000, "8"), None);
        assert_eq!([(); 4].map(|()| turns.next()), ["7", "8", "7", "7"]);
        turns.answered(8);
        assert_eq!(turns.ask(8, 1_001, "8"), Some("8"));
        assert_eq!(turns.ask(8, 1_001, "8"), None);
        assert_eq!(turns.take(|request| *request == "7").len(), 99 - 3);
        assert!(!turns.is_empty());
        assert_eq!(turns.next(), "8");
        assert!(turns.is_empty());
    }
}
