//! A run of the lab: the system tests in every host at once, and then the promises that need the lab itself, from when the first host is done.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use system_tests::{
    command::{Invocation, repeated},
    lab::{Definition, Host, Image, Payload, Workshop, definition, image::TEMPLATES_IN_HOST, payload},
};

use crate::{
    Options,
    outcome::{Outcome, Outcomes, read_line, reasons},
    promises::Queue,
};

/// How long the system tests of one host may take before it is switched off.
const TESTS_LIMIT: Duration = Duration::from_secs(3300);
const ALL_TESTS_LIMIT: Duration = Duration::from_secs(4 * 3600);
/// How much slower than a real processor an emulated one may be.
const PATIENCE: &str = "8";
/// With all hosts and tests: 50 suspends in a row, 20 migrations.
const ALL_REPEATS: u32 = 5;

/// Runs it, and prints the table and the closing line.
pub fn run(workshop: &Workshop, payload: &Payload, options: &Options) -> Result<ExitCode> {
    let began = Instant::now();
    let names = names_of_promises(payload)?;
    let hosts: Vec<Definition> = definition::all()?.into_iter().filter(|host| options.all || host.default).collect();
    for host in &hosts {
        if let Some(part) = unknown_part(&names, host) {
            bail!(
                "{}: leave_out or but_keep in hosts.toml has {part:?}, which is in the name of no promise",
                host.name
            );
        }
    }
    let mut images = Vec::new();
    for host in &hosts {
        images.push(Image::of(workshop, host, &payload.vsctl())?);
    }
    eprintln!("lab: images are ready after {} s", began.elapsed().as_secs());
    let mut outcomes = Outcomes::default();
    let promises = Queue::of((workshop, payload), hosts.iter().zip(&images), &options.filter, repeats(options));
    std::thread::scope(|scope| -> Result<()> {
        let started: Vec<_> = hosts
            .iter()
            .zip(&images)
            .map(|(host, image)| {
                let (names, promises) = (chosen(&names, host, options), &promises);
                // qemu ends with the thread that began it, so each host has one for its whole life.
                scope.spawn(move || {
                    let found = system_tests(workshop, host, image, payload, &names, options)?;
                    promises.keep();
                    anyhow::Ok(found)
                })
            })
            .collect();
        for thread in started {
            let found = thread.join().map_err(|_| anyhow::anyhow!("a thread of the lab panicked"))?;
            outcomes.merge(found?);
        }
        Ok(())
    })?;
    outcomes.merge(promises.outcomes());
    let (passed, failed, skipped) = outcomes.count();
    println!("\n{}\n", outcomes.table());
    print!("{}{}", outcomes.failures(), outcomes.remarks());
    println!("lab: {} s on {} hosts", began.elapsed().as_secs(), hosts.len());
    println!("lab: {passed} passed, {failed} failed, {skipped} skipped");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How much more often than usual promises do again what may leave something behind (`VSOS_TEST_REPEATS`).
fn repeats(options: &Options) -> u32 {
    if options.all { repeated(ALL_REPEATS) } else { repeated(1) }
}

/// The names of all system tests, from the test binary itself.
fn names_of_promises(payload: &Payload) -> Result<Vec<String>> {
    let listed =
        Invocation::new(payload.tests()).args(["--list"]).env("VSOS_PROGRAMS", payload.programs()).succeed()?;
    let text = listed.text();
    let names = text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned);
    Ok(names.collect())
}

/// A part of a name that a host's definition has, and no promise.
fn unknown_part<'a>(names: &[String], host: &'a Definition) -> Option<&'a String> {
    let is_known = |part: &str| names.iter().any(|name| name.contains(part));
    host.leave_out.iter().chain(&host.but_keep).find(|part| !is_known(part))
}

/// What of them is to be kept on a host.
fn chosen(names: &[String], host: &Definition, options: &Options) -> Vec<String> {
    let has = |name: &str, parts: &[String]| parts.iter().any(|part| name.contains(part.as_str()));
    let left_out = |name: &str| has(name, &host.leave_out) && !has(name, &host.but_keep);
    let wanted = |name: &&String| {
        // What was asked for by name is kept wherever it is.
        let asked = !options.filter.is_empty();
        name.contains(&options.filter) && (options.all || asked || !left_out(name))
    };
    names.iter().filter(wanted).cloned().collect()
}

