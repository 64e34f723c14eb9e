//! What is joined: a running server as it is now, not as its spec wants it after the next start.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use kernel::capability::Set;
use kernel::cgroup::{Group, Hierarchies};
use kernel::idmap::IdMap;
use kernel::namespace::{self, Kinds};
use kernel::process::PidFd;
use kernel::seccomp::Profile;
use rustix::fs::{Mode, OFlags};

use crate::failure::{Exit, Failure};
use crate::lifecycle::boot;
use crate::lifecycle::state;
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// A running server.
#[derive(Debug)]
pub struct Target {
    pub(super) name: Name,
    pub(super) init: PidFd,
    root: OwnedFd,
    /// The namespaces that it does not share with the caller.
    pub(super) kinds: Kinds,
    /// Its ids on the host.
    pub(super) ids: IdMap,
    /// Its own group: where its limits are.
    pub(super) group: Group,
    /// The cgroup2 group of its init.
    pub(super) birthplace: Option<OwnedFd>,
    pub(super) capabilities: Set,
    pub(super) profile: Profile,
    /// Its number.
    pub(super) id: u32,
}

impl Target {
    /// Finds a running server.
    ///
    /// # Errors
    /// Exit 44 when there is none, 31 when it does not run or is frozen.
    pub fn find(site: &Site, name: &Name) -> Result<Self> {
        let server = store::load(site, name)?;
        let status = state::status(site, name)?.ok_or_else(|| not_running(name))?;
        let init = state::pidfd(&status)?.ok_or_else(|| not_running(name))?;
        let hierarchies = Hierarchies::detect()?;
        let group = Group::new(&hierarchies, &site.server_cgroup(name));
        // What is born in a frozen group does not come back before somebody thaws it.
        if group.is_frozen()? {
            let failure = Failure::new(Exit::NotRunning, format!("'{name}' is frozen"));
            return Err(failure.hint(format!("`vsctl thaw {name}`")).into());
        }
        let observed = observe(status.pid, hierarchies.unified(), &group);
        // The pid named our init all the while if it still lives: all that was read by its number is its own.
        if !init.is_alive() {
            return Err(not_running(name).into());
        }
        let (root, birthplace, ids, bounding) = observed?;
        let has_ids = !is_own_user_namespace(status.pid)?;
        let wanted = boot::capabilities(&server);
        Ok(Self {
            name: name.clone(),
            init,
            root,
            kinds: if has_ids { Kinds::all() } else { Kinds::all().difference(Kinds::USER) },
            ids,
            group,
            birthplace,
            // A change of the spec may take away at once; what it gives comes with the next start.
            capabilities: Set::from_bits(wanted.bits() & bounding),
            // Its filter is as init's, not as the spec wants the next one; a change to "migratable" counts at once.
            profile: Profile {
                migratable: server.spec.migratable,
                privileged: !has_ids,
                listened: status.listened.is_some() && !server.spec.migratable,
            },
            id: server.record.id,
        })
    }

    /// Init's root directory.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Whether root inside is root outside.
    pub(super) fn is_privileged(&self) -> bool {
        self.profile.privileged
    }
}

fn not_running(name: &Name) -> Failure {
    Failure::new(Exit::NotRunning, format!("'{name}' is not running")).hint(format!("`vsctl start {name}`"))
}

/// Root, birthplace, ids and bounding set of init.
type Observed = (OwnedFd, Option<OwnedFd>, IdMap, u64);

fn observe(pid: i32, unified: Option<&Path>, group: &Group) -> Result<Observed> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        fs::read_to_string(&path).with_context(|| format!("read {path}"))
    };
    let open = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).with_context(|| format!("open {}", path.display()))
    };
    let root = open(Path::new(&format!("/proc/{pid}/root")))?;
    let birthplace = match unified {
        Some(unified) => Some(open(&unified.join(birthplace(&read("cgroup")?, group.path())))?),
        None => None,
    };
    let ids = first_extent(&read("uid_map")?).context("init's ids are unknown")?;
    let bounding = bounding_set(&read("status")?).context("init's bounding set is unknown")?;
    Ok((root, birthplace, ids, bounding))
}

fn is_own_user_namespace(pid: i32) -> Result<bool> {
    let (theirs, ours) = (namespace::open(pid, "user")?, namespace::open_own("user")?);
    Ok(namespace::is_same(theirs.as_fd(), ours.as_fd())?)
}

/// The cgroup2 group that init lives in, relative to the hierarchy's root. Not simply the server's: one that has handed
/// controllers on takes no processes itself (cgroups(7), "no internal processes").
fn birthplace<'a>(cgroup: &'a str, server: &'a Path) -> &'a Path {
    let line = cgroup.lines().find_map(|line| line.strip_prefix("0::/"));
    // It cannot leave the server's group; a path elsewhere is one that this process sees in another way.
    line.map(Path::new).filter(|path| path.starts_with(server)).unwrap_or(server)
}

/// The first line of a uid_map: root's.
fn first_extent(map: &str) -> Option<IdMap> {
    let mut numbers = map.lines().next()?.split_ascii_whitespace().map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(IdMap { inside: next()?, outside: next()?, count: next()? })
}

/// `CapBnd` of proc_pid_status(5).
fn bounding_set(status: &str) -> Option<u64> {
    let digits = status.lines().find_map(|line| line.strip_prefix("CapBnd:"))?;
    u64::from_str_radix(digits.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_born_where_init_lives() {
        let server = Path::new("vsos/web1");
        let hybrid = "12:pids:/vsos/web1\n1:name=systemd:/user\n0::/vsos/web1/init.scope\n";
        assert_eq!(birthplace(hybrid, server), Path::new("vsos/web1/init.scope"));
        assert_eq!(birthplace("0::/vsos/web1\n", server), server);
        assert_eq!(birthplace("0::/vsos/web10/x\n", server), server);
        assert_eq!(birthplace("0::/../other\n", server), server);
        assert_eq!(birthplace("", server), server);
    }

    #[test]
    fn proc_files_are_read() {
        let map = "         0 1879048192      65536\n";
        assert_eq!(first_extent(map), Some(IdMap { inside: 0, outside: 1_879_048_192, count: 65_536 }));
        assert_eq!(first_extent(""), None);
        let status = "Name:\tvsinit\nCapEff:\t000001ffffffffff\nCapBnd:\t00000000a80425fb\nSeccomp:\t2\n";
        assert_eq!(bounding_set(status), Some(0xa804_25fb));
        assert_eq!(bounding_set("Name:\tx\n"), None);
    }
}
