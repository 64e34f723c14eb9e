//! The connection to another host: a program that runs a command there, and its standard input and output.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::VERB;
use super::alive::{Alive, Connection, Limit};
use super::wire::{Hello, Lost};
use crate::failure::{Exit, Failure};
use crate::site::Site;

/// How long the other side may take for what it takes back when the connection ends.
const END: Duration = Duration::from_secs(60);

/// What is to be done when nobody answers.
const NO_QUESTION: &str = "root must get there without a question, and vsctl be installed there";

/// The command on the other host; dropped, it is told to end and waited for.
#[derive(Debug)]
pub struct Link {
    channel: Option<Connection>,
    limit: Limit,
    child: Child,
    line: String,
}

impl Link {
    /// Runs `vsctl` on `host` and exchanges greetings. One that is `apart` is not ended with the terminal's other programs (^C), and can ask
    /// nothing there.
    ///
    /// # Errors
    /// When the shell cannot be run, or what answers is not vsctl.
    pub fn open(site: &Site, host: &str, apart: bool) -> Result<(Self, Hello)> {
        if host.is_empty() || host.starts_with('-') {
            return Err(Failure::new(Exit::BadParameter, format!("'{}' is no host", host.escape_debug())).into());
        }
        let Some((program, arguments)) = site.settings.migrate.shell.split_first() else {
            return Err(Failure::new(Exit::BadConfiguration, "vsos.toml: migrate.shell is empty").into());
        };
        let words: Vec<&str> = arguments.iter().map(String::as_str).chain([host, "vsctl", VERB]).collect();
        let line = format!("{program} {}", words.join(" "));
        let mut command = Command::new(program);
        // What it has to say to people goes where this command's own words go.
        command.args(&words).stdin(Stdio::piped()).stdout(Stdio::piped());
        // As long as nobody holds signals back, ^C is for it, too.
        if apart {
            command.process_group(0);
        }
        let mut child = command.spawn().with_context(|| format!("run {line}"))?;
        let (from, to) =
            (child.stdout.take().context("no pipe from it")?, child.stdin.take().context("no pipe to it")?);
        let limit = Limit::new(Duration::from_secs(site.settings.migrate.silence.get()));
        let channel = Some(Connection::over(from.into(), to.into(), &limit)?);
        let mut link = Self { channel, limit, child, line };
        match link.channel()?.greet() {
            Ok(hello) => Ok((link, hello)),
            Err(error) => Err(match error.downcast_ref::<Lost>().copied() {
                Some(Lost::Ended) => link.unanswered(),
                Some(Lost::Silent(_)) => {
                    let message = format!("wait for an answer of `{}`: {error:#}", link.line);
                    Failure::new(Exit::Failed, message).hint(NO_QUESTION).into()
                }
                None => error,
            }),
        }
    }

    /// What is said and heard.
    ///
    /// # Errors
    /// When it has been closed, or nobody is at its other end.
    pub fn channel(&mut self) -> Result<&mut Connection> {
        let is_usable = !self.limit.is_over() && !self.limit.is_given_up();
        self.channel.as_mut().filter(|_| is_usable).ok_or_else(|| anyhow!("the connection is closed"))
    }

    /// Says that somebody works here ([`Connection::alive`]).
    pub fn alive(&self) -> Option<Alive> {
        self.channel.as_ref().map(Connection::alive)
    }

    /// Why nobody said hello.
    fn unanswered(mut self) -> anyhow::Error {
        self.channel = None;
        let ended = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        let message = format!("`{}` has ended without an answer ({ended})", self.line);
        Failure::new(Exit::Failed, message).hint(NO_QUESTION).into()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.end();
    }
}

impl Link {
    /// Tells it to end, and waits for that.
    pub fn end(&mut self) {
        self.channel = None;
        // One that does not speak will not take anything back, either, before it hears that this is over.
        let end = Instant::now() + if self.limit.is_over() { Duration::ZERO } else { END };
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() >= end {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
