//! A child of the holder: a process that made itself into something unusual, and tells what it is whenever it is asked.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead, BufReader, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use kernel::{
    namespace::{self, Kinds},
    seccomp::{Filter, Profile},
};
use nix::{
    sys::{
        resource::{Resource, setrlimit},
        signal::Signal,
    },
    unistd::{Gid, Uid},
};
use rustix::{
    process::{chroot, ioctl_tiocsctty, nice, set_child_subreaper, setsid},
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
        set_capabilities_secure_bits, set_name, set_no_new_privs,
    },
};

use super::memory::Shared;

/// Ends the facts of one question.
const END: &str = ".";

/// The holder's side of it.
pub struct Limb {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Limb {
    /// Begins one, and waits until it is what `manner` says.
    pub fn begin(place: &Path, manner: &str) -> Result<Self> {
        let program = env::current_exe().context("find this program")?;
        let mut command = Command::new(program);
        command.args(["survivor", "limb"]).arg(place).arg(manner).env("SURVIVOR", "a limb");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("begin a limb")?;
        let (input, output) = (child.stdin.take().context("no input")?, child.stdout.take().context("no output")?);
        let mut limb = Self { child, input, output: BufReader::new(output) };
        limb.facts().with_context(|| format!("a limb of manner {manner}"))?;
        Ok(limb)
    }

    /// What it says of itself, in lines.
    pub fn facts(&mut self) -> Result<Vec<String>> {
        writeln!(self.input, "say").context("ask a limb")?;
        let mut facts = Vec::new();
        loop {
            let mut line = String::new();
            ensure!(self.output.read_line(&mut line).context("listen to a limb")? > 0, "the limb has ended");
            match line.trim_end() {
                END => return Ok(facts),
                line => facts.push(line.to_owned()),
            }
        }
    }
}

impl Drop for Limb {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Becomes what `manner` says, and answers until its input ends.
pub fn be(place: &Path, manner: &str) -> Result<()> {
    let say: Box<dyn Fn() -> Result<Vec<String>>> = match manner {
        "plain" => Box::new(facts),
        "bound" => bound(place)?,
        "user" => user()?,
        "chrooted" => {
            chroot(place).and_then(|()| rustix::process::chdir("/")).context("change the root")?;
            // No /proc in there.
            Box::new(|| Ok(vec![env::current_dir()?.display().to_string(), list("/")?]))
        }
        "led" => led()?,
        "mounts" => {
            namespace::unshare(Kinds::MOUNT)?;
            kernel::mount::make_private_recursive(Path::new("/"))?;
            mount_own(place)?;
            let file = place.join("file");
            fs::write(&file, "only here").context("write there")?;
            Box::new(move || Ok(vec![fs::read_to_string(&file)?, points("/proc/self/mountinfo")?]))
        }
        "network" => {
            namespace::unshare(Kinds::NET)?;
            Box::new(|| Ok(vec![list("/proc/sys/net/ipv4/conf")?]))
        }
        "mapped" => {
            let file = fs::OpenOptions::new().read(true).write(true).open(place).context("open what is shared")?;
            let map = Shared::of(&file, 4096)?;
            Box::new(move || Ok(vec![String::from_utf8_lossy(&map.read(10)?).into_owned()]))
        }
        other => bail!("no limb is {other}"),
    };
    let (mut lines, mut out) = (std::io::stdin().lines(), std::io::stdout().lock());
    while let Some(Ok(_)) = lines.next() {
        for fact in say()? {
            writeln!(out, "{}", fact.replace('\n', " / "))?;
        }
        writeln!(out, "{END}")?;
        out.flush()?;
    }
    Ok(())
}

fn mount_own(place: &Path) -> Result<()> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).context("open a tmpfs")?;
    rustix::mount::fsconfig_create(context.as_fd()).context("make a tmpfs")?;
    let mount = rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .context("mount a tmpfs")?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(mount.as_fd(), "", rustix::fs::CWD, place, flags).context("attach the tmpfs")
}

/// All that bounds a process and can be read or tried.
fn bound(place: &Path) -> Result<Box<dyn Fn() -> Result<Vec<String>>>> {
    set_name(c"bound limb").context("take a name")?;
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o027));
    env::set_current_dir(place).context("change the directory")?;
    setrlimit(Resource::RLIMIT_NOFILE, 99, 123).context("limit files")?;
    setrlimit(Resource::RLIMIT_CORE, 4096, 8192).context("limit cores")?;
    nice(7).context("be nice")?;
    fs::write("/proc/self/oom_score_adj", "123").context("set oom_score_adj")?;
    set_child_subreaper(Some(rustix::process::getpid())).context("adopt orphans")?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).context("end with the parent")?;
    remove_capability_from_bounding_set(CapabilitySet::SYS_CHROOT).context("bound capabilities")?;
    set_capabilities_secure_bits(CapabilitiesSecureBits::NO_ROOT).context("set secure bits")?;
    let kept = CapabilitySet::CHOWN | CapabilitySet::KILL;
    let sets = CapabilitySets { effective: CapabilitySet::KILL, permitted: kept, inheritable: CapabilitySet::KILL };
    set_capabilities(None, sets).context("drop capabilities")?;
    set_no_new_privs(true).context("renounce privileges")?;
    // A second filter over the server's own.
    let profile = Profile { migratable: true, privileged: false, listened: false };
    Filter::compile(&profile).install().context("install a filter")?;
    Ok(Box::new(|| {
        let refused = namespace::unshare(Kinds::UTS).is_err();
        Ok([facts()?, vec![format!("a namespace is refused: {refused}")]].concat())
    }))
}

