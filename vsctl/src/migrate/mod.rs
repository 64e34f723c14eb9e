//! Migration: a server moves to another host, and is never on both to run (`docs/migration.md`).
//!
//! ```text
//! source  offer ─► prepare ─► files ─► pause ─► changes ─► whole ───────────► (restore) ────► moved ─► commit ───────► start ─► remove
//! target  checked    ready    arrived           arrived    on its disk: incoming  all there, still     its own: committed  started
//!
//! With post-copy, memory goes from `(restore)` on until `remove` waits for the last of it.
//! ```

mod alive;
mod blocks;
mod changes;
mod check;
mod files;
mod ladder;
mod link;
mod pages;
mod passes;
mod patches;
mod processes;
mod rounds;
mod source;
mod target;
pub mod wire;

pub use check::faults_are_told;
pub use ladder::{Rung, climb_down};
pub use source::{Found, Memory, Pause, abort, go, proceed, try_out};
pub use target::receive;

/// The command that is run on the other host.
pub const VERB: &str = "migrate-receive";
