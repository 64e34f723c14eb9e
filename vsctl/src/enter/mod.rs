//! Joins a running server: a program in all its namespaces and its cgroup, behind its limits, as one of its users.
//!
//! ```text
//! vsctl                          joiner                                   program
//!    │ a pty of the server's own devpts, or the caller's descriptors
//!    │ fork, into init's cgroup
//!    ├───────────────────────────►│ v1 cgroups, no host descriptor, new session keyring
//!    │                            │ all namespaces by init's pidfd, root of the server
//!    │                            │ bounding set, system-call filter
//!    │                            │ fork: pid namespace, sibling
//!    │◄──────────── "born" + pidfd├───────────────────────────────────────►│ session, terminal, user, directory
//!    │                            ✕                                        │ exec
//!    │◄────────────────────────────────────── the channel closes, or says why not
//!    │ carries bytes, signals and window sizes until it ends, and takes its status
//! ```
//!
//! The guest sees only the last process. When it appears it has given up all that the server does not have, and until
//! exec it is not dumpable: nobody inside can attach to it, or reach its memory, descriptors or program through /proc.

mod account;
pub mod console;
mod joiner;
mod own_copy;
mod program;
mod pty;
pub mod relay;
mod session;
mod target;
pub mod terminal;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use anyhow::Result;

use crate::name::Name;
use crate::site::Site;

pub use program::{PATH, variable};
pub use target::Target;

/// What to run inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// The user's shell, as a login shell.
    LoginShell,
    /// A program and its arguments; never empty.
    Command(Vec<OsString>),
}

/// Whether the program gets a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Terminal {
    /// When the caller's input and output are one.
    #[default]
    AsCaller,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// A wish to run a program inside.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Name or number of a user of the guest.
    pub user: String,
    /// What to run.
    pub program: Program,
    /// Variables beside the usual ones.
    pub environment: Vec<(String, String)>,
    /// Where to run it; the user's home when absent.
    pub directory: Option<PathBuf>,
    /// Whether it gets a terminal.
    pub terminal: Terminal,
}

/// The program cannot be executed: what shells answer with 126 or 127.
#[derive(Debug)]
pub struct CannotExecute {
    /// 126: it may not be executed; 127: there is none.
    pub code: i32,
    message: String,
}

impl CannotExecute {
    /// That `program` cannot be executed, and why; `code` is 126 or 127.
    pub fn new(code: i32, program: &str, why: impl fmt::Display) -> Self {
        Self::said(code, format!("cannot execute '{program}': {why}"))
    }

    /// The same, in words that another process has found.
    pub fn said(code: i32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl fmt::Display for CannotExecute {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.message)
    }
}

impl std::error::Error for CannotExecute {}

/// Runs a program in a server and waits for it. Returns its exit code; 128+N when signal N ended it.
///
/// # Errors
/// Exit 31 when the server does not run or is frozen; [`CannotExecute`]; what the kernel refuses.
pub fn run(site: &Site, name: &Name, wish: &Wish) -> Result<i32> {
    let target = Target::find(site, name)?;
    own_copy::leave_file(&target)?;
    let account = account::find(target.root(), name, &wish.user)?;
    let wiring = session::Wiring::new(&target, &account, wish.terminal)?;
    let signals = relay::Signals::block(wiring.is_terminal())?;
    let plan = joiner::Plan {
        site,
        target: &target,
        directory: wish.directory.clone(),
        program: program::prepare(&account, wish, wiring.is_terminal())?,
        account: &account,
        standard: wiring.inside(),
        is_terminal: wiring.is_terminal(),
    };
    match joiner::start(&plan, &signals)? {
        joiner::Begun::Runs(child) => wiring.carry(child, &signals),
        joiner::Begun::Interrupted(signal) => Ok(128 + signal),
    }
}
