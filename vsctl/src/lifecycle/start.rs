//! Start a server: from Stopped to Running.
//!
//! The command forks; the child becomes the server's monitor: it runs the plan, tells its parent how it went, and then
//! executes itself lean to watch over the server. So init is the monitor's child, and the command may end at any time.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kernel::lock::Flock;
use kernel::process::{self, Fork};
use serde::{Deserialize, Serialize};

use super::batch::{Batch, TemplateInit};
use super::boot::{BootPlan, OWN_INIT};
use super::execute;
use super::facilities::{self, Facilities};
use super::files::FilesStep;
use super::gate::{self, Gate, Keeper, Lifeline};
use super::journal::{Journal, Lasting};
use super::restore::{Check, Image};
use super::state::{self, Action, State, Status};
use super::step::Step;
use super::world::World;
use super::{consoles, create, freeze, group, network, nodes, process as processes, restore, stop, view};
use crate::criu;
use crate::failure::{self, Exit, Failure};
use crate::monitor::{self, Running};
use crate::name::Name;
use crate::network::Networks;
use crate::site::Site;
use crate::store::{self, Server};
use crate::template::remove_tree;
use crate::volume;
use crate::{edit, events};

/// How far `start` waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Until {
    /// Init can take signals.
    #[default]
    Init,
    /// The guest says that it is up.
    Ready,
    /// The monitor has been started.
    Nothing,
}

/// How to start.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// How far to wait.
    pub until: Until,
    /// Only a shell on the console.
    pub rescue: bool,
    /// Boot a suspended server anew, and lose what it had in memory.
    pub discard: bool,
}

/// The plan of a start.
///
/// # Errors
/// When the template or the volume is gone, an address is taken, or the site has no networks.
pub fn plan(site: &Site, batch: &Batch, server: &Server, rescue: bool) -> Result<(BootPlan, Vec<Step>)> {
    check_volume(site, server)?;
    check_number(site, server)?;
    let mut steps = claim(site, batch.networks(site)?, server)?;
    let (boot, own) = plan_created(site, batch, server, rescue)?;
    steps.extend(own);
    Ok((boot, steps))
}

/// The plan of a start that follows a creation, which has made the volume and reserved number and addresses.
///
/// # Errors
/// When the template is gone or the site has no networks.
pub fn plan_created(site: &Site, batch: &Batch, server: &Server, rescue: bool) -> Result<(BootPlan, Vec<Step>)> {
    let TemplateInit { init, stop_signal } = batch.template(site, &server.spec.template)?;
    let run = site.server_run(&server.name);
    let make = |path, mode| Step::Files(FilesStep::MakeDirectory { path, mode });
    let mut steps = vec![make(run.clone(), 0o711), make(run.join("root"), 0o755), make(run.join("nodes"), 0o755)];
    steps.extend(group::plan(site, server));
    steps.push(nodes::plan(site, server));
    steps.push(view::plan(site, server));
    steps.push(processes::plan_enter(site, server));
    steps.push(processes::plan_root(site, server));
    steps.extend(network::plan(site, batch.networks(site)?, server));
    steps.push(processes::plan_boot(site, server, &init));
    Ok((BootPlan { server: server.clone(), init, stop_signal, rescue }, steps))
}

/// A root that is gone is better said before the first step than by a mount that fails.
fn check_volume(site: &Site, server: &Server) -> Result<()> {
    let volume = volume::writable(site, &server.name, server.spec.volume);
    if volume.is_dir() {
        return Ok(());
    }
    let message = format!("the volume of '{}' is gone: {} is missing", server.name, volume.display());
    Err(Failure::new(Exit::NoServer, message).hint("destroy the server, or bring the directory back").into())
}

/// Two servers of one number would have the same user ids on the host.
fn check_number(site: &Site, server: &Server) -> Result<()> {
    let id = server.record.id;
    if create::owner_of_number(site, id).is_some_and(|owner| owner == server.name) {
        return Ok(());
    }
    let message = format!("the number {id} of '{}' is not reserved for it", server.name);
    Err(Failure::new(Exit::Failed, message).hint("`vsctl doctor --fix` reserves it, or says who has it").into())
}

/// Addresses that were written into the spec by hand: nobody else may have them while the server runs.
fn claim(site: &Site, networks: &Networks, server: &Server) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for address in server.addresses() {
        networks.check(*address)?;
        match crate::network::owner(site, *address) {
            Some(owner) if owner == server.name => {}
            Some(owner) => {
                return Err(Failure::new(Exit::BadParameter, format!("ip: {address} is taken by '{owner}'")).into());
            }
            None => steps.push(Step::Files(FilesStep::Reserve {
                path: crate::network::reservation(site, *address),
                owner: server.name.to_string(),
            })),
        }
    }
    Ok(steps)
}

