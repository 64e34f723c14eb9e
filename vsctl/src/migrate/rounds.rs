//! When enough memory was sent ahead: what the pause will take, as far as the rounds so far tell.

use std::time::Duration;

/// A round that leaves more than this part of the one before is the last.
const WORTH_WHILE: f64 = 0.7;

/// As is one that leaves less than this part of what the pause takes in any case.
const NOT_WORTH_MORE: f64 = 0.25;

/// More is told of no pause.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// A round that was sent.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    /// When it began to be written, since the first did.
    pub began: Duration,
    /// How long CRIU took for it, the processes held for some of that.
    pub wrote: Duration,
    /// How long it took to send it, until it was on the target's disk.
    pub sent: Duration,
    /// How long all of it took, until the next can begin.
    pub took: Duration,
    /// Its length.
    pub bytes: u64,
    /// What has changed in files since they were sent: as much will be sent in the pause.
    pub files_bytes: u64,
    /// How long it takes to read those of which only blocks are sent.
    pub files_read: Duration,
    /// How long all of that took.
    pub files_took: Duration,
}

/// What one knows after a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// How long the server would stand still now.
    pub pause: Duration,
    /// How much memory the programs write anew in a second, in bytes; of the first round nobody knows.
    pub changes: Option<f64>,
    /// Whether another round would not make it shorter.
    pub is_over: bool,
}

/// All rounds so far.
#[derive(Debug, Default)]
pub struct Rounds {
    last: Option<Round>,
    least_wrote: Option<Duration>,
    sent: Duration,
    sent_bytes: u64,
}

impl Rounds {
    /// How much changes in a second, when `bytes` have changed from the beginning of the last round to `began`.
    pub fn changes(&self, began: Duration, bytes: u64) -> Option<f64> {
        let since = began.checked_sub(self.last?.began)?.as_secs_f64();
        (since > 0.0).then(|| bytes as f64 / since)
    }

    /// After `round`. As it is to the one before, so will be what has changed during it. What the pause takes without any memory is at least
    /// as long as CRIU has taken for the quickest of them, and there as long again.
    pub fn after(&mut self, round: Round) -> Outlook {
        let changes = self.changes(round.began, round.bytes);
        let left = self.last.map(|last| (round.bytes as f64 / last.bytes.max(1) as f64).min(1.0));
        let least = self.least_wrote.map_or(round.wrote, |least| least.min(round.wrote));
        self.sent += round.sent;
        self.sent_bytes += round.bytes;
        let memory = round.took.saturating_sub(least + round.files_took).as_secs_f64() * left.unwrap_or(1.0);
        // Of all rounds: what a small one takes is hardly for its bytes.
        let files = self.sent.as_secs_f64() * round.files_bytes as f64 / self.sent_bytes.max(1) as f64;
        let files = files + round.files_read.as_secs_f64();
        let fixed = 2.0 * least.as_secs_f64();
        (self.last, self.least_wrote) = (Some(round), Some(least));
        // A rate from next to nothing can be any.
        let pause = Duration::try_from_secs_f64(fixed + memory + files).unwrap_or(LONGEST).min(LONGEST);
        let is_over = left.is_some_and(|left| left > WORTH_WHILE || memory < NOT_WORTH_MORE * (fixed + files));
        Outlook { pause, changes, is_over }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn round(began_s: u32, wrote: Duration, took: Duration, bytes: u64) -> Round {
        Round {
            began: began_s * S,
            wrote,
            sent: took - wrote,
            took,
            bytes,
            files_bytes: 0,
            files_read: Duration::ZERO,
            files_took: Duration::ZERO,
        }
    }

    #[test]
    fn each_round_leaves_as_much_less_as_the_last() {
        let mut rounds = Rounds::default();
        let first = rounds.after(round(0, 2 * S, 32 * S, 1000));
        assert_eq!(first, Outlook { pause: 34 * S, changes: None, is_over: false });
        // 320 in 32 s; of 10 s, 9.5 of them for what changes, a third will be left.
        let second = rounds.after(round(32, S / 2, 10 * S, 320));
        assert_eq!(second.changes, Some(10.0));
        assert!((second.pause.as_secs_f64() - (1.0 + 9.5 * 0.32)).abs() < 0.001 && !second.is_over, "{second:?}");
        // What is left is less than what CRIU takes anyway.
        let third = rounds.after(round(42, S / 2, 7 * S / 10, 20));
        assert!(third.is_over && third.pause < 2 * S, "{third:?}");
    }

    #[test]
    fn what_changes_as_fast_as_it_is_sent_does_not_become_less() {
        let mut rounds = Rounds::default();
        rounds.after(round(0, S, 10 * S, 1000));
        assert!(rounds.after(round(10, S, 10 * S, 1000)).is_over);
    }

    #[test]
    fn files_that_changed_are_in_the_pause() {
        let mut rounds = Rounds::default();
        rounds.after(round(0, S, 11 * S, 1000));
        let with = Round { files_bytes: 500, ..round(11, S, 2 * S, 100) };
        assert!((rounds.after(with).pause.as_secs_f64() - (2.0 + 0.1 + 5.0)).abs() < 0.001);
        // A small round takes as long as a larger one, and says nothing of the rate.
        let small = Round { files_bytes: 500, ..round(13, S, 2 * S, 1) };
        assert!((6.9..7.6).contains(&rounds.after(small).pause.as_secs_f64()));
        // What is read for blocks is read again, however little of it has changed.
        let read = Round { files_read: S, files_took: S, ..round(14, S, 3 * S, 10) };
        let pause = rounds.after(read).pause.as_secs_f64();
        assert!((pause - (2.0 + 1.0 + 1.0)).abs() < 0.001, "{pause}");
        // None of it is memory: no more than that is known.
        let none = Rounds::default().after(Round { files_bytes: u64::MAX, ..round(0, S, S, 0) });
        assert!(none.pause >= 2 * S && none.pause <= LONGEST && !none.is_over);
    }
}
