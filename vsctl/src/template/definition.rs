//! `template.toml`: what a template is made of, as data, and the definitions that are shipped in this program.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::edit::{Access, Edit};
use crate::failure::{Exit, Failure};

/// A template as its author wants it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// One line for lists.
    pub description: String,
    /// The distribution family that says how a root is made a server's own (`families.toml`).
    pub family: String,
    /// Who is PID 1.
    pub init: Init,
    /// The signal that makes the init power off: `SIGTERM`, `SIGRTMIN+4`, …
    pub stop_signal: String,
    /// Shared additions, by name, that come before this template's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Where the root comes from.
    pub source: Source,
    /// What is changed in the root afterwards.
    #[serde(default, skip_serializing_if = "Additions::is_empty")]
    pub additions: Additions,
}

/// PID 1 of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Init {
    /// vsinit supervises the services itself.
    Vsinit,
    /// vsinit prepares, then becomes this program of the root.
    Path(String),
}

/// Where a root comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// The host's static busybox.
    Busybox {},
    /// mmdebstrap(1), from the mirror that the host's apt uses.
    Mmdebstrap {
        /// The distribution's release, by code name.
        suite: String,
        /// Parts of the archive.
        components: Vec<String>,
        /// Packages beside the essential ones and apt.
        packages: Vec<String>,
    },
    /// A tarball of a whole root.
    Import {
        /// Its file name, for the record.
        file: String,
    },
}

/// Changes to a root, by path.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Additions {
    /// systemd units that must not start.
    pub mask: Vec<String>,
    /// Paths that must not be there.
    pub remove: Vec<String>,
    /// Directories and their modes.
    pub directories: BTreeMap<String, u32>,
    /// Symbolic links and what they say.
    pub links: BTreeMap<String, String>,
    /// Modes of files that are not 0644.
    pub modes: BTreeMap<String, u32>,
}

/// A definition or shared additions with their files, as embedded.
struct Shipped {
    name: &'static str,
    text: &'static str,
    /// Path in the root, content.
    files: &'static [(&'static str, &'static [u8])],
}

/// Embeds `templates/$name/$toml` and the named files below `templates/$name/files`.
macro_rules! shipped {
    ($name:literal, $toml:literal, [$($file:literal),* $(,)?]) => {
        Shipped {
            name: $name,
            text: include_str!(concat!("../../../templates/", $name, "/", $toml)),
            files: &[$(($file, include_bytes!(concat!("../../../templates/", $name, "/files/", $file)))),*],
        }
    };
}

/// The templates that `vsctl template build` knows.
const TEMPLATES: &[Shipped] = &[
    shipped!(
        "busybox",
        "template.toml",
        [
            "etc/fstab",
            "etc/group",
            "etc/hosts",
            "etc/issue",
            "etc/nsswitch.conf",
            "etc/os-release",
            "etc/passwd",
            "etc/profile",
            "etc/shadow",
            "etc/shells",
            "etc/vsinit/console.toml",
            "etc/vsinit/crond.toml",
            "etc/vsinit/syslogd.toml",
            "etc/vsinit/tty1.toml",
            "etc/vsinit/tty2.toml",
            "etc/vsinit/tty3.toml",
            "etc/vsinit/tty4.toml",
            "sbin/vsinit",
        ]
    ),
    shipped!("debian-12", "template.toml", ["etc/.updated", "etc/default/locale", "var/.updated"]),
    shipped!("debian-13", "template.toml", ["etc/.updated", "etc/default/locale", "var/.updated"]),
];

/// What templates may include.
const SHARED: &[Shipped] = &[shipped!(
    "systemd",
    "additions.toml",
    [
        "etc/systemd/journald.conf.d/50-vsos.conf",
        "etc/systemd/network/05-eth0.network",
        "etc/systemd/system.conf.d/50-vsos.conf",
        "etc/systemd/user.conf.d/50-vsos.conf",
    ]
)];

/// Names and descriptions of the templates that can be built.
pub fn buildable() -> Vec<(&'static str, String)> {
    TEMPLATES
        .iter()
        .filter_map(|shipped| Some((shipped.name, Definition::parse(shipped.text).ok()?.description)))
        .collect()
}

impl Definition {
    /// Reads a `template.toml`.
    pub fn parse(text: &str) -> Result<Self> {
        let definition: Self = toml::from_str(text).map_err(|error| {
            Failure::new(Exit::BadConfiguration, format!("template.toml: {}", error.to_string().trim_end()))
        })?;
        signal_number(&definition.stop_signal)?;
        Ok(definition)
    }

    /// The shipped definition `name` and its text, comments and all.
    pub fn shipped(name: &str) -> Result<(Self, &'static str)> {
        let Some(shipped) = TEMPLATES.iter().find(|shipped| shipped.name == name) else {
            let known: Vec<&str> = TEMPLATES.iter().map(|shipped| shipped.name).collect();
            return Err(Failure::new(Exit::NoTemplate, format!("'{name}' is no template that can be built"))
                .hint(format!("there are {}; any other root comes by `vsctl template import`", known.join(", ")))
                .into());
        };
        Ok((Self::parse(shipped.text).with_context(|| format!("shipped template {name}"))?, shipped.text))
    }

    /// The stop signal's number.
    pub fn stop_signal_number(&self) -> Result<i32> {
        signal_number(&self.stop_signal)
    }

