//! The system tests: what a user was promised, kept on this host. See the harness in `system_tests`.
//!
//! Run by `make system`, as root, with the programs built; `make system T=reboot` keeps those with "reboot" in a name.

#![forbid(unsafe_code)]

use std::process::ExitCode;

#[path = "system/lifecycle.rs"]
mod lifecycle;

fn main() -> ExitCode {
    let areas = [lifecycle::promises()];
    system_tests::promise::run(areas.into_iter().flatten().collect())
}
