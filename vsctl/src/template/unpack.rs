//! Unpacks a tarball that may be hostile. GNU tar(1) does it, in a place where it can do no harm. Servers' files are packed there, too.
//!
//! ```text
//! archive ─► gzip|xz|zstd|bzip2 ─► this process: counts, keeps the last kilobyte ─► tar
//! ```
//!
//! Both programs run in a mount namespace whose root is a small tmpfs: the host's programs read-only, and the new
//! root at /out. So absolute names, `..`, and links of either kind lead nowhere. They have no network and of root's
//! capabilities only those that files need.
//!
//! Limits: layers of container images are not put together; multi-volume and incremental archives are not read; an
//! access list that names a user by name, and not by number, is left out with a warning.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result};
use kernel::namespace::Kinds;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::CapabilitySet;

use super::During;
use super::progress::Progress;
use crate::failure::{Exit, Failure};

/// An archive ends with two blocks of zeros (tar(5)); one that was cut has none, which tar itself lets pass.
const END_BYTES: usize = 1024;

/// What the programs say when the disk is full; the last is tar's word for a write that went in half.
const FULL: [&str; 3] = ["No space left on device", "Disk quota exceeded", ": Wrote only "];

/// So much of what a program says is kept, in bytes.
const SAID_MAX: u64 = 64 << 10;

/// A tarball of a million complaints is not worth a million lines.
const MOST_WARNINGS: usize = 10;

/// What an archive may hold beside a template's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing: a root by itself.
    Root,
    /// The marks of an overlay in a user namespace (`user.overlay.*`).
    Layer,
    /// Those of the host's own overlays (`trusted.overlay.*`), which need more of root.
    TrustedLayer,
}

impl Content {
    /// tar's words for the attributes that are kept. Where an overlay has a file from is of no use elsewhere: a handle of the
    /// file system below.
    pub fn attributes(self) -> &'static [&'static str] {
        match self {
            Self::Root => {
                &["--xattrs-include=user.*", "--xattrs-include=security.capability", "--xattrs-exclude=user.overlay.*"]
            }
            Self::Layer => &[
                "--xattrs-include=user.*",
                "--xattrs-include=security.capability",
                "--xattrs-exclude=user.overlay.origin",
            ],
            Self::TrustedLayer => &[
                "--xattrs-include=user.*",
                "--xattrs-include=security.capability",
                "--xattrs-include=trusted.overlay.*",
                "--xattrs-exclude=trusted.overlay.origin",
            ],
        }
    }
}

/// How the archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    None,
    By(&'static str),
}

/// Tells by the first bytes, whatever the name says.
fn packing(head: &[u8]) -> Packing {
    match head {
        [0x1f, 0x8b, ..] => Packing::By("gzip"),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Packing::By("xz"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::By("zstd"),
        [b'B', b'Z', b'h', ..] => Packing::By("bzip2"),
        _ => Packing::None,
    }
}

/// What is done where a directory with something in it is in the place of what is no directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InTheWay {
    /// It is an error.
    Refused,
    /// It stays, and the other is left out.
    Stays,
}

/// tar's last words when not all went well.
const NOT_ALL: &str = "Exiting with failure status due to previous errors";

/// Whether tar has ended by itself, complains of nothing else than `is_fine` says, and all that it said is there.
pub fn complains_only(ended: ExitStatus, said: &str, is_fine: impl Fn(&str) -> bool) -> bool {
    /// When not all went well (tar(1)).
    const FAILED: i32 = 2;
    let complaints = || messages(said).filter(|line| line != NOT_ALL);
    let is_all = ended.code() == Some(FAILED) && (said.len() as u64) < SAID_MAX;
    is_all && complaints().count() > 0 && complaints().all(|line| is_fine(&line))
}

/// What tar says of that, also of the other names of what was left out.
fn is_of_the_way(complaint: &str) -> bool {
    let name = |(_, rest): (&str, &str)| {
        rest.strip_suffix(": Operation not permitted").is_some_and(|name| !name.contains(": "))
    };
    complaint.ends_with(": File exists") || complaint.rsplit_once(": Cannot hard link to ").is_some_and(name)
}

