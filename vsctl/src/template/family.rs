//! Distribution families: how a root is recognised, and which rules apply to it. The table is `templates/families.toml`.

use std::sync::OnceLock;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::root::Root;

/// A group of distributions that are configured alike.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Family {
    /// `debian`, `alpine`, …
    pub name: String,
    /// Values of `ID` and `ID_LIKE` in os-release(5).
    ids: Vec<String>,
    /// Rules that make a foreign root fit for a server; once for a template.
    pub adapt: Vec<super::adapt::Rule>,
    /// Rules that make a root one server's own.
    pub personalise: Vec<super::personalise::Rule>,
}

/// What os-release(5) says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Distribution {
    /// `ID`
    pub id: String,
    /// `VERSION_ID`, empty where there is none
    pub version: String,
    /// `PRETTY_NAME`
    pub name: String,
    /// `ID_LIKE`
    #[serde(skip)]
    like: Vec<String>,
}

/// All families, the one that takes everything last.
fn table() -> &'static [Family] {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Table {
        family: Vec<Family>,
    }
    static TABLE: OnceLock<Vec<Family>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let table: Table =
            toml::from_str(include_str!("../../../templates/families.toml")).expect("tested: it can be read");
        table.family
    })
}

impl Family {
    /// The family `name`; the generic one when there is none of that name.
    pub fn named(name: &str) -> &'static Family {
        let generic = table().last().expect("tested: the table is not empty");
        table().iter().find(|family| family.name == name).unwrap_or(generic)
    }

    /// The family of a distribution: by its own id, else by what it is like, else generic.
    pub fn of(distribution: &Distribution) -> &'static Family {
        let ids = std::iter::once(&distribution.id).chain(&distribution.like);
        let known = ids.filter_map(|id| table().iter().find(|family| family.ids.contains(id)));
        known.into_iter().next().unwrap_or_else(|| Family::named("generic"))
    }
}

impl Distribution {
    /// Looks at a root: os-release, else the files that distributions had before it.
    pub fn detect(root: &Root) -> Result<Self> {
        for path in ["etc/os-release", "usr/lib/os-release"] {
            if let Some(text) = root.text(path)? {
                return Ok(Self::parse(&text));
            }
        }
        for (path, id) in
            [("etc/alpine-release", "alpine"), ("etc/debian_version", "debian"), ("etc/redhat-release", "rhel")]
        {
            if let Some(text) = root.text(path)? {
                let first = text.lines().next().unwrap_or_default().trim().to_owned();
                return Ok(Self { id: id.into(), name: first.clone(), version: first, like: Vec::new() });
            }
        }
        let id = if root.exists("bin/busybox")? { "busybox" } else { "unknown" };
        Ok(Self { id: id.into(), name: id.into(), ..Self::default() })
    }

    /// Reads an os-release file: `KEY=value` with shell quotes.
    pub fn parse(text: &str) -> Self {
        let value = |key: &str| {
            let line = text.lines().rev().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
            printable(&line.unwrap_or_default().trim_matches(['"', '\'']).replace('\\', ""))
        };
        Self {
            id: value("ID"),
            version: value("VERSION_ID"),
            name: value("PRETTY_NAME"),
            like: value("ID_LIKE").split_whitespace().map(str::to_owned).collect(),
        }
    }
}

/// What a guest wrote ends on the administrator's terminal: no control characters, and not too much.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_ends_with_the_one_that_takes_everything() {
        assert_eq!(table().last().unwrap().name, "generic");
        assert!(table().iter().rev().skip(1).all(|family| !family.ids.is_empty()));
    }

    #[test]
    fn distributions_find_their_family() {
        for (text, family) in [
            ("ID=debian\nVERSION_ID=\"13\"\n", "debian"),
            ("ID=neon\nID_LIKE=\"ubuntu debian\"\n", "debian"),
            ("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n", "redhat"),
            ("ID=arch\n", "arch"),
            ("ID=alpine\n", "alpine"),
            ("ID=void\n", "generic"),
            ("", "generic"),
        ] {
            assert_eq!(Family::of(&Distribution::parse(text)).name, family, "{text}");
        }
    }

    #[test]
    fn os_release_is_read_and_cleaned() {
        let found = Distribution::parse("PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nID=debian\nVERSION_ID='13'\n");
        assert_eq!((found.id.as_str(), found.version.as_str()), ("debian", "13"));
        assert_eq!(found.name, "Debian GNU/Linux 13 (trixie)");
        assert_eq!(Distribution::parse("PRETTY_NAME=\"\x1b[31mred\"").name, "[31mred");
    }
}
