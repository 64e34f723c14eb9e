//! Migration: a server moves to another host, and is never on both to run (`docs/migration.md`).
//!
//! ```text
//! source  offer ─► prepare ─► pause ─► volume ──────────► (restore) ──────────────► moved ─► commit ──────────► start ─► remove
//! target  checked    ready             all on its disk: incoming  whole, and still           its own: committed  started
//! ```

mod check;
mod files;
mod link;
mod processes;
mod source;
mod target;
pub mod wire;

pub use source::{Found, Pause, abort, go, proceed, try_out};
pub use target::receive;

/// The command that is run on the other host.
pub const VERB: &str = "migrate-receive";
