//! Private memory of processes: what would be free if they were not there.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use system_tests::site::suffix_of;

/// A process, as far as the bench has to know it.
pub struct Process {
    pid: i32,
    exe: String,
    command: String,
}

/// The sum of `Private_*` of `smaps_rollup` over all processes that `chosen` chooses.
pub fn private_kib(chosen: impl Fn(&Process) -> bool) -> Result<u64> {
    let chosen = Process::all()?.into_iter().filter(chosen);
    // Gone in between is nothing to count.
    let rollup = |process: Process| fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid)).ok();
    Ok(chosen.filter_map(rollup).map(|text| private(&text)).sum())
}

/// Memory that a process has in RAM, shared or not.
pub fn resident_kib(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read a process's memory")?;
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok());
    value.with_context(|| format!("no VmRSS of process {pid}"))
}

fn private(rollup: &str) -> u64 {
    let lines = rollup.lines().filter(|line| line.starts_with("Private_"));
    lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

impl Process {
    /// All that there are.
    pub fn all() -> Result<Vec<Process>> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let exe = fs::read_link(entry.path().join("exe")).unwrap_or_default();
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            found.push(Process {
                pid,
                exe: exe.display().to_string(),
                command: String::from_utf8_lossy(&command).replace('\0', " "),
            });
        }
        Ok(found)
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it is the worker of our FUSE service for the installation in `root`.
    pub fn is_our_worker(&self, root: &Path) -> bool {
        self.exe.contains("lxcfs-fuse") && self.command.contains(&format!(" worker --run {}", root.display()))
    }

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

    /// Whether it runs `program` for `directory`.
    pub fn is_run_for(&self, program: &str, directory: &Path) -> bool {
        self.command.starts_with(program) && self.command.contains(&directory.display().to_string())
    }

    /// Whether it is the monitor of a container below `directory`.
    pub fn is_lxc_monitor(&self, directory: &Path) -> bool {
        self.command.starts_with("[lxc monitor]") && self.command.contains(&directory.display().to_string())
    }
}
