//! The texts of open files: what a reader got the beginning of, it gets the rest of.
//!
//! Limit: a memory, not a promise. A handle that is not known here (of an earlier worker, or pushed out) is
//! answered from a new text, see [`resume`].

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Separate locks, so that readers on several CPUs do not meet.
const SHARDS: usize = 16;

/// Texts per shard; a guest that opens more files than that at once gets new texts for the oldest.
const TEXTS_MAX: usize = 256;

/// Buffers kept for the next text, per shard.
const SPARE_MAX: usize = 8;

#[derive(Debug, Default)]
struct Shard {
    texts: HashMap<u64, String>,
    spare: Vec<String>,
}

/// The texts by file handle.
#[derive(Debug)]
pub struct Texts {
    next: AtomicU64,
    shards: [Mutex<Shard>; SHARDS],
}

impl Texts {
    /// No texts. Handles count up from `first`: take the clock, so that two workers never give out the same.
    pub fn new(first: u64) -> Texts {
        Texts { next: AtomicU64::new(first), shards: Default::default() }
    }

    /// A new handle.
    pub fn handle(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Keeps a copy of `text` for `handle`, in place of what was there.
    pub fn keep(&self, handle: u64, text: &str) {
        let mut shard = self.shard(handle);
        if shard.texts.len() >= TEXTS_MAX && !shard.texts.contains_key(&handle) {
            // The lowest handle is the oldest.
            if let Some(oldest) = shard.texts.keys().min().copied() {
                shard.texts.remove(&oldest);
            }
        }
        let spare = shard.texts.remove(&handle).or_else(|| shard.spare.pop());
        let mut kept = spare.unwrap_or_default();
        kept.clear();
        kept.push_str(text);
        shard.texts.insert(handle, kept);
    }

    /// Puts the part of the text from `offset`, at most `size` bytes, in place of `out`; false if there is no text.
    pub fn part(&self, handle: u64, offset: u64, size: u32, out: &mut Vec<u8>) -> bool {
        let shard = self.shard(handle);
        let Some(text) = shard.texts.get(&handle) else {
            return false;
        };
        out.clear();
        out.extend_from_slice(slice(text.as_bytes(), offset, size));
        true
    }

    /// Forgets the text of a closed file.
    pub fn close(&self, handle: u64) {
        let mut shard = self.shard(handle);
        if let Some(text) = shard.texts.remove(&handle) {
            if shard.spare.len() < SPARE_MAX {
                shard.spare.push(text);
            }
        }
    }

    fn shard(&self, handle: u64) -> std::sync::MutexGuard<'_, Shard> {
        let shard = &self.shards[handle as usize % SHARDS];
        shard.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The bytes from `offset`, at most `size`; empty beyond the end.
pub fn slice(text: &[u8], offset: u64, size: u32) -> &[u8] {
    let rest = usize::try_from(offset).ok().and_then(|offset| text.get(offset..)).unwrap_or_default();
    &rest[..rest.len().min(size as usize)]
}

/// What a reader gets who had the first `offset` bytes of a text that is lost, from a new text.
///
/// Most readers take all in one piece and then ask for more until there is none. If the new text is a digit
/// longer, a few stray bytes must not be handed to them as one more line: within the last line is the end.
pub fn resume(text: &[u8], offset: u64, size: u32) -> &[u8] {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let last_line = body.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
    if offset > last_line as u64 { &[] } else { slice(text, offset, size) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_paged_and_forgotten() {
        let texts = Texts::new(100);
        let handle = texts.handle();
        let mut out = vec![1];
        assert!(!texts.part(handle, 0, 10, &mut out));
        texts.keep(handle, "abcdef");
        assert!(texts.part(handle, 2, 3, &mut out) && out == b"cde");
        assert!(texts.part(handle, 6, 3, &mut out) && out.is_empty());
        assert!(texts.part(handle, u64::MAX, 3, &mut out) && out.is_empty());
        texts.close(handle);
        assert!(!texts.part(handle, 0, 10, &mut out));
    }

    #[test]
    fn memory_is_bounded() {
        let texts = Texts::new(0);
        for _ in 0..100_000 {
            texts.keep(texts.handle(), "x");
        }
        let kept: usize = texts.shards.iter().map(|shard| shard.lock().unwrap().texts.len()).sum();
        assert_eq!(kept, SHARDS * TEXTS_MAX);
    }

    #[test]
    fn a_lost_text_resumes_at_lines_and_ends_cleanly() {
        let text = b"first 10\nlast 100\n";
        // Had "first 10\nlast 99\n", 17 bytes, and asks for the end.
        assert_eq!(resume(text, 17, 100), b"");
        assert_eq!(resume(text, 9, 100), b"last 100\n");
        assert_eq!(resume(text, 4, 100), b"t 10\nlast 100\n");
        assert_eq!(resume(b"1.00 2.00\n", 9, 100), b"");
        assert_eq!(resume(b"", 5, 100), b"");
    }
}
