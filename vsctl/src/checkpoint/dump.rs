//! A dump: a running server's processes to images, and then their end, or on with them.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Error, Result};
use kernel::cgroup::{Group, Usage};
use kernel::lock::Flock;
use kernel::process;

use super::ahead::Ahead;
use super::beside::{Begun, Beside};
use super::image::{self, Manifest};
use super::{blockers, clear, places, program, watched};
use crate::criu::message::{Kind, Options as CriuOptions};
use crate::criu::{self, Criu, Event, NotNow, Session};
use crate::failure::{self, Exit, Failure};
use crate::interrupt::{self, Hold};
use crate::lifecycle::boot::OWN_INIT;
use crate::lifecycle::state::{self, CpuTime, State, Status};
use crate::lifecycle::world::World;
use crate::lifecycle::{boot, freeze, guest_groups, network, restore, stop, thread_settings, view};
use crate::monitor;
use crate::name::Name;
use crate::processes;
use crate::site::Site;
use crate::store::{self, Server};
use crate::template::remove_tree;

/// How long killed processes may take to end.
const END_MS: u64 = 10_000;

/// How often a dump is tried once more that may succeed a moment later, and when.
const AGAIN: u32 = 10;
const AGAIN_AFTER: Duration = Duration::from_millis(200);

/// How often it is looked once more for what stands in the way, before it is told.
const LOOKS: u32 = 5;

/// What becomes of the processes once they are in images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// They end, and the server is taken back.
    End,
    /// They go on as if nothing had been.
    GoOn,
}

/// A running server that nothing known stands in the way of dumping.
#[derive(Debug)]
pub struct Subject<'a> {
    site: &'a Site,
    /// The server.
    pub server: &'a Server,
    status: Status,
    criu: Criu,
    version: String,
    /// That of its init, if it is ours.
    program: Option<Vec<u8>>,
    /// What its processes have open as places.
    places: BTreeSet<PathBuf>,
    lock: &'a Flock,
    ahead: Option<&'a Ahead>,
}

impl<'a> Subject<'a> {
    /// Looks at `server`, whose lock the caller has. What a guest can make wait is met here, aside: the process forks, and may have no
    /// other threads. A dump does not.
    ///
    /// # Errors
    /// Exit 31 when it does not run, 5 when it cannot be dumped.
    pub fn find(site: &'a Site, server: &'a Server, lock: &'a Flock) -> Result<Self> {
        check_running(site, &server.name)?;
        if state::arriving_file(site, &server.name).exists() {
            // CRIU takes what has not come for what was never there.
            let message = format!("not all memory of '{}' has come from the other host yet", server.name);
            let hint = "when `vsctl migrate` has ended there, it has";
            return Err(Failure::new(Exit::Locked, message).hint(hint).into());
        }
        let status = state::status(site, &server.name)?.context("the server has just ended")?;
        check_spec(server, &status)?;
        let criu = super::criu(site);
        let version = super::version(site)?;
        check_processes(site, server, &status)?;
        let program = (status.init == OWN_INIT).then(|| program::of(status.pid)).transpose()?;
        let group = World::new(site).group(&site.server_cgroup(&server.name))?;
        let places = places::held(group.processes()?.into_iter());
        Ok(Self { site, server, status, criu, version, program, places, lock, ahead: None })
    }

    /// With memory that was written `ahead`, which must stay where it is.
    pub fn after(self, ahead: &'a Ahead) -> Self {
        Self { ahead: Some(ahead), ..self }
    }

    /// Writes what its memory has since the images in `parent` into the directory `images`, and lets it go on.
    ///
    /// # Errors
    /// What CRIU says.
    pub fn write_ahead(&self, images: &Path, parent: Option<PathBuf>) -> Result<()> {
        let options = CriuOptions {
            parent_img: parent.map(|parent| parent.display().to_string()),
            track_mem: Some(true),
            ..self.options()?
        };
        let logs = self.site.server(&self.server.name);
        let mut session = self.criu.begin(Kind::PreDump, images, &logs, options, Some(self.lock))?;
        while let Event::Stage { .. } = self.listen(&mut session)? {
            session.go_on()?;
        }
        Ok(())
    }

