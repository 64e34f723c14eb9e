//! CRIU, driven over its RPC (`criu swrk`): one process for each dump or restore, which asks at each stage before it goes on.
//!
//! Knows no server: who dumps what, and what happens at a stage, is for the caller to say.

pub mod message;
pub mod pages;

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kernel::channel::{self, Channel};
use kernel::lock::Flock;
use kernel::process;
use prost::Message;

use crate::failure::{Exit, Failure};
use message::{Features, Kind, Options, Request, Response};
pub use pages::Pages;

/// How many of the last lines of errors in a log are told.
const ERRORS_TOLD: usize = 3;

/// How long CRIU may be at work without a word. A guest can make a dump slow, and then is let go on; in a restore nothing of it acts, and all
/// of its memory may have to come from a slow disk.
const SILENCE: Duration = Duration::from_secs(600);
const SILENCE_OF_RESTORE: Duration = Duration::from_secs(3600);

/// After what time without a word of CRIU's somebody looks why, and then again and again.
const LOOK_MS: u64 = 500;

/// The program.
#[derive(Clone, Debug)]
pub struct Criu {
    program: PathBuf,
}

/// A CRIU at work.
#[derive(Debug)]
pub struct Session {
    channel: Channel,
    child: Child,
    kind: Kind,
    log: PathBuf,
    // As long as CRIU opens them by our numbers.
    _directories: [OwnedFd; 2],
}

/// What CRIU says.
#[derive(Debug)]
pub enum Event {
    /// It has reached a stage, and waits for [`Session::go_on`].
    Stage {
        /// The stage's name.
        name: String,
        /// The root of the tree, where CRIU tells it.
        pid: Option<i32>,
        /// What it hands over.
        descriptors: Vec<OwnedFd>,
    },
    /// It is done.
    Done,
}

impl Criu {
    /// The program at `path`.
    pub fn at(path: &Path) -> Self {
        Self { program: path.to_owned() }
    }

    /// Which version it is: major, minor, sublevel.
    ///
    /// # Errors
    /// Exit 5 when it is not there or does not answer.
    pub fn version(&self) -> Result<(i32, i32, i32)> {
        let request = Request { kind: Kind::Version as i32, ..Request::default() };
        let version = self.ask(&request)?.version.context("criu does not tell its version")?;
        Ok((version.major, version.minor, version.sublevel.unwrap_or_default()))
    }

    /// The same, from the file `note`, if it was this program that was asked then: to run it takes longer than all else that a suspend does beside it.
    ///
    /// # Errors
    /// As [`Self::version`].
    pub fn version_noted(&self, note: &Path) -> Result<(i32, i32, i32)> {
        let Some(program) = self.mark() else { return self.version() };
        if let Some(version) = fs::read_to_string(note).ok().and_then(|text| noted(&text, &program)) {
            return Ok(version);
        }
        let version = self.version()?;
        let text = format!("{program}{} {} {}\n", version.0, version.1, version.2);
        // It is asked again next time.
        if let Err(error) = kernel::file::replace(note, text.as_bytes(), 0o644) {
            log::debug!("{error}");
        }
        Ok(version)
    }

    /// What the program has as long as it is the same, as a line; none where only running it tells what it is.
    fn mark(&self) -> Option<String> {
        if self.program.is_relative() && self.program.components().nth(1).is_some() {
            return None;
        }
        let path = std::env::var_os("PATH")?;
        // One that is named by a path is where that says, whatever it is joined to. As execvp(3) looks for it.
        let is_program = |found: &fs::Metadata| found.is_file() && found.mode() & 0o111 != 0;
        let (file, found) = std::env::split_paths(&path).find_map(|directory| {
            let file = directory.join(&self.program);
            fs::metadata(&file).ok().filter(is_program).map(|found| (file, found))
        })?;
        let mut begins = [0; 2];
        // What a script runs may be another tomorrow.
        if fs::File::open(file).and_then(|mut file| file.read_exact(&mut begins)).is_err() || begins == *b"#!" {
            return None;
        }
        let (length, changed, changed_ns) = (found.len(), found.ctime(), found.ctime_nsec());
        Some(format!("{} {} {length} {changed} {changed_ns}\n", found.dev(), found.ino()))
    }

    /// What it and the kernel can do together. The first time after a boot of the host it looks at the whole kernel, which a dump or restore
    /// does not have to do any more then.
    ///
    /// # Errors
    /// Exit 5 when it is not there or does not answer.
    pub fn features(&self) -> Result<Features> {
        let wanted = Features { notes_changes: Some(true), brings_pages: Some(true) };
        let request = Request { kind: Kind::FeatureCheck as i32, features: Some(wanted), ..Request::default() };
        self.ask(&request)?.features.context("criu does not tell what it can do here")
    }

