//! The system tests: what a user was promised, kept on this host. See the harness in `system_tests`.
//!
//! Run by `make system`, as root, with the programs built; `make system T=reboot` keeps those with "reboot" in a name.

#![forbid(unsafe_code)]

use std::process::ExitCode;

// One file per area. In this order they run, the plain before the strange.
#[path = "system/bad_input.rs"]
mod bad_input;
#[path = "system/callers.rs"]
mod callers;
#[path = "system/checkpoint.rs"]
mod checkpoint;
#[path = "system/console_enter_exec.rs"]
mod console_enter_exec;
#[path = "system/consumers.rs"]
mod consumers;
#[path = "system/differential.rs"]
mod differential;
#[path = "system/faults.rs"]
mod faults;
#[path = "system/guest_view.rs"]
mod guest_view;
#[path = "system/hostile.rs"]
mod hostile;
#[path = "system/lifecycle.rs"]
mod lifecycle;
#[path = "system/migrate.rs"]
mod migrate;
#[path = "system/network.rs"]
mod network;
#[path = "system/newcomer.rs"]
mod newcomer;
#[path = "system/readers.rs"]
mod readers;
#[path = "system/security.rs"]
mod security;
#[path = "system/statistics.rs"]
mod statistics;
#[path = "system/survivors.rs"]
mod survivors;
#[path = "system/system_calls.rs"]
mod system_calls;
#[path = "system/templates.rs"]
mod templates;
#[path = "system/tree.rs"]
mod tree;
#[path = "system/vsinit.rs"]
mod vsinit;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Elsewhere: in a server, where a promise has pushed this program, or on a host of the lab.
    let face = match arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        Some(("survivor", rest)) => Some(system_tests::survivor::run(rest)),
        Some(("dialogue", rest)) => Some(system_tests::dialogue::run(rest)),
        _ => None,
    };
    if let Some(ended) = face {
        return match ended {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error:#}", arguments[0]);
                ExitCode::FAILURE
            }
        };
    }
    tree::work_in_threads();
    let areas = [
        lifecycle::promises(),
        guest_view::promises(),
        statistics::promises(),
        consumers::promises(),
        differential::promises(),
        system_calls::promises(),
        network::promises(),
        security::promises(),
        hostile::promises(),
        console_enter_exec::promises(),
        templates::promises(),
        vsinit::promises(),
        bad_input::promises(),
        callers::promises(),
        faults::promises(),
        checkpoint::promises(),
        tree::promises(),
        survivors::promises(),
        migrate::promises(),
        readers::promises(),
        newcomer::promises(),
    ];
    system_tests::promise::run(areas.into_iter().flatten().collect())
}
