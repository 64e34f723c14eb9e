//! PID 1 of a virtual server, and the command that talks to it.
//!
//! As PID 1 it finds a handover from the manager on descriptor 3, makes the guest around itself,
//! and then either stays and supervises the guest's services or lets the guest's own init take
//! over. Called by anybody else it is the client of a running one.
//!
//! It is linked statically and never asks the C library about names: no file of the guest is ever
//! loaded into it. After the boot nothing makes it exit but the end of the server.

#![forbid(unsafe_code)]

mod client;
mod console_log;
mod exec;
mod failure;
mod last_resort;
mod order;
mod power;
mod prepare;
mod service;
mod state;
mod supervise;

use std::os::fd::{AsFd, RawFd};
use std::process::ExitCode;

use init::handover::{self, Handover, Role, word};
use kernel::channel::Channel;
use kernel::process::{adopt_descriptor, close_from};
use kernel::seccomp::Listener;

use failure::{During, Failure, Result, chain};
use supervise::Supervisor;

fn main() -> ExitCode {
    console_log::set_up();
    if std::process::id() != 1 {
        return client::run();
    }
    match boot() {
        // What booting had on the stack is gone by now: it would stay for the server's life.
        Ok(mut supervisor) => supervisor.run(),
        Err(error) => log::error!("{}", chain(&error)),
    }
    ExitCode::FAILURE
}

/// The story of a server, up to the words that the monitor waits for. Returns when there is something to supervise.
#[inline(never)]
fn boot() -> Result<Supervisor> {
    let document = adopt_descriptor(handover::DESCRIPTOR).during(|| "find the handover on descriptor 3".into())?;
    let handover = Handover::read(document).during(|| "take over".into())?;
    let channel = adopt_descriptor(handover.channel).map(Channel::from);
    let channel = channel.during(|| "take the monitor's channel".into())?;
    live(handover, &channel).inspect_err(|error| {
        let message = format!("{}{}", word::FAILED_PREFIX, chain(error));
        if let Err(error) = channel.send(message.as_bytes(), &[]) {
            log::error!("cannot tell the monitor: {error}");
        }
    })
}

fn live(handover: Handover, channel: &Channel) -> Result<Supervisor> {
    // First of all: whatever else the host left open here is none of the guest's business.
    close_from(3, &expected(&handover)).during(|| "close the host's descriptors".into())?;
    let prepared = prepare::prepare(&handover)?;
    say(channel, word::PREPARED, &prepared.descriptors())?;
    wait_for_network(channel)?;
    // Last, because preparing takes rights that the guest does not get.
    let listener = prepare::confine(&handover)?;
    // Called once, and drops the listener: nobody inside is to have it.
    let running = || running(channel, listener);
    match &handover.role {
        Role::Exec { argv } => match exec::take_over(argv, &handover, prepared, running)? {},
        Role::Supervise => supervise(Supervisor::start_services, handover, prepared, running),
        Role::Rescue => supervise(Supervisor::start_rescue, handover, prepared, running),
    }
}

fn supervise(
    start: fn(&mut Supervisor),
    handover: Handover,
    prepared: prepare::Prepared,
    running: impl FnOnce() -> Result<()>,
) -> Result<Supervisor> {
    prepare::take_console(true)?;
    let mut supervisor = Supervisor::new(prepared, handover.environment)?;
    running()?;
    last_resort::set_up();
    start(&mut supervisor);
    Ok(supervisor)
}

fn expected(handover: &Handover) -> Vec<RawFd> {
    let mounts = handover.mounts.iter().map(|mount| mount.fd);
    mounts.chain([handover.channel, handover.root]).collect()
}

fn wait_for_network(channel: &Channel) -> Result<()> {
    let (answer, _) = channel.receive().during(|| "wait for the network".into())?;
    match answer == word::PROCEED.as_bytes() {
        true => Ok(()),
        false if answer.is_empty() => Err(Failure::new("the monitor is gone")),
        false => Err(Failure::new("the monitor said something else than 'proceed'")),
    }
}

fn running(channel: &Channel, listener: Option<Listener>) -> Result<()> {
    let listener: Vec<std::os::fd::BorrowedFd<'_>> = listener.iter().map(AsFd::as_fd).collect();
    say(channel, word::RUNNING, &listener)
}

fn say(channel: &Channel, word: &str, descriptors: &[std::os::fd::BorrowedFd]) -> Result<()> {
    channel.send(word.as_bytes(), descriptors).during(|| format!("tell the monitor '{word}'"))
}