/// Boots a host and keeps the system tests in it. When its kernel hangs, another host is made in its place, once, for the
/// promises that gave no result; the one under way is among them. An error is one of the lab itself.
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
    let end = Instant::now() + if options.all { ALL_TESTS_LIMIT } else { TESTS_LIMIT };
    let boot = |place: &str| -> Result<Host> {
        let began = Instant::now();
        let host = Host::boot(workshop, definition, image, payload, place)?;
        eprintln!("lab: {name} ({}) takes commands after {} s", host.kernel(), began.elapsed().as_secs());
        Ok(host)
    };
    let mut host = boot(name)?;
    let mut ended = keep_in(&host, names, repeats(options), end, &mut outcomes);
    let left = outcomes.missing(names, name);
    if let (Some(said), Some(first)) = (host.hang(), left.first()) {
        let remark = format!("{name} hung in {first}, and was switched on again for {} promises\n{said}", left.len());
        println!("{remark}");
        outcomes.remark(remark);
        outcomes.explain(name, "why was not said before its host hung");
        // With a disk of its own: what a kernel leaves that stops anywhere is no host as users have them.
        drop(host);
        match boot(&format!("{name}-again")) {
            Ok(again) => host = again,
            Err(error) => {
                fail(&left, name, &format!("it did not come up again: {error:#}"), &mut outcomes);
                return Ok(outcomes);
            }
        }
        ended = keep_in(&host, &left, repeats(options), end, &mut outcomes);
    }
    let missing = outcomes.missing(names, name);
    if !missing.is_empty() {
        let why = match host.hang() {
            Some(said) => format!("its host hung again\n{said}"),
            None => ended.err().map_or(String::new(), |error| error.to_string()),
        };
        println!("{}", host.serial());
        fail(&missing, name, &why, &mut outcomes);
    }
    Ok(outcomes)
}

/// Keeps the promises `names` in a host, for as long as there is time and its kernel is at work. The error is why not all may have
/// a result.
fn keep_in(host: &Host, names: &[String], repeats: u32, end: Instant, outcomes: &mut Outcomes) -> Result<()> {
    let name = host.name();
    let began = Instant::now();
    let command = format!(
        "cd / && VSOS_PROGRAMS={} VSOS_TEST_TEMPLATES={TEMPLATES_IN_HOST} \
         VSOS_TEST_PATIENCE={PATIENCE} VSOS_TEST_REPEATS={} VSOS_TEST_ONLY='{}' {} 2>&1",
        payload::PROGRAMS_IN_HOST,
        repeats,
        names.join(" "),
        payload::TESTS_IN_HOST
    );
    let mut running = host.ssh(&command).limit(end.saturating_duration_since(began)).spawn()?;
    let mut report = Vec::new();
    let read = |line: &str| match read_line(line) {
        Some((promise, outcome)) => {
            println!("{:6.1} {name}: {line}", began.elapsed().as_secs_f64());
            outcomes.add(promise, name, outcome);
        }
        None => report.push(line.to_owned()),
    };
    let done = running.wait_with_lines(read, || host.hang());
    for (promise, reason) in reasons(report.iter().map(String::as_str)) {
        // A test's own output may look like the title of another's.
        if names.iter().any(|chosen| chosen == promise) {
            outcomes.add(promise, name, Outcome::Failed(reason));
        }
    }
    let (_, failed, _) = outcomes.count();
    if failed > 0 || done.is_err() || !outcomes.missing(names, name).is_empty() {
        report.iter().for_each(|line| println!("{name}| {line}"));
    }
    done.map(drop)
}

/// Counts promises without a result as failed.
fn fail(missing: &[String], host: &str, why: &str, outcomes: &mut Outcomes) {
    println!("{host}: {} promises gave no result: {why}", missing.len());
    missing.iter().for_each(|promise| outcomes.add(promise, host, Outcome::Failed(format!("no result: {why}"))));
}