    /// Everything that the definition adds to a root, the included first; `name` is the template's own.
    pub fn edits(&self, name: &str) -> Result<Vec<Edit>> {
        let mut edits = Vec::new();
        for include in &self.include {
            let Some(shared) = SHARED.iter().find(|shared| shared.name == include) else {
                bail!("include '{include}' is not known");
            };
            let additions: Additions =
                toml::from_str(shared.text).with_context(|| format!("additions of {include}"))?;
            edits.extend(additions.edits(shared.files));
        }
        let files = TEMPLATES.iter().find(|shipped| shipped.name == name).map_or(&[][..], |shipped| shipped.files);
        edits.extend(self.additions.edits(files));
        Ok(edits)
    }
}

impl Additions {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Directories first: what comes after is in them.
    fn edits(&self, files: &[(&str, &[u8])]) -> Vec<Edit> {
        let mode_of = |path: &str| self.modes.get(&format!("/{path}")).copied().unwrap_or(0o644);
        let directories = self.directories.iter().map(|(path, mode)| Edit::directory(path, Access::root(*mode)));
        let removed = self.remove.iter().map(Edit::absent);
        let files = files.iter().map(|(path, content)| Edit::file(*path, Access::root(mode_of(path)), *content));
        let links = self.links.iter().map(|(path, target)| Edit::link(path, target));
        let masks = self.mask.iter().map(|unit| Edit::link(format!("/etc/systemd/system/{unit}"), "/dev/null"));
        directories.chain(removed).chain(files).chain(links).chain(masks).collect()
    }
}

impl TryFrom<String> for Init {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "vsinit" => Ok(Init::Vsinit),
            path if path.starts_with('/') => Ok(Init::Path(text)),
            _ => Err(format!("init is \"vsinit\" or an absolute path, not \"{text}\"")),
        }
    }
}

impl From<Init> for String {
    fn from(init: Init) -> String {
        match init {
            Init::Vsinit => "vsinit".into(),
            Init::Path(path) => path,
        }
    }
}

/// The number of a signal that an init may be told to stop by (signal(7), x86 and ARM).
fn signal_number(name: &str) -> Result<i32> {
    const NAMED: [(&str, i32); 9] = [
        ("SIGHUP", 1),
        ("SIGINT", 2),
        ("SIGQUIT", 3),
        ("SIGUSR1", 10),
        ("SIGUSR2", 12),
        ("SIGTERM", 15),
        ("SIGCONT", 18),
        ("SIGWINCH", 28),
        ("SIGPWR", 30),
    ];
    // What glibc leaves of the kernel's real-time signals begins here, and systemd counts from it.
    const SIGRTMIN: i32 = 34;
    let real_time =
        || Some(SIGRTMIN + name.strip_prefix("SIGRTMIN+")?.parse::<i32>().ok().filter(|n| (0..=30).contains(n))?);
    let named = NAMED.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    named.or_else(real_time).ok_or_else(|| {
        Failure::new(Exit::BadConfiguration, format!("stop_signal: '{name}' is no signal"))
            .hint("use SIGTERM, SIGPWR, SIGINT, SIGUSR2, SIGCONT, … or SIGRTMIN+n")
            .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    #[test]
    fn every_shipped_definition_can_be_read() {
        assert_eq!(buildable().len(), TEMPLATES.len());
        for shipped in TEMPLATES {
            let (definition, _) = Definition::shipped(shipped.name).unwrap();
            assert!(!definition.edits(shipped.name).unwrap().is_empty());
            let written = toml::to_string(&definition).unwrap();
            assert_eq!(Definition::parse(&written).unwrap(), definition);
        }
    }

    #[test]
    fn the_embedded_files_are_the_folders_files() {
        fn below(directory: &Path, files: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
                if entry.is_dir() { below(&entry, files) } else { files.push(entry) }
            }
        }
        for shipped in TEMPLATES.iter().chain(SHARED) {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../templates").join(shipped.name).join("files");
            let mut found = Vec::new();
            below(&folder, &mut found);
            let mut found: Vec<String> =
                found.iter().map(|file| file.strip_prefix(&folder).unwrap().to_str().unwrap().to_owned()).collect();
            found.sort();
            assert_eq!(found, shipped.files.iter().map(|(path, _)| *path).collect::<Vec<_>>(), "{}", shipped.name);
        }
    }

    #[test]
    fn every_mode_names_a_file() {
        for shipped in TEMPLATES {
            let (definition, _) = Definition::shipped(shipped.name).unwrap();
            for path in definition.additions.modes.keys() {
                assert!(shipped.files.iter().any(|(file, _)| path[1..] == **file), "{}: {path}", shipped.name);
            }
        }
    }

    #[test]
    fn unknown_keys_and_values_are_refused() {
        let (_, text) = Definition::shipped("busybox").unwrap();
        for (from, to) in [
            ("family =", "famliy ="),
            ("\"vsinit\"", "\"sbin/init\""),
            ("\"SIGPWR\"", "\"SIGPRW\""),
            ("\"SIGPWR\"", "\"SIGRTMIN+31\""),
            ("kind = \"busybox\"", "kind = \"bsybox\""),
            ("[additions.modes]", "[additions.mods]"),
        ] {
            assert!(text.contains(from));
            assert!(Definition::parse(&text.replacen(from, to, 1)).is_err(), "{to}");
        }
    }

    #[test]
    fn signals_have_their_numbers() {
        let numbers = ["SIGTERM", "SIGPWR", "SIGRTMIN+3", "SIGRTMIN+4"].map(|name| signal_number(name).unwrap());
        assert_eq!(numbers, [15, 30, 37, 38]);
    }
}
