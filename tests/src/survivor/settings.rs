//! What a thread chooses for itself, and a process for its dumps: none of it is in CRIU's images.

use std::{
    fs,
    num::NonZeroU64,
    path::Path,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kernel::{cgroup::CpuSet, process};

use super::{Check, Kind, same};
use crate::promise::skip;

pub const KINDS: &[Kind] = &[
    ("processors-of-a-thread", |_| chosen(one_processor, processors)),
    ("timer-slack", |_| chosen(late, slack)),
    ("io-priority", |_| chosen(idle, priority)),
    ("core-dump-filter", core_filter),
];

/// Read by the thread itself, and said in words.
type Read = fn() -> Result<String>;

/// A thread that `choose`s and another that does not: what each reads of itself stays, and is not the other's.
fn chosen(choose: fn() -> Result<()>, read: Read) -> Result<Check> {
    let mut both = [asked(choose, read)?, asked(|| Ok(()), read)?];
    let ask = move |both: &mut [Asked; 2]| -> Result<[String; 2]> { Ok([both[0].ask()?, both[1].ask()?]) };
    let before = ask(&mut both)?;
    ensure!(before[0] != before[1], "{before:?} are the same");
    Ok(Box::new(move || same("what was chosen, and what was not", ask(&mut both)?, before.clone())))
}

/// A thread that answers whenever it is asked.
struct Asked {
    ask: Sender<()>,
    answer: Receiver<Result<String>>,
}

impl Asked {
    fn ask(&mut self) -> Result<String> {
        self.ask.send(()).context("the thread has ended")?;
        self.answer.recv_timeout(Duration::from_secs(60)).context("the thread does not answer")?
    }
}

fn asked(choose: fn() -> Result<()>, read: Read) -> Result<Asked> {
    let ((ask, questions), (answers, answer)) = (channel(), channel());
    let body = move || {
        let _ = answers.send(choose().map(|()| String::new()));
        while questions.recv().is_ok() {
            let _ = answers.send(read());
        }
    };
    thread::Builder::new().spawn(body).context("begin a thread")?;
    answer.recv_timeout(Duration::from_secs(60)).context("the thread does not choose")??;
    Ok(Asked { ask, answer })
}

fn own() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

fn allowed() -> Result<CpuSet> {
    let mut mask = [0; process::AFFINITY_WORDS];
    process::affinity(0, &mut mask)?;
    Ok(CpuSet::from_mask(&mask))
}

/// The last one, which another host is likeliest not to have.
fn one_processor() -> Result<()> {
    let all = allowed()?;
    if all.len() < 2 {
        return Err(skip("there is one processor to choose from"));
    }
    Ok(process::set_processors(own(), &all.iter().skip(all.len() - 1).collect())?)
}

fn processors() -> Result<String> {
    Ok(allowed()?.to_string())
}

fn late() -> Result<()> {
    rustix::thread::set_current_timer_slack(NonZeroU64::new(70_001)).context("choose a slack")
}

fn slack() -> Result<String> {
    Ok(rustix::thread::current_timer_slack().context("ask for the slack")?.to_string())
}

/// The idle class: whoever has something to write is served before.
fn idle() -> Result<()> {
    Ok(process::set_io_priority(own(), 3 << 13)?)
}

fn priority() -> Result<String> {
    Ok(format!("{:?}", process::io_priority(own())?))
}

fn core_filter(_: &Path) -> Result<Check> {
    const FILE: &str = "/proc/self/coredump_filter";
    fs::write(FILE, "0x12").context("choose what is dumped")?;
    let read = || fs::read_to_string(FILE).context("ask what is dumped");
    let before = read()?;
    ensure!(before.trim() == "00000012", "{before}");
    Ok(Box::new(move || same("what is dumped", read()?, before.clone())))
}