/// A start under way.
#[derive(Debug)]
pub struct Starting {
    name: Name,
    until: Until,
    report: File,
    /// Of a server that waits when it is whole.
    keeper: Option<Keeper>,
}

/// What the monitor tells the command, as JSON; an empty report is a monitor that was killed.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    /// 0, or the exit code of the failure.
    exit: u8,
    message: String,
    outcome: Option<String>,
    hint: Option<String>,
}

/// Begins to start a server; [`Starting::finish`] waits for it.
///
/// # Errors
/// What can be seen before anything is changed: no such server, running already, its template gone.
pub fn begin(site: &Site, batch: &Rc<Batch>, name: &Name, options: Options) -> Result<Starting> {
    let lock = store::lock(site, name)?;
    begin_locked(site, batch, name, options, None, lock)
}

/// Begins to bring a suspended server back from `image`; [`Starting::finish`] waits for it. `lock` is the server's, under which the
/// image was looked at.
///
/// # Errors
/// What can be seen before anything is changed.
pub fn resume(site: &Site, name: &Name, image: Image, lock: Flock) -> Result<Starting> {
    begin_locked(site, &Rc::default(), name, Options::default(), Some(image), lock)
}

/// Begins to start a server whose lock the caller holds.
///
/// # Errors
/// As [`begin`].
pub fn begin_held(site: &Site, name: &Name, lock: Flock) -> Result<Starting> {
    begin_locked(site, &Rc::default(), name, Options::default(), None, lock)
}

fn begin_locked(
    site: &Site,
    batch: &Rc<Batch>,
    name: &Name,
    options: Options,
    image: Option<Image>,
    lock: Flock,
) -> Result<Starting> {
    let waits = image.as_ref().is_some_and(|image| image.waits);
    if !waits {
        store::check_own(site, name)?;
    }
    edit::recover(site, name)?;
    let server = store::load(site, name)?;
    let look = if waits { state::beneath } else { state::of };
    let mut now = look(site, name)?;
    if now == State::Ready {
        stop::recover(site, name)?;
        now = look(site, name)?;
    }
    let discards = now == State::Suspended && options.discard;
    if now == State::Suspended && image.is_none() && !discards {
        let hint = format!(
            "`vsctl resume {name}` lets it go on; `vsctl start --discard {name}` boots it anew, and what it had in memory is lost"
        );
        return Err(Failure::new(Exit::AlreadyRunning, format!("'{name}' is suspended")).hint(hint).into());
    }
    if image.is_some() && now != State::Suspended {
        return Err(Failure::new(Exit::NotRunning, format!("'{name}' is not suspended any more, it is {now}")).into());
    }
    if now.after(Action::Prepare).is_none() {
        return Err(Failure::new(Exit::AlreadyRunning, format!("'{name}' is {now} already")).into());
    }
    Facilities(site).ensure()?;
    Facilities(site).ensure_view()?;
    edit::settle(site, &server)?;
    let (boot, steps) = plan(site, batch, &server, options.rescue)?;
    if discards {
        // Now that nothing is known that speaks against the start.
        let used = spend(&state::suspended_directory(site, name))?;
        forget(site, name, &used);
    }
    let devices: Vec<String> = server.spec.device.iter().map(ToString::to_string).collect();
    if let Err(error) = batch.prepare(&devices) {
        // The step that needs it fails by itself, and says it in its place.
        log::debug!("'{name}': {error:#}");
    }
    let (report, told) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("make a pipe")?;
    let (gate, keeper) = waits.then(gate::pair).transpose().context("make a gate")?.unzip();
    match process::fork(&facilities::beside(site, batch.hierarchies()?)?)? {
        Fork::Parent { .. } => {
            Ok(Starting { name: name.clone(), until: options.until, report: File::from(report), keeper })
        }
        Fork::Child => {
            drop((report, keeper));
            // The lock is the child's now: the server is busy until it is up, whatever becomes of the command.
            let code = child(site, batch, &boot, &steps, image.map(|image| (image, gate)), File::from(told), lock);
            std::process::exit(code)
        }
    }
}

impl Starting {
    /// Waits until a server that was to wait is whole; false when it will not be, and [`Self::finish`] says why.
    ///
    /// # Errors
    /// When that cannot be known.
    pub fn is_whole(&self) -> Result<bool> {
        self.keeper.as_ref().map_or(Ok(true), Keeper::is_reached)
    }

