//! Which processors the groups of a thread allow it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::cpuset::CpuSet;
use super::hierarchies::{Controller, Hierarchies};
use super::interface::read_optional;
use crate::Result;
use crate::error::During;

/// The file that says so, on v2 and on v1: what is left of a group's own wish by the groups above it and by what is online.
const EFFECTIVE: [&str; 2] = ["cpuset.cpus.effective", "cpuset.effective_cpus"];

/// Looks threads' groups up, each of them once.
#[derive(Clone, Debug)]
pub struct AllowedProcessors {
    hierarchies: Hierarchies,
    known: BTreeMap<PathBuf, CpuSet>,
}

impl AllowedProcessors {
    /// Knows no group yet.
    pub fn new(hierarchies: &Hierarchies) -> Self {
        Self { hierarchies: hierarchies.clone(), known: BTreeMap::new() }
    }

    /// Those that `thread` may run on when it has not chosen. ENOENT or ESRCH: there is no such thread.
    pub fn of(&mut self, thread: i32) -> Result<CpuSet> {
        let file = format!("/proc/{thread}/cgroup");
        let text = fs::read(&file).during("read", &file)?;
        let path = group_of(&text, self.hierarchies.is_v1(Controller::Cpuset)).unwrap_or(Path::new("/"));
        if let Some(set) = self.known.get(path) {
            return Ok(set.clone());
        }
        let set = self.of_group(path)?;
        self.known.insert(path.into(), set.clone());
        Ok(set)
    }

    /// Those of a group; one that the controller is not handed on to has what the next one above has.
    fn of_group(&self, path: &Path) -> Result<CpuSet> {
        let Some(root) = self.hierarchies.root_of(Controller::Cpuset) else { return CpuSet::online() };
        let group = root.join(path.strip_prefix("/").unwrap_or(path));
        for directory in group.ancestors().take_while(|directory| directory.starts_with(root)) {
            for file in EFFECTIVE {
                if let Some(text) = read_optional(&directory.join(file))? {
                    return text.parse();
                }
            }
        }
        CpuSet::online()
    }
}

/// The group that /proc/PID/cgroup names for the controller (cgroups(7)): on its hierarchy of v1, or on the unified one. Whoever makes a
/// group names it, and not always in UTF-8.
fn group_of(text: &[u8], is_v1: bool) -> Option<&Path> {
    let controller = Controller::Cpuset.as_str().as_bytes();
    text.split(|byte| *byte == b'\n').find_map(|line| {
        let mut fields = line.splitn(3, |byte| *byte == b':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let mut names = controllers.split(|byte| *byte == b',');
        let is_it = if is_v1 { names.any(|name| name == controller) } else { controllers.is_empty() };
        is_it.then_some(Path::new(OsStr::from_bytes(path)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_that_of_the_hierarchy_with_the_controller() {
        let text = b"5:pids:/a\n3:cpu,cpuset:/b:c\n1:name=systemd:/d\n0::/e\n";
        assert_eq!(group_of(text, true), Some(Path::new("/b:c")));
        assert_eq!(group_of(text, false), Some(Path::new("/e")));
        assert_eq!(group_of(b"5:pids:/a", false), None);
        let odd = Path::new(OsStr::from_bytes(b"/\xff"));
        assert_eq!(group_of(b"0::/\xff\n", false), Some(odd));
    }

    #[test]
    fn a_group_has_what_the_next_one_above_says() {
        let root = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        file("cpuset.cpus.effective", "0-3\n");
        file("web1/cpuset.cpus.effective", "1-2\n");
        file("web1/a.slice/x.service/cgroup.procs", "");
        file("web1/b.slice/cpuset.cpus.effective", "2\n");
        let allowed = AllowedProcessors::new(&Hierarchies::at(Some(root.path().into()), BTreeMap::new()));
        let of = |path: &str| allowed.of_group(Path::new(path)).unwrap().to_string();
        assert_eq!(of("/web1/a.slice/x.service"), "1-2");
        assert_eq!([of("/web1/b.slice"), of("/other"), of("/")], ["2", "0-3", "0-3"]);
    }

    #[test]
    fn where_no_group_says_it_all_are_allowed() {
        let root = tempfile::tempdir().unwrap();
        let allowed =
            |unified| AllowedProcessors::new(&Hierarchies::at(unified, BTreeMap::new())).of_group(Path::new("/a"));
        let online = CpuSet::online().unwrap();
        assert_eq!((allowed(None).unwrap(), allowed(Some(root.path().into())).unwrap()), (online.clone(), online));
    }

    #[test]
    fn the_own_group_is_found() {
        let own = std::process::id() as i32;
        let set = AllowedProcessors::new(&Hierarchies::detect().unwrap()).of(own).unwrap();
        assert!(!set.is_empty() && set.iter().all(|number| CpuSet::online().unwrap().contains(number)), "{set}");
    }
}
