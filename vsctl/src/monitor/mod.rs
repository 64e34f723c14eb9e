//! The small process beside each running server: holds its consoles, waits for its init, and takes back what its start
//! has made, or starts it again.
//!
//! It keeps nothing that a new one could not find: killed, it harms no server, and the next command that meets the
//! server puts another in its place ([`adopt`]).

mod console;
mod healing;
mod listeners;
mod request;

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use kernel::cgroup::Hierarchies;
use kernel::process::{self, PidFd};
use kernel::pty::Master;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::aside::{self, Found};
use crate::criu::pages;
use crate::events;
use crate::lifecycle::boot::OWN_INIT;
use crate::lifecycle::calls::{self, Calls};
use crate::lifecycle::gate::is_settled;
use crate::lifecycle::{self, facilities, start, state, stop};
use crate::name::Name;
use crate::site::Site;
use crate::store::{self, Pausing};

use healing::Healing;
use listeners::Listeners;

pub use healing::{VERB as HEAL_VERB, main as heal};

pub use console::{Attached, attach, log_file, resize};
pub use request::{Handed, hand_over, keep};

/// The hidden verb by which `vsctl` executes itself as a monitor.
pub const VERB: &str = "monitor";

/// The labels of the descriptors that an adopter may get: the monitor's lock, and those of a [lifeline](Running::lifeline).
const ADOPTERS_LOCK: &str = "adopt-lock";
const LIFELINE: &str = "lifeline";

/// How many datagrams of a guest are heard in a row.
const DATAGRAMS_AT_ONCE: usize = 64;

/// How long who has received a server may take to say why it has ended.
const LAST_WORD_MS: u16 = 2000;

/// After this long without an event, memory that is not in use goes back to the kernel.
const REST_MS: u16 = 100;

/// A running server as its monitor holds it.
#[derive(Debug)]
pub struct Running {
    /// Init's pid on the host.
    pub pid: i32,
    /// Init's pidfd.
    pub pidfd: PidFd,
    /// Masters of the console and the ttys.
    pub consoles: Vec<OwnedFd>,
    /// Where the guest's init says that it is ready.
    pub notify: Option<OwnedFd>,
    /// Held as long as the monitor lives.
    pub lock: Option<OwnedFd>,
    /// The supervisor of `lxcfs-fuse` whose files the server has, if that is known.
    pub keeper: Option<PidFd>,
    /// The calls of its filter, and of those who joined.
    pub calls: Vec<Calls>,
    /// Of a server whose memory is on its way: its [`Lifeline`](lifecycle::gate::Lifeline), and what keeps alive who brings it.
    pub lifeline: Vec<OwnedFd>,
}

fn socket_file(site: &Site, name: &Name) -> PathBuf {
    site.server_run(name).join("monitor.sock")
}

fn lock_file(site: &Site, name: &Name) -> PathBuf {
    site.server_run(name).join("monitor.lock")
}

/// Becomes the server's monitor.
///
/// # Errors
/// When there is one, or the file cannot be made.
pub fn lock(site: &Site, name: &Name) -> Result<OwnedFd> {
    // Somebody may just be asking whether there is one, which takes the lock for a moment.
    let attempt = |_| kernel::lock::Flock::try_exclusive(&lock_file(site, name)).transpose().or_else(pause);
    let lock = (0..100).find_map(attempt).transpose()?;
    let lock = lock.ok_or_else(|| anyhow!("'{name}' has a monitor already"))?;
    Ok(lock.file().try_clone().context("keep the monitor's lock")?.into())
}

fn pause<T>() -> Option<T> {
    std::thread::sleep(std::time::Duration::from_millis(1));
    None
}

/// Whether the server has a living monitor.
///
/// # Errors
/// When that cannot be known.
pub fn is_alive(site: &Site, name: &Name) -> Result<bool> {
    // Taken and given back at once; a monitor that comes just then tries again.
    match kernel::lock::Flock::try_shared(&lock_file(site, name)) {
        Ok(lock) => Ok(lock.is_none()),
        // The server's runtime directory has gone, and its monitor with it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot tell whether '{name}' has a monitor")),
    }
}

