//! `vsctl`: parses the command line, runs one command, prints an error once.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Err(error) = kernel::process::shed_inherited() {
        eprintln!("vsctl: {:#}", anyhow::Error::from(error));
        return ExitCode::FAILURE;
    }
    let arguments: Vec<_> = std::env::args_os().collect();
    // Before anything of the command line is built: monitors stay for long and shall stay small.
    if arguments.get(1).is_some_and(|verb| verb == vsctl::monitor::VERB) {
        return vsctl::cli::run_monitor(&arguments[2..]);
    }
    if arguments.get(1).is_some_and(|verb| verb == vsctl::monitor::HEAL_VERB) {
        return vsctl::cli::run_heal(&arguments[2..]);
    }
    vsctl::cli::main(arguments)
}
