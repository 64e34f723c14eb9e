//! Start a server: from Stopped to Running.
//!
//! The command forks; the child becomes the server's monitor: it runs the plan, tells its parent how it went, and then
//! executes itself lean to watch over the server. So init is the monitor's child, and the command may end at any time.

use std::fs::File;
use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kernel::process::{self, CloneOptions, Fork};
use serde::{Deserialize, Serialize};

use super::boot::BootPlan;
use super::execute;
use super::facilities::Facilities;
use super::files::FilesStep;
use super::journal::{Journal, Lasting};
use super::state::{self, Action, State};
use super::step::Step;
use super::world::World;
use super::{group, network, nodes, process as processes, stop, view};
use crate::failure::{self, Exit, Failure};
use crate::monitor::{self, Running};
use crate::name::Name;
use crate::network::Networks;
use crate::site::Site;
use crate::store::{self, Server};
use crate::template::Templates;
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
}

/// The plan of a start.
///
/// # Errors
/// When the template is gone or the site has no networks.
pub fn plan(site: &Site, server: &Server, rescue: bool) -> Result<(BootPlan, Vec<Step>)> {
    let template = Templates::below(&site.state()).open(&server.spec.template)?;
    let init = String::from(template.definition.init.clone());
    let stop_signal = template.definition.stop_signal_number()?;
    let networks = Networks::of(site)?;
    let run = site.server_run(&server.name);
    let make = |path, mode| Step::Files(FilesStep::MakeDirectory { path, mode });
    check_volume(site, server)?;
    let mut steps = claim(site, &networks, server)?;
    steps.extend([make(run.clone(), 0o700), make(run.join("root"), 0o755), make(run.join("nodes"), 0o755)]);
    steps.extend(group::plan(site, server));
    steps.push(nodes::plan(site, server));
    steps.push(view::plan(site, server));
    steps.push(processes::plan_enter(site, server));
    steps.push(processes::plan_root(site, server));
    steps.extend(network::plan(site, &networks, server));
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
pub fn begin(site: &Site, name: &Name, options: Options) -> Result<Starting> {
    let lock = store::lock(site, name)?;
    edit::recover(site, name)?;
    let server = store::load(site, name)?;
    let now = state::of(site, name);
    if now == State::Ready {
        stop::recover(site, name)?;
    } else if now.after(Action::Prepare).is_none() {
        return Err(Failure::new(Exit::AlreadyRunning, format!("'{name}' is {now} already")).into());
    }
    Facilities(site).ensure()?;
    edit::settle(site, &server)?;
    let (boot, steps) = plan(site, &server, options.rescue)?;
    let (report, told) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("make a pipe")?;
    match process::fork(&CloneOptions { namespaces: kernel::namespace::Kinds::empty(), cgroup: None, sibling: false })?
    {
        Fork::Parent { .. } => Ok(Starting { name: name.clone(), until: options.until, report: File::from(report) }),
        Fork::Child => {
            drop(report);
            // The lock is the child's now: the server is busy until it is up, whatever becomes of the command.
            let code = child(site, &boot, &steps, File::from(told), lock);
            std::process::exit(code)
        }
    }
}

impl Starting {
    /// Waits as far as was asked.
    ///
    /// # Errors
    /// Why the server does not run.
    pub fn finish(mut self, site: &Site) -> Result<()> {
        if self.until == Until::Nothing {
            return Ok(());
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
            return Err(match report.outcome {
                Some(outcome) => error.context(execute::Outcome(outcome)),
                None => error,
            });
        }
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
        if state::status(site, name).is_none() {
            return Err(Failure::new(Exit::NotRunning, format!("'{name}' ended before it was ready")).into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The monitor before it becomes lean. Returns only when the server does not run.
fn child(site: &Site, boot: &BootPlan, steps: &[Step], mut told: File, lock: kernel::lock::Flock) -> i32 {
    let name = boot.server.name.clone();
    let outcome = process::new_session().map_err(Into::into).and_then(|()| run(site, boot.clone(), steps));
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
            let error = monitor::become_lean(&name, &running);
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
pub fn run(site: &Site, boot: BootPlan, steps: &[Step]) -> Result<Running> {
    let (name, init, stop_signal) = (boot.server.name.clone(), boot.init.clone(), boot.stop_signal);
    let mut world = World::new(site);
    world.boot = Some(boot);
    let mut journal = Journal::open(&state::journal_file(site, &name), Lasting::Boot)?;
    let outcome = execute::run("start", 1, steps, &mut world, &mut journal)
        .and_then(|()| world.running.take().context("nothing was booted"))
        .and_then(|running| note(site, &name, init, stop_signal, running));
    if outcome.is_err() {
        // The plan has taken itself back; when only the note failed, that is still to do.
        execute::take_back("undo", &mut world, &mut journal)?;
        journal.remove()?;
    }
    outcome
}

/// Writes `status.toml`: from now on the server is running.
fn note(site: &Site, name: &Name, init: String, stop_signal: i32, mut running: Running) -> Result<Running> {
    // Before the server is seen to run: a command that finds no monitor makes one.
    running.lock = Some(monitor::lock(site, name)?);
    let status = state::Status {
        pid: running.pid,
        start_ticks: process::start_time(running.pid)?,
        started_boottime_ns: view::boottime_ns(),
        init,
        stop_signal,
    };
    let text = toml::to_string(&status).context("write the status as TOML")?;
    kernel::file::replace(&state::status_file(site, name), text.as_bytes(), 0o644)?;
    events::note(site, name, events::Kind::Started);
    Ok(running)
}

/// Starts again after the guest asked for a reboot: the monitor's own way, without a command. The caller holds the lock.
///
/// # Errors
/// Why the server does not run.
pub fn again(site: &Site, name: &Name) -> Result<Running> {
    let server = store::load(site, name)?;
    edit::settle(site, &server)?;
    let (boot, steps) = plan(site, &server, false)?;
    run(site, boot, &steps)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

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
        let steps = plan(&site, &server, false).unwrap().1;
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
