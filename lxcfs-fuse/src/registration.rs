//! A server's registration: the file `servers/<id>.toml` that the manager writes, and nothing else.
//!
//! Limit: keys that this version does not know are ignored, so that a newer manager can speak to an older
//! worker; keys that it needs and that are missing or of the wrong type are errors.

use std::path::PathBuf;

use serde::Deserialize;

/// What the manager says about one server.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Registration {
    /// The server's name, for log lines.
    pub name: String,
    /// `CLOCK_BOOTTIME` of the host when the server's init started, in nanoseconds; before 0 for one that came here from an earlier
    /// boot, or from another host.
    pub started_boottime_ns: i64,
    /// The quota as the spec has it. Only a hint: the cgroup is the truth.
    #[serde(default)]
    pub cpus: Option<f64>,
    /// What it had used of processors before its cgroup was made: it came back from a checkpoint.
    #[serde(default)]
    pub cpu_before: CpuTime,
    /// The server's cgroup directories.
    pub cgroup: Cgroup,
}

/// Processor time, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct CpuTime {
    /// In programs.
    pub user_usec: u64,
    /// In the kernel.
    pub system_usec: u64,
}

/// Absolute directories of the server's control groups, by controller.
///
/// A controller without a directory here is looked for in the unified one (pure cgroup v2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Cgroup {
    /// The cgroup v2 directory.
    pub unified: Option<PathBuf>,
    /// v1 `cpu`: quota and throttling.
    pub cpu: Option<PathBuf>,
    /// v1 `cpuacct`: CPU time.
    pub cpuacct: Option<PathBuf>,
    /// v1 `cpuset`.
    pub cpuset: Option<PathBuf>,
    /// v1 `memory`.
    pub memory: Option<PathBuf>,
    /// v1 `blkio`.
    pub blkio: Option<PathBuf>,
    /// v1 `pids`.
    pub pids: Option<PathBuf>,
}

impl Cgroup {
    /// Every directory that is named.
    pub fn directories(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.unified, &self.cpu, &self.cpuacct, &self.cpuset, &self.memory, &self.blkio, &self.pids]
            .into_iter()
            .flatten()
    }
}

/// Why a registration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// Not TOML, a key missing, or a value of the wrong type.
    #[error("not a registration")]
    Syntax(#[source] toml::de::Error),
    /// A directory that is not absolute, or none at all.
    #[error("cgroup directory '{0}' is not absolute")]
    Relative(String),
    /// There is nothing to measure.
    #[error("no cgroup directory is named")]
    NoDirectory,
}

impl Registration {
    /// Parses the text of a registration file.
    pub fn parse(text: &str) -> Result<Registration, Malformed> {
        let registration: Registration = toml::from_str(text).map_err(Malformed::Syntax)?;
        if let Some(relative) = registration.cgroup.directories().find(|path| !path.is_absolute()) {
            return Err(Malformed::Relative(relative.display().to_string()));
        }
        if registration.cgroup.directories().next().is_none() {
            return Err(Malformed::NoDirectory);
        }
        Ok(registration)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_of_the_contract_is_read() {
        let text = "name = \"web1\"\nstarted_boottime_ns = 123456789\ncpus = 1.5\n\n\
                    [cpu_before]\nuser_usec = 7\nsystem_usec = 8\n\n[cgroup]\n\
                    unified = \"/sys/fs/cgroup/unified/vsos/web1\"\ncpu = \"/sys/fs/cgroup/cpu/vsos/web1\"\n";
        let registration = Registration::parse(text).unwrap();
        assert_eq!(registration.name, "web1");
        assert_eq!(registration.cpus, Some(1.5));
        assert_eq!(registration.cpu_before, CpuTime { user_usec: 7, system_usec: 8 });
        assert_eq!(registration.cgroup.directories().count(), 2);
    }

    #[test]
    fn what_a_newer_manager_adds_is_ignored() {
        let text = "name = \"a\"\nstarted_boottime_ns = 1\nnew = 1\n[cgroup]\nunified = \"/a\"\nrdma = \"/b\"\n";
        assert!(Registration::parse(text).is_ok());
    }

    #[test]
    fn a_broken_registration_says_what_is_wrong() {
        for (text, wanted) in [
            ("", "not a registration"),
            ("name = \"a\"\nstarted_boottime_ns = 0.5\n[cgroup]\nunified = \"/a\"", "not a registration"),
            ("name = \"a\"\nstarted_boottime_ns = 1\n[cgroup]\n", "no cgroup directory is named"),
            (
                "name = \"a\"\nstarted_boottime_ns = 1\n[cgroup]\nunified = \"a\"",
                "cgroup directory 'a' is not absolute",
            ),
        ] {
            assert_eq!(Registration::parse(text).unwrap_err().to_string(), wanted);
        }
    }
}