/// Executes this program anew, with nothing of the start in memory, and the server's descriptors inherited.
/// Returns only when it cannot.
pub fn become_lean(name: &Name, running: &Running) -> anyhow::Error {
    let arranged = || -> Result<Vec<CString>> {
        let mut arguments = vec!["vsctl".to_owned(), VERB.to_owned(), name.to_string()];
        let mut hand = |label: &str, fd: BorrowedFd<'_>| -> Result<()> {
            process::keep_across_exec(fd)?;
            arguments.push(format!("{label}={}", fd.as_raw_fd()));
            Ok(())
        };
        hand("pidfd", running.pidfd.as_fd())?;
        for console in &running.consoles {
            hand("console", console.as_fd())?;
        }
        if let Some(notify) = &running.notify {
            hand("notify", notify.as_fd())?;
        }
        if let Some(keeper) = &running.keeper {
            hand("keeper", keeper.as_fd())?;
        }
        if let Some(lock) = &running.lock {
            hand("lock", lock.as_fd())?;
        }
        for calls in &running.calls {
            hand("listener", calls.listener.as_fd())?;
            hand("slot", calls.slot.as_fd())?;
        }
        arguments.into_iter().map(|text| CString::new(text).context("an argument with NUL")).collect()
    };
    let arguments = match arranged() {
        Ok(arguments) => arguments,
        Err(error) => return error,
    };
    let program = match own_program() {
        Ok(program) => program,
        Err(error) => return error,
    };
    process::exec_path(&program, &arguments, &environment()).into()
}

fn own_program() -> Result<CString> {
    let own = std::env::current_exe().context("find the own program")?;
    CString::new(own.as_os_str().as_bytes()).context("the own program's path has NUL")
}

/// What a monitor needs of the environment: nothing but where its site is, how much it logs, and to be small.
fn environment() -> Vec<CString> {
    let kept = ["VSOS_ROOT", "RUST_LOG", "VSOS_FAULT", "LXCFS_FUSE_NO_RESEND"];
    let kept = kept.iter().filter_map(|name| CString::new(format!("{name}={}", std::env::var(name).ok()?)).ok());
    kept.chain([process::SPARING.to_owned()]).collect()
}

/// Executes this program anew as a monitor that finds its server as it is, and has its lock already if there is `lock`, and what of a
/// `lifeline` there is. Returns only when it cannot.
pub fn become_adopter(name: &Name, lock: Option<&OwnedFd>, lifeline: &[OwnedFd]) -> anyhow::Error {
    let program = || -> Result<std::convert::Infallible> {
        let mut arguments = vec![c"vsctl".to_owned(), CString::new(VERB)?, CString::new(name.as_str())?];
        let lock = lock.into_iter().map(|fd| (ADOPTERS_LOCK, fd));
        for (label, fd) in lock.chain(lifeline.iter().map(|fd| (LIFELINE, fd))) {
            process::keep_across_exec(fd)?;
            arguments.push(CString::new(format!("{label}={}", fd.as_raw_fd()))?);
        }
        Err(process::exec_path(&own_program()?, &arguments, &environment()).into())
    };
    let Err(error) = program();
    error
}

/// Puts a monitor beside a running server that has none.
///
/// # Errors
/// When the process cannot be made.
pub fn adopt(site: &Site, name: &Name) -> Result<()> {
    match process::fork(&facilities::beside(site, &Hierarchies::detect()?)?)? {
        process::Fork::Parent { .. } => Ok(()),
        process::Fork::Child => {
            let error = process::new_session().map_or_else(Into::into, |()| become_adopter(name, None, &[]));
            eprintln!("vsctl: monitor of '{name}': {error:#}");
            std::process::exit(1)
        }
    }
}

/// The monitor's own main: `monitor NAME [label=number]…`.
///
/// # Errors
/// When there is nothing to watch over.
pub fn main(arguments: &[String]) -> Result<i32> {
    let (name, descriptors) = arguments.split_first().context("whose monitor?")?;
    let name: Name = name.parse()?;
    let site = Site::from_environment()?;
    // Whatever the command's caller had open is not for a process that stays.
    let numbers = descriptors.iter().filter_map(|text| text.split_once('=')?.1.parse().ok());
    process::close_from(3, &numbers.collect::<Vec<RawFd>>())?;
    quiet()?;
    let running = match descriptors {
        [] => find(&site, &name, lock(&site, &name)?)?,
        [first, rest @ ..] if first.starts_with(ADOPTERS_LOCK) => {
            let lock = labelled(first)?.1;
            let lifeline = rest.iter().map(|text| labelled(text).map(|(_, fd)| fd)).collect::<Result<_>>()?;
            Running { lifeline, ..find(&site, &name, lock)? }
        }
        _ => inherited(&site, &name, descriptors)?,
    };
    Ok(watch(&site, &name, running))
}