/// What became of the unpacking.
#[derive(Debug, Default)]
struct Outcome {
    tar: Option<ExitStatus>,
    tar_said: String,
    unpacker: Option<ExitStatus>,
    unpacker_said: String,
    /// tar ended before it had read all.
    tar_left: bool,
    has_end: bool,
}

/// Unpacks `archive` into the empty directory `root`; `sandbox` is another directory, not above it, to mount on.
/// Returns warnings. What a failure leaves in `root` is the caller's to remove.
pub fn unpack(archive: &Path, root: &Path, sandbox: &Path, progress: &mut dyn Progress) -> Result<Vec<String>> {
    let mut file = File::open(archive).with_context(|| format!("open {}", archive.display()))?;
    let meta = file.metadata().with_context(|| format!("stat {}", archive.display()))?;
    if !meta.is_file() {
        return Err(Failure::new(Exit::BadParameter, format!("{} is no regular file", archive.display())).into());
    }
    let mut head = Vec::new();
    (&mut file).take(16).read_to_end(&mut head).with_context(|| format!("read {}", archive.display()))?;
    file.rewind().with_context(|| format!("rewind {}", archive.display()))?;
    let packing = packing(&head);
    check_programs(packing)?;
    progress.phase("unpacking", Some(meta.len()));
    // The namespaces and the chroot are the thread's own and its children's; the rest of this process keeps its view.
    let (send, receive) = std::sync::mpsc::channel();
    let outcome = std::thread::scope(|scope| {
        let worker = scope.spawn(move || run(&mut file, packing, root, sandbox, &send));
        for done_bytes in receive {
            progress.advance(done_bytes);
        }
        worker.join()
    });
    let outcome = outcome.map_err(|_| anyhow::anyhow!("the unpacking thread panicked"))??;
    judge(&outcome, archive, InTheWay::Refused)
}

/// Unpacks the plain tar stream `from`, called `name` in errors, as a template's file is.
pub fn unpack_stream(
    from: &mut (dyn Read + Send),
    content: Content,
    name: &str,
    root: &Path,
    sandbox: &Path,
    in_the_way: InTheWay,
) -> Result<Vec<String>> {
    check_programs(Packing::None)?;
    let work = || {
        enter(root, sandbox, content).context("cannot make a safe place to unpack in")?;
        let mut tar = spawn_tar(content)?;
        let listener = listen(&mut tar);
        let mut outcome = Outcome::default();
        let mut into = tar.stdin.take().context("tar has no input")?;
        let pumped = pump(from, &mut into, &mut outcome, &mut || {});
        drop(into);
        outcome.tar = Some(tar.wait().context("wait for tar")?);
        outcome.tar_said = listener.join().unwrap_or_default();
        pumped.map(|()| outcome)
    };
    let outcome = std::thread::scope(|scope| scope.spawn(work).join());
    judge(&outcome.map_err(|_| anyhow::anyhow!("the unpacking thread panicked"))??, Path::new(name), in_the_way)
}

/// What is packed of a directory.
#[derive(Debug, Clone, Copy)]
pub enum Members<'a> {
    /// These, with everything that is in them.
    Whole(&'a [&'a Path]),
    /// The paths in this list, each with a NUL behind it, and nothing that is in them.
    Listed(&'a [u8]),
    /// Of a member with everything in it, the directories, and what was changed, or written, at this time or later, in seconds since 1970.
    /// What is in the list, by lines, is left out.
    Newer(&'a Path, i64, &'a [u8]),
}

