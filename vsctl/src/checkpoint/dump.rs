//! A dump: a running server's processes to images, and then their end, or on with them.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kernel::cgroup::Group;
use kernel::lock::Flock;

use super::ahead::Ahead;
use super::image::{self, Manifest};
use super::{blockers, clear};
use crate::criu::message::{Kind, Options as CriuOptions};
use crate::criu::{Criu, Event};
use crate::failure::{self, Exit, Failure};
use crate::lifecycle::state::{self, State, Status};
use crate::lifecycle::world::World;
use crate::lifecycle::{boot, freeze, guest_groups, network, restore, stop, view};
use crate::monitor;
use crate::name::Name;
use crate::processes;
use crate::site::Site;
use crate::store::{self, Server};

/// How long killed processes may take to end.
const END_MS: u64 = 10_000;

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
    lock: &'a Flock,
    ahead: Option<&'a Ahead>,
}

impl<'a> Subject<'a> {
    /// Looks at `server`, whose lock the caller has.
    ///
    /// # Errors
    /// Exit 31 when it does not run, 5 when it cannot be dumped.
    pub fn find(site: &'a Site, server: &'a Server, lock: &'a Flock) -> Result<Self> {
        check_running(site, &server.name)?;
        let status = state::status(site, &server.name)?.context("the server has just ended")?;
        check_spec(server, &status)?;
        let criu = super::criu(site);
        let version = super::version(&criu)?;
        check_processes(site, server, &status)?;
        Ok(Self { site, server, status, criu, version, lock, ahead: None })
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
        while let Event::Stage { .. } = session.listen()? {
            session.go_on()?;
        }
        Ok(())
    }

    /// Dumps it into the new directory `images`. `commit` names them while nothing of the server moves: from then on they count.
    ///
    /// # Errors
    /// What CRIU, the kernel or `commit` says, and what has become of the server.
    pub fn dump(&self, images: &Path, then: Then, commit: impl Fn(Manifest) -> Result<()>) -> Result<()> {
        DirBuilder::new().mode(0o710).create(images).with_context(|| format!("make {}", images.display()))?;
        super::give(images, self.server.first_id(self.site), super::PASS)?;
        // Told first, so that it leaves the taking back to us; should we fail, it watches on.
        let handed = match then {
            Then::End => Some(monitor::hand_over(self.site, &self.server.name)?),
            Then::GoOn => None,
        };
        if let Err(error) = self.run(images, then, commit) {
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

    fn run(&self, images: &Path, then: Then, commit: impl Fn(Manifest) -> Result<()>) -> Result<()> {
        let Self { site, server, .. } = self;
        let name = &server.name;
        let world = World::new(site);
        let group = world.group(&site.server_cgroup(name))?;
        let options = CriuOptions {
            leave_running: Some(then == Then::GoOn),
            parent_img: self.ahead.and_then(Ahead::parent).map(|parent| parent.display().to_string()),
            track_mem: self.ahead.map(|_| true),
            ..self.options()?
        };
        let at = |stage: &str| match stage {
            // Nothing reaches the server from now on, so that nothing is acknowledged that is not in the images.
            "network-lock" => network::put_on_bridge(&world, server, false),
            // From here on nothing moves until it is certain who counts.
            "post-dump" => freeze::hold(site, name).and_then(|()| commit(self.manifest(&group, images)?)),
            _ => Ok(()),
        };
        let mut session = self.criu.begin(Kind::Dump, images, &site.server(name), options, Some(self.lock))?;
        loop {
            match session.listen()? {
                Event::Stage { name: stage, .. } => match at(&stage) {
                    Ok(()) => session.go_on()?,
                    Err(error) => {
                        session.take_back();
                        return Err(error);
                    }
                },
                Event::Done => return Ok(()),
            }
        }
    }

    /// How CRIU finds what it is to dump.
    fn options(&self) -> Result<CriuOptions> {
        let Self { site, server, .. } = self;
        let group = World::new(site).group(&site.server_cgroup(&server.name))?;
        let sources = boot::from_host(site, server, &self.status.init)?;
        let external = sources.iter().map(|(_, inside)| format!("mnt[{}]:{}", inside.display(), inside.display()));
        let root = site.server_run(&server.name).join("root");
        Ok(CriuOptions {
            pid: Some(self.status.pid),
            freeze_cgroup: group.unified_directory().map(|directory| directory.display().to_string()),
            ..restore::common(&root, external.collect())
        })
    }

    /// What is written down of the server beside its images.
    fn manifest(&self, group: &Group, images: &Path) -> Result<Manifest> {
        let Self { server, status, .. } = self;
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
            groups: groups?,
            files: image::survey(images)?.into_iter().chain(self.ahead.into_iter().flat_map(Ahead::files)).collect(),
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
    let found = blockers::find(status.pid, &processes::of(&group, status.pid, server.first_id(site).unwrap_or(0))?)?;
    if found.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = found.iter().map(|blocker| format!("\n  {blocker}")).collect();
    let message = format!("'{}' cannot be put on the disk as it is:{}", server.name, list.concat());
    Err(Failure::new(Exit::Unsupported, message).into())
}