/// Lets go of the terminal of the command that started the server.
fn quiet() -> Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?;
    for standard in 0..=2 {
        process::place_descriptor(&null, standard)?;
    }
    std::env::set_current_dir("/").context("go to /")
}

/// A descriptor that was handed on, and what it is.
fn labelled(text: &str) -> Result<(&str, OwnedFd)> {
    let no_descriptor = || format!("'{text}' is no descriptor");
    let (label, number) = text.split_once('=').with_context(no_descriptor)?;
    let number: RawFd = number.parse().with_context(no_descriptor)?;
    Ok((label, process::adopt_descriptor(number)?))
}

fn inherited(site: &Site, name: &Name, descriptors: &[String]) -> Result<Running> {
    let (status, pidfd) = init_of(site, name)?;
    let (consoles, calls) = (Vec::new(), Vec::new());
    let mut running = Running {
        pid: status.pid,
        pidfd,
        consoles,
        notify: None,
        lock: None,
        keeper: None,
        calls,
        lifeline: Vec::new(),
    };
    let mut listener = None;
    for text in descriptors {
        let (label, fd) = labelled(text)?;
        match label {
            "pidfd" => running.pidfd = PidFd::from(fd),
            "console" => running.consoles.push(fd),
            "notify" => running.notify = Some(fd),
            "keeper" => running.keeper = Some(PidFd::from(fd)),
            "lock" => running.lock = Some(fd),
            "listener" => listener = Some(fd),
            "slot" => running.calls.extend(listener.take().map(|listener| Calls { listener, slot: fd })),
            _ => return Err(anyhow!("'{text}' is no descriptor of a monitor")),
        }
    }
    Ok(running)
}

fn init_of(site: &Site, name: &Name) -> Result<(state::Status, PidFd)> {
    let status = state::status(site, name)?.context("the server has ended")?;
    let pidfd = state::pidfd(&status)?.context("the server has ended")?;
    Ok((status, pidfd))
}

/// Finds everything anew, after a monitor that died, or a restore.
fn find(site: &Site, name: &Name, lock: OwnedFd) -> Result<Running> {
    let lock = Some(lock);
    let (status, pidfd) = init_of(site, name)?;
    let mut consoles = consoles_of(site, name, &status).unwrap_or_else(|error| {
        log::warn!("'{name}' has no console until it restarts: {error:#}");
        Vec::new()
    });
    let notify = consoles.pop();
    let calls = calls_of(site, &status);
    Ok(Running { pid: status.pid, pidfd, consoles, notify, lock, keeper: None, calls, lifeline: Vec::new() })
}

/// The calls that `lxcfs-fuse` keeps for the server.
fn calls_of(site: &Site, status: &state::Status) -> Vec<Calls> {
    let Some(id) = status.listened else { return Vec::new() };
    match calls::fetch(site, id) {
        Ok((calls, _)) => calls,
        Err(error) => {
            log::warn!("its sysinfo(2) and sched_getaffinity(2) fail until it restarts: {error:#}");
            Vec::new()
        }
    }
}

/// The consoles that vsinit keeps, or those that the dead monitor of a server with another init had given to `lxcfs-fuse`; at their
/// end the notify socket.
fn consoles_of(site: &Site, name: &Name, status: &state::Status) -> Result<Vec<OwnedFd>> {
    if status.init != OWN_INIT {
        return lifecycle::consoles::fetch(site, store::load_record(site, name)?.id, status.start_ticks);
    }
    let pid = status.pid;
    let found = aside::fetch(init::control::CONSOLES_TIMEOUT, &[], || {
        let socket = guest_control(pid)?;
        let descriptors = init::control::consoles(socket.as_fd())?;
        Ok(Found { descriptors: recognised(descriptors)?, ..Found::default() })
    });
    Ok(found?.descriptors)
}

/// What a guest has given, if it is what it should be: masters, and at the end a socket for datagrams. Anything else could
/// make the monitor wait when it is used or closed; the process that looks at it here is not the monitor.
fn recognised(mut descriptors: Vec<OwnedFd>) -> Result<Vec<OwnedFd>> {
    use rustix::net::{AddressFamily, SocketType, sockopt};
    let notify = descriptors.pop().context("vsinit has no consoles")?;
    let is_socket = sockopt::socket_domain(&notify) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(&notify) == Ok(SocketType::DGRAM);
    if !is_socket {
        return Err(anyhow!("vsinit's notify socket is none"));
    }
    let master =
        |fd| Master::recognise(fd).map(OwnedFd::from).map_err(|_| anyhow!("a console of vsinit's is no terminal"));
    descriptors.into_iter().map(master).chain([Ok(notify)]).collect()
}

