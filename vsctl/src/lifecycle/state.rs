//! The states of a server, and what is seen of them in the runtime directory.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kernel::cgroup::Usage;
use kernel::process::{self, PidFd};
use serde::{Deserialize, Serialize};

use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::site::Site;
use crate::store;
use crate::volume;

/// Where a server stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Half created or half destroyed.
    Incomplete,
    /// Defined and not running.
    Stopped,
    /// Not running; its processes are on the disk.
    Suspended,
    /// Came from another host, which has not given it up yet.
    Incoming,
    /// Given up to another host; a copy.
    Moved,
    /// A start or a stop is under way, or was interrupted.
    Ready,
    /// Its init runs.
    Running,
    /// Its processes are held.
    Frozen,
}

/// What a user asks of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Everything but processes.
    Prepare,
    /// Init.
    Boot,
    /// Hold the processes.
    Freeze,
    /// Let them go on.
    Thaw,
    /// End it.
    Stop,
    /// Remove it.
    Destroy,
}

impl State {
    /// Every state, for help texts.
    pub const ALL: &[State] = &[
        State::Incomplete,
        State::Stopped,
        State::Suspended,
        State::Incoming,
        State::Moved,
        State::Ready,
        State::Running,
        State::Frozen,
    ];

    /// The state after `action`, or `None` when the action makes no sense here.
    pub fn after(self, action: Action) -> Option<State> {
        use {Action::*, State::*};
        Some(match (self, action) {
            (Stopped | Suspended, Prepare) => Ready,
            (Ready, Boot) => Running,
            (Running, Freeze) => Frozen,
            (Frozen, Thaw) => Running,
            (Ready | Running | Frozen, Stop) => Stopped,
            (Incomplete | Stopped | Suspended | Incoming | Moved, Destroy) => Incomplete,
            _ => return None,
        })
    }

    /// The state of a server that is not its host's own.
    pub fn of_side(side: store::Side) -> Self {
        match side {
            store::Side::Incoming => Self::Incoming,
            store::Side::Moved => Self::Moved,
        }
    }

    /// Whether anything of it is on the host beside files.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Ready | Self::Running | Self::Frozen)
    }

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Incomplete => "incomplete",
            Self::Stopped => "stopped",
            Self::Suspended => "suspended",
            Self::Incoming => "incoming",
            Self::Moved => "moved",
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Frozen => "frozen",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(self.as_str())
    }
}

/// `status.toml`: what names the running init for as long as the host runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Init's pid on the host.
    pub pid: i32,
    /// Its start time in clock ticks since boot: with the pid it names the process for ever (proc(5), field 22).
    pub start_ticks: u64,
    /// When it was started, on the clock that counts from boot; before 0 for one that came here from an earlier boot.
    pub started_boottime_ns: i64,
    /// The init, as the template names it.
    pub init: String,
    /// The signal that asks it to power off.
    pub stop_signal: i32,
    /// The number of the server whose filter leaves calls to `lxcfs-fuse`; none when it has no such filter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listened: Option<u32>,
    /// What it had used before its control group was made; nothing for one that was started and not brought back.
    #[serde(default, skip_serializing_if = "CpuTime::is_none")]
    pub cpu_before: CpuTime,
}

/// Time that a server has used of processors. A group that is made for one that comes back counts from nothing again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuTime {
    /// In its programs, in microseconds.
    pub user_usec: u64,
    /// In the kernel.
    pub system_usec: u64,
}

impl CpuTime {
    /// What a group has counted.
    pub fn of(usage: &Usage) -> Self {
        Self { user_usec: usage.cpu_usec.saturating_sub(usage.cpu_system_usec), system_usec: usage.cpu_system_usec }
    }

    /// Both together.
    pub fn plus(self, more: Self) -> Self {
        let [user_usec, system_usec] =
            [(self.user_usec, more.user_usec), (self.system_usec, more.system_usec)].map(|(a, b)| a.saturating_add(b));
        Self { user_usec, system_usec }
    }

