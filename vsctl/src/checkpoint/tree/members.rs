//! Who belongs to a tree of the host's processes.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use kernel::process::{self, Stat};

use crate::failure::{Exit, Failure};
use crate::processes::{self, Process};

/// A process and all below it, and who has left them.
#[derive(Debug)]
pub struct Members {
    /// Root first, each behind its parent.
    pub inside: Vec<Process>,
    /// Others of their sessions: their parents have ended, and they go on without the tree.
    pub strayed: Vec<Process>,
    /// The session of each that is inside.
    pub sessions: BTreeMap<i32, i32>,
}

impl Members {
    /// Looks at the tree whose root is `root`.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of(root: i32) -> Result<Self> {
        let all = everybody()?;
        if all.get(&root).is_none_or(|stat| stat.has_ended) {
            return Err(Failure::new(Exit::BadParameter, format!("there is no process {root}")).into());
        }
        let inside = below(root, &all);
        let sessions: BTreeMap<i32, i32> =
            inside.iter().filter_map(|pid| Some((*pid, all.get(pid)?.session))).collect();
        let strayed = strayed(&all, &sessions);
        let seen = |pids: Vec<i32>| pids.into_iter().filter_map(processes::of_host).collect();
        Ok(Self { inside: seen(inside), strayed: seen(strayed), sessions })
    }
}

/// Whether process `pid` is below one that `is_inside`, or has ended. Those whom it began while it was looked at are so.
pub fn is_below(pid: i32, is_inside: impl Fn(i32) -> bool) -> bool {
    let mut next = pid;
    while next != 0 {
        let Ok(stat) = process::stat(next) else { return next == pid };
        if is_inside(stat.parent) || stat.has_ended {
            return true;
        }
        next = stat.parent;
    }
    false
}

/// All processes of the host, as this process sees them.
///
/// # Errors
/// When /proc cannot be read.
pub fn pids() -> Result<Vec<i32>> {
    processes::numbers("/proc")
}

fn everybody() -> Result<BTreeMap<i32, Stat>> {
    // Who ends meanwhile is nobody's.
    Ok(pids()?.into_iter().filter_map(|pid| Some((pid, process::stat(pid).ok()?))).collect())
}

fn below(root: i32, all: &BTreeMap<i32, Stat>) -> Vec<i32> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for (pid, stat) in all {
        children.entry(stat.parent).or_default().push(*pid);
    }
    let (mut found, mut next) = (Vec::new(), vec![root]);
    while let Some(pid) = next.pop() {
        found.push(pid);
        next.extend(children.get(&pid).into_iter().flatten().rev());
    }
    found
}

/// Those outside that are of a session which began inside.
fn strayed(all: &BTreeMap<i32, Stat>, inside: &BTreeMap<i32, i32>) -> Vec<i32> {
    let own: BTreeSet<i32> = inside.values().copied().filter(|session| inside.contains_key(session)).collect();
    let is_stray = |pid: &i32, stat: &Stat| !inside.contains_key(pid) && !stat.has_ended && own.contains(&stat.session);
    all.iter().filter(|(pid, stat)| is_stray(pid, stat)).map(|(pid, _)| *pid).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use kernel::process::PidFd;

    use super::*;

    fn host(processes: &[(i32, i32, i32)]) -> BTreeMap<i32, Stat> {
        let stat = |parent, session| Stat {
            has_ended: false,
            parent,
            session,
            foreground: -1,
            start_ticks: 1,
            status: ExitStatus::from_raw(0),
        };
        processes.iter().map(|(pid, parent, session)| (*pid, stat(*parent, *session))).collect()
    }

    #[test]
    fn a_tree_is_its_root_and_all_below() {
        let all = host(&[(1, 0, 1), (7, 1, 7), (9, 7, 7), (8, 9, 7), (12, 7, 12), (13, 1, 13), (14, 13, 13)]);
        assert_eq!(below(7, &all), [7, 9, 8, 12]);
        assert_eq!(below(14, &all), [14]);
    }

    #[test]
    fn who_has_left_the_tree_is_known_by_its_session() {
        let all = host(&[(1, 0, 1), (7, 1, 7), (9, 7, 7), (20, 1, 7), (21, 1, 21), (22, 1, 1)]);
        assert_eq!(strayed(&all, &BTreeMap::from([(7, 7), (9, 7)])), [20]);
        // One whose session began outside is not of the tree's making.
        assert_eq!(strayed(&all, &BTreeMap::from([(9, 7)])), [0; 0]);
    }

    #[test]
    fn the_root_is_the_first() {
        let own = std::process::id() as i32;
        assert_eq!(Members::of(own).unwrap().inside[0].pid, own);
    }

    #[test]
    fn a_child_that_was_born_later_is_below() {
        let own = std::process::id() as i32;
        let mut child = std::process::Command::new("sh").args(["-c", "sleep 60 & wait"]).spawn().unwrap();
        let grandchild = loop {
            match everybody().unwrap().into_iter().find(|(_, stat)| stat.parent == child.id() as i32) {
                Some((pid, _)) => break pid,
                None => std::thread::yield_now(),
            }
        };
        assert!(is_below(grandchild, |pid| pid == own) && is_below(child.id() as i32, |pid| pid == own));
        assert!(!is_below(own, |pid| pid == grandchild));
        PidFd::open(grandchild).unwrap().signal(9).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_below(child.id() as i32, |_| false));
    }

    #[test]
    fn nobody_is_no_tree() {
        assert_eq!(Members::of(i32::MAX).unwrap_err().to_string(), format!("there is no process {}", i32::MAX));
    }
}
