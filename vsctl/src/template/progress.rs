//! How long work tells where it is. What a terminal makes of it is the command line's matter.

/// Hears of the phases of a build or an import.
pub trait Progress {
    /// A new phase begins; `total_bytes` where the end can be foreseen.
    fn phase(&mut self, what: &str, total_bytes: Option<u64>);
    /// So much of the phase is done, in bytes since its beginning.
    fn advance(&mut self, done_bytes: u64);
    /// How something went.
    fn note(&mut self, what: &str);
    /// Something that the user should know and that stops nothing.
    fn warn(&mut self, what: &str);
}

/// Hears and says nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn phase(&mut self, _what: &str, _total_bytes: Option<u64>) {}
    fn advance(&mut self, _done_bytes: u64) {}
    fn note(&mut self, _what: &str) {}
    fn warn(&mut self, _what: &str) {}
}
