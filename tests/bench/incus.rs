//! Incus's side of the bench: our busybox root as an image, unprivileged, a veth on a bridge, the same limits, a pool of
//! plain directories.
//!
//! The daemon is the bench's own and runs in network, mount and process namespaces of its own, which do not slow it: its
//! bridge, its nft table, its dnsmasq and its mounts are in there, and go with it when it is killed. It reaches no network.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use system_tests::command::{Background, Invocation, eventually};

use crate::ours::{MEMORY, Ours};

/// Where everything of it lies; a fixed name, so that a later run finds what a killed one has left.
const DIRECTORY: &str = "/var/tmp/vsosbench-incus";
/// The daemon, which Debian keeps off the path.
pub const DAEMON: &str = "/usr/libexec/incus/incusd";
/// How its instances' names begin, and so those of their control groups.
const PREFIX: &str = "vsosbench-";
/// How long the daemon may run.
const LIMIT: Duration = Duration::from_secs(4 * 3600);
/// The first program in its namespaces: /sys as the new network namespace has it, with the host's control groups.
const INSIDE: &str = "set -eu; ip link set lo up; mount -t sysfs sysfs \"$INCUS_DIR/view\"; \
                      mount --rbind /sys/fs/cgroup \"$INCUS_DIR/view/fs/cgroup\"; mount --rbind \"$INCUS_DIR/view\" /sys; \
                      exec \"$1\" --logfile \"$INCUS_DIR/daemon.log\"";
/// The services of our template that its containers have terminals for.
const INITTAB: &str = "\
::sysinit:/bin/true
::respawn:/sbin/syslogd -n -O /var/log/messages -s 200 -b 1
::respawn:/usr/sbin/crond -f -c /var/spool/cron/crontabs
console::respawn:/sbin/getty -L 0 console vt220
";

/// The daemon's directory.
pub fn directory() -> &'static Path {
    Path::new(DIRECTORY)
}

/// A daemon with an image, a pool and a bridge. Dropped, all of it is gone.
pub struct Incus {
    daemon: Background,
    /// Control groups that were there before it.
    before: Vec<PathBuf>,
}

