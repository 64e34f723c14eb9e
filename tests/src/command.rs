//! Running a program with a hard limit: it ends by itself, or it is killed and counts as a failure.
//!
//! A command must also let go of its output when it ends: a process left behind that still holds the pipe would hang
//! every script that reads it, so that is an error here.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    io::{Read, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        OnceLock,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{PidfdFlags, pidfd_open},
};

/// How long a command may take unless the caller knows better. Generous: it bounds hangs, it measures nothing.
pub const LIMIT: Duration = Duration::from_secs(90);
/// For a command that ends when its caller wants it to.
pub const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// How long the output may stay open after the command has ended.
const OUTPUT_GRACE: Duration = Duration::from_secs(5);
/// After how long a silence whoever waits for lines looks whether there is hope.
const SILENCE: Duration = Duration::from_secs(1);

/// A command to run: program, arguments, environment, input and limit.
#[derive(Clone, Debug)]
pub struct Invocation {
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    input: Vec<u8>,
    directory: Option<PathBuf>,
    limit: Duration,
}

/// A command that ended by itself.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The command line, for messages.
    pub command: String,
    /// The exit status; a signal is 128+N, as a shell has it.
    pub code: i32,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
    /// Wall time. For the bench; no promise looks at it.
    pub took: Duration,
}

impl Invocation {
    /// A call of `program` without arguments.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            input: Vec::new(),
            directory: None,
            limit: LIMIT,
        }
    }

    /// Adds arguments.
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, arguments: I) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().into()));
        self
    }

    /// Sets a variable in the environment.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((key.as_ref().into(), value.as_ref().into()));
        self
    }

    /// Bytes for the standard input; without them it is `/dev/null`.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// Where it runs.
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Changes the limit.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it to its end, whatever its exit status.
    pub fn run(self) -> Result<Finished> {
        let mut background = self.spawn()?;
        background.wait()
    }

    /// Runs it and asks for exit status 0.
    pub fn succeed(self) -> Result<Finished> {
        self.run()?.success()
    }

    /// Starts it; dropped, it is killed with its process group.
    pub fn spawn(self) -> Result<Background> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).envs(self.environment.iter().cloned()).process_group(0);
        command.stdin(if self.input.is_empty() { Stdio::null() } else { Stdio::piped() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        let mut child = command.spawn().with_context(|| format!("run {self}"))?;
        if let Some(mut pipe) = child.stdin.take() {
            let input = self.input.clone();
            // A command that does not read its input closes the pipe: its exit status tells, not the write.
            thread::spawn(move || pipe.write_all(&input));
        }
        let stdout = drain(child.stdout.take().context("no pipe for the output")?);
        let stderr = drain(child.stderr.take().context("no pipe for the errors")?);
        Ok(Background {
            command: self.to_string(),
            child,
            stdout,
            stderr,
            limit: patient(self.limit),
            started: Instant::now(),
        })
    }
}

impl fmt::Display for Invocation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = Path::new(&self.program).file_name().unwrap_or(&self.program);
        write!(out, "{}", program.to_string_lossy())?;
        self.arguments.iter().try_for_each(|argument| write!(out, " {}", argument.to_string_lossy().escape_debug()))
    }
}

/// A command that is running.
#[derive(Debug)]
pub struct Background {
    command: String,
    child: Child,
    stdout: Receiver<Chunk>,
    stderr: Receiver<Chunk>,
    limit: Duration,
    started: Instant,
}