    /// Waits for CRIU, unless it has come upon a thread that it cannot stop: it would try for minutes, in which nothing moves. Until it has
    /// stopped all it has done nothing to the others but hold them.
    fn listen(&self, session: &mut Session) -> Result<Event> {
        let group = World::new(self.site).group(&self.site.server_cgroup(&self.server.name))?;
        let heard = session.listen_and(|| match group.processes()?.into_iter().find_map(process::in_vfork) {
            None => Ok(()),
            Some(thread) => {
                let why = format!("thread {thread} on the host waits for its child (vfork), and cannot be stopped");
                Err(NotNow(why).into())
            }
        });
        if heard.as_ref().is_err_and(|error| error.is::<NotNow>()) {
            session.end();
            group.thaw()?;
        }
        heard
    }

    /// Puts its init's program, if it is ours, beside the images in `directory`.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn keep_program(&self, directory: &Path) -> Result<()> {
        let Some(program) = &self.program else { return Ok(()) };
        let kept = directory.join(program::NAME);
        fs::write(&kept, program).with_context(|| format!("write {}", kept.display()))
    }

    /// Dumps it into the new directory `images`. `commit` names them while nothing of the server moves: from then on they count.
    ///
    /// # Errors
    /// What CRIU, the kernel or `commit` says, and what has become of the server.
    pub fn dump(&self, images: &Path, then: Then, commit: impl Fn(Manifest) -> Result<()>) -> Result<()> {
        // An end in the midst would leave it standing still.
        let _hold = Hold::begin()?;
        // Told first, so that it leaves the taking back to us; should we fail, it watches on.
        let handed = match then {
            Then::End => Some(monitor::hand_over(self.site, &self.server.name)?),
            Then::GoOn => None,
        };
        let dumped = match self.run(self.ahead, images, then, &commit) {
            Err(error) if self.ahead.is_some() && criu::may_pass(&error) => {
                log::info!("once more, with all of its memory: {error:#}");
                remove_tree(images).and_then(|()| self.run(None, images, then, &commit))
            }
            dumped => dumped,
        };
        if let Err(error) = dumped.map_err(interrupt::instead_of).map_err(criu::say_if_the_disk_is_full) {
            let error = match super::doubt(self.site) {
                Ok(Some(doubt)) => Failure::new(failure::exit_of(&error), format!("{error:#}")).hint(doubt).into(),
                _ => error,
            };
            return Err(error.context(self.after_failure()));
        }
        match handed {
            None => self.let_go_on(),
            Some(handed) => self.end(handed),
        }
    }

    fn run(
        &self,
        ahead: Option<&Ahead>,
        images: &Path,
        then: Then,
        commit: &impl Fn(Manifest) -> Result<()>,
    ) -> Result<()> {
        let Self { site, server, .. } = self;
        let name = &server.name;
        let world = World::new(site);
        let group = world.group(&site.server_cgroup(name))?;
        let options = CriuOptions {
            leave_running: Some(then == Then::GoOn),
            parent_img: ahead.and_then(Ahead::parent).map(|parent| parent.display().to_string()),
            track_mem: ahead.map(|_| true),
            ..self.options()?
        };
        let at = |stage: &str, sums: &mut Beside| match stage {
            // Nothing reaches the server from now on, so that nothing is acknowledged that is not in the images.
            "network-lock" => network::put_on_bridge(&world, server, false),
            // From here on nothing moves until it is certain who counts.
            "post-dump" => interrupt::check().and_then(|()| self.check_restorable(&group)).and_then(|()| {
                freeze::hold(site, name)?;
                commit(self.manifest(&group, images, ahead, sums.end())?)
            }),
            _ => Ok(()),
        };
        let dump = || {
            interrupt::check()?;
            DirBuilder::new().mode(0o710).create(images).with_context(|| format!("make {}", images.display()))?;
            super::give(images, server.first_id(site), super::PASS)?;
            if ahead.is_none() {
                self.keep_program(images)?;
            }
            let logs = site.server(name);
            let mut session = self.criu.begin(Kind::Dump, images, &logs, options.clone(), Some(self.lock))?;
            let mut sums = Beside::begin(images);
            loop {
                match self.listen(&mut session)? {
                    Event::Stage { name: stage, .. } => match at(&stage, &mut sums) {
                        Ok(()) => session.go_on()?,
                        Err(error) => {
                            session.take_back();
                            return Err(error);
                        }
                    },
                    Event::Done => return Ok(()),
                }
            }
        };
        persistently(ahead.is_none(), images, dump)
    }

    /// Whether what was dumped, and stands still, can be restored.
    fn check_restorable(&self, group: &Group) -> Result<()> {
        let Some((pid, program)) = places::run_by(&group.processes()?, &self.places) else { return Ok(()) };
        let program = program.display();
        let why = format!(
            "process {pid} on the host runs {program}, which another has open as a place (O_PATH): CRIU would not restore it"
        );
        Err(NotNow(why).into())
    }

    /// How CRIU finds what it is to dump.
    fn options(&self) -> Result<CriuOptions> {
        let Self { site, server, .. } = self;
        let group = World::new(site).group(&site.server_cgroup(&server.name))?;
        let sources = boot::from_host(site, server, &self.status.init, None)?;
        let external = sources.iter().map(|(_, inside)| format!("mnt[{}]:{}", inside.display(), inside.display()));
        let root = site.server_run(&server.name).join("root");
        let mut options = restore::common(&root, external.collect());
        options.irmap_scan_paths.extend(self.watched(&group, &root)?);
        Ok(CriuOptions {
            pid: Some(self.status.pid),
            freeze_cgroup: group.unified_directory().map(|directory| directory.display().to_string()),
            ..options
        })
    }

    /// What is watched beside where CRIU looks anyway.
    fn watched(&self, group: &Group, root: &Path) -> Result<Vec<String>> {
        let first_id = self.server.first_id(self.site).unwrap_or(0);
        let processes = processes::of(group, self.status.pid, first_id)?;
        let device = fs::metadata(root).with_context(|| format!("look at {}", root.display()))?.dev();
        let paths = watched::paths(root, watched::numbers(&processes, device), restore::WATCHED)?;
        Ok(paths.into_iter().map(|path| path.display().to_string()).collect())
    }

    /// What is written down of the server beside its images.
    fn manifest(&self, group: &Group, images: &Path, ahead: Option<&Ahead>, begun: Begun) -> Result<Manifest> {
        let Self { server, status, .. } = self;
        let files = image::survey_rest(images, begun)?;
        let groups =
            group.unified_directory().map_or_else(|| Ok(Vec::new()), |directory| guest_groups::survey(&directory));
        Ok(Manifest {
            version: image::VERSION,
            name: server.name.to_string(),
            uuid: server.record.uuid.clone(),
            created_s: store::now_s(),
            age_ns: view::age_ns(status.started_boottime_ns),
            template_digest: server.record.template_digest.clone(),
            with_host: false,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            criu: self.version.clone(),
            cpu: used(status.cpu_before, group.usage()),
            groups: groups?,
            settings: thread_settings::survey_in(group, status.pid),
            is_thin: false,
            files: files.into_iter().chain(ahead.into_iter().flat_map(Ahead::files)).collect(),
        })
    }

    fn end(&self, handed: monitor::Handed) -> Result<()> {
        let name = &self.server.name;
        if let Some(pidfd) = state::pidfd(&self.status)? {
            World::new(self.site).group(&self.site.server_cgroup(name))?.kill()?;
            if !pidfd.wait_exit(Some(END_MS))? {
                return Err(Failure::new(Exit::System, format!("the processes of '{name}' do not end")).into());
            }
        }
        handed.wait_gone();
        stop::recover(self.site, name)
    }

    fn let_go_on(&self) -> Result<()> {
        // What peers send is acknowledged from here on.
        network::put_on_bridge(&World::new(self.site), self.server, true)?;
        freeze::let_go_on(self.site, &self.server.name)
    }

    /// What becomes of the server when its dump failed, in words.
    fn after_failure(&self) -> String {
        let Self { site, server, .. } = self;
        let name = &server.name;
        let again = || -> Result<String> {
            if state::suspended_directory(site, name).exists() {
                // Behind the point where the images count: what is left of the processes goes.
                stop::recover(site, name)?;
                return Ok(format!("'{name}' is suspended, but not all went well"));
            }
            clear(site, name)?;
            if state::status(site, name)?.is_none() {
                stop::recover(site, name)?;
                return Ok(format!("'{name}' has ended meanwhile"));
            }
            self.let_go_on()?;
            Ok(format!("cannot put '{name}' on the disk, and it goes on"))
        };
        again().unwrap_or_else(|error| {
            format!("cannot put '{name}' on the disk, nor let it go on (`vsctl doctor --fix`: {error:#})")
        })
    }
}

