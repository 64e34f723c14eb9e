//! What a group uses now and may use, from the files of v1 or v2.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::group::Group;
use super::hierarchies::Controller;
use super::interface::{read_number, read_optional, value_of};
use crate::Result;

/// v1 writes "no limit" as the largest number of whole pages; with any page size it is above this.
const V1_UNLIMITED_BYTES: u64 = 1 << 62;

/// Use and limits of a group with all groups below it. What its kernel or hierarchy does not account is 0, or no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Memory in use, page cache included.
    pub memory_bytes: u64,
    /// Its limit.
    pub memory_limit_bytes: Option<u64>,
    /// Swap in use.
    pub swap_bytes: u64,
    /// Its limit.
    pub swap_limit_bytes: Option<u64>,
    /// Processor time used, in microseconds.
    pub cpu_usec: u64,
    /// Of it, in the kernel.
    pub cpu_system_usec: u64,
    /// Time for which the limit kept tasks from running.
    pub throttled_usec: u64,
    /// Number of tasks.
    pub tasks: u64,
    /// Its limit.
    pub pids_limit: Option<u64>,
    /// Read from block devices.
    pub io_read_bytes: u64,
    /// Written to block devices.
    pub io_write_bytes: u64,
}

/// Memory that is in no file.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Anonymous {
    /// Of programs alone.
    pub own_bytes: u64,
    /// Shared, or of tmpfs.
    pub shared_bytes: u64,
}

impl Group {
    /// Reads use and limits. The reads are not one moment: each value is true for its own.
    pub fn usage(&self) -> Result<Usage> {
        let mut usage = Usage::default();
        self.read_memory(&mut usage)?;
        self.read_cpu(&mut usage)?;
        self.read_io(&mut usage)?;
        if let Some(directory) = self.directory(Controller::Pids) {
            usage.pids_limit = read_number(&directory.join("pids.max"))?;
            usage.tasks = match read_number(&directory.join("pids.current"))? {
                Some(tasks) => tasks,
                None => self.processes()?.len() as u64,
            };
        }
        Ok(usage)
    }

    /// Memory that is in no file: programs' own, what of it is swapped out included, and what is shared or in tmpfs. What programs have in common
    /// since a fork counts once. The kernel takes its time for this (`memory.stat`), so [`Self::usage`] does without.
    ///
    /// # Errors
    /// When the group cannot be read. Without a memory controller it is nothing.
    pub fn anonymous(&self) -> Result<Anonymous> {
        let Some(directory) = self.directory(Controller::Memory) else { return Ok(Anonymous::default()) };
        let stat = read_optional(&directory.join("memory.stat"))?.unwrap_or_default();
        let sum = |keys: &[&str]| keys.iter().filter_map(|key| value_of(&stat, key)).sum::<u64>();
        if self.hierarchies.is_v1(Controller::Memory) {
            return Ok(Anonymous { own_bytes: sum(&["total_rss", "total_swap"]), shared_bytes: sum(&["total_shmem"]) });
        }
        let swapped = read_number(&directory.join("memory.swap.current"))?.unwrap_or(0);
        Ok(Anonymous { own_bytes: sum(&["anon"]) + swapped, shared_bytes: sum(&["shmem"]) })
    }

    fn read_memory(&self, usage: &mut Usage) -> Result<()> {
        let Some(directory) = self.directory(Controller::Memory) else {
            return Ok(());
        };
        if self.hierarchies.is_v1(Controller::Memory) {
            return read_memory_v1(&directory, usage);
        }
        usage.memory_bytes = read_number(&directory.join("memory.current"))?.unwrap_or(0);
        usage.memory_limit_bytes = read_number(&directory.join("memory.max"))?;
        usage.swap_bytes = read_number(&directory.join("memory.swap.current"))?.unwrap_or(0);
        usage.swap_limit_bytes = read_number(&directory.join("memory.swap.max"))?;
        Ok(())
    }

