//! Sets of capabilities, and limiting a process to one (capabilities(7)).

use std::fmt;
use std::io;
use std::str::FromStr;

use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::Result;
use crate::error::{During, Error};

/// The names, each at the place of its number (linux/capability.h), without `cap_`.
const NAMES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// What a server may not have by default. Each reaches past its namespaces, or nothing in a server can use it:
/// kernel modules and raw i/o, the host's clock, wake alarms and suspend, the host's audit and kernel log, security modules.
const NOT_FOR_SERVERS: [&str; 10] = [
    "sys_module",
    "sys_rawio",
    "sys_time",
    "wake_alarm",
    "block_suspend",
    "audit_control",
    "audit_read",
    "syslog",
    "mac_override",
    "mac_admin",
];

/// A set of capabilities; bit N is capability number N.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Set(u64);

impl Set {
    /// The set with the bits of `bits`.
    pub const fn from_bits(bits: u64) -> Set {
        Set(bits)
    }

    /// The set as bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The empty set.
    pub const fn empty() -> Set {
        Set(0)
    }

    /// Every capability the running kernel knows (/proc/sys/kernel/cap_last_cap; else those known to this crate).
    pub fn all_supported() -> Set {
        let last = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").ok();
        let last = last.and_then(|text| text.trim().parse::<u32>().ok()).unwrap_or(NAMES.len() as u32 - 1);
        Set(u64::MAX >> (63 - last.min(63)))
    }

    /// What the root of a virtual server has by default: all but those that reach past its namespaces.
    pub fn default_for_servers() -> Set {
        let without = NOT_FOR_SERVERS.iter().filter_map(|name| number(name)).fold(0, |bits, number| bits | 1 << number);
        Set(Self::all_supported().0 & !without)
    }

    /// Adds (`+net_admin`) or takes away (`-mknod`) one capability, or all (`+all`, `-all`).
    pub fn apply_change(&mut self, change: &str) -> Result<()> {
        let (name, add) = match (change.strip_prefix('+'), change.strip_prefix('-')) {
            (Some(name), _) => (name, true),
            (_, Some(name)) => (name, false),
            _ => return Err(invalid(change, "a change begins with + or -")),
        };
        let changed: Set = name.parse()?;
        self.0 = if add { self.0 | changed.0 } else { self.0 & !changed.0 };
        Ok(())
    }

    /// Whether every capability of `other` is in this set.
    pub fn contains(self, other: Set) -> bool {
        self.0 & other.0 == other.0
    }

    /// The numbers in the set, rising.
    pub fn numbers(self) -> impl Iterator<Item = u32> {
        (0..64).filter(move |number| self.0 & (1 << number) != 0)
    }
}

/// A capability's number by name, any case, with or without `cap_`.
fn number(name: &str) -> Option<u32> {
    let name = name.to_ascii_lowercase();
    let name = name.strip_prefix("cap_").unwrap_or(&name);
    NAMES.iter().position(|known| *known == name).map(|number| number as u32)
}

fn invalid(text: &str, why: &str) -> Error {
    Error::refused("parse capability", text, io::ErrorKind::InvalidInput, why)
}

/// Names separated by commas, `all`, or the empty text for none.
impl FromStr for Set {
    type Err = Error;

    fn from_str(text: &str) -> Result<Set> {
        let mut set = Set::empty();
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            if name.eq_ignore_ascii_case("all") {
                set.0 |= Set::all_supported().0;
            } else {
                set.0 |= 1 << number(name).ok_or_else(|| invalid(name, "no capability has this name"))?;
            }
        }
        Ok(set)
    }
}

/// Names separated by commas, a number where there is no name.
impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, number) in self.numbers().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            match NAMES.get(number as usize) {
                Some(name) => f.write_str(name)?,
                None => write!(f, "{number}")?,
            }
        }
        Ok(())
    }
}