    /// Can be read when [`Self::is_whole`] does not wait; none of a server that was not to wait.
    pub fn gate(&self) -> Option<BorrowedFd<'_>> {
        self.keeper.as_ref().map(AsFd::as_fd)
    }

    /// Can be read when [`Self::finish`] does not wait.
    pub fn report(&self) -> BorrowedFd<'_> {
        self.report.as_fd()
    }

    /// Lets a server go on that waits.
    pub fn open(&mut self) -> Option<Lifeline> {
        self.keeper.take().map(Keeper::open)
    }

    /// Waits as far as was asked. What still waits to go on is taken back.
    ///
    /// # Errors
    /// Why the server does not run.
    pub fn finish(mut self, site: &Site) -> Result<()> {
        self.keeper = None;
        if self.until == Until::Nothing {
            return store::forget_leaving(site, &self.name);
        }
        let mut text = String::new();
        self.report.read_to_string(&mut text).context("listen to the monitor")?;
        let failed = || format!("cannot start '{}'", self.name);
        if text.is_empty() {
            let hint = "`vsctl doctor --fix` takes back what it had made";
            return Err(Failure::new(Exit::Failed, format!("{}: its monitor was killed", failed())).hint(hint).into());
        }
        let report: Report = serde_json::from_str(&text).context("read the monitor's report")?;
        if report.exit != 0 {
            let failure = Failure::new(Exit::from_code(report.exit), report.message);
            let failure = match report.hint {
                Some(hint) => failure.hint(hint),
                None => failure,
            };
            let error = anyhow!(failure).context(failed());
            return Err(execute::Outcome::beside(error, report.outcome));
        }
        store::forget_leaving(site, &self.name)?;
        match self.until {
            Until::Ready => wait_ready(site, &self.name),
            _ => Ok(()),
        }
    }
}

