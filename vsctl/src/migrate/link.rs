//! The connection to another host: a program that runs a command there, and its standard input and output.

use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::VERB;
use super::wire::{Channel, Hello, Lost};
use crate::failure::{Exit, Failure};
use crate::site::Site;

/// How long the other side may take for what it takes back when the connection ends.
const END: Duration = Duration::from_secs(60);

/// The command on the other host; dropped, it is told to end and waited for.
#[derive(Debug)]
pub struct Link {
    channel: Option<Channel<ChildStdout, ChildStdin>>,
    child: Child,
    line: String,
}

impl Link {
    /// Runs `vsctl` on `host` and exchanges greetings.
    ///
    /// # Errors
    /// When the shell cannot be run, or what answers is not vsctl.
    pub fn open(site: &Site, host: &str) -> Result<(Self, Hello)> {
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
        let mut child = command.spawn().with_context(|| format!("run {line}"))?;
        let (from, to) =
            (child.stdout.take().context("no pipe from it")?, child.stdin.take().context("no pipe to it")?);
        let mut link = Self { channel: Some(Channel::new(from, to)), child, line };
        match link.channel()?.greet() {
            Ok(hello) => Ok((link, hello)),
            Err(error) if error.is::<Lost>() => Err(link.unanswered()),
            Err(error) => Err(error),
        }
    }

    /// What is said and heard.
    ///
    /// # Errors
    /// When it has been closed.
    pub fn channel(&mut self) -> Result<&mut Channel<ChildStdout, ChildStdin>> {
        self.channel.as_mut().ok_or_else(|| anyhow!("the connection is closed"))
    }

    /// Why nobody said hello.
    fn unanswered(mut self) -> anyhow::Error {
        self.channel = None;
        let ended = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        let message = format!("`{}` has ended without an answer ({ended})", self.line);
        Failure::new(Exit::Failed, message)
            .hint("root must get there without a question, and vsctl be installed there")
            .into()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.channel = None;
        let end = Instant::now() + END;
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
