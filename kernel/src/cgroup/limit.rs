//! Limits of a group: memory, swap, processor time, processors, tasks.

use std::io;
use std::path::Path;
use std::sync::Once;

use super::cpuset::CpuSet;
use super::group::{Group, inherit_cpuset, no_hierarchy};
use super::hierarchies::Controller;
use super::interface::{read_number, write, write_optional};
use crate::Result;
use crate::error::Error;

/// The period over which processor time is shared out; the kernel's default.
const PERIOD_USEC: u64 = 100_000;
/// The kernel takes no smaller quota.
const QUOTA_USEC_MIN: u64 = 1_000;

impl Group {
    /// Limits memory, and swap beside it; `None` is no limit.
    ///
    /// v1 counts memory and swap together, so there swap has a limit only if memory has one. EBUSY: more is in use and
    /// could not be reclaimed. A kernel without swap accounting: said once in the log, memory is limited all the same.
    pub fn set_memory(&self, bytes: Option<u64>, swap_bytes: Option<u64>) -> Result<()> {
        let directory = self.directory(Controller::Memory).ok_or_else(|| no_hierarchy("limit memory of", self))?;
        if self.hierarchies.is_v1(Controller::Memory) {
            return set_memory_v1(&directory, bytes, swap_bytes);
        }
        write(&directory.join("memory.max"), or_max(bytes))?;
        if !write_optional(&directory.join("memory.swap.max"), or_max(swap_bytes))? && swap_bytes.is_some() {
            warn_no_swap_accounting();
        }
        Ok(())
    }

    /// Limits processor time to that of `cpus` processors (0.5 is half of one); `None` is no limit.
    pub fn set_cpus(&self, cpus: Option<f64>) -> Result<()> {
        let directory = self.directory(Controller::Cpu).ok_or_else(|| no_hierarchy("limit processors of", self))?;
        let quota = cpus.map(quota_usec).transpose()?;
        if self.hierarchies.is_v1(Controller::Cpu) {
            write(&directory.join("cpu.cfs_period_us"), PERIOD_USEC.to_string())?;
            return write(&directory.join("cpu.cfs_quota_us"), quota.map_or("-1".to_owned(), |usec| usec.to_string()));
        }
        write(&directory.join("cpu.max"), format!("{} {PERIOD_USEC}", or_max(quota)))
    }

    /// Limits the group to the processors of `set`; `None` gives it those of its parent.
    pub fn set_cpuset(&self, set: Option<&CpuSet>) -> Result<()> {
        let directory = self.directory(Controller::Cpuset).ok_or_else(|| no_hierarchy("limit processors of", self))?;
        match set {
            Some(set) => write(&directory.join("cpuset.cpus"), set.to_string()),
            None if self.hierarchies.is_v1(Controller::Cpuset) => inherit_cpuset(&directory),
            // An empty line is the kernel's word for "as the parent"; an empty write would not reach it.
            None => write(&directory.join("cpuset.cpus"), "\n"),
        }
    }

    /// Limits the number of tasks; `None` is no limit.
    pub fn set_pids(&self, max: Option<u64>) -> Result<()> {
        let directory = self.directory(Controller::Pids).ok_or_else(|| no_hierarchy("limit tasks of", self))?;
        write(&directory.join("pids.max"), or_max(max))
    }
}

fn or_max(value: Option<u64>) -> String {
    value.map_or("max".to_owned(), |value| value.to_string())
}

/// Processor time per period.
fn quota_usec(cpus: f64) -> Result<u64> {
    if !cpus.is_finite() || cpus <= 0.0 || cpus > 65_536.0 {
        let why = "a number of processors is above 0";
        return Err(Error::refused("limit processors to", cpus, io::ErrorKind::InvalidInput, why));
    }
    Ok(((cpus * PERIOD_USEC as f64).round() as u64).max(QUOTA_USEC_MIN))
}

/// `memory.memsw` is memory plus swap and the kernel keeps it at or above `memory.limit`, so the order of the two
/// writes depends on where they come from.
fn set_memory_v1(directory: &Path, bytes: Option<u64>, swap_bytes: Option<u64>) -> Result<()> {
    let limit_file = directory.join("memory.limit_in_bytes");
    let both_file = directory.join("memory.memsw.limit_in_bytes");
    let both = bytes.and_then(|bytes| swap_bytes.and_then(|swap| bytes.checked_add(swap)));
    let Some(both_now) = read_number(&both_file)? else {
        if swap_bytes.is_some() {
            warn_no_swap_accounting();
        }
        return write(&limit_file, or_unlimited(bytes));
    };
    let sum_first = bytes.is_none_or(|bytes| bytes > both_now);
    let writes = [(&limit_file, bytes), (&both_file, both)];
    let order = if sum_first { [1, 0] } else { [0, 1] };
    for index in order {
        let (file, value) = writes[index];
        write(file, or_unlimited(value))?;
    }
    Ok(())
}

fn or_unlimited(value: Option<u64>) -> String {
    value.map_or("-1".to_owned(), |value| value.to_string())
}

fn warn_no_swap_accounting() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| log::warn!("the kernel does not account swap: swap limits have no effect"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_have_a_floor_and_nonsense_is_refused() {
        assert_eq!(quota_usec(1.5).unwrap(), 150_000);
        assert_eq!(quota_usec(0.001).unwrap(), 1_000);
        for cpus in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(quota_usec(cpus).is_err(), "{cpus}");
        }
    }
}