impl Background {
    /// The process id on the host.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid fits pid_t")
    }

    /// Waits for its end; past the limit the whole process group is killed, and that is an error with the output.
    pub fn wait(&mut self) -> Result<Finished> {
        let status = match self.wait_until(self.started + self.limit)? {
            Some(status) => status,
            None => {
                self.kill();
                let output = self.collect(Duration::from_secs(1));
                bail!("{} hung for {} s and was killed\n{}", self.command, self.limit.as_secs(), output.shown());
            }
        };
        let took = self.started.elapsed();
        let output = self.collect(patient(OUTPUT_GRACE));
        ensure!(
            output.closed,
            "{} ended, but a process it left behind still holds its output open\n{}",
            self.command,
            output.shown()
        );
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        Ok(Finished { command: self.command.clone(), code, stdout: output.stdout, stderr: output.stderr, took })
    }

    /// Waits as [`wait`](Self::wait) does, and hands over each line of the standard output as it comes. `hopeless` is asked after
    /// each second of silence: when it has a reason to wait no longer, the command is killed, and that is an error with the reason.
    pub fn wait_with_lines(
        &mut self,
        mut each: impl FnMut(&str),
        hopeless: impl Fn() -> Option<String>,
    ) -> Result<Finished> {
        let end = self.started + self.limit;
        let mut bytes = Vec::new();
        let mut shown = 0;
        loop {
            match self.stdout.recv_timeout(end.saturating_duration_since(Instant::now()).min(SILENCE)) {
                Ok(chunk) => bytes.extend(chunk),
                // The end of the channel is the end of the output.
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if Instant::now() >= end => break,
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(reason) = hopeless() {
                        self.kill();
                        bail!("{} was waited for no longer\n{reason}", self.command);
                    }
                }
            }
            while let Some(length) = bytes[shown..].iter().position(|byte| *byte == b'\n') {
                each(&String::from_utf8_lossy(&bytes[shown..shown + length]));
                shown += length + 1;
            }
        }
        let done = self.wait()?;
        Ok(Finished { stdout: bytes, ..done })
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills the whole process group.
    pub fn kill(&mut self) {
        // Gone already is fine.
        let _ = killpg(Pid::from_raw(self.pid()), Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// Woken by its end, and not by a clock: the bench measures with it.
    fn wait_until(&mut self, end: Instant) -> Result<Option<ExitStatus>> {
        let about = || format!("wait for {}", self.command);
        // A number that was reaped is nobody's.
        if let Some(status) = self.child.try_wait().with_context(about)? {
            return Ok(Some(status));
        }
        let process = rustix::process::Pid::from_child(&self.child);
        let process = pidfd_open(process, PidfdFlags::empty()).with_context(about)?;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).with_context(about)?;
            match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Ok(None),
                Ok(_) => return self.child.wait().map(Some).with_context(about),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).with_context(about),
            }
        }
    }

    fn collect(&self, grace: Duration) -> Output {
        let end = Instant::now() + grace;
        let (stdout, out_closed) = gather(&self.stdout, end);
        let (stderr, err_closed) = gather(&self.stderr, end);
        Output { stdout, stderr, closed: out_closed && err_closed }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.is_running() {
            self.kill();
        }
    }
}

impl Finished {
    /// Itself, if the exit status is 0.
    pub fn success(self) -> Result<Self> {
        ensure!(self.code == 0, "{self}");
        Ok(self)
    }

    /// Itself, if it failed with `code` and its errors contain all of `words` (in any case of letters).
    ///
    /// Panic and silence are never a right way to fail.
    pub fn failure(self, code: i32, words: &[&str]) -> Result<Self> {
        ensure!(self.code == code, "wanted exit status {code}\n{self}");
        self.complains(words)
    }

    /// Itself, if it failed in any orderly way and its errors contain all of `words`.
    pub fn complains(self, words: &[&str]) -> Result<Self> {
        ensure!(self.code != 0, "wanted a failure\n{self}");
        ensure!(self.code < 101, "wanted an orderly failure, not a panic or a signal\n{self}");
        let errors = self.errors().to_lowercase();
        ensure!(!errors.trim().is_empty(), "it failed without a word\n{self}");
        for word in words {
            ensure!(errors.contains(&word.to_lowercase()), "the error does not name {word:?}\n{self}");
        }
        Ok(self)
    }

    /// The standard output as text, without the white space around it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// The standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The standard output as JSON.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.stdout).with_context(|| format!("the output is not JSON\n{self}"))
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "$ {}\nexit status {}", self.command, self.code)?;
        write!(out, "{}", shown(&self.stdout, &self.stderr))
    }
}

/// What was gathered, and whether both pipes have been closed.
struct Output {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    closed: bool,
}

impl Output {
    fn shown(&self) -> String {
        shown(&self.stdout, &self.stderr)
    }
}

fn shown(stdout: &[u8], stderr: &[u8]) -> String {
    let part = |name: &str, bytes: &[u8]| match String::from_utf8_lossy(bytes).trim_end() {
        "" => String::new(),
        text => text.lines().map(|line| format!("  {name} {line}\n")).collect(),
    };
    part("out|", stdout) + &part("err|", stderr)
}