    fn read_cpu(&self, usage: &mut Usage) -> Result<()> {
        let Some(directory) = self.directory(Controller::Cpu) else {
            return Ok(());
        };
        let stat = read_optional(&directory.join("cpu.stat"))?.unwrap_or_default();
        if self.hierarchies.is_v1(Controller::Cpu) {
            usage.throttled_usec = value_of(&stat, "throttled_time").unwrap_or(0) / 1_000;
        } else {
            read_cpu_stat(&stat, usage);
        }
        match self.directory(Controller::Cpuacct) {
            Some(directory) if self.hierarchies.is_v1(Controller::Cpuacct) => read_cpuacct(&directory, usage),
            _ => Ok(()),
        }
    }

    fn read_io(&self, usage: &mut Usage) -> Result<()> {
        let Some(directory) = self.directory(Controller::Io) else {
            return Ok(());
        };
        (usage.io_read_bytes, usage.io_write_bytes) = if self.hierarchies.is_v1(Controller::Io) {
            // The plain file counts this group alone.
            let text = read_optional(&directory.join("blkio.throttle.io_service_bytes_recursive"))?;
            parse_blkio(&text.unwrap_or_default())
        } else {
            parse_io_stat(&read_optional(&directory.join("io.stat"))?.unwrap_or_default())
        };
        Ok(())
    }
}

fn read_memory_v1(directory: &Path, usage: &mut Usage) -> Result<()> {
    let limit = |file: &str| -> Result<Option<u64>> {
        Ok(read_number(&directory.join(file))?.filter(|&bytes| bytes < V1_UNLIMITED_BYTES))
    };
    usage.memory_bytes = read_number(&directory.join("memory.usage_in_bytes"))?.unwrap_or(0);
    usage.memory_limit_bytes = limit("memory.limit_in_bytes")?;
    let both = limit("memory.memsw.limit_in_bytes")?;
    usage.swap_limit_bytes = both.zip(usage.memory_limit_bytes).map(|(both, memory)| both.saturating_sub(memory));
    let stat = read_optional(&directory.join("memory.stat"))?.unwrap_or_default();
    usage.swap_bytes = value_of(&stat, "total_swap").unwrap_or(0);
    Ok(())
}

fn read_cpu_stat(stat: &str, usage: &mut Usage) {
    usage.cpu_usec = value_of(stat, "usage_usec").unwrap_or(0);
    usage.cpu_system_usec = value_of(stat, "system_usec").unwrap_or(0);
    usage.throttled_usec = value_of(stat, "throttled_usec").unwrap_or(0);
}

/// Nanoseconds in all; how they are divided only `cpuacct.stat` tells, which counts ticks of the clock.
fn read_cpuacct(directory: &Path, usage: &mut Usage) -> Result<()> {
    usage.cpu_usec = read_number(&directory.join("cpuacct.usage"))?.unwrap_or(0) / 1_000;
    let stat = read_optional(&directory.join("cpuacct.stat"))?.unwrap_or_default();
    let [user, system] = ["user", "system"].map(|key| u128::from(value_of(&stat, key).unwrap_or(0)));
    let part = (u128::from(usage.cpu_usec) * system).checked_div(user + system).unwrap_or(0);
    usage.cpu_system_usec = u64::try_from(part).unwrap_or(usage.cpu_usec);
    Ok(())
}

/// `8:0 Read 4096` lines, one per device and kind: (read, written) bytes of all devices.
fn parse_blkio(text: &str) -> (u64, u64) {
    let sum = |kind: &str| {
        let lines = text.lines().filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (_device, found, bytes) = (fields.next()?, fields.next()?, fields.next()?);
            if found == kind { bytes.parse::<u64>().ok() } else { None }
        });
        lines.sum()
    };
    (sum("Read"), sum("Write"))
}

