//! Real links, addresses, routes and rules, in network namespaces that each test makes for itself.
//!
//! Nothing here touches the namespace that the tests were started in. They need root; without it each is listed as
//! ignored, with the reason.

#![forbid(unsafe_code)]

mod announcing;
mod fixture;
mod frames;
mod links;
mod rules;
mod spoofing;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    if std::env::var_os(links::ALONE).is_some() {
        return links::alone();
    }
    let arguments = Arguments::from_args();
    let parts = [links::trials(), rules::trials(), spoofing::trials(), frames::trials(), announcing::trials()];
    let trials = parts.into_iter().flatten().collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A test in a thread that lives in a network namespace of its own, which dies with it.
fn trial(name: &str, test: fn()) -> Trial {
    let root = nix::unistd::geteuid().is_root();
    let run = move || -> Result<(), Failed> { fixture::apart(test).map_err(Failed::from) };
    let trial = Trial::test(name, run).with_ignored_flag(!root);
    if root { trial } else { trial.with_kind("needs root") }
}
