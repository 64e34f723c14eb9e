//! Programs that somebody has open as a mere place (`O_PATH`, open(2)) while another runs them.
//!
//! CRIU (4.2 and older) takes two descriptors of one file for the same where it looks for the program of a process, and opens that as a
//! place, too; then the kernel does not take it for a program (EBADF of `PR_SET_MM_MAP`), and nothing comes back. systemd (≥ 255) has
//! `systemd-executor` open so, which runs for some milliseconds whenever a unit starts.
//!
//! Limit: by name, as the processes see it. Two of that name in other mount namespaces are taken for the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::processes::{self, field};

/// The flag in `flags:` of /proc/PID/fdinfo/N (include/uapi/asm-generic/fcntl.h).
const O_PATH: u32 = 0o10_000_000;

/// What the processes `pids` have open as places. Who ends meanwhile has none.
pub fn held(pids: impl Iterator<Item = i32>) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for pid in pids {
        for (number, _) in processes::descriptors(pid).filter(|(_, info)| is_place(info)) {
            found.extend(fs::read_link(Path::new("/proc").join(pid.to_string()).join("fd").join(number)));
        }
    }
    found
}

fn is_place(info: &str) -> bool {
    let flags = field(info, "flags:").and_then(|flags| u32::from_str_radix(flags, 8).ok());
    flags.is_some_and(|flags| flags & O_PATH != 0)
}

/// One of the processes `pids` that runs something of `held`, and what. Only names are read: who moves no more cannot keep anybody waiting.
pub fn run_by(pids: &[i32], held: &BTreeSet<PathBuf>) -> Option<(i32, PathBuf)> {
    if held.is_empty() {
        return None;
    }
    pids.iter().find_map(|pid| {
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        held.contains(&program).then_some((*pid, program))
    })
}

#[cfg(test)]
mod tests {
    use rustix::fs::{Mode, OFlags};

    use super::*;

    #[test]
    fn a_place_is_told_from_an_open_file() {
        assert!(is_place("pos:\t0\nflags:\t012100000\nmnt_id:\t29\n"));
        assert!(!is_place("pos:\t0\nflags:\t02100000\nmnt_id:\t29\n") && !is_place(""));
    }

    #[test]
    fn who_runs_what_is_held_is_found() {
        let own = std::process::id() as i32;
        let program = fs::read_link("/proc/self/exe").unwrap();
        let file = fs::File::open(&program).unwrap();
        assert_eq!(run_by(&[own], &held([own].into_iter())), None, "open as a file");
        let _place = rustix::fs::open(&program, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        drop(file);
        assert_eq!(run_by(&[own], &held([own].into_iter())), Some((own, program)));
    }
}