    /// All of it, in microseconds.
    pub fn sum_usec(self) -> u64 {
        self.user_usec.saturating_add(self.system_usec)
    }

    fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// Path of the status.
pub fn status_file(site: &Site, name: &Name) -> PathBuf {
    site.server_run(name).join("status.toml")
}

/// The images of a suspended server; there only when they are whole. In its volume, since the one is worth nothing without the other.
pub fn suspended_directory(site: &Site, name: &Name) -> PathBuf {
    volume::directory(site, name).join(volume::IMAGES)
}

/// There as long as memory of a running server is on its way from the host that it came from.
pub fn arriving_file(site: &Site, name: &Name) -> PathBuf {
    site.server_run(name).join("memory-arrives")
}

/// What the directory of images is called beside its name once they count no more.
pub const USED: &str = "used";

/// … and that of those that go ahead of their memory to another host.
pub const THIN: &str = "thin";

/// Path of the journal of what a start has made.
pub fn journal_file(site: &Site, name: &Name) -> PathBuf {
    // Not in the server's runtime directory, which is itself a step.
    site.run().join("journal").join(name.as_str())
}

/// The running init of a server; `None` when it does not run.
///
/// # Errors
/// When that cannot be known. Whoever takes this for "does not run" takes a living server apart.
pub fn status(site: &Site, name: &Name) -> Result<Option<Status>> {
    let file = status_file(site, name);
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| unknown(name, "read", &file)),
    };
    let status: Status = toml::from_str(&text).map_err(|error| {
        let message = format!("{}: {}", unknown(name, "use", &file), error.message());
        Failure::new(Exit::Failed, message).hint("make sure that nothing of it runs, then remove the file")
    })?;
    // A zombie has ended: an adopted one stays one until the host's init gets round to it.
    let found = process::find(status.pid).with_context(|| format!("cannot tell whether '{name}' runs"))?;
    let lives = found.is_some_and(|found| found.start_ticks == status.start_ticks && !found.has_ended);
    Ok(lives.then_some(status))
}

fn unknown(name: &Name, verb: &str, file: &Path) -> String {
    format!("cannot tell whether '{name}' runs: {verb} {}", file.display())
}