/// What a server has used with `usage` in its group, on top of what it had `before`. It is a figure, and no reason not to dump.
fn used(before: CpuTime, usage: kernel::Result<Usage>) -> CpuTime {
    match usage {
        Ok(usage) => before.plus(CpuTime::of(&usage)),
        Err(error) => {
            log::warn!("what it has used of processors since it started is not kept: {:#}", Error::from(error));
            before
        }
    }
}

/// Dumps again at once what may be dumped a moment later, for some times. Not what builds on earlier images, which is `fresh` no more: the
/// kernel has begun to note anew what changes in memory, and what it had noted until then is lost with the attempt. `dump` makes the directory
/// `images`: CRIU would take what is left of an attempt for a part of the next.
pub fn persistently(fresh: bool, images: &Path, dump: impl Fn() -> Result<()>) -> Result<()> {
    for _ in 0..if fresh { AGAIN } else { 0 } {
        match dump() {
            Err(error) if criu::may_pass(&error) => {
                log::info!("once more: {error:#}");
                remove_tree(images)?;
                thread::sleep(AGAIN_AFTER);
            }
            ended => return ended,
        }
    }
    dump()
}

fn check_running(site: &Site, name: &Name) -> Result<()> {
    let failure = match state::of(site, name)? {
        State::Running => return Ok(()),
        State::Frozen => {
            Failure::new(Exit::Failed, format!("'{name}' is frozen")).hint(format!("`vsctl thaw {name}` first"))
        }
        State::Suspended => Failure::new(Exit::NotRunning, format!("'{name}' is suspended already")),
        _ => Failure::new(Exit::NotRunning, format!("'{name}' is not running")),
    };
    Err(failure.into())
}

