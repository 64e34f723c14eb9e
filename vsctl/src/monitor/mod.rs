//! The small process beside each running server: holds its consoles, waits for its init, and takes back what its start
//! has made, or starts it again.
//!
//! It keeps nothing that a new one could not find: killed, it harms no server, and the next command that meets the
//! server puts another in its place ([`adopt`]).

mod console;
mod request;

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use kernel::process::{self, PidFd};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::events;
use crate::lifecycle::boot::OWN_INIT;
use crate::lifecycle::{start, state, stop};
use crate::name::Name;
use crate::site::Site;
use crate::store;

pub use console::{Attached, attach, log_file, resize};
pub use request::{Handed, hand_over};

/// The hidden verb by which `vsctl` executes itself as a monitor.
pub const VERB: &str = "monitor";

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
pub fn is_alive(site: &Site, name: &Name) -> bool {
    // Taken and given back at once; a monitor that comes just then tries again.
    matches!(kernel::lock::Flock::try_shared(&lock_file(site, name)), Ok(None))
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
        if let Some(lock) = &running.lock {
            hand("lock", lock.as_fd())?;
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

/// What a monitor needs of the environment: nothing but where its site is and how much it logs.
fn environment() -> Vec<CString> {
    ["VSOS_ROOT", "RUST_LOG", "VSOS_FAULT"]
        .iter()
        .filter_map(|name| CString::new(format!("{name}={}", std::env::var(name).ok()?)).ok())
        .collect()
}

/// Puts a monitor beside a running server that has none.
///
/// # Errors
/// When the process cannot be made.
pub fn adopt(name: &Name) -> Result<()> {
    let options = process::CloneOptions { namespaces: kernel::namespace::Kinds::empty(), cgroup: None, sibling: false };
    match process::fork(&options)? {
        process::Fork::Parent { .. } => Ok(()),
        process::Fork::Child => {
            let program = || -> Result<std::convert::Infallible> {
                process::new_session()?;
                let arguments = [c"vsctl".to_owned(), CString::new(VERB)?, CString::new(name.as_str())?];
                Err(process::exec_path(&own_program()?, &arguments, &environment()).into())
            };
            let Err(error) = program();
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
    let running = if descriptors.is_empty() { find(&site, &name)? } else { inherited(&site, &name, descriptors)? };
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

fn inherited(site: &Site, name: &Name, descriptors: &[String]) -> Result<Running> {
    let status = state::status(site, name).context("the server has ended")?;
    let mut running =
        Running { pid: status.pid, pidfd: state::pidfd(&status)?, consoles: Vec::new(), notify: None, lock: None };
    for text in descriptors {
        let (label, number) = text.split_once('=').with_context(|| format!("'{text}' is no descriptor"))?;
        let number: RawFd = number.parse().with_context(|| format!("'{text}' is no descriptor"))?;
        let fd = process::adopt_descriptor(number)?;
        match label {
            "pidfd" => running.pidfd = PidFd::from(fd),
            "console" => running.consoles.push(fd),
            "notify" => running.notify = Some(fd),
            "lock" => running.lock = Some(fd),
            _ => return Err(anyhow!("'{text}' is no descriptor of a monitor")),
        }
    }
    Ok(running)
}

/// Finds everything anew, after a monitor that died.
fn find(site: &Site, name: &Name) -> Result<Running> {
    let lock = Some(lock(site, name)?);
    let status = state::status(site, name).context("the server has ended")?;
    let mut consoles = consoles_of(&status).unwrap_or_default();
    let notify = if consoles.len() > 1 { consoles.pop() } else { None };
    Ok(Running { pid: status.pid, pidfd: state::pidfd(&status)?, consoles, notify, lock })
}

/// The consoles that vsinit keeps. Another init has none: those of the dead monitor died with it.
fn consoles_of(status: &state::Status) -> Result<Vec<OwnedFd>> {
    if status.init != OWN_INIT {
        return Ok(Vec::new());
    }
    let socket = guest_control(status.pid)?;
    Ok(init::control::consoles(socket.as_fd())?)
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
}

/// Watches over a server until it has ended for good; returns the exit code of the monitor.
pub fn watch(site: &Site, name: &Name, mut running: Running) -> i32 {
    loop {
        let end = match Watch::begin(site, name, &running).and_then(Watch::run) {
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
    let _lock = store::lock(site, name)?;
    // Another command may have been faster, and even have started the server again.
    if state::status(site, name).is_some() || !state::journal_file(site, name).exists() {
        return Ok(None);
    }
    stop::recover(site, name)?;
    events::note(site, name, events::Kind::Stopped);
    match end {
        End::Stop => Ok(None),
        End::Reboot => start::again(site, name).map(Some),
    }
}

/// One watch over one life of a server.
struct Watch<'a> {
    site: &'a Site,
    name: &'a Name,
    running: &'a Running,
    listener: UnixListener,
    consoles: console::Consoles,
    /// Connections whose first line is not read yet.
    callers: Vec<UnixStream>,
    /// Commands that stop the server and take it back themselves.
    stoppers: Vec<UnixStream>,
}

impl<'a> Watch<'a> {
    fn begin(site: &'a Site, name: &'a Name, running: &'a Running) -> Result<Self> {
        let path = socket_file(site, name);
        // A dead monitor's: the lock says that there is no living one.
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).with_context(|| format!("listen at {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).context("keep others out")?;
        listener.set_nonblocking(true).context("listen without waiting")?;
        let consoles = console::Consoles::new(&running.consoles, log_file(site, name))?;
        Ok(Self { site, name, running, listener, consoles, callers: Vec::new(), stoppers: Vec::new() })
    }

    /// Until init ends; `None` when somebody else takes the server back.
    fn run(mut self) -> Result<Option<End>> {
        loop {
            let ready = self.wait()?;
            self.consoles.serve(&ready);
            if ready.contains(&self.notify_number()) {
                self.hear_notify();
            }
            if ready.contains(&self.listener.as_raw_fd()) {
                while let Ok((caller, _)) = self.listener.accept() {
                    if caller.set_nonblocking(true).is_ok() {
                        self.callers.push(caller);
                    }
                }
            }
            // One that went away has changed its mind, or was killed. Before new ones come: their wish is still in `ready`.
            self.stoppers.retain(|stopper| !ready.contains(&stopper.as_raw_fd()));
            self.hear_callers(&ready);
            if ready.contains(&self.running.pidfd.as_fd().as_raw_fd()) {
                self.consoles.drain();
                return Ok(if self.stoppers.is_empty() { Some(self.end()) } else { None });
            }
        }
    }

    fn notify_number(&self) -> RawFd {
        self.running.notify.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Waits until something can be read, and tells what.
    fn wait(&self) -> Result<Vec<RawFd>> {
        let mut polled = vec![
            PollFd::new(self.running.pidfd.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        polled.extend(self.running.notify.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        let sockets = self.callers.iter().chain(&self.stoppers);
        polled.extend(sockets.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        polled.extend(self.consoles.descriptors().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match nix::poll::poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for the server"),
        }
        let is_ready = |polled: &&PollFd| polled.revents().is_some_and(|events| !events.is_empty());
        Ok(polled.iter().filter(is_ready).map(|polled| polled.as_fd().as_raw_fd()).collect())
    }

    fn hear_callers(&mut self, ready: &[RawFd]) {
        for mut caller in std::mem::take(&mut self.callers) {
            if !ready.contains(&caller.as_raw_fd()) {
                self.callers.push(caller);
                continue;
            }
            match request::read(&mut caller) {
                Some(request::Request::HandOver) => self.stoppers.extend(request::agree(caller)),
                Some(request::Request::Console(number)) => {
                    if let Some(caller) = request::agree(caller) {
                        self.consoles.attach(number, caller);
                    }
                }
                Some(request::Request::Resize { console, size }) => self.consoles.resize(console, size),
                // Gone, or nonsense: closed.
                None => {}
            }
        }
    }

    /// sd_notify(3): datagrams of lines; only readiness is of interest.
    fn hear_notify(&mut self) {
        let Some(socket) = &self.running.notify else { return };
        let mut datagram = [0u8; 4096];
        // The guest has the socket as well, and may have taken the datagram back.
        let Ok((length, _)) = rustix::net::recv(socket, &mut datagram, rustix::net::RecvFlags::DONTWAIT) else {
            return;
        };
        if datagram[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
            let _ = fs::write(self.site.server_run(self.name).join("ready"), "");
        }
    }

    /// Why init ended. An adopted one is not our child: while it is a zombie its /proc tells, and newer kernels tell
    /// through the pidfd when it has been reaped.
    fn end(&self) -> End {
        use std::os::unix::process::ExitStatusExt;
        let pidfd = &self.running.pidfd;
        let zombie = || process::stat(self.running.pid).ok().filter(|found| found.has_ended).map(|found| found.status);
        let status = pidfd.reap().ok().or_else(zombie).or_else(|| pidfd.exit_status().ok().flatten());
        match status.and_then(|status| status.signal()) {
            Some(libc::SIGHUP) => End::Reboot,
            _ => End::Stop,
        }
    }
}

/// Reads a file to its end, at most `limit` bytes of it.
fn read_some(file: &mut impl Read, limit: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; limit];
    let length = file.read(&mut bytes).unwrap_or(0);
    bytes.truncate(length);
    bytes
}