/// An `O_PATH` descriptor of the control socket of the vsinit with `pid`; a guest's symbolic links lead nowhere else.
///
/// # Errors
/// When there is none.
pub fn guest_control(pid: i32) -> Result<OwnedFd> {
    let root = File::open(format!("/proc/{pid}/root")).context("open the guest's root")?;
    let path = std::path::Path::new(init::control::SOCKET);
    Ok(kernel::file::open_beneath_with(&root, path, rustix::fs::OFlags::PATH, 0)?)
}

/// How the end of a server's init is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The guest asked for a reboot (reboot(2) in a pid namespace: init dies of SIGHUP).
    Reboot,
    /// Power off, halt, a crash, or somebody's SIGKILL.
    Stop,
    /// Its memory was on its way, and did not come: the monitor itself has ended it.
    Lost,
}

/// Watches over a server until it has ended for good; returns the exit code of the monitor.
pub fn watch(site: &Site, name: &Name, mut running: Running) -> i32 {
    loop {
        let calls = std::mem::take(&mut running.calls);
        let healing = Healing::new(site, name, running.keeper.take());
        let lifeline = std::mem::take(&mut running.lifeline);
        let end = match Watch::begin(site, name, &running, calls, healing, lifeline).and_then(Watch::run) {
            Ok(Some(end)) => end,
            // Whoever stops the server takes it back.
            Ok(None) => return 0,
            Err(error) => {
                log::error!("the monitor of '{name}': {error:#}");
                return 1;
            }
        };
        match after(site, name, end) {
            Ok(Some(again)) => {
                let error = become_lean(name, &again);
                log::error!("the monitor of '{name}' goes on as it is: {error:#}");
                running = again;
            }
            Ok(None) => return 0,
            Err(error) => {
                log::error!("the monitor of '{name}': {error:#}");
                return 1;
            }
        }
    }
}

/// Takes back what the start had made and, after a reboot, starts again.
fn after(site: &Site, name: &Name, end: End) -> Result<Option<Running>> {
    // A migration may hold it for as long as it sends.
    let _lock = store::lock_at_last(site, name)?;
    // Another command may have been faster, and even have started the server again.
    if state::status(site, name)?.is_some() || !state::has_journal(site, name)? {
        return Ok(None);
    }
    stop::recover(site, name)?;
    // Killed while it stopped the server, a migration leaves it to us, and to the doctor.
    let pausing = store::leaving(site, name).ok().flatten().and_then(|leaving| leaving.pausing);
    let is_its_doing =
        pausing == Some(Pausing::Stops) || pausing.is_some() && state::suspended_directory(site, name).exists();
    if end == End::Reboot || !is_its_doing {
        store::try_forget_leaving(site, name);
    }
    let why = (end == End::Lost).then(|| "its memory did not come from the other host".to_owned());
    events::note_with(site, name, events::Kind::Stopped, why);
    match end {
        End::Stop | End::Lost => Ok(None),
        End::Reboot => start::again(site, name).map(Some),
    }
}

/// One watch over one life of a server.
struct Watch<'a> {
    site: &'a Site,
    name: &'a Name,
    running: &'a Running,
    /// The server's number and the start of its init, if others than init keep the consoles.
    kept_as: Option<(u32, u64)>,
    listener: UnixListener,
    consoles: console::Consoles,
    listeners: Listeners<'a>,
    healing: Healing<'a>,
    /// Connections whose first line is not read yet.
    callers: Vec<UnixStream>,
    /// Commands that stop the server and take it back themselves.
    stoppers: Vec<UnixStream>,
    /// How the guest has said that it will end.
    announced: End,
    /// Whether nothing has happened since memory was given back.
    rested: bool,
    /// See [`Running::lifeline`]; empty as soon as it does not matter any more.
    lifeline: Vec<OwnedFd>,
}