fn user() -> Result<Box<dyn Fn() -> Result<Vec<String>>>> {
    let group = Gid::from_raw(4321);
    nix::unistd::setgroups(&[group, Gid::from_raw(7)]).context("take groups")?;
    nix::unistd::setresgid(group, group, group).context("take a group")?;
    let user = Uid::from_raw(1234);
    nix::unistd::setresuid(user, user, user).context("take a user")?;
    Ok(Box::new(facts))
}

/// The leader of a session with a terminal, with a group of its own in the foreground.
fn led() -> Result<Box<dyn Fn() -> Result<Vec<String>>>> {
    setsid().context("lead a session")?;
    let pair = nix::pty::openpty(None, None).context("open a terminal")?;
    ioctl_tiocsctty(&pair.slave).context("take the terminal")?;
    // One of its session that is in a group of its own, and in the foreground. That it is the job's terminal, too, is lost: only the
    // leader can take one.
    let input = pair.slave.try_clone().context("copy the terminal")?;
    let mut job = Command::new("sleep");
    let sleeper = job.arg("1000000").stdin(input).process_group(0).spawn().context("begin a job")?;
    let pid = rustix::process::Pid::from_raw(i32::try_from(sleeper.id())?).context("a pid")?;
    rustix::termios::tcsetpgrp(&pair.slave, pid).context("put the job in front")?;
    Ok(Box::new(move || {
        let front = rustix::termios::tcgetpgrp(&pair.master).context("ask for the foreground")?;
        let session = rustix::termios::tcgetsid(&pair.slave).context("ask for the session")?;
        let job = numbers(&format!("/proc/{}/stat", sleeper.id()), &["pgrp", "session"])?;
        Ok([facts()?, vec![format!("{front:?} {session:?} {job}")]].concat())
    }))
}

/// The value of `key` in a file of `key: value` lines.
pub fn field(path: &str, key: &str) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {key} in {path}"))?.trim().to_owned())
}

/// Fields of a stat file by their names in proc_pid_stat(5).
fn numbers(path: &str, names: &[&str]) -> Result<String> {
    const ALL: [&str; 17] = [
        "state", "ppid", "pgrp", "session", "tty_nr", "tpgid", "flags", "minflt", "cminflt", "majflt", "cmajflt",
        "utime", "stime", "cutime", "cstime", "priority", "nice",
    ];
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let rest = text.rsplit_once(')').context("a stat without a name")?.1;
    let named: Vec<String> = ALL
        .iter()
        .zip(rest.split_whitespace())
        .filter(|(name, _)| names.contains(name))
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    Ok(named.join(", "))
}

fn list(directory: &str) -> Result<String> {
    let entries = fs::read_dir(directory).with_context(|| format!("list {directory}"))?;
    let names: BTreeSet<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    Ok(names.into_iter().collect::<Vec<_>>().join(" "))
}

/// Where something is mounted, and of what kind.
fn points(mountinfo: &str) -> Result<String> {
    let text = fs::read_to_string(mountinfo).with_context(|| format!("read {mountinfo}"))?;
    let point = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let kind = words.iter().position(|word| *word == "-").and_then(|at| words.get(at + 1));
        Some(format!("{} {} {}", words.get(4)?, kind?, words.get(5)?))
    };
    let all: BTreeSet<String> = text.lines().filter_map(point).collect();
    Ok(all.into_iter().collect::<Vec<_>>().join(", "))
}

/// What `/proc` says of this process and should say ever after. The processors that it may run on are not asked for: who has not chosen
/// has all, and another host may have more.
pub fn facts() -> Result<Vec<String>> {
    const STATUS: &[&str] = &[
        "Name",
        "Umask",
        "Tgid",
        "Pid",
        "PPid",
        "Uid",
        "Gid",
        "Groups",
        "NStgid",
        "NSpid",
        "NSpgid",
        "NSsid",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        "THP_enabled",
    ];
    let mut facts = Vec::new();
    for key in STATUS {
        facts.push(format!("{key} {}", field("/proc/self/status", key)?));
    }
    facts.push(numbers("/proc/self/stat", &["pgrp", "session", "tty_nr", "tpgid", "priority", "nice"])?);
    for file in [
        "limits",
        "environ",
        "cmdline",
        "oom_score_adj",
        "cgroup",
        "uid_map",
        "comm",
        "timerslack_ns",
        "coredump_filter",
    ] {
        // A file that a process of another user may not read of itself says nothing either way.
        let text = fs::read(format!("/proc/self/{file}")).unwrap_or_default();
        facts.push(format!("{file} {}", String::from_utf8_lossy(&text).replace('\0', " ")));
    }
    for link in ["cwd", "root", "exe"] {
        facts.push(format!("{link} {}", fs::read_link(format!("/proc/self/{link}")).unwrap_or_default().display()));
    }
    let reaps = rustix::process::child_subreaper().context("ask who reaps")?;
    let ends = nix::sys::prctl::get_pdeathsig().context("ask for the parent's death")?;
    let bits = rustix::thread::capabilities_secure_bits().context("ask for secure bits")?;
    facts.push(format!("reaps {reaps:?}, ends with {ends:?}, {bits:?}"));
    facts.push(format!("mounts {}", points("/proc/self/mountinfo")?));
    Ok(facts)
}

/// What has changed, in words.
pub fn compare(now: &[String], before: &[String]) -> Result<()> {
    let differ: Vec<String> = now
        .iter()
        .zip(before)
        .filter(|(now, before)| now != before)
        .map(|(now, before)| format!("[{now}], and was [{before}]"))
        .collect();
    ensure!(differ.is_empty() && now.len() == before.len(), "it is {}", differ.join("; "));
    Ok(())
}
