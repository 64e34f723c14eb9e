//! `lxcfs-fuse`: starting and stopping the overlay; all else is in the library.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kernel::process::PidFd;
use lxcfs_fuse::run_directory::RunDirectory;
use lxcfs_fuse::{handover, mountpoint, supervisor, worker};

const USAGE: &str = "usage: lxcfs-fuse serve|stop|reload --run DIR
  serve   mount DIR/mount and serve the servers registered in DIR/servers, in the background
  stop    unmount it and end the service; fine if there is none
  reload  let this program go on in the place of the one that serves; readers do not notice";

/// How long `reload` waits for the other program, in milliseconds: longer than a worker may take to come up.
const RELOAD_TIMEOUT_MS: u64 = 30_000;

/// How long a second `serve` waits for the first one to be live.
const LIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long `stop` waits for the supervisor to clean up, before it does so itself.
const STOP_TIMEOUT_MS: u64 = 10_000;

fn main() -> ExitCode {
    set_up_logging();
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(|argument| argument.to_str().unwrap_or("")).collect();
    let done = match words[..] {
        ["serve", "--run", _] => serve(Path::new(&arguments[2])),
        ["stop", "--run", _] => stop(Path::new(&arguments[2])),
        ["reload", "--run", _] => reload(Path::new(&arguments[2])),
        [handover::ASK_FORMAT] => {
            println!("{}", handover::FORMAT);
            Ok(())
        }
        ["supervise", "--run", _, handover::FOLLOWING] => follow(Path::new(&arguments[2])),
        ["supervise", "--run", _] => supervise(Path::new(&arguments[2])),
        ["worker", "--run", _] => worker::run(Path::new(&arguments[2])).inspect_err(|error| log::error!("{error:#}")),
        ["--help" | "-h" | "help"] => {
            println!("{USAGE}");
            Ok(())
        }
        ["--version" | "-V"] => {
            println!("lxcfs-fuse {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if words.first().is_some_and(|word| matches!(*word, "serve" | "stop" | "reload")) {
                eprintln!("lxcfs-fuse: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Supervisor and workers write to DIR/log, which is their stderr. fuser warns of each request it does not know,
/// which a guest could send without end.
fn set_up_logging() {
    let default = env_logger::Env::default().default_filter_or("info,fuser=error");
    let format = |out: &mut env_logger::fmt::Formatter, record: &log::Record<'_>| {
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let level = record.level().as_str().to_lowercase();
        writeln!(
            out,
            "{}.{:03} [{}] {level}: {}",
            time.as_secs(),
            time.subsec_millis(),
            std::process::id(),
            record.args()
        )
    };
    env_logger::Builder::from_env(default).format(format).init();
}

/// Serves a run directory: a supervisor is live when this returns.
fn serve(run: &Path) -> anyhow::Result<()> {
    let run = RunDirectory::create(run)?;
    let Some(pid) = start(&run)? else { return Ok(()) };
    if !mountpoint::mounted_at(&run.mount())?.is_empty() {
        println!("lxcfs-fuse: already serving {} (pid {pid})", run.path().display());
        return Ok(());
    }
    // Somebody has unmounted it. Who has its files bound does not notice, and nobody else can have them.
    stop(run.path())?;
    start(&run).map(drop)
}

/// Starts a supervisor in the background and waits until it is live; the pid of the one that is already.
fn start(run: &RunDirectory) -> anyhow::Result<Option<String>> {
    let program = std::env::current_exe().context("find this program")?;
    let mut child = Command::new(&program)
        .arg("supervise")
        .arg("--run")
        .arg(run.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Not ours: whoever waits for the end of our output would wait for the supervisor's end.
        .stderr(Stdio::from(run.log()?))
        .current_dir("/")
        .spawn()
        .with_context(|| format!("run {}", program.display()))?;
    let mut answer = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut answer).context("read from the supervisor")?;
    }
    match answer.trim_end().split_once(' ').unwrap_or((answer.trim_end(), "")) {
        ("live", _) => Ok(None),
        ("already", pid) => Ok(Some(pid.to_owned())),
        ("error", what) => bail!("{what}"),
        _ => bail!("the supervisor ended without a word; see {}/log", run.path().display()),
    }
}

/// The supervisor, started by `serve`: says one line on its output, then goes on alone.
fn supervise(run: &Path) -> anyhow::Result<()> {
    let done = RunDirectory::open(run).map_err(anyhow::Error::from).and_then(|run| supervise_in(&run));
    if let Err(error) = &done {
        log::error!("{error:#}");
        supervisor::tell_starter(&format!("error {error:#}"));
    }
    done
}

fn supervise_in(run: &RunDirectory) -> anyhow::Result<()> {
    // EPERM: already the leader of a session, which is what is wanted.
    let _ = rustix::process::setsid();
    let since = Instant::now();
    let lock = loop {
        if let Some(lock) = run.try_lock()? {
            break lock;
        }
        if let Some(pid) = run.pid() {
            supervisor::tell_starter(&format!("already {pid}"));
            return Ok(());
        }
        if since.elapsed() > LIVE_TIMEOUT {
            bail!("another lxcfs-fuse holds {} but is not live", run.path().join("lock").display());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    // Of a supervisor that was killed: nobody may take it for ours.
    run.withdraw();
    let end = supervisor::run(run, lock.into(), || {
        supervisor::tell_starter("live");
        close_output();
    })?;
    tell_end(end)
}

/// The supervisor, which another program was until now. Nobody has started it, and nobody hears it.
fn follow(run: &Path) -> anyhow::Result<()> {
    let done = RunDirectory::open(run).map_err(anyhow::Error::from).and_then(|run| supervisor::follow(&run));
    done.and_then(tell_end).inspect_err(|error| log::error!("{error:#}"))
}

fn tell_end(end: supervisor::End) -> anyhow::Result<()> {
    match end {
        supervisor::End::Stopped => log::info!("stopped"),
        supervisor::End::Unmounted => {
            log::warn!("ended: the file system was unmounted by somebody else")
        }
        supervisor::End::Broken => {
            log::warn!(
                "ended: the kernel cannot give out again what the worker left unanswered, so its readers were let go"
            )
        }
        supervisor::End::Hopeless => bail!("no worker could be brought up"),
    }
    Ok(())
}

/// The starter reads to the end of the line and goes; nothing may be written to it after that.
fn close_output() {
    let null = std::fs::File::options().write(true).open("/dev/null");
    let replaced = null.and_then(|null| Ok(rustix::stdio::dup2_stdout(&null)?));
    if let Err(error) = replaced {
        log::warn!("replace standard output: {error}");
    }
}

/// Puts this program in the place of the one that serves.
fn reload(run: &Path) -> anyhow::Result<()> {
    let run = RunDirectory::open(run)?;
    let program = std::env::current_exe().context("find this program")?;
    let caller = kernel::channel::knock(&run.listeners())?;
    caller.send(&[b"reload ", program.as_os_str().as_bytes()].concat(), &[])?;
    let answer = caller.receive_within(RELOAD_TIMEOUT_MS)?;
    let (words, _) = answer.with_context(|| format!("no answer; see {}/log", run.path().display()))?;
    let words = String::from_utf8_lossy(&words);
    match words.split_once(' ') {
        Some(("reloaded", version)) => println!("lxcfs-fuse: {version} serves {}", run.path().display()),
        Some(("refused", why)) => bail!("{why}"),
        _ => bail!("it ended, or is of a version that cannot; see {}/log", run.path().display()),
    }
    Ok(())
}

/// Ends the service of a run directory, and removes what a dead one left.
fn stop(run: &Path) -> anyhow::Result<()> {
    if !run.exists() {
        return Ok(());
    }
    let run = RunDirectory::open(run)?;
    if run.try_lock()?.is_none() {
        end_supervisor(&run)?;
    }
    let Some(_lock) = run.try_lock()? else {
        bail!("another lxcfs-fuse was started at {} meanwhile", run.path().display())
    };
    mountpoint::clear(&run.mount())?;
    run.withdraw();
    Ok(())
}

/// Asks the supervisor to stop; kills it if it does not. Its worker goes with it.
fn end_supervisor(run: &RunDirectory) -> anyhow::Result<()> {
    let since = Instant::now();
    // The holder of the lock may be a supervisor that is not live yet.
    let pid = loop {
        if let Some(pid) = run.pid() {
            break pid;
        }
        if run.try_lock()?.is_some() {
            return Ok(());
        }
        if since.elapsed() > LIVE_TIMEOUT {
            bail!("{} is held, but there is no {}", run.path().join("lock").display(), run.pid_file().display());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let process: PidFd = match PidFd::open(pid) {
        Ok(process) => process,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // Between reading the pid and opening it the process may have ended; the lock says whether it was ours.
    if run.try_lock()?.is_some() {
        return Ok(());
    }
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        let _ = process.signal(signal);
        if process.wait_exit(Some(STOP_TIMEOUT_MS))? {
            return Ok(());
        }
    }
    bail!("supervisor {pid} cannot be killed")
}
