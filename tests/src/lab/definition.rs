//! Which hosts there are: `tests/lab/hosts.toml`, as data.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    packages: Vec<String>,
    host: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    suite: String,
    init: Init,
    packages: Vec<String>,
    second_kernel: Option<String>,
    #[serde(default = "yes")]
    default: bool,
    #[serde(default)]
    leave_out: Vec<String>,
    #[serde(default)]
    but_keep: Vec<String>,
}

fn yes() -> bool {
    true
}

/// What runs as PID 1 of a host.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "kebab-case")]
pub enum Init {
    /// busybox's, with the mounts that programs expect and nothing else.
    Minimal,
    /// systemd, with udev and journald.
    Systemd,
}

/// One host of the lab.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Its name, and its host name.
    pub name: String,
    /// The Debian release, by code name.
    pub suite: String,
    /// Its PID 1.
    pub init: Init,
    /// All packages in it, without the kernel; sorted.
    pub packages: Vec<String>,
    /// The suite of which it also has the kernel. It boots the newer one first.
    pub second_kernel: Option<String>,
    /// Whether a run without `LAB=all` takes it.
    pub default: bool,
    /// Parts of names of the promises that only a run with `LAB=all` keeps on it.
    pub leave_out: Vec<String>,
    /// Parts of names of those among them that any run keeps on it.
    pub but_keep: Vec<String>,
}

/// Reads the text of `hosts.toml`.
///
/// # Errors
/// When it is not what this program understands, with line and key.
pub fn parse(text: &str) -> Result<Vec<Definition>> {
    let document: Document = toml::from_str(text).context("read tests/lab/hosts.toml")?;
    let common = document.packages;
    let define = |(name, entry): (String, Entry)| {
        let mut packages = [common.clone(), entry.packages].concat();
        packages.sort();
        packages.dedup();
        Definition {
            name,
            suite: entry.suite,
            init: entry.init,
            packages,
            second_kernel: entry.second_kernel,
            default: entry.default,
            leave_out: entry.leave_out,
            but_keep: entry.but_keep,
        }
    };
    Ok(document.host.into_iter().map(define).collect())
}

/// The hosts of this tree.
///
/// # Errors
/// See [`parse`].
pub fn all() -> Result<Vec<Definition>> {
    parse(include_str!("../../lab/hosts.toml"))
}

/// The host called `name`.
///
/// # Errors
/// When there is none; the error names those that there are.
pub fn named(name: &str) -> Result<Definition> {
    let all = all()?;
    let names = all.iter().map(|host| host.name.clone()).collect::<Vec<_>>().join(", ");
    let Some(found) = all.into_iter().find(|host| host.name == name) else {
        bail!("the lab has no host '{name}'; it has {names}");
    };
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_of_the_tree_are_understood() {
        let all = all().unwrap();
        assert!(all.iter().any(|host| host.init == Init::Systemd) && all.iter().any(|host| host.init == Init::Minimal));
        assert!(all.iter().all(|host| host.packages.iter().any(|package| package == "openssh-server")));
        assert!(all.iter().filter(|host| host.default).count() >= 2);
    }

    #[test]
    fn an_unknown_key_or_host_is_an_error_that_names_it() {
        let error = parse("packages = []\n[host.a]\nsuite = \"x\"\ninit = \"minimal\"\npackages = []\nkernel = 1\n");
        assert!(format!("{:#}", error.unwrap_err()).contains("kernel"));
        let error = named("debian-1").unwrap_err().to_string();
        assert!(error.contains("debian-1") && error.contains("debian-12"), "{error}");
    }
}
