//! Stopping all processes of a group at once, and ending them.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::group::{Group, no_hierarchy};
use super::hierarchies::Controller;
use super::interface::{read, value_of, write, write_optional};
use crate::Result;
use crate::error::{During, Error};
use crate::poll::Deadline;
use crate::process::PidFd;

/// How long a group may take to freeze: a process in an uninterruptible wait freezes only after it.
const FREEZE_TIMEOUT_MS: u64 = 10_000;
/// How long [`Group::kill`] signals again on a kernel that has no `cgroup.kill`.
const KILL_TIMEOUT_MS: u64 = 10_000;

impl Group {
    /// Freezes the group and those below it and waits until every process stands still.
    ///
    /// After a bounded time it thaws again and the error is `TimedOut`.
    pub fn freeze(&self) -> Result<()> {
        self.set_frozen(true).inspect_err(|error| {
            if error.kind() == io::ErrorKind::TimedOut {
                // Half frozen is no state to leave a group in; the time-out is what is reported.
                let _ = self.set_frozen(false);
            }
        })
    }

    /// Lets the group run again.
    pub fn thaw(&self) -> Result<()> {
        self.set_frozen(false)
    }

    /// Whether every process of the group stands still.
    pub fn is_frozen(&self) -> Result<bool> {
        if let Some(directory) = self.unified_directory() {
            return Ok(value_of(&read(&directory.join("cgroup.events"))?, "frozen") == Some(1));
        }
        let directory = self.freezer()?;
        Ok(read(&directory.join("freezer.state"))? == "FROZEN")
    }

    /// Sends `SIGKILL` to every process of the group and of those below it, frozen ones too.
    ///
    /// Does not wait for their end: see [`wait_empty`](Self::wait_empty). Only on a kernel without `cgroup.kill` (before 5.14, or
    /// no cgroup2) it goes on until the group is empty, for a bounded time.
    pub fn kill(&self) -> Result<()> {
        if let Some(directory) = self.unified_directory() {
            // Linux ≥ 5.14; one write that no fork can outrun.
            if write_optional(&directory.join("cgroup.kill"), "1")? || !directory.exists() {
                return Ok(());
            }
        }
        self.kill_one_by_one()
    }

    /// Waits until no process is left in the group or below, at most `timeout_ms`; `false`: some are.
    pub fn wait_empty(&self, timeout_ms: u64) -> Result<bool> {
        let deadline = Deadline::after(Some(timeout_ms));
        if let Some(directory) = self.unified_directory() {
            return wait_event(&directory, "populated", 0, deadline);
        }
        loop {
            if self.processes()?.is_empty() {
                return Ok(true);
            }
            if deadline.is_over() {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn freezer(&self) -> Result<std::path::PathBuf> {
        self.directory(Controller::Freezer).ok_or_else(|| no_hierarchy("freeze", self))
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        let deadline = Deadline::after(Some(FREEZE_TIMEOUT_MS));
        let reached = match self.unified_directory() {
            Some(directory) => {
                write(&directory.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
                wait_event(&directory, "frozen", u64::from(frozen), deadline)?
            }
            None => set_frozen_v1(&self.freezer()?, frozen, deadline)?,
        };
        if reached {
            return Ok(());
        }
        let operation = if frozen { "freeze" } else { "thaw" };
        Err(Error::refused(
            operation,
            self.path().display(),
            io::ErrorKind::TimedOut,
            "some processes did not follow in time",
        ))
    }

    /// Signals all, and goes on until none is left, for a fork may outrun a list of pids.
    fn kill_one_by_one(&self) -> Result<()> {
        let deadline = Deadline::after(Some(KILL_TIMEOUT_MS));
        loop {
            let processes = self.processes()?;
            if processes.is_empty() {
                return Ok(());
            }
            for pid in processes {
                // Gone in between is what we want.
                if let Ok(process) = PidFd::open(pid) {
                    let _ = process.signal(libc::SIGKILL);
                }
            }
            // The v1 freezer holds even a killed process; thawed, it ends before it runs another instruction of its own.
            if let Some(root) = self.hierarchies.v1(Controller::Freezer) {
                write_optional(&root.join(self.path()).join("freezer.state"), "THAWED")?;
            }
            if deadline.is_over() {
                return Err(Error::refused(
                    "kill",
                    self.path().display(),
                    io::ErrorKind::TimedOut,
                    "some processes are left",
                ));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Waits until `key` in `cgroup.events` has `value`; the kernel wakes pollers of that file with `POLLPRI`.
fn wait_event(directory: &Path, key: &str, value: u64, deadline: Deadline) -> Result<bool> {
    let path = directory.join("cgroup.events");
    let file = match File::open(&path) {
        // A group that is gone has no processes and freezes none.
        Err(error) if error.kind() == io::ErrorKind::NotFound && value == 0 => return Ok(true),
        other => other.during("open", path.display())?,
    };
    let mut buffer = [0_u8; 256];
    loop {
        // From the start each time: that read also arms the next wake-up.
        let length = match rustix::io::pread(&file, &mut buffer, 0) {
            Err(rustix::io::Errno::NODEV) if value == 0 => return Ok(true),
            other => other.during("read", path.display())?,
        };
        if value_of(&String::from_utf8_lossy(&buffer[..length]), key) == Some(value) {
            return Ok(true);
        }
        if deadline.is_over() {
            return Ok(false);
        }
        let mut polled = [PollFd::new(&file, PollFlags::PRI)];
        match rustix::event::poll(&mut polled, deadline.left().as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).during("wait for", path.display()),
        }
    }
}

/// v1 has no wake-up; the state goes over FREEZING to FROZEN, and reading it drives that on.
fn set_frozen_v1(directory: &Path, frozen: bool, deadline: Deadline) -> Result<bool> {
    let path = directory.join("freezer.state");
    let wanted = if frozen { "FROZEN" } else { "THAWED" };
    write(&path, wanted)?;
    loop {
        if read(&path)? == wanted {
            return Ok(true);
        }
        if deadline.is_over() {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