impl<'a> Watch<'a> {
    fn begin(
        site: &'a Site,
        name: &'a Name,
        running: &'a Running,
        calls: Vec<Calls>,
        healing: Healing<'a>,
        lifeline: Vec<OwnedFd>,
    ) -> Result<Self> {
        // Before the rest: somebody inside may wait for it.
        let status = state::status(site, name)?;
        let listened = status.as_ref().and_then(|status| status.listened);
        let mut listeners = Listeners::new(site, listened.unwrap_or_default());
        calls.into_iter().for_each(|calls| listeners.keep(calls));
        listeners.serve(&[]);
        let others = status.filter(|status| status.init != OWN_INIT);
        let kept_as =
            others.map(|status| Ok::<_, anyhow::Error>((store::load_record(site, name)?.id, status.start_ticks)));
        let kept_as = kept_as.transpose()?;
        let path = socket_file(site, name);
        // A dead monitor's: the lock says that there is no living one.
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).with_context(|| format!("listen at {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).context("keep others out")?;
        listener.set_nonblocking(true).context("listen without waiting")?;
        let consoles = console::Consoles::new(&running.consoles, log_file(site, name)).or_else(|error| {
            // The guest holds them as well, and can make one useless. The server needs its monitor all the same.
            log::warn!("the consoles of '{name}' cannot be used: {error:#}");
            console::Consoles::new(&[], log_file(site, name))
        })?;
        let (callers, stoppers) = (Vec::new(), Vec::new());
        let watch = Self {
            site,
            name,
            running,
            kept_as,
            listener,
            consoles,
            listeners,
            healing,
            callers,
            stoppers,
            rested: false,
            announced: End::Stop,
            lifeline,
        };
        watch.keep_consoles();
        Ok(watch)
    }

    /// Gives copies of the consoles to the supervisor of `lxcfs-fuse`, if the server's init keeps none. When there is no supervisor the
    /// next one gets them.
    fn keep_consoles(&self) {
        let Some((id, init_start)) = self.kept_as else { return };
        let kept: Vec<_> = self.running.consoles.iter().chain(&self.running.notify).map(AsFd::as_fd).collect();
        if kept.is_empty() {
            return;
        }
        if let Err(error) = lifecycle::consoles::keep(self.site, id, init_start, &kept) {
            log::debug!("{error:#}");
        }
    }

    /// Until init ends; `None` when somebody else takes the server back.
    fn run(mut self) -> Result<Option<End>> {
        loop {
            let happened = self.wait()?;
            if self.healing.serve(&happened) {
                self.listeners.hurry();
                self.keep_consoles();
            }
            self.listeners.serve(&happened);
            let ready: Vec<RawFd> = happened.into_iter().map(|(fd, _)| fd).collect();
            self.consoles.serve(&ready);
            if ready.contains(&self.notify_number()) {
                self.hear_notify();
            }
            // One that went away has changed its mind, or was killed. Before new ones come: their wish is still in `ready`.
            self.stoppers.retain(|stopper| !ready.contains(&stopper.as_raw_fd()));
            self.hear_callers(&ready);
            // Last: a new caller may get the number of something that was ready and is closed by now, and has said nothing yet.
            if ready.contains(&self.listener.as_raw_fd()) {
                while let Ok((caller, _)) = self.listener.accept() {
                    if caller.set_nonblocking(true).is_ok() {
                        self.callers.push(caller);
                    }
                }
            }
            if self.lifeline.first().is_some_and(|end| ready.contains(&end.as_raw_fd())) {
                self.hear_lifeline();
            }
            if ready.contains(&self.running.pidfd.as_fd().as_raw_fd()) {
                // Its last words may be younger than the look at what is ready.
                self.hear_notify();
                self.consoles.drain();
                return Ok(if self.stoppers.is_empty() { Some(self.end()) } else { None });
            }
        }
    }

    /// Ends the server when its memory will not come. Before anybody else may: without who brings it, what is missing is zeros.
    fn hear_lifeline(&mut self) {
        if self.lifeline.first().is_none_or(is_settled) {
            self.lifeline.clear();
            let _ = fs::remove_file(state::arriving_file(self.site, self.name));
            if self.running.notify.is_none() {
                // Its init could not answer in time, as long as its own memory was on its way.
                let error = become_adopter(self.name, self.running.lock.as_ref(), &[]);
                log::error!("the monitor of '{}' goes on as it is: {error:#}", self.name);
            }
            return;
        }
        // Held until all of it has ended: what runs on without it has lost its memory.
        self.announced = End::Lost;
        if let Err(error) = lifecycle::stop::end_at_once(self.site, self.name) {
            log::error!("the monitor of '{}': {error:#}", self.name);
        }
        if let Err(error) = pages::clear(&self.site.server(self.name)) {
            log::error!("the monitor of '{}': {error:#}", self.name);
        }
    }

    fn notify_number(&self) -> RawFd {
        self.running.notify.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Waits until something can be read, and tells what.
    fn wait(&mut self) -> Result<Vec<(RawFd, PollFlags)>> {
        let mut polled = vec![
            PollFd::new(self.running.pidfd.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        let lifeline = self.lifeline.first().filter(|_| self.announced != End::Lost);
        polled.extend(lifeline.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        polled.extend(self.running.notify.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        let sockets = self.callers.iter().chain(&self.stoppers);
        polled.extend(sockets.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        polled.extend(self.consoles.descriptors().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        polled.extend(self.listeners.polled());
        polled.extend(self.healing.polled());
        // Rounded up, so that a wait for the rest of a millisecond does not spin.
        let due = self.listeners.due().into_iter().chain(self.healing.due()).min();
        let due = due.map(|due| due.saturating_duration_since(Instant::now()).as_millis() + 1);
        let rest = (!self.rested).then_some(u128::from(REST_MS));
        let left = due.into_iter().chain(rest).min();
        let timeout = left.map_or(PollTimeout::NONE, |ms| PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX));
        match nix::poll::poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for the server"),
        }
        let happened = |polled: &PollFd| {
            let flags = polled.revents().filter(|flags| !flags.is_empty())?;
            Some((polled.as_fd().as_raw_fd(), flags))
        };
        let happened: Vec<_> = polled.iter().filter_map(happened).collect();
        if happened.is_empty() && rest.is_some() && left == rest {
            process::give_memory_back();
        }
        self.rested = happened.is_empty() && (self.rested || left == rest);
        Ok(happened)
    }

    fn hear_callers(&mut self, ready: &[RawFd]) {
        for caller in std::mem::take(&mut self.callers) {
            if !ready.contains(&caller.as_raw_fd()) {
                self.callers.push(caller);
                continue;
            }
            match request::read(&caller) {
                Some(request::Request::HandOver) => self.stoppers.extend(request::agree(caller)),
                Some(request::Request::Console(number)) => {
                    if let Some(caller) = request::agree(caller) {
                        self.consoles.attach(number, caller);
                    }
                }
                Some(request::Request::Keep(calls)) => self.listeners.keep_joiners(calls),
                Some(request::Request::Resize { console, size }) => self.consoles.resize(console, size),
                // Gone, or nonsense: closed.
                None => {}
            }
        }
    }

    /// sd_notify(3): datagrams of lines. Of interest are readiness, and how the guest means to end.
    fn hear_notify(&mut self) {
        let Some(socket) = &self.running.notify else { return };
        let mut datagram = [0u8; 4096];
        // A guest that never stops talking does not keep the monitor from its other work.
        for _ in 0..DATAGRAMS_AT_ONCE {
            // The guest has the socket as well, and may have taken the datagram back.
            let Ok((length, _)) = rustix::net::recv(socket, &mut datagram, rustix::net::RecvFlags::DONTWAIT) else {
                return;
            };
            for line in datagram[..length].split(|byte| *byte == b'\n') {
                match line.strip_prefix(b"X_SYSTEMD_SHUTDOWN=") {
                    Some(b"reboot") => self.announced = End::Reboot,
                    Some(_) => self.announced = End::Stop,
                    None if line == b"READY=1" => {
                        let _ = fs::write(self.site.server_run(self.name).join("ready"), "");
                    }
                    None => {}
                }
            }
        }
    }

    /// Whether it was ended because its memory does not come: by us, or by who has received it and says so now.
    fn is_lost(&self) -> bool {
        let Some(end) = self.lifeline.first().filter(|_| self.announced != End::Lost) else {
            return self.announced == End::Lost;
        };
        let limit = PollTimeout::from(LAST_WORD_MS);
        let is_told = nix::poll::poll(&mut [PollFd::new(end.as_fd(), PollFlags::POLLIN)], limit);
        is_told.is_ok_and(|count| count > 0) && !is_settled(end)
    }

    /// Why init ended. An adopted one is not our child: while it is a zombie its /proc tells, newer kernels (6.15) tell
    /// through the pidfd when it has been reaped, and for older ones remains what the guest had announced.
    fn end(&self) -> End {
        use std::os::unix::process::ExitStatusExt;
        if self.is_lost() {
            return End::Lost;
        }
        let pidfd = &self.running.pidfd;
        let zombie = || process::stat(self.running.pid).ok().filter(|found| found.has_ended).map(|found| found.status);
        let status = pidfd.reap().ok().or_else(zombie).or_else(|| pidfd.exit_status().ok().flatten());
        match status {
            Some(status) if status.signal() == Some(libc::SIGHUP) => End::Reboot,
            Some(_) => End::Stop,
            None => self.announced,
        }
    }
}
