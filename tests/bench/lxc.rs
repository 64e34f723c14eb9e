//! LXC's side of the bench: the same busybox root on an overlay, privileged, a veth on a bridge of the bench's own,
//! limits, its own seccomp policy, no AppArmor. No user namespace and no lxcfs: less work than ours does.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use system_tests::command::Invocation;
use tempfile::TempDir;

use crate::ours::Ours;

/// Its own bridge, with a subnet that carries no route of anybody else's.
const BRIDGE: &str = "vsosbench0";
/// The bridge's subnet, from the block kept for benchmarks (RFC 2544).
const SUBNET: &str = "198.18";
/// The parent of its control groups.
const CGROUP: &str = "vsosbench";
/// How long the loop over all containers may take.
const LIMIT: Duration = Duration::from_secs(900);
/// The services of our template, for busybox's own init.
const INITTAB: &str = "\
::sysinit:/bin/true
::respawn:/sbin/syslogd -n -O /var/log/messages -s 200 -b 1
::respawn:/usr/sbin/crond -f -c /var/spool/cron/crontabs
console::respawn:/sbin/getty -L 0 console vt220
tty1::respawn:/sbin/getty -L 0 tty1 vt220
tty2::respawn:/sbin/getty -L 0 tty2 vt220
tty3::respawn:/sbin/getty -L 0 tty3 vt220
tty4::respawn:/sbin/getty -L 0 tty4 vt220
";

/// A directory of containers and a bridge. Dropped, both are gone.
pub struct Lxc {
    directory: TempDir,
    lower: PathBuf,
}

impl Lxc {
    /// Makes it, where LXC is installed.
    pub fn find(ours: &Ours) -> Result<Option<Self>> {
        if Invocation::new("lxc-start").args(["--version"]).succeed().is_err() {
            return Ok(None);
        }
        let directory = tempfile::Builder::new().prefix("vsosbench-").tempdir_in("/var/tmp")?;
        let lower = directory.path().join("lower");
        Invocation::new("cp").args(["-a"]).args([&ours.guest(), &lower]).succeed()?;
        fs::write(lower.join("etc/inittab"), INITTAB)?;
        let lxc = Self { directory, lower };
        // Left by a run that was killed.
        let _ = ip(&format!("link delete {BRIDGE}"));
        ip(&format!("link add {BRIDGE} type bridge"))?;
        ip(&format!("address add {SUBNET}.0.1/16 dev {BRIDGE}"))?;
        ip(&format!("link set {BRIDGE} up"))?;
        Ok(Some(lxc))
    }

    /// Where its containers are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Describes container number `number`.
    pub fn create(&self, name: &str, number: usize) -> Result<()> {
        let home = self.directory().join(name);
        fs::create_dir_all(home.join("upper"))?;
        let (lower, upper) = (self.lower.display(), home.join("upper").display().to_string());
        let (high, low) = ((number + 1) / 250, (number + 1) % 250 + 2);
        let seccomp = Path::new("/usr/share/lxc/config/common.seccomp");
        let seccomp =
            if seccomp.exists() { format!("lxc.seccomp.profile = {}\n", seccomp.display()) } else { String::new() };
        let text = format!(
            "lxc.rootfs.path = overlay:{lower}:{upper}\n\
             lxc.uts.name = {name}\n\
             lxc.init.cmd = /bin/busybox init\n\
             lxc.mount.auto = proc:mixed sys:ro cgroup:mixed\n\
             lxc.autodev = 1\n\
             lxc.pty.max = 16\n\
             lxc.tty.max = 4\n\
             lxc.apparmor.profile = unconfined\n\
             {seccomp}\
             lxc.cap.drop = mac_admin mac_override sys_time sys_module sys_rawio\n\
             lxc.net.0.type = veth\n\
             lxc.net.0.link = {BRIDGE}\n\
             lxc.net.0.flags = up\n\
             lxc.net.0.ipv4.address = {SUBNET}.{high}.{low}/16\n\
             lxc.net.0.ipv4.gateway = {SUBNET}.0.1\n\
             lxc.cgroup.dir.container = {CGROUP}/{name}.payload\n\
             lxc.cgroup.dir.monitor = {CGROUP}/{name}.monitor\n\
             {}",
            limits()
        );
        fs::write(home.join("config"), text).context("write the container's configuration")
    }

    /// Starts it, as a user does: in the background, back when its init runs.
    pub fn start(&self, name: &str) -> Result<Duration> {
        self.call("lxc-start", name, &[])
    }

    /// Starts all in a shell loop.
    pub fn start_in_a_loop(&self, names: &[&str]) -> Result<Duration> {
        let script = "path=$1; shift; for name in \"$@\"; do lxc-start -P \"$path\" -n \"$name\" || exit 1; done";
        let call = Invocation::new("sh").args(["-c", script, "sh"]).args([self.directory()]).args(names).limit(LIMIT);
        Ok(call.succeed()?.took)
    }

    /// Runs the shortest command there is.
    pub fn exec_true(&self, name: &str) -> Result<Duration> {
        self.call("lxc-attach", name, &["--", "/bin/true"])
    }

    /// Kills it.
    pub fn kill(&self, name: &str) -> Result<Duration> {
        self.call("lxc-stop", name, &["-k"])
    }

    /// Removes its files.
    pub fn destroy(&self, name: &str) -> Result<()> {
        fs::remove_dir_all(self.directory().join(name)).with_context(|| format!("remove the container {name}"))
    }

    fn call(&self, program: &str, name: &str, more: &[&str]) -> Result<Duration> {
        let call = Invocation::new(program).args(["-P"]).args([self.directory()]).args(["-n", name]).args(more);
        Ok(call.succeed()?.took)
    }
}

impl Drop for Lxc {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.directory()).into_iter().flatten().flatten() {
            if entry.path().join("config").exists() {
                let _ = self.call("lxc-stop", &entry.file_name().to_string_lossy(), &["-k"]);
            }
        }
        let _ = ip(&format!("link delete {BRIDGE}"));
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            remove_groups(&hierarchy.path().join(CGROUP));
        }
        remove_groups(&Path::new("/sys/fs/cgroup").join(CGROUP));
    }
}

/// Removes empty control groups, the deepest first.
pub fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

/// The same limits as ours, in the words of this host's control groups.
fn limits() -> &'static str {
    if Path::new("/sys/fs/cgroup/memory").is_dir() {
        "lxc.cgroup.memory.limit_in_bytes = 128M\nlxc.cgroup.cpu.cfs_quota_us = 100000\nlxc.cgroup.pids.max = 200\n\
         lxc.cgroup.devices.deny = a\nlxc.cgroup.devices.allow = c 1:3 rwm\nlxc.cgroup.devices.allow = c 1:5 rwm\n\
         lxc.cgroup.devices.allow = c 1:7 rwm\nlxc.cgroup.devices.allow = c 1:8 rwm\nlxc.cgroup.devices.allow = c 1:9 rwm\n\
         lxc.cgroup.devices.allow = c 5:* rwm\nlxc.cgroup.devices.allow = c 136:* rwm\n"
    } else {
        "lxc.cgroup2.memory.max = 128M\nlxc.cgroup2.cpu.max = 100000 100000\nlxc.cgroup2.pids.max = 200\n\
         lxc.cgroup2.devices.deny = a\nlxc.cgroup2.devices.allow = c 1:* rwm\nlxc.cgroup2.devices.allow = c 5:* rwm\n\
         lxc.cgroup2.devices.allow = c 136:* rwm\n"
    }
}

fn ip(words: &str) -> Result<()> {
    Invocation::new("ip").args(words.split(' ')).succeed().map(drop)
}
