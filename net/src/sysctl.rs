//! Settings of the network stack: the files below /proc/sys/net.
//!
//! Keys are written with slashes (`net/ipv4/conf/eth0/forwarding`), since names of interfaces may have dots.
//! The files show the network namespace of the thread that opens them: for another one see [`crate::namespace::within`].

use std::{fs, io, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The tree of settings, /proc/sys or a copy of it.
#[derive(Debug, Clone)]
pub struct Sysctl {
    root: PathBuf,
}

/// A setting that was changed, and what it was before: enough to take it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The setting, with slashes.
    pub key: String,
    /// Its value before.
    pub before: String,
}

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// net/ipv4
    V4,
    /// net/ipv6
    V6,
}

impl Default for Sysctl {
    fn default() -> Self {
        Self::at("/proc/sys")
    }
}

impl Sysctl {
    /// The settings below `root` instead of /proc/sys.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The value of a setting, without the line's end.
    pub fn read(&self, key: &str) -> Result<String> {
        match fs::read_to_string(self.root.join(key)) {
            Ok(text) => Ok(text.trim_end().to_owned()),
            Err(e) => Err(Error::new("read setting", key, e)),
        }
    }

    /// Changes a setting; `None` if it was so already.
    pub fn set(&self, key: &str, value: &str) -> Result<Option<Change>> {
        let before = self.read(key)?;
        if before == value {
            return Ok(None);
        }
        self.write(key, value)?;
        let key = key.to_owned();
        Ok(Some(Change { key, before }))
    }

    /// Takes back a change; a setting that is gone (with its interface) is fine.
    pub fn take_back(&self, change: &Change) -> Result<()> {
        match self.write(&change.key, &change.before) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn write(&self, key: &str, value: &str) -> Result<()> {
        let path = self.root.join(key);
        // Not fs::write, which would make a file that is not there: a misspelt key must fail in a copy of the tree too.
        let file = fs::OpenOptions::new().write(true).open(path);
        file.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
            .map_err(|e| Error::new("write setting", format!("{key} = {value}"), e))
    }

    /// Lets the host route packets of this family between all its interfaces; returns what it changed, in order.
    ///
    /// IPv6: a host that routes no longer listens to routers unless `accept_ra` is 2 (Documentation/networking/ip-sysctl.rst), so
    /// interfaces that listened go on to: otherwise the host would lose its own default route.
    pub fn enable_forwarding(&self, family: Family) -> Result<Vec<Change>> {
        let changes = self.forwarding_changes(family)?;
        for change in &changes {
            let listens = change.key.ends_with("/accept_ra");
            self.write(&change.key, if listens { "2" } else { "1" })?;
        }
        Ok(changes)
    }

    /// What [`Sysctl::enable_forwarding`] would change, with the values of now: for those who write it down before.
    pub fn forwarding_changes(&self, family: Family) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        if family == Family::V6 {
            for link in self.interfaces(Family::V6)? {
                let accept_ra = interface_key(Family::V6, &link, "accept_ra");
                let forwarding = interface_key(Family::V6, &link, "forwarding");
                if self.read(&accept_ra)? == "1" && self.read(&forwarding)? == "0" {
                    changes.push(Change { key: accept_ra, before: "1".into() });
                }
            }
        }
        let key = match family {
            Family::V4 => "net/ipv4/ip_forward",
            Family::V6 => "net/ipv6/conf/all/forwarding",
        };
        let before = self.read(key)?;
        if before != "1" {
            changes.push(Change { key: key.into(), before });
        }
        Ok(changes)
    }

    /// The interfaces that have settings of this family, without `all` and `default`.
    fn interfaces(&self, family: Family) -> Result<Vec<String>> {
        let path = self.root.join(conf(family));
        let list = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(&path)? {
                names.extend(entry?.file_name().into_string().ok());
            }
            names.retain(|name| name != "all" && name != "default");
            names.sort();
            Ok(names)
        };
        list().map_err(|e| Error::new("list", path.display().to_string(), e))
    }
}

fn conf(family: Family) -> &'static str {
    match family {
        Family::V4 => "net/ipv4/conf",
        Family::V6 => "net/ipv6/conf",
    }
}

/// The key of a setting of one interface; `link` may also be `all` or `default`.
///
/// Those used here: `forwarding`; of IPv6 also `accept_dad`, `accept_ra`, `disable_ipv6`.
pub fn interface_key(family: Family, link: &str, setting: &str) -> String {
    format!("{}/{link}/{setting}", conf(family))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A copy of the tree with an interface that listens to routers, one that does not, and one that routes already.
    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (key, value) in [
            ("net/ipv4/ip_forward", "0\n"),
            ("net/ipv6/conf/all/forwarding", "0\n"),
            ("net/ipv6/conf/default/accept_ra", "1\n"),
            ("net/ipv6/conf/eth0/accept_ra", "1\n"),
            ("net/ipv6/conf/eth0/forwarding", "0\n"),
            ("net/ipv6/conf/eth1.5/accept_ra", "0\n"),
            ("net/ipv6/conf/eth1.5/forwarding", "0\n"),
            ("net/ipv6/conf/tun0/accept_ra", "1\n"),
            ("net/ipv6/conf/tun0/forwarding", "1\n"),
        ] {
            let path = root.path().join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
        root
    }

    fn changed(changes: &[Change]) -> Vec<(&str, &str)> {
        let pairs = changes.iter().map(|c| (c.key.as_str(), c.before.as_str()));
        pairs.collect()
    }

    #[test]
    fn a_routing_host_goes_on_listening_to_its_router() {
        let root = tree();
        let sysctl = Sysctl::at(root.path());
        let changes = sysctl.enable_forwarding(Family::V6).unwrap();
        assert_eq!(changed(&changes), [("net/ipv6/conf/eth0/accept_ra", "1"), ("net/ipv6/conf/all/forwarding", "0")]);
        assert_eq!(sysctl.read("net/ipv6/conf/eth0/accept_ra").unwrap(), "2");
        assert_eq!(sysctl.enable_forwarding(Family::V6).unwrap(), []);
        for change in changes.iter().rev() {
            sysctl.take_back(change).unwrap();
        }
        assert_eq!(sysctl.read("net/ipv6/conf/eth0/accept_ra").unwrap(), "1");
        assert_eq!(sysctl.read("net/ipv6/conf/all/forwarding").unwrap(), "0");
    }

    #[test]
    fn a_setting_that_is_so_already_is_no_change() {
        let root = tree();
        let sysctl = Sysctl::at(root.path());
        assert_eq!(sysctl.set("net/ipv4/ip_forward", "0").unwrap(), None);
        let change = sysctl.set("net/ipv4/ip_forward", "1").unwrap().unwrap();
        assert_eq!(change.before, "0");
        assert_eq!(sysctl.enable_forwarding(Family::V4).unwrap(), []);
    }

    #[test]
    fn a_missing_setting_is_an_error_and_its_undo_is_not() {
        let root = tree();
        let sysctl = Sysctl::at(root.path());
        let key = interface_key(Family::V6, "gone", "accept_dad");
        let error = sysctl.set(&key, "0").unwrap_err();
        assert_eq!(error.to_string(), "read setting net/ipv6/conf/gone/accept_dad");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let before = "1".to_owned();
        sysctl.take_back(&Change { key, before }).unwrap();
        assert!(!root.path().join("net/ipv6/conf/gone").exists());
    }
}