/// Begins to pack `members` of `root`, in such a place as they are unpacked in: where tar finds no list of users, it writes those of
/// access lists as numbers, which the unpacking needs. The archive comes from the child's standard output.
pub fn pack_stream(root: &Path, sandbox: &Path, content: Content, members: Members<'_>) -> Result<Child> {
    check_programs(Packing::None)?;
    let work = || {
        enter(root, sandbox, content).context("cannot make a safe place to pack in")?;
        let mut tar = Command::new("tar");
        tar.args(["--create", "--file=-", "--directory=/out", "--format=posix", "--sparse", "--numeric-owner"]);
        // Sockets stay behind without a word.
        tar.args(["--acls", "--xattrs", "--warning=no-file-ignored"]).args(content.attributes());
        // There is no /dev/null in that place.
        let mut child = match members {
            Members::Whole(members) => spawn(tar.arg("--").args(members).stdin(Stdio::piped()))?,
            Members::Listed(names) => {
                let list = kernel::memfd::sealed("names", names)?;
                spawn(tar.args(["--no-recursion", "--null", "--files-from=-"]).stdin(list))?
            }
            Members::Newer(member, since_s, but) => {
                let list = kernel::memfd::sealed("names", but)?;
                tar.args(["--anchored", "--no-wildcards", "--exclude-from=-"]);
                spawn(tar.arg(format!("--after-date=@{since_s}")).arg("--").arg(member).stdin(list))?
            }
        };
        child.stdin = None;
        Ok(child)
    };
    std::thread::scope(|scope| scope.spawn(work).join()).map_err(|_| anyhow::anyhow!("the packing thread panicked"))?
}

fn check_programs(packing: Packing) -> Result<()> {
    let packer = match packing {
        Packing::None => None,
        Packing::By(program) => Some(program),
    };
    for program in [Some("tar"), packer].into_iter().flatten() {
        if !["/usr/bin", "/bin"].iter().any(|directory| Path::new(directory).join(program).is_file()) {
            let package = if program == "xz" { "xz-utils" } else { program };
            return Err(Failure::new(Exit::Unsupported, format!("the program {program} is not installed"))
                .hint(format!("install the package {package}"))
                .into());
        }
    }
    Ok(())
}

fn run(
    file: &mut File,
    packing: Packing,
    root: &Path,
    sandbox: &Path,
    done: &std::sync::mpsc::Sender<u64>,
) -> Result<Outcome> {
    enter(root, sandbox, Content::Root).context("cannot make a safe place to unpack in")?;
    let mut tar = spawn_tar(Content::Root)?;
    // A copy of the descriptor shares its offset, which is how far the unpacker has read.
    let mut position = file.try_clone().context("copy the archive's descriptor")?;
    let mut unpacker = match packing {
        Packing::None => None,
        Packing::By(program) => Some(spawn(Command::new(program).arg("-dc").stdin(file.try_clone()?))?),
    };
    let mut outcome = Outcome::default();
    let listeners = (listen(&mut tar), unpacker.as_mut().map(listen));
    {
        let mut into = tar.stdin.take().context("tar has no input")?;
        let mut unpacked = unpacker.as_mut().and_then(|child| child.stdout.take());
        let from: &mut dyn Read = match &mut unpacked {
            Some(output) => output,
            None => file,
        };
        pump(from, &mut into, &mut outcome, &mut || {
            // The receiver lives as long as the scope; a lost message would only cost a jump of the bar.
            let _ = done.send(position.stream_position().unwrap_or_default());
        })?;
    }
    outcome.tar = Some(tar.wait().context("wait for tar")?);
    outcome.tar_said = listeners.0.join().unwrap_or_default();
    if let (Some(mut child), Some(listener)) = (unpacker, listeners.1) {
        outcome.unpacker = Some(child.wait().context("wait for the unpacker")?);
        outcome.unpacker_said = listener.join().unwrap_or_default();
    }
    Ok(outcome)
}

fn pump(from: &mut dyn Read, into: &mut dyn Write, outcome: &mut Outcome, step: &mut dyn FnMut()) -> Result<()> {
    let mut buffer = vec![0u8; 256 << 10];
    let mut tail: VecDeque<u8> = VecDeque::with_capacity(2 * END_BYTES);
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("read the archive"),
        };
        let piece = &buffer[..length];
        tail.extend(&piece[length.saturating_sub(END_BYTES)..]);
        tail.drain(..tail.len().saturating_sub(END_BYTES));
        match into.write_all(piece) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                outcome.tar_left = true;
                return Ok(());
            }
            Err(error) => return Err(error).context("hand the archive to tar"),
        }
        step();
    }
    outcome.has_end = tail.len() == END_BYTES && tail.iter().all(|byte| *byte == 0);
    Ok(())
}