/// `8:0 rbytes=1 wbytes=2 rios=…` lines, one per device.
fn parse_io_stat(text: &str) -> (u64, u64) {
    let sum = |key: &str| {
        let words = text.split_ascii_whitespace();
        words.filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok()).sum()
    };
    (sum("rbytes="), sum("wbytes="))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Hierarchies;

    #[test]
    fn block_io_is_summed_over_devices() {
        let blkio = "254:0 Read 4096\n254:0 Write 100\n254:0 Sync 4196\n254:0 Total 4196\n8:0 Read 1\nTotal 4197\n";
        assert_eq!(parse_blkio(blkio), (4097, 100));
        let stat = "254:0 rbytes=4096 wbytes=100 rios=1 wios=1 dbytes=0 dios=0\n8:0 rbytes=1 wbytes=0 rios=1 wios=0\n";
        assert_eq!(parse_io_stat(stat), (4097, 100));
    }

    /// A directory that looks like a hierarchy with the one group `g`.
    fn fake(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("g")).unwrap();
        for (name, text) in files {
            std::fs::write(root.path().join("g").join(name), text).unwrap();
        }
        root
    }

    #[test]
    fn a_group_of_v2() {
        let root = fake(&[
            ("memory.current", "1000\n"),
            ("memory.max", "max\n"),
            ("memory.swap.current", "5\n"),
            ("memory.swap.max", "0\n"),
            ("memory.stat", "anon 600\nfile 300\nshmem 40\n"),
            (
                "cpu.stat",
                "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnice_usec 0\nnr_throttled 2\nthrottled_usec 7\n",
            ),
            ("pids.current", "3\n"),
            ("pids.max", "100\n"),
        ]);
        let group = Group::new(&Hierarchies::at(Some(root.path().into()), Default::default()), "g");
        let expected = Usage {
            memory_bytes: 1000,
            swap_bytes: 5,
            swap_limit_bytes: Some(0),
            cpu_usec: 30,
            cpu_system_usec: 10,
            throttled_usec: 7,
            tasks: 3,
            pids_limit: Some(100),
            ..Default::default()
        };
        assert_eq!(group.usage().unwrap(), expected);
        assert_eq!(group.anonymous().unwrap(), Anonymous { own_bytes: 605, shared_bytes: 40 });
    }

    #[test]
    fn a_group_of_v1_with_all_controllers_together() {
        let root = fake(&[
            ("memory.usage_in_bytes", "1000\n"),
            ("memory.limit_in_bytes", "4096\n"),
            ("memory.memsw.limit_in_bytes", "6144\n"),
            ("memory.stat", "cache 1\nswap 2\ntotal_cache 1\ntotal_rss 20\ntotal_shmem 1\ntotal_swap 9\n"),
            ("cpuacct.usage", "30000\n"),
            ("cpuacct.stat", "user 4\nsystem 2\n"),
            ("cpu.stat", "nr_periods 1\nnr_throttled 1\nthrottled_time 7000\n"),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
        ]);
        let v1 = Controller::ALL.into_iter().map(|controller| (controller, root.path().to_owned())).collect();
        let group = Group::new(&Hierarchies::at(None, v1), "g");
        let expected = Usage {
            memory_bytes: 1000,
            memory_limit_bytes: Some(4096),
            swap_bytes: 9,
            swap_limit_bytes: Some(2048),
            cpu_usec: 30,
            cpu_system_usec: 10,
            throttled_usec: 7,
            tasks: 3,
            ..Default::default()
        };
        assert_eq!(group.usage().unwrap(), expected);
        assert_eq!(group.anonymous().unwrap(), Anonymous { own_bytes: 29, shared_bytes: 1 });
    }

    #[test]
    fn the_v1_word_for_no_limit_is_none() {
        let root = fake(&[
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.memsw.limit_in_bytes", "9223372036854771712\n"),
        ]);
        let v1 = [(Controller::Memory, root.path().to_owned())].into_iter().collect();
        let usage = Group::new(&Hierarchies::at(None, v1), "g").usage().unwrap();
        assert_eq!((usage.memory_limit_bytes, usage.swap_limit_bytes), (None, None));
    }
}
