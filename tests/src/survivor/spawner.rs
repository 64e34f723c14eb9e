//! A process that is nearly always in the midst of starting another: in vfork(2), where it waits for a child that waits for somebody else.

use std::{fs::OpenOptions, path::Path, thread, time::Duration};

use anyhow::{Context, Result};
use nix::{
    fcntl::OFlag,
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn},
    sys::{stat::Mode, wait::waitpid},
    unistd::mkfifo,
};

/// How long it is in that wait, and how long it is not.
const WAITS: Duration = Duration::from_millis(1500);
const RESTS: Duration = Duration::from_millis(700);

/// Does so for ever.
///
/// # Errors
/// When no child can be had.
pub fn be(place: &Path) -> Result<()> {
    let fifo = place.join("spawner");
    mkfifo(&fifo, Mode::S_IRWXU).context("make a fifo")?;
    loop {
        let opened = fifo.clone();
        let opener = thread::spawn(move || {
            thread::sleep(WAITS);
            OpenOptions::new().write(true).open(opened)
        });
        let mut actions = PosixSpawnFileActions::init().context("begin a list of actions")?;
        // Done by the child before it executes anything.
        actions.add_open(0, &fifo, OFlag::O_RDONLY, Mode::empty()).context("add an action")?;
        let attributes = PosixSpawnAttr::init().context("begin attributes")?;
        let child = posix_spawn(c"/bin/true", &actions, &attributes, &[c"true"], &[] as &[&std::ffi::CStr])
            .context("start a child")?;
        drop(opener.join().map(|opened| opened.context("open the fifo")));
        waitpid(child, None).context("wait for the child")?;
        thread::sleep(RESTS);
    }
}