/// Waits until the guest's init has said that it is up.
fn wait_ready(site: &Site, name: &Name) -> Result<()> {
    let mark = site.server_run(name).join("ready");
    while !mark.exists() {
        if state::status(site, name)?.is_none() {
            return Err(Failure::new(Exit::NotRunning, format!("'{name}' ended before it was ready")).into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The monitor before it becomes lean. Returns only when the server does not run.
fn child(
    site: &Site,
    batch: &Rc<Batch>,
    boot: &BootPlan,
    steps: &[Step],
    image: Option<(Image, Option<Gate>)>,
    mut told: File,
    lock: Flock,
) -> i32 {
    let name = boot.server.name.clone();
    let resumes = image.is_some();
    let outcome = process::new_session()
        .and_then(|()| process::unblock_signals())
        .map_err(Into::into)
        .and_then(|()| run(site, batch, boot.clone(), steps, image));
    let report = match &outcome {
        Ok(_) => Report { exit: 0, message: String::new(), outcome: None, hint: None },
        Err(error) => {
            let (message, outcome) = execute::Outcome::apart(error);
            let hint = failure::hint_of(error).map(ToOwned::to_owned);
            Report { exit: failure::exit_of(error) as u8, message, outcome, hint }
        }
    };
    drop(lock);
    // A command that is gone does not want to know.
    let _ = serde_json::to_writer(&mut told, &report).map(|()| told.flush());
    drop(told);
    match outcome {
        Ok(running) => {
            let error = match resumes {
                // What a start hands on comes from the guest then, as after a monitor that died.
                true => monitor::become_adopter(&name, running.lock.as_ref(), &running.lifeline),
                false => monitor::become_lean(&name, &running),
            };
            log::error!("the monitor of '{name}' goes on as it is: {error:#}");
            monitor::watch(site, &name, running)
        }
        Err(_) => 1,
    }
}

/// Runs the plan and writes down what runs.
///
/// # Errors
/// The step that failed; everything has been taken back then.
pub fn run(
    site: &Site,
    batch: &Rc<Batch>,
    boot: BootPlan,
    steps: &[Step],
    image: Option<(Image, Option<Gate>)>,
) -> Result<Running> {
    let (name, init, stop_signal) = (boot.server.name.clone(), boot.init.clone(), boot.stop_signal);
    let listened = boot.server.spec.answers_calls().then_some(boot.server.record.id);
    let mut world = World::sharing(site, Rc::clone(batch));
    world.boot = Some(boot);
    let (image, gate) = image.unzip();
    world.image = image;
    let unread = world.image.as_ref().and_then(|image| image.unread.as_ref());
    let reading = unread.map(Check::begin).transpose()?;
    world.reading = reading.into();
    let mut journal = Journal::open(&state::journal_file(site, &name), Lasting::Boot)?;
    let outcome = execute::run("start", 1, steps, &mut world, &mut journal)
        .and_then(|()| world.running.take().context("nothing was booted"))
        .and_then(|running| {
            let (age_ns, cpu_before) = world.image.as_ref().map(|image| (image.age_ns, image.cpu)).unwrap_or_default();
            let said = |pid, start_ticks| Status {
                pid,
                start_ticks,
                started_boottime_ns: view::started_ns(age_ns),
                init,
                stop_signal,
                listened,
                cpu_before,
            };
            let (status, mut running) = note(site, &name, said, running)?;
            match &world.image {
                None => events::note(site, &name, events::Kind::Started),
                Some(image) => {
                    running.lifeline = let_go(&world, image, gate.flatten(), &name, &status, &running)?;
                }
            }
            Ok(running)
        });
    let outcome = outcome.map_err(|error| damaged(&world, error));
    if outcome.is_err() {
        // The plan has taken itself back; when only the note failed, that is still to do.
        execute::take_back("undo", &mut world, &mut journal)?;
        journal.remove()?;
    }
    outcome
}

/// What is said of a restore that failed. CRIU looks at some of the memory itself, and what it says when that is damaged helps nobody.
fn damaged(world: &World<'_>, error: anyhow::Error) -> anyhow::Error {
    if !criu::has_refused(&error) {
        return error;
    }
    match world.compared() {
        // One that could not look has no advice.
        Err(damaged) if failure::hint_of(&damaged).is_some() => {
            execute::Outcome::beside(damaged, execute::Outcome::apart(&error).1)
        }
        _ => error,
    }
}

/// Writes `status.toml`, of what is `said` of init's pid and start time: from now on the server is running.
fn note(
    site: &Site,
    name: &Name,
    said: impl FnOnce(i32, u64) -> Status,
    mut running: Running,
) -> Result<(Status, Running)> {
    // Before the server is seen to run: a command that finds no monitor makes one.
    running.lock = Some(monitor::lock(site, name)?);
    let status = said(running.pid, process::start_time(running.pid)?);
    let text = toml::to_string(&status).context("write the status as TOML")?;
    kernel::file::replace(&state::status_file(site, name), text.as_bytes(), 0o644)?;
    Ok((status, running))
}

/// What was restored counts from now on, and its images do not: they go first. Returns what its monitor is to hold of one whose memory is
/// on its way.
///
/// # Errors
/// What went wrong before that; behind it nothing is a reason any more to end the server.
fn let_go(
    world: &World,
    image: &Image,
    gate: Option<Gate>,
    name: &Name,
    status: &Status,
    running: &Running,
) -> Result<Vec<OwnedFd>> {
    let site = world.site;
    let server = store::load(site, name)?;
    if status.init != OWN_INIT {
        // What the next monitor asks for: the consoles, and last where init says how it is.
        let notify = restore::notify_socket(status.pid, !server.spec.privileged)?;
        let kept: Vec<_> = running.consoles.iter().chain([&notify]).map(AsFd::as_fd).collect();
        consoles::keep(site, server.record.id, status.start_ticks, &kept)?;
    }
    let mut lifeline = Vec::new();
    if let Some(gate) = gate {
        gate.pass()?;
        if let Some(pages) = &image.pages {
            let mark = state::arriving_file(site, name);
            std::fs::write(&mark, "").with_context(|| format!("write {}", mark.display()))?;
            lifeline = vec![gate.into(), pages.try_clone().context("keep a descriptor")?];
        }
    }
    let used = spend(&image.directory)?;
    if let Err(error) = network::note_return(site, &server) {
        log::warn!("connections to '{name}' may not go on: {error:#}");
    }
    // What peers send is acknowledged from here on.
    let connected = network::put_on_bridge(world, &server, true).inspect_err(|error| {
        log::error!("'{name}' has no network (`vsctl doctor --fix`): {error:#}");
    });
    // They find it later by themselves, when it sends or their entries have become old.
    let announced = connected.and_then(|()| {
        network::announce(&server, status.pid)
            .inspect_err(|error| log::warn!("nobody is told where '{name}' is now: {error:#}"))
    });
    if let Err(error) = freeze::let_go_on(site, name) {
        log::error!("'{name}' stands still (`vsctl thaw {name}`): {error:#}");
    }
    // Not before: it takes its time.
    drop(announced);
    forget(site, name, &used);
    events::note(site, name, events::Kind::Resumed);
    Ok(lifeline)
}

/// Removes images that do not count any more, and what was written ahead of them.
fn forget(site: &Site, name: &Name, used: &Path) {
    let (ahead, thin) = (volume::directory(site, name).join(volume::MEMORY), used.with_extension(state::THIN));
    for spent in [used, &ahead, &thin] {
        if let Err(error) = remove_tree(spent) {
            log::warn!("{error:#}");
        }
    }
}

/// Takes images their name, for good, and tells which they have now.
///
/// # Errors
/// When the disk refuses; then they have it still.
fn spend(images: &Path) -> Result<PathBuf> {
    let used = images.with_extension(state::USED);
    let failed = || format!("put {} aside", images.display());
    // Of a removal that was interrupted.
    remove_tree(&used)?;
    std::fs::rename(images, &used).with_context(failed)?;
    if let Err(error) = kernel::file::sync_entry(&used) {
        // A power cut would bring them back beside a server that has gone on.
        std::fs::rename(&used, images).with_context(failed)?;
        return Err(error).with_context(failed);
    }
    Ok(used)
}

/// Starts again after the guest asked for a reboot: the monitor's own way, without a command. The caller holds the lock.
///
/// # Errors
/// Why the server does not run.
pub fn again(site: &Site, name: &Name) -> Result<Running> {
    let server = store::load(site, name)?;
    Facilities(site).ensure_view()?;
    edit::settle(site, &server)?;
    let batch = Rc::default();
    let (boot, steps) = plan(site, &batch, &server, false)?;
    run(site, &batch, boot, &steps, None)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::spec::Spec;
    use crate::store::Record;

    /// The sentences of a start, with the site's directory and suffix taken out.
    fn sentences(spec: &str) -> String {
        let root = tempfile::tempdir().unwrap();
        let state = root.path().join("var/lib/vsos");
        fs::create_dir_all(state.join("templates/busybox")).unwrap();
        fs::write(state.join("network.toml"), "ipv4 = \"10.77.0.0/24\"\nipv6 = \"fd12::/64\"\n").unwrap();
        fs::create_dir_all(state.join("addresses")).unwrap();
        for layer in ["upper", "root"] {
            fs::create_dir_all(state.join("servers/web1/volume").join(layer)).unwrap();
        }
        for address in ["10.77.0.4", "fd12::4"] {
            fs::write(state.join("addresses").join(address), "web1").unwrap();
        }
        fs::create_dir_all(state.join("ids")).unwrap();
        fs::write(state.join("ids/3"), "web1").unwrap();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../templates/busybox/template.toml");
        fs::copy(shipped, state.join("templates/busybox/template.toml")).unwrap();
        let record = "version = 1\norigin = \"test\"\nbuilt_s = 0\nentries = 1\nsize_bytes = 1\ndigest = \"sha256:0\"\n\
                      warnings = []\n[distribution]\nid = \"busybox\"\nversion = \"1\"\nname = \"busybox\"\n";
        fs::write(state.join("templates/busybox/record.toml"), record).unwrap();
        let site = Site::at(root.path()).unwrap();
        let addresses = vec!["10.77.0.4/24".parse().unwrap(), "fd12::4/64".parse().unwrap()];
        let record =
            Record { version: 1, id: 3, uuid: "0".into(), created_s: 0, template_digest: "0".into(), addresses };
        let spec = Spec::parse(spec, "server.toml").unwrap();
        let server = Server { name: "web1".parse().unwrap(), spec, record };
        let steps = plan(&site, &Batch::default(), &server, false).unwrap().1;
        let text: String = steps.iter().map(|step| format!("{step}\n")).collect();
        let suffix = site.cgroup().replace("vsos-", "");
        text.replace(&root.path().display().to_string(), "")
            .replace(&suffix, "SITE")
            .replace(&site.first_id(3).to_string(), "FIRST")
    }

    /// Compares with a golden file; `GOLDEN=write` writes it anew.
    fn check(name: &str, spec: &str) {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lifecycle/golden").join(name);
        let found = sentences(spec);
        if std::env::var_os("GOLDEN").is_some() {
            fs::write(&file, &found).unwrap();
        }
        assert_eq!(found, fs::read_to_string(&file).unwrap(), "{name}");
    }

    #[test]
    fn plans_are_as_they_were() {
        check("bridge-and-limits", "template = \"busybox\"\nmemory = \"512M\"\ncpus = 1.5\npids = 100\n");
        check("alone-and-privileged", "template = \"busybox\"\nnet = \"none\"\nprivileged = true\nvolume = \"dir\"\n");
        check("two-addresses", "template = \"busybox\"\nip = [\"10.77.0.8/24\", \"10.77.0.9/24\"]\n");
    }
}
