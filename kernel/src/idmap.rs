//! Maps of user and group ids between a user namespace and its parent (user_namespaces(7)).
//!
//! Limit: rendering and writing. Who owns which range is decided elsewhere.

use std::fmt;

use crate::Result;
use crate::error::During;

/// One extent: `count` ids that begin at `inside` in the namespace are those that begin at `outside` in its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdMap {
    /// First id as seen in the namespace.
    pub inside: u32,
    /// First id as seen by the writer's namespace.
    pub outside: u32,
    /// Number of ids.
    pub count: u32,
}

impl IdMap {
    /// Writes this one extent as `uid_map` and `gid_map` of process `pid`.
    pub fn write_for(&self, pid: i32) -> Result<()> {
        write(pid, &[*self], &[*self])
    }

    /// The id outside for one inside.
    pub fn to_outside(&self, inside: u32) -> Option<u32> {
        let offset = inside.checked_sub(self.inside)?;
        if offset < self.count { self.outside.checked_add(offset) } else { None }
    }

    /// The id inside for one outside.
    pub fn to_inside(&self, outside: u32) -> Option<u32> {
        let offset = outside.checked_sub(self.outside)?;
        if offset < self.count { self.inside.checked_add(offset) } else { None }
    }
}

impl fmt::Display for IdMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.inside, self.outside, self.count)
    }
}

/// Writes both maps of process `pid`. Each can be written once, by a process with `CAP_SETUID` and `CAP_SETGID` in the
/// parent namespace; EPERM says one of the two.
pub fn write(pid: i32, uids: &[IdMap], gids: &[IdMap]) -> Result<()> {
    for (file, maps) in [("uid_map", uids), ("gid_map", gids)] {
        let path = format!("/proc/{pid}/{file}");
        // The kernel takes a map in one write(2) only; fs::write of one buffer is one.
        std::fs::write(&path, render(maps)).during("write id map", &path)?;
    }
    Ok(())
}

/// The text of a map file: one extent a line.
fn render(maps: &[IdMap]) -> String {
    maps.iter().map(|map| format!("{map}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_lines() {
        let maps =
            [IdMap { inside: 0, outside: 100_000, count: 65_536 }, IdMap { inside: 65_536, outside: 7, count: 1 }];
        assert_eq!(render(&maps), "0 100000 65536\n65536 7 1\n");
    }

    #[test]
    fn ids_outside_the_extent_have_no_image() {
        let map = IdMap { inside: 0, outside: 100_000, count: 65_536 };
        assert_eq!(
            (map.to_outside(0), map.to_outside(65_535), map.to_outside(65_536)),
            (Some(100_000), Some(165_535), None)
        );
        assert_eq!((map.to_inside(100_000), map.to_inside(99_999), map.to_inside(165_536)), (Some(0), None, None));
    }
}
