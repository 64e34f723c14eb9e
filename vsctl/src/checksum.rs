//! Checksums of what lies on a disk or passes through a connection, so that damage is found.
//!
//! XXH3 with 128 bits: a server stands still while its memory is summed, and this takes a fraction of the time that a cryptographic
//! hash takes where the processor has no instructions for one. It finds damage, not forgery: a guest that made two images alike would
//! harm itself only, and who sends a server is who ssh says it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

/// What is read at once, in bytes.
const PIECE: usize = 256 << 10;

/// Of a piece that is at hand, as a number.
pub fn of_piece(piece: &[u8]) -> u128 {
    XxHash3_128::oneshot(piece)
}

/// How much there was, and what of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sum {
    /// Length.
    pub bytes: u64,
    /// XXH3 with 128 bits, in hexadecimal digits.
    pub xxh3: String,
}

impl Sum {
    /// Of a file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(file: &Path) -> io::Result<Self> {
        Self::of_rest(file, Summing::default())
    }

    /// Of a file of which the front was summed when it was not longer. One that is shorter by now is summed anew.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of_rest(file: &Path, front: Summing) -> io::Result<Self> {
        let file = File::open(file)?;
        let is_longer = file.metadata()?.len() >= front.bytes;
        let mut summing = if is_longer { front } else { Summing::default() };
        summing.go_on(&file, || true)?;
        Ok(summing.sum())
    }
}

/// A sum in the making.
#[derive(Default)]
pub struct Summing {
    bytes: u64,
    hash: XxHash3_128,
}

impl Summing {
    /// What comes next.
    pub fn add(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        self.hash.write(piece);
    }

    /// What `file` has behind what has come, to its end, or until a piece after which it is not to be `more`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn go_on(&mut self, file: &File, more: impl Fn() -> bool) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            match file.read_at(&mut piece, self.bytes) {
                Ok(0) => return Ok(()),
                Ok(length) => self.add(&piece[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if !more() {
                return Ok(());
            }
        }
    }

    /// How many bytes have come.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Of all that has come.
    pub fn sum(&self) -> Sum {
        Sum { bytes: self.bytes, xxh3: format!("{:032x}", self.hash.finish_128()) }
    }
}

impl std::fmt::Debug for Summing {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Summing({} bytes)", self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(content: &[u8]) -> Sum {
        let mut summing = Summing::default();
        summing.add(content);
        summing.sum()
    }

    /// As `xxhsum -H2` says, so that another build reads what this one wrote.
    #[test]
    fn it_is_xxh3_of_128_bits() {
        assert_eq!(sum(b"").xxh3, "99aa06d3014798d86001c324468d497f");
        assert_eq!(sum(b"abc").xxh3, "06b05ab6733a618578af5f94892f3950");
    }

    #[test]
    fn pieces_do_not_matter_and_each_bit_does() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        let mut content: Vec<u8> = (0..3 * PIECE + 77).map(|n| (n % 251) as u8).collect();
        std::fs::write(&file, &content).unwrap();
        let of_file = Sum::of(&file).unwrap();
        assert_eq!(of_file, sum(&content));
        assert_eq!(of_file.bytes, content.len() as u64);
        content[2 * PIECE] ^= 1;
        assert_ne!(of_file, sum(&content));
    }
}
