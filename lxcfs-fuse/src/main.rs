//! `lxcfs-fuse`: starting and stopping the overlay; all else is in the library.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kernel::process::PidFd;
use lxcfs_fuse::run_directory::RunDirectory;
use lxcfs_fuse::{mountpoint, supervisor, worker};

const USAGE: &str = "usage: lxcfs-fuse serve|stop --run DIR
  serve  mount DIR/mount and serve the servers registered in DIR/servers, in the background
  stop   unmount it and end the service; fine if there is none";

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
            if words.first().is_some_and(|word| matches!(*word, "serve" | "stop")) {
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

/// Starts a supervisor in the background and waits until it is live.
fn serve(run: &Path) -> anyhow::Result<()> {
    let run = RunDirectory::create(run)?;
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
        ("live", _) => Ok(()),
        ("already", pid) => {
            println!("lxcfs-fuse: already serving {} (pid {pid})", run.path().display());
            Ok(())
        }
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
    let _lock = loop {
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
    let end = supervisor::run(run, || {
        supervisor::tell_starter("live");
        close_output();
    })?;
    match end {
        supervisor::End::Stopped => log::info!("stopped"),
        supervisor::End::Unmounted => {
            log::warn!("ended: the file system was unmounted by somebody else")
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