    /// Asks one question.
    fn ask(&self, request: &Request) -> Result<Response> {
        let (channel, mut child) = self.spawn(None)?;
        // To one that has ended already nothing can be sent; that it does not answer says more.
        let _ = channel.send(&request.encode_to_vec(), &[]);
        let limit_ms = SILENCE.as_millis() as u64;
        let answer = channel.receive_within(limit_ms).context("listen to criu");
        end(&mut child);
        let packet = answer?.with_context(|| format!("criu has said nothing for {} s", SILENCE.as_secs()))?;
        let response = understand(packet)?.0;
        if !response.success {
            let message = format!("criu cannot work with this kernel: {}", response.message.unwrap_or_default());
            return Err(Failure::new(Exit::Unsupported, message).hint("`criu check` says more").into());
        }
        Ok(response)
    }

    /// Begins a dump or restore with images in `images`. Its log goes to `logs`, since images may be removed when it fails.
    ///
    /// A lock that is given is held until CRIU has ended, also when its caller is killed: it then still puts back what it had begun.
    ///
    /// # Errors
    /// Exit 5 when the program is not there.
    pub fn begin(
        &self,
        kind: Kind,
        images: &Path,
        logs: &Path,
        mut options: Options,
        lock: Option<&Flock>,
    ) -> Result<Session> {
        let open = |path: &Path| fs::File::open(path).with_context(|| format!("open {}", path.display()));
        let directories = [open(images)?, open(logs)?];
        let log_file = match kind {
            Kind::Dump | Kind::PreDump => "criu-dump.log",
            _ => "criu-restore.log",
        };
        let log = logs.join(log_file);
        options.images_dir_fd = directories[0].as_raw_fd();
        options.work_dir_fd = Some(directories[1].as_raw_fd());
        options.log_file = Some(log_file.to_owned());
        options.log_level = Some(4);
        let (channel, child) = self.spawn(lock)?;
        let session = Session { channel, child, kind, log, _directories: directories.map(OwnedFd::from) };
        let request = Request { kind: kind as i32, options: Some(options), ..Request::default() };
        session.channel.send(&request.encode_to_vec(), &[])?;
        Ok(session)
    }

    fn spawn(&self, lock: Option<&Flock>) -> Result<(Channel, Child)> {
        let (ours, theirs) = channel::pair()?;
        let lock = lock.map(|lock| lock.file().try_clone().context("share the lock")).transpose()?;
        if let Some(lock) = &lock {
            process::keep_across_exec(lock)?;
        }
        process::keep_across_exec(&theirs)?;
        let number = theirs.as_fd().as_raw_fd();
        let mut command = Command::new(&self.program);
        // Not in the terminal's group: ^C would end it in the midst of its work on other processes.
        command.process_group(0);
        command.args(["swrk", &number.to_string()]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                let message = format!("there is no {}", self.program.display());
                Failure::new(Exit::Unsupported, message)
                    .hint("install criu, or name one in vsos.toml: checkpoint.criu = PATH")
                    .into()
            }
            _ => anyhow::Error::from(error).context(format!("run {}", self.program.display())),
        })?;
        Ok((ours, child))
    }
}

/// What CRIU has said when it could not do its work.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

/// What CRIU refuses and may do a moment later: a watch of a file that is gone (systemd watches the control group of each of its units,
/// and ends that when it has seen the end of the group), a message on its way with a descriptor or with who has sent it, and one in a
/// connection that nobody has accepted yet; news of the kernel's that nobody has read, as after a resume, which brings a link.
const PASSING: [&str; 4] = [
    "irmap: Failed to resolve",
    "skqueue: Control messages in queue",
    "in-flight socket",
    "netlink: The socket has data to read",
];

/// Whether CRIU has refused what it may do a moment later, or somebody else has.
pub fn may_pass(error: &anyhow::Error) -> bool {
    let refuses = |refusal: &Refusal| PASSING.iter().any(|passing| refusal.0.contains(passing));
    error.is::<NotNow>() || error.downcast_ref::<Refusal>().is_some_and(refuses)
}

/// An error of CRIU's; when that has failed for want of room, as others say it. It is no reason any more to try once more.
pub fn say_if_the_disk_is_full(error: anyhow::Error) -> anyhow::Error {
    let said = format!("{error:#}");
    match has_refused(&error)
        && ["No space left on device", "Disk quota exceeded"].iter().any(|word| said.contains(word))
    {
        true => Failure::new(Exit::NoSpace, format!("the disk is full: {said}")).into(),
        false => error,
    }
}

/// Whether CRIU has said that it failed.
pub fn has_refused(error: &anyhow::Error) -> bool {
    error.is::<Refusal>() || error.chain().any(|cause| cause.is::<Refusal>())
}

