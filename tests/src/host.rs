//! What a server could leave on a host: listed before and after each promise, and compared.
//!
//! Two scopes. [`Scope::Host`] compares everything, as on a machine that belongs to the tests. [`Scope::Site`]
//! (`VSOS_TEST_HOST=shared`) compares only what names the promise's own installation, for a machine on which others
//! work at the same time; it sees less, so it is not the default.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::command::{Invocation, patient};

/// How long the kernel may take to let go of what has ended: dying cgroups, namespaces, programs.
const SETTLE: Duration = Duration::from_secs(10);
/// Control groups deeper than this below a hierarchy's root are not looked at.
const CGROUP_DEPTH_MAX: usize = 8;
/// Names of our programs, as `/proc/PID/exe` shows them, also when they run from a sealed descriptor.
const PROGRAMS: [&str; 3] = ["vsctl", "vsinit", "lxcfs-fuse"];

/// How much of the host is compared.
#[derive(Clone, Debug)]
pub enum Scope {
    /// All of it.
    Host,
    /// What names one installation.
    Site {
        /// Its `VSOS_ROOT`.
        root: PathBuf,
        /// The four digits in its global names.
        suffix: String,
    },
}

/// The host's objects, by kind, each as one line of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState(BTreeMap<&'static str, BTreeSet<String>>);

impl HostState {
    /// Lists the host.
    pub fn capture(scope: &Scope) -> Self {
        let kinds: [(&'static str, BTreeSet<String>); 8] = [
            ("mount", mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())),
            ("link", names_in("/sys/class/net")),
            ("cgroup", cgroups()),
            ("process", processes(scope)),
            ("nft table", nft_tables()),
            ("bpf program", bpf_programs()),
            ("named network namespace", names_in("/run/netns")),
            ("directory", directories()),
        ];
        let kept = kinds.map(|(kind, lines)| (kind, lines.into_iter().filter(|line| scope.includes(kind, line))));
        Self(kept.into_iter().map(|(kind, lines)| (kind, lines.collect())).collect())
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.0.values().all(BTreeSet::is_empty)
    }

    /// The lines of one kind, in order.
    pub fn of(&self, kind: &str) -> impl DoubleEndedIterator<Item = &str> {
        self.0.get(kind).into_iter().flatten().map(String::as_str)
    }

    /// Waits until the host is as it was, or returns the lines that differ.
    pub fn compare_when_settled(&self, scope: &Scope) -> Result<(), Difference> {
        let end = Instant::now() + patient(SETTLE);
        loop {
            let difference = self.difference(&Self::capture(scope));
            if difference.0.is_empty() {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(difference);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What `after` has more or less than this.
    fn difference(&self, after: &Self) -> Difference {
        let none = BTreeSet::new();
        let mut lines = Vec::new();
        for (kind, new) in &after.0 {
            let old = self.0.get(kind).unwrap_or(&none);
            lines.extend(new.difference(old).map(|line| format!("left behind: {kind} {line}")));
            lines.extend(old.difference(new).map(|line| format!("gone: {kind} {line}")));
        }
        Difference(lines)
    }
}

/// Lines that differ between two states of the host.
#[derive(Debug)]
pub struct Difference(Vec<String>);

impl fmt::Display for Difference {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "the host is not as it was:")?;
        self.0.iter().try_for_each(|line| writeln!(out, "  {line}"))
    }
}

impl std::error::Error for Difference {}

impl Scope {
    fn includes(&self, kind: &str, line: &str) -> bool {
        match self {
            Self::Host => true,
            // Chosen while they were listed.
            Self::Site { .. } if kind == "process" => true,
            // They carry no name of ours, and others load and unload theirs.
            Self::Site { .. } if kind == "bpf program" => false,
            Self::Site { root, suffix } => {
                let global = ["vsos-", "vsos_", "vsbr", "vs"].map(|word| format!("{word}{suffix}"));
                line.contains(&*root.to_string_lossy()) || global.iter().any(|name| line.contains(name.as_str()))
            }
        }
    }
}

/// `MOUNT-POINT TYPE SOURCE` of each line; the numbers in it differ from one mount to the next of the same thing.
fn mounts(mountinfo: &str) -> BTreeSet<String> {
    let mut seen = BTreeMap::<String, usize>::new();
    for line in mountinfo.lines() {
        let Some((mount, file_system)) = line.split_once(" - ") else {
            continue;
        };
        let mut words = file_system.split(' ');
        let (kind, source) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let point = mount.split(' ').nth(4).unwrap_or_default();
        *seen.entry(format!("{point} {kind} {source}")).or_default() += 1;
    }
    // Mounted over itself once more is a difference too.
    seen.into_iter().map(|(line, times)| if times == 1 { line } else { format!("{line} ({times} times)") }).collect()
}

fn names_in(directory: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Control groups of ours in any hierarchy, with those below them.
fn cgroups() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![(PathBuf::from("/sys/fs/cgroup"), 0)];
    while let Some((directory, depth)) = open.pop() {
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            let path = entry.path();
            if path.components().any(|part| part.as_os_str().as_bytes().starts_with(b"vsos")) {
                found.insert(path.display().to_string());
            }
            if depth < CGROUP_DEPTH_MAX {
                open.push((path, depth + 1));
            }
        }
    }
    found
}