/// What is known without looking at the processes.
fn check_spec(server: &Server, status: &Status) -> Result<()> {
    let name = &server.name;
    let refuse = |why: String, hint: String| Err(Failure::new(Exit::Unsupported, why).hint(hint).into());
    if !server.spec.migratable {
        let hint = format!("`vsctl set {name} migratable=true`, then `vsctl restart {name}`");
        return refuse(format!("'{name}' was not started for checkpoints"), hint);
    }
    if status.listened.is_some() {
        return refuse(
            format!("'{name}' still runs with answered system calls, which no checkpoint can hold"),
            format!("`vsctl restart {name}`: its spec says migratable since it was started"),
        );
    }
    if let (Some(bind), false) = (server.spec.mount.first(), server.spec.privileged) {
        return refuse(
            format!("'{name}' has the mount {bind}, whose owners are mapped, and CRIU cannot restore that"),
            format!("take it out: `vsctl edit {name}`, then `vsctl restart {name}`"),
        );
    }
    Ok(())
}

/// What is seen at its processes before anything is frozen.
fn check_processes(site: &Site, server: &Server, status: &Status) -> Result<()> {
    let group = World::new(site).group(&site.server_cgroup(&server.name))?;
    let look = || blockers::find(status.pid, &processes::of(&group, status.pid, server.first_id(site).unwrap_or(0))?);
    let mut found = look()?;
    // A unit's program has a namespace of its own in the making, for some milliseconds.
    for _ in 0..LOOKS {
        if found.is_empty() {
            break;
        }
        thread::sleep(AGAIN_AFTER);
        found = look()?;
    }
    blockers::refuse(&format!("'{}'", server.name), &found)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io;

    use super::*;

    #[test]
    fn what_was_used_before_stays_when_the_group_does_not_say_more() {
        let before = CpuTime { user_usec: 5, system_usec: 7 };
        let usage = Usage { cpu_usec: 30, cpu_system_usec: 10, ..Usage::default() };
        assert_eq!(used(before, Ok(usage)), CpuTime { user_usec: 25, system_usec: 17 });
        let refused = kernel::Error::new("read", "cpu.stat", io::Error::from_raw_os_error(24));
        assert_eq!(used(before, Err(refused)), before);
    }

    #[test]
    fn what_may_pass_is_tried_again_and_finds_nothing_of_the_attempt() {
        let parent = tempfile::tempdir().unwrap();
        let images = parent.path().join("suspended.new");
        let attempts = Cell::new(0);
        let dump = |succeeds_at: u32| {
            attempts.set(attempts.get() + 1);
            fs::create_dir(&images)?;
            fs::write(images.join("remap-fpath.img"), "of this attempt")?;
            if attempts.get() == succeeds_at { Ok(()) } else { Err(NotNow("not now".into()).into()) }
        };
        persistently(true, &images, || dump(3)).unwrap();
        assert!(attempts.get() == 3 && images.exists());
        fs::remove_dir_all(&images).unwrap();
        // Its changes of memory are noted no more.
        attempts.set(0);
        persistently(false, &images, || dump(2)).unwrap_err();
        assert_eq!(attempts.get(), 1);
        fs::remove_dir_all(&images).unwrap();
        attempts.set(0);
        persistently(true, &images, || dump(1).and_then(|()| anyhow::bail!("for good"))).unwrap_err();
        assert_eq!(attempts.get(), 1);
    }
}