/// What cannot be dumped, or not so that it could be restored, and may be a moment later: in words.
#[derive(Debug)]
pub struct NotNow(pub String);

impl fmt::Display for NotNow {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for NotNow {}

impl Session {
    /// Waits for what CRIU says next.
    ///
    /// # Errors
    /// That it failed, with the last errors of its log.
    pub fn listen(&mut self) -> Result<Event> {
        self.listen_and(|| Ok(()))
    }

    /// The same; `look` is called now and then while it says nothing, and ends the wait.
    ///
    /// # Errors
    /// As [`Self::listen`], and what `look` says.
    pub fn listen_and(&mut self, look: impl Fn() -> Result<()>) -> Result<Event> {
        let (began, silence) = (Instant::now(), if self.kind == Kind::Restore { SILENCE_OF_RESTORE } else { SILENCE });
        let packet = loop {
            if let Some(packet) = self.channel.receive_within(LOOK_MS).context("listen to criu")? {
                break packet;
            }
            if began.elapsed() >= silence {
                bail!("criu has said nothing for {} s: {}", silence.as_secs(), self.why());
            }
            look()?;
        };
        let (response, descriptors) =
            understand(packet).map_err(|error| Refusal(format!("{}: {error:#}", self.why())))?;
        if !response.success {
            let why = response.message.unwrap_or_default();
            let errno = response.errno.filter(|errno| *errno != 0);
            let errno = errno.map_or_else(String::new, |errno| format!(" ({})", io::Error::from_raw_os_error(errno)));
            log::debug!("criu says: {why}");
            return Err(Refusal(format!("criu failed{errno}: {}", self.why())).into());
        }
        if let Some(stage) = response.notify {
            log::debug!("criu is at {}", stage.script.as_deref().unwrap_or_default());
            return Ok(Event::Stage { name: stage.script.unwrap_or_default(), pid: stage.pid, descriptors });
        }
        if response.kind != self.kind as i32 {
            bail!("criu answers something else than it was asked ({})", response.kind);
        }
        log::debug!("criu is done");
        Ok(Event::Done)
    }

    /// Lets CRIU go on after a stage.
    ///
    /// # Errors
    /// When it is gone.
    pub fn go_on(&self) -> Result<()> {
        self.answer(true)
    }

    /// Has CRIU give up at a stage.
    ///
    /// # Errors
    /// When it is gone.
    pub fn give_up(&self) -> Result<()> {
        self.answer(false)
    }

    /// Ends it, wherever it is. Those whom it has held only are let go by the kernel (ptrace(2)); a group that it has frozen stays so.
    pub fn end(&mut self) {
        end(&mut self.child);
    }

    /// Has CRIU give up at a stage, and waits until it has put everything back as it was.
    pub fn take_back(mut self) {
        if let Err(error) = self.give_up() {
            log::warn!("{error:#}");
            return;
        }
        // It asks on the way, and at its end says that it has failed, as it was told to.
        while let Ok(Event::Stage { .. }) = self.listen() {
            if self.go_on().is_err() {
                return;
            }
        }
    }

    fn answer(&self, success: bool) -> Result<()> {
        let request = Request { kind: Kind::Notify as i32, notify_success: Some(success), ..Request::default() };
        self.channel.send(&request.encode_to_vec(), &[]).with_context(|| self.why())
    }