/// Finds the cause among the complaints: an archive that was cut makes both programs complain.
fn judge(outcome: &Outcome, archive: &Path, in_the_way: InTheWay) -> Result<Vec<String>> {
    let name = archive.display();
    let both = format!("{}\n{}", outcome.tar_said, outcome.unpacker_said);
    if FULL.iter().any(|words| both.contains(words)) {
        return Err(Failure::new(Exit::NoSpace, format!("the disk is full while unpacking {name}")).into());
    }
    let bad = |message: String, hint: &str| -> Result<Vec<String>> {
        Err(Failure::new(Exit::BadParameter, message).hint(hint.to_owned()).into())
    };
    let whole = "get the file again, and compare its checksum";
    // An unpacker that lost its reader was killed by that, and is not to blame.
    if !outcome.tar_left && outcome.unpacker.is_some_and(|status| !status.success()) {
        return bad(format!("{name} is cut short or damaged: {}", first_line(&outcome.unpacker_said)), whole);
    }
    if outcome.tar_said.contains("does not look like a tar archive") {
        return bad(
            format!("{name} is no tar archive"),
            "give a tarball of a whole root, packed by gzip, xz, zstd, bzip2 or not at all",
        );
    }
    if outcome.tar_said.contains("Unexpected EOF") || (!outcome.tar_left && !outcome.has_end) {
        return bad(format!("{name} is cut short: its end is missing"), whole);
    }
    if outcome.tar_said.contains("contains '..'") {
        return bad(
            format!("{name} holds a name that leads out of it: {}", line_with(&outcome.tar_said, "contains '..'")),
            "a root's tarball has no '..' in its names",
        );
    }
    let may_be_left = |ended| in_the_way == InTheWay::Stays && complains_only(ended, &outcome.tar_said, is_of_the_way);
    if !outcome.tar.is_some_and(may_be_left) && !outcome.tar.is_some_and(|status| status.success()) {
        return bad(format!("tar cannot unpack {name}: {}", first_line(&outcome.tar_said)), "try `tar -tvf` on it");
    }
    Ok(messages(&outcome.tar_said).take(MOST_WARNINGS).collect())
}

/// tar's messages for a person, without its name and without what a terminal would obey.
fn messages(said: &str) -> impl Iterator<Item = String> + '_ {
    let lines = said.lines().map(|line| line.trim_start_matches("tar: ")).filter(|line| !line.is_empty());
    lines.map(|line| line.chars().filter(|c| !c.is_control()).collect())
}

fn first_line(said: &str) -> String {
    line_with(said, "")
}

fn line_with(said: &str, words: &str) -> String {
    messages(said).find(|line| line.contains(words)).unwrap_or_else(|| "it gave no reason".into())
}

fn spawn_tar(content: Content) -> Result<Child> {
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--file=-", "--directory=/out", "--numeric-owner", "--same-owner", "--same-permissions"]);
    tar.args(["--delay-directory-restore", "--acls", "--xattrs"]);
    // File capabilities and users' own attributes; not what the overlay file system would take for its own.
    tar.args(content.attributes());
    tar.arg("--warning=no-timestamp").stdin(Stdio::piped());
    let mut child = spawn(&mut tar)?;
    // Without -v tar prints nothing there.
    child.stdout = None;
    Ok(child)
}

fn spawn(command: &mut Command) -> Result<Child> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C");
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().with_context(|| format!("run {program}"))
}

/// Collects a child's messages while it runs, the first of them: a pipe that nobody empties would stop it.
pub fn listen(child: &mut Child) -> std::thread::JoinHandle<String> {
    let errors = child.stderr.take();
    std::thread::spawn(move || {
        let Some(mut errors) = errors else {
            return String::new();
        };
        let mut said = Vec::new();
        let _ = (&mut errors).take(SAID_MAX).read_to_end(&mut said);
        let _ = std::io::copy(&mut errors, &mut std::io::sink());
        String::from_utf8_lossy(&said).into_owned()
    })
}