/// Processes that run one of our programs or live in one of our control groups.
fn processes(scope: &Scope) -> BTreeSet<String> {
    let pids = names_in("/proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    pids.filter_map(|pid| {
        let directory = Path::new("/proc").join(&pid);
        // Without a program it is a thread of the kernel or has ended, and waits only to be read by its parent.
        let exe = fs::read_link(directory.join("exe")).ok()?.to_string_lossy().into_owned();
        let cgroup = fs::read_to_string(directory.join("cgroup")).unwrap_or_default();
        let command = fs::read(directory.join("cmdline")).unwrap_or_default();
        let ours = PROGRAMS.iter().any(|program| {
            let name = exe.trim_end_matches(" (deleted)").rsplit('/').next().unwrap_or_default();
            name == *program || name == format!("memfd:{program}")
        });
        let ours = match scope {
            Scope::Host => ours || cgroup.contains("/vsos"),
            Scope::Site { root, suffix } => {
                let environment = fs::read(directory.join("environ")).unwrap_or_default();
                let named =
                    [environment, command.clone()].iter().any(|text| contains(text, root.as_os_str().as_bytes()));
                cgroup.contains(&format!("/vsos-{suffix}")) || ours && named
            }
        };
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        ours.then(|| format!("{pid} {exe} {}", command.trim_end()))
    })
    .collect()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn nft_tables() -> BTreeSet<String> {
    // Without nft there are no tables of ours to leave.
    let list = Invocation::new("nft").args(["list", "tables"]).run();
    list.map(|done| done.text().lines().map(str::to_owned).collect()).unwrap_or_default()
}

/// How many device programs of ours are loaded: one goes with the control group that it was attached to.
fn bpf_programs() -> BTreeSet<String> {
    let count = kernel::bpf::DeviceProgram::count_loaded();
    [count.map_or_else(|error| format!("cannot be listed: {error}"), |count| format!("{count} loaded"))].into()
}

/// Directories of the host's own installation, and temporary ones that carry our names.
fn directories() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for place in ["/run", "/var/lib", "/etc", "/tmp", "/dev/shm"] {
        let ours =
            |name: &String| name.starts_with("vsos") || name.starts_with("vsctl") || name.starts_with("lxcfs-fuse");
        found.extend(names_in(place).into_iter().filter(ours).map(|name| format!("{place}/{name}")));
    }
    for place in ["/run/vsos/servers", "/var/lib/vsos/servers", "/var/lib/vsos/ids"] {
        found.extend(names_in(place).into_iter().map(|name| format!("{place}/{name}")));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:5 / /proc rw,nosuid master:2 - proc proc rw
90 22 0:9 / /mnt/a\\040b rw - tmpfs none rw,size=4k
91 90 0:9 / /mnt/a\\040b rw - tmpfs none rw,size=4k
";

    #[test]
    fn mounts_are_named_by_place_type_and_source() {
        let found = mounts(MOUNTINFO);
        assert!(found.contains("/ ext4 /dev/vda") && found.contains("/proc proc proc"), "{found:?}");
        assert!(found.contains("/mnt/a\\040b tmpfs none (2 times)"), "{found:?}");
    }

    #[test]
    fn a_difference_names_what_came_and_what_went() {
        let state =
            |lines: &[&str]| HostState([("link", lines.iter().map(|line| (*line).to_owned()).collect())].into());
        let difference = state(&["lo", "eth0"]).difference(&state(&["lo", "vs-1"])).to_string();
        assert!(difference.contains("left behind: link vs-1"), "{difference}");
        assert!(difference.contains("gone: link eth0"), "{difference}");
    }

    #[test]
    fn a_shared_host_counts_only_what_names_the_site() {
        let scope = Scope::Site { root: "/var/tmp/site-x".into(), suffix: "1a2b".into() };
        assert!(scope.includes("link", "vs1a2b-3") && scope.includes("link", "vsbr1a2b"));
        assert!(scope.includes("cgroup", "/sys/fs/cgroup/memory/vsos-1a2b/web1"));
        assert!(scope.includes("mount", "/var/tmp/site-x/run overlay none"));
        assert!(!scope.includes("link", "vs9999-3") && !scope.includes("cgroup", "/sys/fs/cgroup/memory/vsos"));
    }
}
