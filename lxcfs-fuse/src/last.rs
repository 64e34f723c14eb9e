//! The last good texts of a server's files, for when the kernel keeps a reading of its figures waiting.
//!
//! A control group's files can take long: the kernel sums up all CPUs and all groups below, under locks that others hold.
//! What waits for that is answered after [`DEADLINE_MS`] with what the file said last, and until the kernel has answered
//! all others that read a file of this server are, at once.
//!
//! Limits: a text is kept at most once a second, and all together in at most 512 KiB: beyond that, and where a file was
//! never read before, there is none.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::inode::At;

/// How long a reading may take before it is answered with the last text.
pub const DEADLINE_MS: u64 = 1_000;

/// How old a text may be before it is kept anew.
const FRESH_MS: u64 = 1_000;

/// What the texts of all servers may take.
const TEXTS_MAX_BYTES: usize = 512 << 10;

/// What they take now.
static TEXTS_BYTES: AtomicUsize = AtomicUsize::new(0);

/// The texts of one server.
#[derive(Debug, Default)]
pub struct LastTexts {
    texts: Mutex<Vec<(At, Text)>>,
    /// Readings that are overdue and have not come back.
    overdue: AtomicUsize,
}

#[derive(Debug)]
struct Text {
    text: Box<str>,
    made_ms: u64,
}

impl Text {
    /// A copy, if there is room.
    fn of(text: &str, made_ms: u64) -> Option<Text> {
        let before = TEXTS_BYTES.fetch_add(text.len(), Ordering::Relaxed);
        // Dropped at once, it gives back what it has not got.
        let copy = Text { text: if before + text.len() <= TEXTS_MAX_BYTES { text.into() } else { "".into() }, made_ms };
        TEXTS_BYTES.fetch_sub(text.len() - copy.text.len(), Ordering::Relaxed);
        (!copy.text.is_empty()).then_some(copy)
    }
}

impl Drop for Text {
    fn drop(&mut self) {
        TEXTS_BYTES.fetch_sub(self.text.len(), Ordering::Relaxed);
    }
}

impl LastTexts {
    /// Keeps what the file `at` said at `now_ms`.
    pub fn keep(&self, at: At, text: &str, now_ms: u64) {
        let mut texts = self.texts();
        if let Some(known) = texts.iter().position(|(file, _)| *file == at) {
            if now_ms.saturating_sub(texts[known].1.made_ms) < FRESH_MS {
                return;
            }
            // The old one makes room first.
            texts.swap_remove(known);
        }
        texts.extend(Text::of(text, now_ms).map(|text| (at, text)));
    }

    /// A reading of one of its files is overdue.
    pub fn begin_overdue(&self) {
        self.overdue.fetch_add(1, Ordering::Relaxed);
    }

    /// A reading that was overdue has come back.
    pub fn end_overdue(&self) {
        self.overdue.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether any of its readings is overdue.
    pub fn has_overdue(&self) -> bool {
        self.overdue.load(Ordering::Relaxed) > 0
    }

    /// Puts what the file said last in place of `out`; false if nothing is kept.
    pub fn text(&self, at: At, out: &mut String) -> bool {
        let texts = self.texts();
        let kept = texts.iter().find(|(file, _)| *file == at);
        if let Some((_, kept)) = kept {
            out.clear();
            out.push_str(&kept.text);
        }
        kept.is_some()
    }

    /// Forgets the texts, as of a server that nobody reads.
    pub fn clear(&self) {
        self.texts().clear();
    }

    fn texts(&self) -> MutexGuard<'_, Vec<(At, Text)>> {
        self.texts.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(name: &str) -> At {
        At::default().child("proc".as_ref()).and_then(|proc| proc.child(name.as_ref())).unwrap()
    }

    #[test]
    fn the_last_text_of_a_second_is_kept() {
        let last = LastTexts::default();
        let (meminfo, stat) = (at("meminfo"), at("stat"));
        let mut out = "x".to_owned();
        assert!(!last.text(meminfo, &mut out) && out == "x");
        last.keep(meminfo, "one", 1_000);
        last.keep(meminfo, "two", 1_999);
        assert!(last.text(meminfo, &mut out) && out == "one");
        last.keep(meminfo, "three", 2_000);
        assert!(last.text(meminfo, &mut out) && out == "three" && !last.text(stat, &mut out));
        last.clear();
        assert!(!last.text(meminfo, &mut out));
    }

    #[test]
    fn a_server_is_overdue_until_all_its_readings_have_come_back() {
        let last = LastTexts::default();
        last.begin_overdue();
        last.begin_overdue();
        last.end_overdue();
        last.clear();
        assert!(last.has_overdue());
        last.end_overdue();
        assert!(!last.has_overdue());
    }

    #[test]
    fn memory_is_bounded() {
        let long = "x".repeat(TEXTS_MAX_BYTES / 10);
        let servers: Vec<LastTexts> = (0..20).map(|_| LastTexts::default()).collect();
        servers.iter().for_each(|last| last.keep(at("stat"), &long, 0));
        let mut out = String::new();
        let kept = servers.iter().filter(|last| last.text(at("stat"), &mut out)).count();
        assert!((1..=10).contains(&kept), "{kept}");
        drop(servers);
        // Other tests keep little.
        assert!(TEXTS_BYTES.load(Ordering::Relaxed) < TEXTS_MAX_BYTES / 10);
    }
}