impl Incus {
    /// Starts it. The error says why it is not available here.
    pub fn start(ours: &Ours) -> Result<Self> {
        ensure!(Path::new(DAEMON).exists(), "it is not installed");
        let directory = Path::new(DIRECTORY);
        if directory.exists() {
            // Left by a run that was killed; its daemon went with it.
            groups().iter().for_each(|group| crate::lxc::remove_groups(group));
            fs::remove_dir_all(directory).context("remove what an earlier run has left")?;
        }
        fs::create_dir_all(directory.join("view")).context("make the daemon's directory")?;
        let before = groups();
        // Ends with the bench, however that ends.
        let call = Invocation::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare"])
            .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["sh", "-c", INSIDE, "sh", DAEMON])
            .env("INCUS_DIR", DIRECTORY)
            .limit(LIMIT);
        let incus = Self { daemon: call.spawn()?, before };
        eventually("the daemon's socket", Duration::from_secs(30), || {
            directory.join("unix.socket").exists().then_some(())
        })?;
        incus.call(&["admin", "waitready", "--timeout", "30"])?;
        incus.call(&["storage", "create", "vsosbench", "dir"])?;
        let network = ["network", "create", "vsosbench1", "ipv4.address=198.19.0.1/16"];
        incus.call(&[&network[..], &["ipv4.nat=false", "ipv6.address=none"]].concat())?;
        incus.import(ours)?;
        Ok(incus)
    }

    /// Our template's root as an image, with an init that Incus can execute by itself.
    fn import(&self, ours: &Ours) -> Result<()> {
        let scratch = tempfile::Builder::new().prefix("vsosbench-").tempdir_in("/var/tmp")?;
        let at = |name: &str| scratch.path().join(name);
        let root = at("root");
        Invocation::new("cp").args(["-a"]).args([&ours.guest(), &root]).succeed()?;
        fs::write(root.join("etc/inittab"), INITTAB)?;
        let init = root.join("sbin/init");
        fs::remove_file(&init).context("replace the image's init")?;
        symlink("/bin/busybox", &init)?;
        fs::write(
            at("metadata.yaml"),
            "architecture: x86_64\ncreation_date: 1\nproperties:\n  description: vsosbench\n",
        )?;
        let tar = |file: &str, from: &Path, what: &str| {
            Invocation::new("tar").args(["-cf"]).args([at(file)]).args(["-C"]).args([from]).args([what]).succeed()
        };
        tar("metadata.tar", scratch.path(), "metadata.yaml")?;
        tar("root.tar", &root, ".")?;
        let (metadata, root) = (at("metadata.tar").display().to_string(), at("root.tar").display().to_string());
        self.call(&["image", "import", &metadata, &root, "--alias", "vsosbench"]).map(drop)
    }

    /// Defines an instance.
    pub fn create(&self, name: &str) -> Result<Duration> {
        self.make("init", name)
    }

    /// Defines and starts one.
    pub fn create_and_start(&self, name: &str) -> Result<Duration> {
        self.make("launch", name)
    }

    fn make(&self, verb: &str, name: &str) -> Result<Duration> {
        let (name, memory) = (format!("{PREFIX}{name}"), format!("limits.memory={MEMORY}iB"));
        let flags = ["-s", "vsosbench", "-n", "vsosbench1", "-c", &memory];
        let limits = ["-c", "limits.cpu.allowance=100ms/100ms", "-c", "limits.processes=200"];
        self.call(&[&[verb, "vsosbench", &name][..], &flags, &limits].concat())
    }

    /// Starts it.
    pub fn run(&self, name: &str) -> Result<Duration> {
        self.call(&["start", &format!("{PREFIX}{name}")])
    }

    /// Runs the shortest command there is.
    pub fn exec_true(&self, name: &str) -> Result<Duration> {
        self.call(&["exec", &format!("{PREFIX}{name}"), "--", "/bin/true"])
    }

    /// Kills it.
    pub fn kill(&self, name: &str) -> Result<Duration> {
        self.call(&["stop", "--force", &format!("{PREFIX}{name}")])
    }

    /// Kills it if it runs, and removes its files.
    pub fn destroy(&self, name: &str) -> Result<()> {
        self.call(&["delete", "--force", &format!("{PREFIX}{name}")]).map(drop)
    }

    fn call(&self, words: &[&str]) -> Result<Duration> {
        Ok(Invocation::new("incus").args(words).env("INCUS_DIR", DIRECTORY).succeed()?.took)
    }
}

impl Drop for Incus {
    fn drop(&mut self) {
        // The first process of a pid namespace takes all others with it: monitors, containers, dnsmasq.
        self.daemon.kill();
        let is_ours = |group: &&PathBuf| !self.before.contains(group);
        for group in groups().iter().filter(is_ours) {
            // The last of its processes may still be on their way out.
            let _ = eventually("an empty control group", Duration::from_secs(5), || {
                crate::lxc::remove_groups(group);
                (!group.exists()).then_some(())
            });
        }
        let _ = fs::remove_dir_all(DIRECTORY);
    }
}

/// The control groups that liblxc makes at the hierarchies' roots for what is measured here.
fn groups() -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(top).into_iter().flatten().flatten().map(|entry| entry.path());
    let ours = |name: &str| name == "lxc.pivot" || name.starts_with("lxc.") && name.contains(&format!(".{PREFIX}"));
    let inside = |root: PathBuf| fs::read_dir(root).into_iter().flatten().flatten();
    let found = hierarchies.chain([top.to_owned()]).flat_map(inside);
    found.filter(|entry| ours(&entry.file_name().to_string_lossy())).map(|entry| entry.path()).collect()
}