/// Takes every capability outside `keep` out of the caller's bounding set, for ever. EPERM without `CAP_SETPCAP`.
pub fn limit_bounding(keep: Set) -> Result<()> {
    for number in Set::all_supported().numbers() {
        let one = CapabilitySet::from_bits_retain(1 << number);
        let is_in = rustix::thread::capability_is_in_bounding_set(one)
            .during("read bounding set for capability", Set(1 << number))?;
        if is_in && !keep.contains(Set(1 << number)) {
            rustix::thread::remove_capability_from_bounding_set(one)
                .during("limit bounding set by capability", Set(1 << number))?;
        }
    }
    Ok(())
}

/// The caller's bounding set.
pub fn bounding() -> Result<Set> {
    let mut set = Set::empty();
    for number in Set::all_supported().numbers() {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if rustix::thread::capability_is_in_bounding_set(one).during("read", "bounding set")? {
            set.0 |= 1 << number;
        }
    }
    Ok(set)
}

/// The caller's effective set.
pub fn effective() -> Result<Set> {
    let sets = rustix::thread::capabilities(None).during("read", "capabilities")?;
    Ok(Set(sets.effective.bits()))
}

/// Makes effective, permitted and inheritable sets of the caller `set`, as far as it has them permitted now
/// (a set cannot grow), and clears the ambient set.
pub fn set_all(set: Set) -> Result<()> {
    rustix::thread::clear_ambient_capability_set().during("clear", "ambient capabilities")?;
    let permitted = rustix::thread::capabilities(None).during("read", "capabilities")?.permitted;
    let kept = CapabilitySet::from_bits_retain(set.0 & permitted.bits());
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: kept };
    rustix::thread::set_capabilities(None, sets).during("set capabilities", set)
}

/// Keeps `set` in reserve for the calling thread and those it makes, as far as it has it permitted now: nothing is effective
/// until [`use_reserve`].
pub fn keep_in_reserve(set: Set) -> Result<()> {
    set_all(set)?;
    let permitted = rustix::thread::capabilities(None).during("read", "capabilities")?.permitted;
    let sets = CapabilitySets { effective: CapabilitySet::empty(), permitted, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).during("set capabilities", set)
}

/// Makes effective, for the calling thread alone, what is permitted.
pub fn use_reserve() -> Result<()> {
    let sets = rustix::thread::capabilities(None).during("read", "capabilities")?;
    let sets = CapabilitySets { effective: sets.permitted, ..sets };
    rustix::thread::set_capabilities(None, sets).during("use", "capabilities in reserve")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_every_usual_form() {
        let set: Set = "net_admin, CAP_SYS_PTRACE,cap_chown".parse().unwrap();
        assert_eq!(set.bits(), 1 << 12 | 1 << 19 | 1);
        assert_eq!(set.to_string(), "chown,net_admin,sys_ptrace");
        assert_eq!("".parse::<Set>().unwrap(), Set::empty());
        assert!("net_admn".parse::<Set>().unwrap_err().to_string().contains("net_admn"));
    }

    #[test]
    fn numbers_are_the_kernels() {
        for (name, expected) in
            [("setfcap", 31), ("mac_override", 32), ("syslog", 34), ("bpf", 39), ("checkpoint_restore", 40)]
        {
            assert_eq!(number(name), Some(expected), "{name}");
        }
    }

    #[test]
    fn changes_add_and_take_away() {
        let mut set = Set::default_for_servers();
        assert!(!set.contains("sys_module".parse().unwrap()) && set.contains("sys_admin,mknod".parse().unwrap()));
        set.apply_change("-mknod").unwrap();
        set.apply_change("+cap_sys_time").unwrap();
        assert!(!set.contains("mknod".parse().unwrap()) && set.contains("sys_time".parse().unwrap()));
        set.apply_change("-all").unwrap();
        assert_eq!(set, Set::empty());
        assert!(set.apply_change("mknod").is_err());
    }

    #[test]
    fn an_unknown_number_is_shown_as_number() {
        assert_eq!(Set::from_bits(1 << 63 | 1).to_string(), "chown,63");
    }
}