/// Puts the calling thread, and what it starts, into a place where only `root` can be written.
fn enter(root: &Path, sandbox: &Path, content: Content) -> Result<()> {
    kernel::namespace::unshare(Kinds::MOUNT | Kinds::NET | Kinds::IPC)?;
    // Before the first mount, or it would appear on the host as well. What is unmounted there goes here, too.
    rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .during("make mounts follow the host's")?;
    rustix::mount::mount("tmpfs", sandbox, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755,size=1m")
        .during("mount a tmpfs")?;
    for name in ["usr", "bin", "lib", "lib64"] {
        let host = Path::new("/").join(name);
        let inside = sandbox.join(name);
        match std::fs::read_link(&host) {
            Ok(target) => std::os::unix::fs::symlink(target, &inside).with_context(|| format!("link {name}"))?,
            Err(_) if host.is_dir() => {
                bind(&host, &inside, MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV)?
            }
            Err(_) => {}
        }
    }
    // Device nodes of the archive do nothing here, and are removed afterwards.
    bind(root, &sandbox.join("out"), MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC)?;
    rustix::mount::mount_remount(
        sandbox,
        MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::BIND,
        c"",
    )
    .during("make the place read-only")?;
    rustix::process::chroot(sandbox).during("chroot")?;
    rustix::process::chdir("/").during("chdir")?;
    keep_file_capabilities(content)
}

fn bind(from: &Path, to: &Path, flags: MountFlags) -> Result<()> {
    std::fs::create_dir(to).with_context(|| format!("make directory {}", to.display()))?;
    rustix::mount::mount_bind(from, to).during(format!("bind {}", from.display()))?;
    rustix::mount::mount_remount(to, flags | MountFlags::BIND, c"").during(format!("restrict {}", to.display()))
}

/// What is left to programs started from here by root: the bounding set is the thread's own (capabilities(7)).
fn keep_file_capabilities(content: Content) -> Result<()> {
    let mut keep = CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::MKNOD
        | CapabilitySet::SETFCAP;
    if content == Content::TrustedLayer {
        keep |= CapabilitySet::SYS_ADMIN;
    }
    for capability in CapabilitySet::all().difference(keep).iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // A newer crate than the kernel knows more capabilities.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno).during(format!("drop {capability:?}")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn the_packing_is_told_by_the_content() {
        assert_eq!(packing(b"\x1f\x8b\x08\0"), Packing::By("gzip"));
        assert_eq!(packing(b"\xfd7zXZ\0\0"), Packing::By("xz"));
        assert_eq!(packing(b"\x28\xb5\x2f\xfd\x04"), Packing::By("zstd"));
        assert_eq!(packing(b"BZh9"), Packing::By("bzip2"));
        assert_eq!(packing(b"etc/passwd"), Packing::None);
        assert_eq!(packing(b""), Packing::None);
    }

    #[test]
    fn what_is_in_the_way_is_told_from_other_failures() {
        let failed = ExitStatus::from_raw(2 << 8);
        let is_left = |said: &str| complains_only(failed, said, is_of_the_way);
        let way = "tar: volume/a: Cannot open: File exists\n";
        assert!(is_left(way) && is_left(&format!("{way}tar: {NOT_ALL}\n")));
        assert!(is_left("tar: volume/c: Cannot hard link to 'volume/a': Operation not permitted\n"));
        assert!(!is_left(&format!("{way}tar: volume/b: Cannot open: Input/output error\n")));
        assert!(!is_left("") && !is_left(NOT_ALL));
        let (killed, did_all) = (ExitStatus::from_raw(9), ExitStatus::from_raw(0));
        assert!([killed, did_all].iter().all(|ended| !complains_only(*ended, way, is_of_the_way)));
        // What comes after is not known.
        assert!(!is_left(&way.repeat(SAID_MAX as usize / way.len() + 1)));
    }

    #[test]
    fn the_end_is_found_across_pieces() {
        for (content, has_end) in [
            (vec![0u8; 1024], true),
            ([vec![1u8; 700_000], vec![0u8; 1024]].concat(), true),
            ([vec![1u8; 700_000], vec![0u8; 1023]].concat(), false),
            (vec![0u8; 512], false),
            (vec![], false),
        ] {
            let mut outcome = Outcome::default();
            let mut copy = Vec::new();
            pump(&mut &content[..], &mut copy, &mut outcome, &mut || {}).unwrap();
            assert!(copy == content);
            assert_eq!(outcome.has_end, has_end);
        }
    }
}