/// Bytes as they came; the end of the channel is the end of the pipe.
type Chunk = Vec<u8>;

fn drain(mut pipe: impl Read + Send + 'static) -> Receiver<Chunk> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 16384];
        while let Ok(count) = pipe.read(&mut buffer) {
            if count == 0 || sender.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

fn gather(chunks: &Receiver<Chunk>, end: Instant) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    loop {
        match chunks.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(chunk) => bytes.extend(chunk),
            Err(RecvTimeoutError::Disconnected) => return (bytes, true),
            Err(RecvTimeoutError::Timeout) => return (bytes, false),
        }
    }
}

/// A limit as this machine needs it: an emulated processor is told to be given more by `VSOS_TEST_PATIENCE`, a factor.
///
/// Limits bound hangs. They measure nothing, so a longer one proves no less.
pub fn patient(limit: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| {
        let factor = std::env::var("VSOS_TEST_PATIENCE").ok().and_then(|text| text.parse().ok());
        factor.unwrap_or(1)
    });
    limit.saturating_mul(*factor)
}

/// How often a promise does again what may leave something behind: `times`, and a multiple of that where `VSOS_TEST_REPEATS`, a factor,
/// says that there is time for it.
pub fn repeated(times: u32) -> u32 {
    let factor = std::env::var_os("VSOS_TEST_REPEATS").map_or(1, |text| {
        // Counted as 1, it would prove less than whoever set it believes.
        text.to_str().and_then(|text| text.parse().ok()).expect("VSOS_TEST_REPEATS is a number, such as 5")
    });
    times.saturating_mul(factor)
}

/// Ends a process with SIGKILL.
pub fn kill_hard(pid: i32) -> Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("kill {pid}"))
}

/// Calls `probe` until it yields something, for at most `limit`; then the error says what was waited for.
pub fn eventually<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let limit = patient(limit);
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = probe() {
            return Ok(value);
        }
        ensure!(Instant::now() < end, "waited {} s in vain: {what}", limit.as_secs());
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Invocation {
        Invocation::new("sh").args(["-c", script])
    }

    #[test]
    fn output_and_status_are_kept_apart() {
        let done = shell("cat; echo no >&2; exit 7").input("yes").run().unwrap();
        assert_eq!((done.text().as_str(), done.errors().as_str(), done.code), ("yes", "no\n", 7));
    }

    #[test]
    fn a_command_that_hangs_is_an_error_with_its_output() {
        let error = shell("echo before; sleep 60").limit(Duration::from_millis(300)).run().unwrap_err();
        assert!(error.to_string().contains("hung") && error.to_string().contains("before"), "{error}");
    }

    #[test]
    fn what_a_serial_log_says_ends_the_wait_for_lines() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("serial");
        let hang = || crate::lab::serial::hang(&std::fs::read_to_string(&log).unwrap_or_default());
        // It writes the log itself, and then hangs; a processor that is stuck for a moment is no reason.
        let says = |seconds: u32| format!("echo 'soft lockup - CPU#0 stuck for {seconds}s! [nft:1]' >>serial;");
        let script = format!("echo one; {} sleep 2; echo two; sleep 0.4; {} sleep 60; echo three", says(23), says(133));
        let mut lines = Vec::new();
        let mut running = shell(&script).directory(directory.path()).spawn().unwrap();
        let error = running.wait_with_lines(|line| lines.push(line.to_owned()), hang).unwrap_err();
        assert!(error.to_string().contains("stuck for 133s"), "{error}");
        assert_eq!(lines, ["one", "two"]);
        assert!(!running.is_running());
        // Without a word, it is waited for.
        let mut running = shell("echo one; sleep 2; echo two").spawn().unwrap();
        assert_eq!(running.wait_with_lines(|_| (), || None).unwrap().text(), "one\ntwo");
    }

    #[test]
    fn a_signal_counts_as_a_shell_counts_it() {
        assert_eq!(shell("kill -9 $$").run().unwrap().code, 137);
    }

    #[test]
    fn a_failure_must_be_orderly_and_name_its_object() {
        assert!(shell("echo no such server web1 >&2; exit 44").run().unwrap().failure(44, &["WEB1"]).is_ok());
        assert!(shell("exit 44").run().unwrap().complains(&[]).is_err());
        assert!(shell("echo panicked >&2; exit 101").run().unwrap().complains(&[]).is_err());
    }
}