/// Init's pidfd; `None` when it has ended and been reaped.
///
/// # Errors
/// When the kernel refuses.
pub fn pidfd(status: &Status) -> Result<Option<PidFd>> {
    let is_same = || -> Result<bool> {
        Ok(process::find(status.pid)?.is_some_and(|found| found.start_ticks == status.start_ticks))
    };
    match PidFd::open(status.pid) {
        // The pid may have gone to another between reading and opening; the pidfd keeps it from now on.
        Ok(pidfd) => Ok(is_same()?.then_some(pidfd)),
        // One that has ended cannot be opened, whatever has its number now.
        Err(_) if !is_same()? => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What is seen of a server now. Costs a few file accesses: no lock, no parsing of its spec.
///
/// # Errors
/// When it cannot be known.
pub fn of(site: &Site, name: &Name) -> Result<State> {
    if !is_there(&store::record_file(site, name))? {
        return Ok(State::Incomplete);
    }
    match store::migration(site, name)? {
        Some(migration) => Ok(State::of_side(migration.side)),
        None => beneath(site, name),
    }
}

/// What there is of a server that exists, whichever host may run it.
///
/// # Errors
/// When it cannot be known.
pub fn beneath(site: &Site, name: &Name) -> Result<State> {
    let suspended = is_there(&suspended_directory(site, name))?;
    // While there are both images and processes, these stand still and the images count: somebody suspends or resumes.
    if !suspended && status(site, name)?.is_some() {
        return Ok(if frozen(site, name)? { State::Frozen } else { State::Running });
    }
    Ok(match has_journal(site, name)? {
        true => State::Ready,
        false if suspended => State::Suspended,
        false => State::Stopped,
    })
}

/// Whether a server's processes are there and count: with images beside them they do not.
///
/// # Errors
/// When it cannot be known.
pub fn is_running(site: &Site, name: &Name) -> Result<bool> {
    Ok(!is_there(&suspended_directory(site, name))? && status(site, name)?.is_some())
}

/// Whether something that a start has made still stands.
///
/// # Errors
/// When it cannot be known.
pub fn has_journal(site: &Site, name: &Name) -> Result<bool> {
    is_there(&journal_file(site, name))
}

fn frozen(site: &Site, name: &Name) -> Result<bool> {
    // Freezing writes this mark, so that a list need not open a cgroup per server.
    is_there(&site.server_run(name).join("frozen"))
}

fn is_there(path: &Path) -> Result<bool> {
    path.try_exists().with_context(|| format!("look for {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A site with a server whose status is of the process `pid` that started at `start_ticks`.
    fn site(pid: i32, start_ticks: u64) -> (tempfile::TempDir, Site, Name) {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        let name: Name = "web1".parse().unwrap();
        fs::create_dir_all(site.server(&name)).unwrap();
        fs::create_dir_all(site.server_run(&name)).unwrap();
        fs::write(store::record_file(&site, &name), "").unwrap();
        let status = Status {
            pid,
            start_ticks,
            started_boottime_ns: 0,
            init: "vsinit".into(),
            stop_signal: 15,
            listened: None,
            cpu_before: CpuTime::default(),
        };
        fs::write(status_file(&site, &name), toml::to_string(&status).unwrap()).unwrap();
        (root, site, name)
    }

    #[test]
    fn a_process_that_is_another_by_now_or_gone_is_no_running_server() {
        let pid = std::process::id() as i32;
        let started = process::start_time(pid).unwrap();
        let (_root, site, name) = self::site(pid, started);
        assert_eq!(of(&site, &name).unwrap(), State::Running);
        assert!(pidfd(&status(&site, &name).unwrap().unwrap()).unwrap().is_some());
        let (_root, site, name) = self::site(pid, started + 1);
        assert_eq!(of(&site, &name).unwrap(), State::Stopped);
        // The kernel gives no such number (PID_MAX_LIMIT).
        let (_root, site, name) = self::site(0x40_0001, started);
        assert_eq!(of(&site, &name).unwrap(), State::Stopped);
        fs::remove_file(status_file(&site, &name)).unwrap();
        assert_eq!(status(&site, &name).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_read_is_not_taken_for_stopped() {
        let (_root, site, name) = site(1, 1);
        let file = status_file(&site, &name);
        fs::write(&file, "pid = ").unwrap();
        let error = of(&site, &name).unwrap_err();
        assert!(error.to_string().contains("cannot tell whether 'web1' runs"), "{error:#}");
        assert!(crate::failure::hint_of(&error).unwrap().contains("remove the file"));
        // Not ENOENT: EISDIR stands for whatever a disk or a limit may answer.
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        let error = of(&site, &name).unwrap_err();
        assert!(format!("{error:#}").contains("read ") && format!("{error:#}").contains("directory"), "{error:#}");
        fs::remove_dir(&file).unwrap();
        // A runtime directory that is none says nothing either.
        fs::remove_dir(site.server_run(&name)).unwrap();
        fs::write(site.server_run(&name), "").unwrap();
        assert!(of(&site, &name).is_err());
    }

    #[test]
    fn only_sensible_actions_have_a_state_after() {
        use {Action::*, State::*};
        assert_eq!(Stopped.after(Prepare).and_then(|state| state.after(Boot)), Some(Running));
        assert_eq!(Running.after(Freeze).and_then(|state| state.after(Stop)), Some(Stopped));
        assert_eq!(Running.after(Destroy), None);
        assert_eq!(Stopped.after(Freeze), None);
        assert_eq!((Incoming.after(Prepare), Moved.after(Prepare)), (None, None));
        for state in State::ALL {
            assert_eq!(state.after(Stop).is_some(), state.is_up(), "{state}");
        }
    }
}
