//! What the running kernel can, found out by trying, for promises that differ from kernel to kernel.

use std::{fs::File, io::Read, os::fd::AsRawFd, process::Command};

use anyhow::{Context, Result, ensure};
use kernel::{
    mount::{Attributes, FileSystem},
    namespace,
    process::PidFd,
};
use nix::errno::Errno;

/// Whether it tells the number that a thread of another pid namespace has here (`NS_GET_PID_FROM_PIDNS`, Linux ≥ 6.11). The same
/// release began to tell whether an address is writable (`PROCMAP_QUERY`).
pub fn knows_threads_of_other_namespaces() -> Result<bool> {
    let own = namespace::open_own("pid")?;
    match namespace::thread_from(std::os::fd::AsFd::as_fd(&own), nix::unistd::getpid().as_raw()) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(Errno::ENOTTY as i32) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether it tells how a process ended that its parent has reaped (`PIDFD_GET_INFO`, Linux ≥ 6.15).
pub fn tells_how_the_reaped_ended() -> Result<bool> {
    let mut child = Command::new("true").spawn().context("run true")?;
    let pidfd = PidFd::open(i32::try_from(child.id())?)?;
    child.wait()?;
    Ok(pidfd.exit_status()?.is_some())
}

/// Whether it can give out again what a FUSE server that died has left unanswered (Linux ≥ 6.9): it says so in its first message to
/// a new file system (linux/fuse.h: `FUSE_INIT_EXT`, `FUSE_HAS_RESEND`).
pub fn resends_fuse_requests() -> Result<bool> {
    let mut connection = File::options().read(true).write(true).open("/dev/fuse")?;
    let mut probe = FileSystem::new("fuse")?;
    probe.option("fd", connection.as_raw_fd().to_string())?.option("rootmode", "40000")?;
    probe.option("user_id", "0")?.option("group_id", "0")?;
    let _mounted = probe.mount(Attributes::READ_ONLY)?;
    let mut init = vec![0; 16 << 10];
    ensure!(connection.read(&mut init).context("read INIT")? >= 60, "INIT is short");
    let word = |at: usize| u32::from_ne_bytes([init[at], init[at + 1], init[at + 2], init[at + 3]]);
    Ok(word(52) & 1 << 30 != 0 && word(56) & 1 << 7 != 0)
}

/// Why servers cannot be put on the disk here; `None` when they can.
///
/// # Errors
/// When this process's capabilities cannot be read.
pub fn lacks_for_checkpoints() -> Result<Option<String>> {
    /// Number of CAP_SYS_RESOURCE (capabilities(7)): CRIU changes limits of processes with ids of their own.
    const SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let bounding = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).context("no CapBnd")?;
    if u64::from_str_radix(bounding.trim(), 16)? & (1 << SYS_RESOURCE) == 0 {
        return Ok(Some("root here lacks CAP_SYS_RESOURCE, which CRIU needs".into()));
    }
    let version = match Command::new("criu").arg("--version").output() {
        Ok(done) => String::from_utf8_lossy(&done.stdout).into_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Some("criu is not installed".into())),
        Err(error) => return Err(error).context("run criu --version"),
    };
    let numbers = version.lines().next().and_then(|line| line.strip_prefix("Version: "));
    let mut numbers = numbers.unwrap_or_default().split('.').map_while(|number| number.parse::<u32>().ok());
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    if (major, minor) < (3, 18) {
        return Ok(Some(format!("criu {major}.{minor} is too old")));
    }
    // It takes the answer that there are no such sockets for a failure, which `criu check` does not see (criu issue 3002).
    let protocols = std::fs::read_to_string("/proc/net/protocols")?;
    if (major, minor) <= (4, 2) && !protocols.lines().any(|line| line.starts_with("UDP-Lite")) {
        return Ok(Some(format!("criu {major}.{minor} dumps nothing on a kernel without UDP-Lite")));
    }
    match Command::new("criu").arg("check").output() {
        Ok(done) if done.status.success() => Ok(None),
        Ok(done) => {
            let why = String::from_utf8_lossy(&done.stderr);
            Ok(Some(format!("`criu check` fails: {}", why.lines().last().unwrap_or_default())))
        }
        Err(error) => Err(error).context("run criu check"),
    }
}
