//! Processes: themselves, threads, sessions, what bounds them, and those that have ended and were not asked for.

use std::{
    path::Path,
    process::Command,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
    unistd::Pid,
};

use super::{
    Check, Kind,
    limb::{Limb, compare, facts},
    same,
};

pub const KINDS: &[Kind] = &[
    ("process", process),
    ("process-that-is-bound", |place| limb(place, "bound")),
    ("process-of-another-user", |place| limb(place, "user")),
    ("process-with-another-root", |place| limb(place, "chrooted")),
    ("process-with-mounts-of-its-own", |place| limb(place, "mounts")),
    ("process-with-a-network-of-its-own", |place| limb(place, "network")),
    ("session-with-a-terminal", |place| limb(place, "led")),
    ("zombie", zombie),
    ("threads", threads),
];

fn process(_: &Path) -> Result<Check> {
    let mut before = None;
    Ok(Box::new(move || {
        // Asked for first when all kinds are made: some change what the process is.
        let before = before.get_or_insert(facts()?);
        compare(&facts()?, before)
    }))
}

fn limb(place: &Path, manner: &str) -> Result<Check> {
    let mut limb = Limb::begin(place, manner)?;
    let before = limb.facts()?;
    Ok(Box::new(move || compare(&limb.facts()?, &before)))
}

fn zombie(_: &Path) -> Result<Check> {
    let child = Command::new("sh").args(["-c", "exit 7"]).spawn().context("begin a process")?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let ended = move || {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(pid), flags | WaitPidFlag::WNOHANG).context("look at the process")
    };
    // What it has come to is there as soon as it has.
    waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).context("wait for the process")?;
    Ok(Box::new(move || same("what it ended with", ended()?, WaitStatus::Exited(pid, 7))))
}

/// Each counts on its stack, and tells who it is.
fn threads(_: &Path) -> Result<Check> {
    const COUNT: usize = 5;
    type Ends = (Sender<()>, Receiver<(i32, String, u64)>);
    let mut ends: Vec<Ends> = Vec::new();
    for number in 0..COUNT {
        let ((ask, asked), (answer, answered)) = (channel(), channel());
        let body = move || {
            let mut count = 0;
            while asked.recv().is_ok() {
                count += 1;
                let (id, name) = (rustix::thread::gettid(), thread::current().name().unwrap_or_default().to_owned());
                let _ = answer.send((id.as_raw_nonzero().get(), name, count));
            }
        };
        thread::Builder::new().name(format!("thread {number}")).spawn(body).context("begin a thread")?;
        ends.push((ask, answered));
    }
    let ask = move || -> Result<Vec<(i32, String, u64)>> {
        for (ask, _) in &ends {
            ask.send(()).context("a thread has ended")?;
        }
        ends.iter().map(|(_, answered)| Ok(answered.recv_timeout(Duration::from_secs(60))?)).collect()
    };
    let mut before = ask()?;
    Ok(Box::new(move || {
        let began = Instant::now();
        for thread in &mut before {
            thread.2 += 1;
        }
        let now = ask()?;
        let names = std::fs::read_dir("/proc/self/task").context("list threads")?.count();
        ensure!(names > COUNT && began.elapsed() < Duration::from_secs(60), "{names} threads");
        same("what the threads say", now, before.clone())
    }))
}
