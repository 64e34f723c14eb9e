//! For comparison only: peers that run one command in a fresh container, without a network and without limits.

use std::{fs, time::Duration};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use system_tests::{command::Invocation, sample::Sample};

use crate::{interrupt::Interrupt, ours::Ours, report::Report};

/// Measures those that are installed.
pub fn measure(ours: &Ours, rounds: usize, interrupt: &Interrupt, report: &mut Report) -> Result<()> {
    let bundle = tempfile::Builder::new().prefix("vsosbench-").tempdir_in("/var/tmp")?;
    let root = bundle.path().join("rootfs");
    Invocation::new("cp").args(["-a"]).args([&ours.guest(), &root]).succeed()?;
    for (name, version) in [("crun", "--version"), ("systemd-nspawn", "--version")] {
        if Invocation::new(name).args([version]).succeed().is_err() {
            report.note(format!("{name} is not installed"));
            continue;
        }
        let once = || -> Result<Duration> {
            interrupt.check()?;
            let call = match name {
                "crun" => {
                    bundle_config(bundle.path())?;
                    Invocation::new("crun").args(["run", "-b"]).args([bundle.path()]).args(["vsosbench"])
                }
                _ => Invocation::new("systemd-nspawn")
                    .args(["--quiet", "--register=no", "--keep-unit", "--pipe", "-D"])
                    .args([&root])
                    .args(["/bin/true"]),
            };
            Ok(call.succeed()?.took)
        };
        let mut sample = Sample::default();
        let measured = (0..rounds.min(10)).try_for_each(|_| once().map(|took| sample.add(took)));
        match measured {
            Ok(()) => report.note(format!(
                "{name}, one `true` in a fresh container, no network: {:.1} ms",
                sample.median().unwrap_or_default()
            )),
            // A peer that does not run here is no reason to lose our own figures.
            Err(error) => report.note(format!("{name} does not run here: {}", first_line(&error))),
        }
    }
    Ok(())
}

/// An error on one line, without the command that it came from.
pub fn first_line(error: &anyhow::Error) -> String {
    format!("{error:#}").lines().filter(|line| !line.starts_with('$')).take(3).collect::<Vec<_>>().join(" ")
}

/// The standard OCI configuration, with `true` for a command and no terminal.
fn bundle_config(bundle: &std::path::Path) -> Result<()> {
    let file = bundle.join("config.json");
    if file.exists() {
        return Ok(());
    }
    Invocation::new("sh").args(["-c", "cd \"$1\" && exec crun spec", "sh"]).args([bundle]).succeed()?;
    let mut config: Value = serde_json::from_slice(&fs::read(&file)?).context("read crun's configuration")?;
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(["/bin/true"]);
    fs::write(&file, serde_json::to_vec_pretty(&config)?)?;
    Ok(())
}