    fn why(&self) -> String {
        why(&self.log)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// The version in a note about `program`.
fn noted(text: &str, program: &str) -> Option<(i32, i32, i32)> {
    let numbers = text.strip_prefix(program)?.trim_end().split(' ').map(|word| word.parse().ok());
    match numbers.collect::<Option<Vec<i32>>>()?[..] {
        [major, minor, sublevel] => Some((major, minor, sublevel)),
        _ => None,
    }
}

/// The last errors in a log, and where it is.
fn why(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let told = errors(&String::from_utf8_lossy(&text));
    format!("{} (all of it: {})", if told.is_empty() { "no reason in its log" } else { &told }, log.display())
}

/// Ends a CRIU and takes its status. One that has done its work has ended by itself.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn understand((bytes, descriptors): (Vec<u8>, Vec<OwnedFd>)) -> Result<(Response, Vec<OwnedFd>)> {
    if bytes.is_empty() {
        bail!("criu ended without an answer");
    }
    Ok((Response::decode(bytes.as_slice()).context("understand criu")?, descriptors))
}

/// The last lines of a log that tell of errors, without time and place.
fn errors(log: &str) -> String {
    // It asks for programs of iptables and for tun devices, which nobody needs, and calls it an error when there are none.
    let of_probes = |line: &&str| {
        let is_iptables = line.ends_with(" -V failed") || (line.contains("execvp(\"ip") && line.contains("tables-"));
        is_iptables || line.contains(": tun: Unable to create tun: ")
    };
    let errors = log.lines().filter_map(|line| line.split_once("Error (")).map(|(_, rest)| rest);
    let mut lines: Vec<&str> = errors.filter(|line| !of_probes(line)).collect();
    // When something has failed it ends what it had begun, and may see each end before its own: of the reason nothing would be left. Where
    // nothing had failed before, an end is the reason.
    let is_end = |line: &str| line.ends_with(" killed by signal 9: Killed") || line.contains(" exited, status=");
    let mut has_failed = false;
    lines.retain(|line| !std::mem::replace(&mut has_failed, true) || !is_end(line));
    let told = lines.iter().skip(lines.len().saturating_sub(ERRORS_TOLD));
    told.map(|line| line.split_once("): ").map_or(*line, |(_, what)| what)).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_last_errors_of_a_log_are_told() {
        let log = "(00.1) Dumping\n(00.2) Error (criu/mount.c:12): mnt: one\n(00.3)     12: Error (criu/net.c:3): two\n\
                   (00.3) Error (criu/a.c:1): three\n(00.4) Error (criu/util.c:9): iptables-save -V failed\n(00.4) Error (criu/util.c:9): execvp(\"ip6tables-legacy-restore\", ...) failed: No such file or directory\n(00.4) Error (criu/tun.c:85): tun: Unable to create tun: No such file or directory\n(00.4) Error (criu/cr-dump.c:5): Dumping FAILED.\n";
        assert_eq!(errors(log), "two; three; Dumping FAILED.");
        assert_eq!(errors("(00.1) fine\n"), "");
        let killed = "(00.4) Error (criu/cr-restore.c:1): 8 killed by signal 9: Killed\n(00.5) Error (criu/cr-restore.c:2): Restoring FAILED.\n";
        assert_eq!(errors(killed), "8 killed by signal 9: Killed; Restoring FAILED.");
        let exited = "(00.3) Error (criu/cr-restore.c:1): 8 exited, status=1\n";
        let log = format!(
            "(00.3) Error (criu/files-reg.c:1): File job/data has bad size\n(00.3) Error (criu/files.c:1): Unable to open fd=7\n{exited}{killed}"
        );
        assert_eq!(errors(&log), "File job/data has bad size; Unable to open fd=7; Restoring FAILED.");
    }

    #[test]
    fn a_watch_of_what_is_gone_may_pass() {
        let refused = |why: &str| anyhow::Error::from(Refusal(format!("criu failed: {why}"))).context("outside");
        assert!(may_pass(&refused(
            "fsnotify: Can't dump that handle; irmap: Failed to resolve 1b:1027; Dumping FAILED."
        )));
        assert!(may_pass(&refused("netlink: The socket has data to read; Dumping FAILED.")));
        assert!(!may_pass(&refused("mnt: one; Dumping FAILED.")));
        assert!(!may_pass(&anyhow::anyhow!("irmap: Failed to resolve")));
    }

    #[test]
    fn a_program_that_is_not_there_says_what_to_do() {
        let error = Criu::at(Path::new("/nowhere/criu")).version().unwrap_err();
        assert_eq!(crate::failure::exit_of(&error), Exit::Unsupported);
        assert!(crate::failure::hint_of(&error).unwrap().contains("vsos.toml"));
    }

    #[test]
    fn a_version_is_noted_for_the_program_that_told_it() {
        let directory = tempfile::tempdir().unwrap();
        let (program, note) = (directory.path().join("criu"), directory.path().join("note"));
        // It cannot be asked: what is known comes from the note.
        fs::write(&program, "nothing").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let criu = Criu::at(&program);
        criu.version_noted(&note).unwrap_err();
        fs::write(&note, format!("{}4 1 1\n", criu.mark().unwrap())).unwrap();
        assert_eq!(criu.version_noted(&note).unwrap(), (4, 1, 1));
        fs::write(&program, "another").unwrap();
        criu.version_noted(&note).unwrap_err();
        fs::write(&program, "#!/bin/sh").unwrap();
        assert_eq!(criu.mark(), None);
        fs::write(&program, "a third").unwrap();
        for damaged in ["4 1", "4 1 x", "4 1 1 1", ""] {
            fs::write(&note, format!("{}{damaged}", criu.mark().unwrap())).unwrap();
            criu.version_noted(&note).unwrap_err();
        }
    }

    #[test]
    fn one_that_ends_at_once_is_an_error() {
        let error = Criu::at(Path::new("/bin/true")).version().unwrap_err();
        assert!(format!("{error:#}").contains("ended without an answer"), "{error:#}");
    }
}
