//! Private memory of processes: what would be free if they were not there.

use std::{fs, path::Path};

use anyhow::Result;
use system_tests::site::suffix_of;

/// A process, as far as the bench has to know it.
pub struct Process {
    pid: i32,
    exe: String,
    command: String,
}

/// The sum of `Private_*` of `smaps_rollup` over all processes that `chosen` chooses.
pub fn private_kib(chosen: impl Fn(&Process) -> bool) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let exe = fs::read_link(entry.path().join("exe")).unwrap_or_default();
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let process = Process {
            pid,
            exe: exe.display().to_string(),
            command: String::from_utf8_lossy(&command).replace('\0', " "),
        };
        if chosen(&process) {
            // Gone in between is nothing to count.
            sum += fs::read_to_string(entry.path().join("smaps_rollup")).map_or(0, |text| private(&text));
        }
    }
    Ok(sum)
}

fn private(rollup: &str) -> u64 {
    let lines = rollup.lines().filter(|line| line.starts_with("Private_"));
    lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

impl Process {
    /// Whether it is one of our programs, at work for the installation in `root`: monitors, inits, FUSE workers.
    pub fn is_ours(&self, root: &Path) -> bool {
        // A guest's init runs from a mount that its own root hides: the kernel has no path for it.
        let programs = ["vsctl", "vsinit", "lxcfs-fuse"];
        let named = programs.iter().any(|program| self.exe.contains(program));
        if !named && !self.command.starts_with("vsinit") {
            return false;
        }
        let environment = fs::read(format!("/proc/{}/environ", self.pid)).unwrap_or_default();
        let root = root.display().to_string();
        let suffix = suffix_of(Path::new(&root));
        let group = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains(&root)
            || self.command.contains(&root)
            || group.contains(&format!("/vsos-{suffix}/"))
    }

    /// Whether it is the monitor of a container below `directory`.
    pub fn is_lxc_monitor(&self, directory: &Path) -> bool {
        self.command.starts_with("[lxc monitor]") && self.command.contains(&directory.display().to_string())
    }
}
