//! A run of the lab: the system tests in every host at once, then the promises that need the lab itself.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Result;
use system_tests::{
    command::Invocation,
    lab::{Definition, Host, Image, Payload, Workshop, definition, image::TEMPLATES_IN_HOST, payload},
};

use crate::{
    Options,
    outcome::{Outcome, Outcomes, read_line, reasons},
    promises,
};

/// How long the system tests of one host may take before it is switched off.
const TESTS_LIMIT: Duration = Duration::from_secs(3300);
const ALL_TESTS_LIMIT: Duration = Duration::from_secs(4 * 3600);
/// How much slower than a real processor an emulated one may be.
const PATIENCE: &str = "8";

/// Runs it, and prints the table and the closing line.
pub fn run(workshop: &Workshop, payload: &Payload, options: &Options) -> Result<ExitCode> {
    let began = Instant::now();
    let names = names_of_promises(payload)?;
    let hosts: Vec<Definition> = definition::all()?.into_iter().filter(|host| options.all || host.default).collect();
    let mut images = Vec::new();
    for host in &hosts {
        images.push(Image::of(workshop, host, &payload.vsctl())?);
    }
    eprintln!("lab: images are ready after {} s", began.elapsed().as_secs());
    let mut outcomes = Outcomes::default();
    std::thread::scope(|scope| -> Result<()> {
        let started: Vec<_> = hosts
            .iter()
            .zip(&images)
            .map(|(host, image)| {
                let names = chosen(&names, host, options);
                // qemu ends with the thread that began it, so each host has one for its whole life.
                scope.spawn(move || system_tests(workshop, host, image, payload, &names, options))
            })
            .collect();
        for thread in started {
            let found = thread.join().map_err(|_| anyhow::anyhow!("a thread of the lab panicked"))?;
            outcomes.merge(found?);
        }
        Ok(())
    })?;
    outcomes.merge(promises::keep(workshop, payload, &hosts, &images, &options.filter)?);
    let (passed, failed, skipped) = outcomes.count();
    println!("\n{}\n", outcomes.table());
    print!("{}", outcomes.failures());
    println!("lab: {} s on {} hosts", began.elapsed().as_secs(), hosts.len());
    println!("lab: {passed} passed, {failed} failed, {skipped} skipped");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The names of all system tests, from the test binary itself.
fn names_of_promises(payload: &Payload) -> Result<Vec<String>> {
    let listed =
        Invocation::new(payload.tests()).args(["--list"]).env("VSOS_PROGRAMS", payload.programs()).succeed()?;
    let text = listed.text();
    let names = text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned);
    Ok(names.collect())
}

/// What of them is to be kept on a host.
fn chosen(names: &[String], host: &Definition, options: &Options) -> Vec<String> {
    let left_out = |name: &str| host.leave_out.iter().any(|part| name.contains(part.as_str()));
    let wanted = |name: &&String| {
        // What was asked for by name is kept wherever it is.
        let asked = !options.filter.is_empty();
        name.contains(&options.filter) && (options.all || asked || !left_out(name))
    };
    names.iter().filter(wanted).cloned().collect()
}

/// Boots a host and keeps the system tests in it. An error is one of the lab itself.
fn system_tests(
    workshop: &Workshop,
    definition: &Definition,
    image: &Image,
    payload: &Payload,
    names: &[String],
    options: &Options,
) -> Result<Outcomes> {
    let mut outcomes = Outcomes::default();
    if names.is_empty() {
        return Ok(outcomes);
    }
    let name = &definition.name;
    let began = Instant::now();
    let host = Host::boot(workshop, definition, image, payload, name)?;
    eprintln!("lab: {name} ({}) takes commands after {} s", host.kernel(), began.elapsed().as_secs());
    let command = format!(
        "cd / && VSOS_PROGRAMS={} VSOS_TEST_TEMPLATES={TEMPLATES_IN_HOST} \
         VSOS_TEST_PATIENCE={PATIENCE} VSOS_TEST_ONLY='{}' {} 2>&1",
        payload::PROGRAMS_IN_HOST,
        names.join(" "),
        payload::TESTS_IN_HOST
    );
    let limit = if options.all { ALL_TESTS_LIMIT } else { TESTS_LIMIT };
    let mut running = host.ssh(&command).limit(limit).spawn()?;
    let mut report = Vec::new();
    let done = running.wait_with_lines(|line| match read_line(line) {
        Some((promise, outcome)) => {
            println!("{:6.1} {name}: {line}", began.elapsed().as_secs_f64());
            outcomes.add(promise, name, outcome);
        }
        None => report.push(line.to_owned()),
    });
    for (promise, reason) in reasons(report.iter().map(String::as_str)) {
        // A test's own output may look like the title of another's.
        if names.iter().any(|chosen| chosen == promise) {
            outcomes.add(promise, name, Outcome::Failed(reason));
        }
    }
    let missing: Vec<&String> = names.iter().filter(|promise| !outcomes.has(promise, name)).collect();
    let (_, failed, _) = outcomes.count();
    if failed > 0 || !missing.is_empty() || done.is_err() {
        report.iter().for_each(|line| println!("{name}| {line}"));
    }
    if !missing.is_empty() {
        let why = done.err().map_or(String::new(), |error| error.to_string());
        println!("{name}: {} promises gave no result: {why}", missing.len());
        println!("{}", host.serial());
        missing.iter().for_each(|promise| outcomes.add(promise, name, Outcome::Failed(format!("no result: {why}"))));
    }
    Ok(outcomes)
}
