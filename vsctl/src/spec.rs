//! What the user wants of one server: `server.toml`, and nothing of how it is done.
//!
//! The keys are flat and are the flags of `vsctl create` and the keys of `vsctl set`. Every type here is valid by
//! construction: what can be refused by looking at the value alone is refused while it is read.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use ipnet::IpNet;
use kernel::cgroup::CpuSet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::size;

/// The least memory that a server may be given, in bytes: less does not hold an init and a shell.
pub const LEAST_MEMORY_BYTES: u64 = 4 << 20;

/// One server as its owner wants it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The template of its root.
    pub template: Name,
    /// Host name inside; the server's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Hostname>,
    /// Most memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Most swap besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap: Option<Swap>,
    /// CPU time per time; 1.5 is one and a half CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Cpus>,
    /// CPUs that it may run on.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "as_text")]
    pub cpuset: Option<CpuSet>,
    /// Most processes and threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<Pids>,
    /// How it is connected.
    #[serde(default)]
    pub net: NetworkMode,
    /// Addresses of eth0; the next free one of the site's networks when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ip: Vec<IpNet>,
    /// Host directories and files inside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mount: Vec<Bind>,
    /// Host devices inside, beside the harmless ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device: Vec<Device>,
    /// Changes to the default capability bounding set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cap: Vec<CapabilityChange>,
    /// No user namespace: root inside is root outside, held back by capabilities and seccomp alone.
    #[serde(default, skip_serializing_if = "is_false")]
    pub privileged: bool,
    /// Started by `vsctl autostart`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub autostart: bool,
    /// Refuses inside what a checkpoint cannot hold (nested namespaces, io_uring, bpf, MPTCP, pidfds).
    #[serde(default, skip_serializing_if = "is_false")]
    pub migratable: bool,
    /// What the system calls say that tell of a machine.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sysinfo: Sysinfo,
    /// How its root is kept on disk; fixed at creation.
    #[serde(default)]
    pub volume: VolumeKind,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// How a key is written with `vsctl set KEY=VALUE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One value.
    Text,
    /// A number.
    Number,
    /// `true` or `false`.
    Switch,
    /// Values with commas between.
    List,
}

/// When a changed key takes effect on a running server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applies {
    /// At once.
    Live,
    /// With the next start.
    Restart,
    /// Never: it is fixed at creation.
    Never,
}

/// Every key of `server.toml`: how it is written, when it applies, what it is.
pub const KEYS: &[(&str, Form, Applies, &str)] = &[
    ("template", Form::Text, Applies::Never, "template of the root"),
    ("hostname", Form::Text, Applies::Restart, "host name inside (default: the server's name)"),
    ("memory", Form::Text, Applies::Live, "most memory, e.g. 512M"),
    ("swap", Form::Text, Applies::Live, "most swap besides the memory, e.g. 256M"),
    ("cpus", Form::Number, Applies::Live, "CPU time, e.g. 1.5"),
    ("cpuset", Form::Text, Applies::Live, "CPUs it may run on, e.g. 0-1"),
    ("pids", Form::Number, Applies::Live, "most processes and threads"),
    ("net", Form::Text, Applies::Restart, "bridge or none"),
    ("ip", Form::List, Applies::Restart, "addresses of eth0, e.g. 10.88.0.5/24"),
    ("mount", Form::List, Applies::Restart, "host paths inside: SRC:DST[:ro]"),
    ("device", Form::List, Applies::Restart, "host devices inside: PATH[:rwm]"),
    ("cap", Form::List, Applies::Restart, "capabilities: +name, -name"),
    ("privileged", Form::Switch, Applies::Restart, "no user namespace"),
    ("autostart", Form::Switch, Applies::Live, "start with the host"),
    ("migratable", Form::Switch, Applies::Restart, "refuse what a checkpoint cannot hold"),
    ("sysinfo", Form::Text, Applies::Restart, "own or host: what sysinfo(2) and sched_getaffinity(2) say inside"),
    ("volume", Form::Text, Applies::Never, "overlay or dir"),
];

impl Spec {
    /// A server of `template` with every default.
    pub fn of(template: Name) -> Self {
        Self {
            template,
            hostname: None,
            memory: None,
            swap: None,
            cpus: None,
            cpuset: None,
            pids: None,
            net: NetworkMode::default(),
            ip: Vec::new(),
            mount: Vec::new(),
            device: Vec::new(),
            cap: Vec::new(),
            privileged: false,
            autostart: false,
            migratable: false,
            sysinfo: Sysinfo::default(),
            volume: VolumeKind::default(),
        }
    }

    /// Reads a `server.toml`; `file` names it in errors.
    ///
    /// # Errors
    /// A [`Failure`] with file, line and, for an unknown key, the nearest known one.
    pub fn parse(text: &str, file: &str) -> Result<Self, Failure> {
        toml::from_str(text).map_err(|error| {
            // Only now: a sound file need not be read twice, and a list reads a thousand of them.
            if let Err(unknown) = unknown_key(text, file) {
                return unknown;
            }
            let place = error.span().map_or_else(String::new, |span| format!(":{}", line_of(text, span.start)));
            Failure::new(Exit::BadConfiguration, format!("{file}{place}: {}", error.message().trim_end()))
        })
    }

    /// The `server.toml` of this spec.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a spec has only values that TOML has")
    }

    /// Whether the system calls that tell of a machine are answered by us. Not when it can be migrated: CRIU restores filters
    /// and no listeners, and then those calls would not exist.
    pub fn answers_calls(&self) -> bool {
        self.sysinfo == Sysinfo::Own && !self.migratable
    }

    /// The host name inside.
    pub fn hostname_or(&self, name: &Name) -> String {
        self.hostname.as_ref().map_or_else(|| name.to_string(), |hostname| hostname.0.clone())
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

/// Refuses a key that is none of [`KEYS`], with the nearest known one as a hint.
fn unknown_key(text: &str, file: &str) -> Result<(), Failure> {
    // Text that is no TOML at all is the other parser's to explain.
    let Ok(document) = toml_edit::Document::parse(text) else { return Ok(()) };
    for (key, _) in document.as_table() {
        if KEYS.iter().any(|(known, ..)| *known == key) {
            continue;
        }
        let span = document.as_table().key(key).and_then(toml_edit::Key::span);
        let line = span.map_or(1, |span| line_of(text, span.start));
        return Err(unknown(key, Exit::BadConfiguration, &format!("{file}:{line}: ")));
    }
    Ok(())
}

/// The failure for a key that does not exist, after `place`.
pub fn unknown(key: &str, exit: Exit, place: &str) -> Failure {
    let failure = Failure::new(exit, format!("{place}unknown key '{key}'"));
    match nearest(key) {
        Some(known) => failure.hint(format!("did you mean '{known}'?")),
        None => {
            failure.hint(format!("the keys are {}", KEYS.iter().map(|(key, ..)| *key).collect::<Vec<_>>().join(", ")))
        }
    }
}

fn nearest(key: &str) -> Option<&'static str> {
    let scored = KEYS.iter().map(|(known, ..)| (strsim::damerau_levenshtein(key, known), *known));
    scored.min().filter(|(distance, known)| *distance <= known.len().max(3) / 2).map(|(_, known)| known)
}

/// Types that are written as one text.
macro_rules! text_type {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Scalar::deserialize(deserializer)?.0.parse().map_err(de::Error::custom)
            }
        }
    };
}

/// A text, or a number that is read as its text (`memory = 536870912`, `cpuset = 0`).
struct Scalar(String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a text or a number")]
        enum Either {
            Text(String),
            Integer(i64),
            Real(f64),
        }
        Ok(Self(match Either::deserialize(deserializer)? {
            Either::Text(text) => text,
            Either::Integer(number) => number.to_string(),
            Either::Real(number) => number.to_string(),
        }))
    }
}

/// A set of processors is a type of `kernel`, which knows no file of ours.
pub(crate) mod as_text {
    use super::{CpuSet, Deserialize, Deserializer, Scalar, Serializer, de};

    pub fn serialize<S: Serializer>(set: &Option<CpuSet>, serializer: S) -> Result<S::Ok, S::Error> {
        match set {
            Some(set) => serializer.collect_str(set),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<CpuSet>, D::Error> {
        let text = Scalar::deserialize(deserializer)?.0;
        text.parse()
            .map(Some)
            .map_err(|_| de::Error::custom(format!("'{text}' is no list of CPUs (an example: 0-1,4)")))
    }
}

fn bad(message: String) -> Failure {
    Failure::new(Exit::BadParameter, message)
}

/// A limit of memory in bytes, at least [`LEAST_MEMORY_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory(pub u64);

impl FromStr for Memory {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        let bytes = size::parse_bytes(text).map_err(|error| bad(format!("memory: {error}")))?;
        if bytes < LEAST_MEMORY_BYTES {
            return Err(bad(format!("memory: {text} is too little for a server"))
                .hint(format!("the least is {}", size::show_bytes(LEAST_MEMORY_BYTES))));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Swap(self.0), out)
    }
}

/// A limit of swap in bytes; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Swap(pub u64);

impl FromStr for Swap {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        size::parse_bytes(text).map(Self).map_err(|error| bad(format!("swap: {error}")))
    }
}

impl fmt::Display for Swap {
    /// Exact: a file must hold what was asked for, so no unit that rounds.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("G", 30), ("M", 20), ("K", 10)];
        match units.iter().find(|(_, shift)| self.0 != 0 && self.0 % (1 << shift) == 0) {
            Some((unit, shift)) => write!(out, "{}{unit}", self.0 >> shift),
            None => write!(out, "{}", self.0),
        }
    }
}

/// CPU time per time, between 0.01 and 8192 CPUs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cpus(pub f64);

impl FromStr for Cpus {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        match text.trim().parse::<f64>() {
            Ok(cpus) if (0.01..=8192.0).contains(&cpus) => Ok(Self(cpus)),
            _ => Err(bad(format!("cpus: '{text}' is no amount of CPUs")).hint("from 0.01 to 8192, an example: 1.5")),
        }
    }
}

impl Serialize for Cpus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0)
    }
}

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Scalar::deserialize(deserializer)?.0.parse().map_err(de::Error::custom)
    }
}

/// A limit of processes and threads, at least 4: an init, a shell and what it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pids(pub u64);

impl FromStr for Pids {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        match text.trim().parse::<u64>() {
            Ok(pids) if (4..=4_194_304).contains(&pids) => Ok(Self(pids)),
            _ => Err(bad(format!("pids: '{text}' is no limit of processes")).hint("from 4 to 4194304")),
        }
    }
}

impl Serialize for Pids {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Pids {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Scalar::deserialize(deserializer)?.0.parse().map_err(de::Error::custom)
    }
}

/// A host name: labels of letters, digits and `-`, 64 bytes at most (hostname(7), the kernel's `__NEW_UTS_LEN`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hostname(String);

impl FromStr for Hostname {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if text.len() <= 64 && text.split('.').all(label) {
            Ok(Self(text.to_owned()))
        } else {
            Err(bad(format!("hostname: '{}' is no host name", text.escape_debug())))
        }
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// How a server is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkMode {
    /// eth0 on the site's bridge.
    #[default]
    Bridge,
    /// Only the loopback interface.
    None,
}

impl FromStr for NetworkMode {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        match text {
            "bridge" => Ok(Self::Bridge),
            "none" => Ok(Self::None),
            _ => Err(bad(format!("net: '{text}' is no kind of network")).hint("bridge or none")),
        }
    }
}

impl fmt::Display for NetworkMode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Bridge => "bridge",
            Self::None => "none",
        })
    }
}

/// What sysinfo(2) and sched_getaffinity(2) say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sysinfo {
    /// What the server's /proc says.
    #[default]
    Own,
    /// What the kernel says of the host.
    Host,
}

impl FromStr for Sysinfo {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        match text {
            "own" => Ok(Self::Own),
            "host" => Ok(Self::Host),
            _ => Err(bad(format!("sysinfo: '{text}' is nobody's")).hint("own or host")),
        }
    }
}

impl fmt::Display for Sysinfo {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Own => "own",
            Self::Host => "host",
        })
    }
}

/// How a root is kept on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VolumeKind {
    /// The server's changes over the shared template.
    #[default]
    Overlay,
    /// A full copy in a directory.
    Dir,
}

impl FromStr for VolumeKind {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        match text {
            "overlay" => Ok(Self::Overlay),
            "dir" => Ok(Self::Dir),
            _ => Err(bad(format!("volume: '{text}' is no kind of volume")).hint("overlay or dir")),
        }
    }
}

impl fmt::Display for VolumeKind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Overlay => "overlay",
            Self::Dir => "dir",
        })
    }
}

/// A host path inside the server: `SRC:DST[:ro]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Absolute path in the server.
    pub target: PathBuf,
    /// May not be written inside.
    pub read_only: bool,
}

impl FromStr for Bind {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        let refused =
            |why: &str| Err(bad(format!("mount: '{text}': {why}")).hint("SRC:DST or SRC:DST:ro, both absolute"));
        let mut parts = text.split(':');
        let (Some(source), Some(target)) = (parts.next(), parts.next()) else { return refused("a target is missing") };
        let read_only = match (parts.next(), parts.next()) {
            (None | Some("rw"), None) => false,
            (Some("ro"), None) => true,
            _ => return refused("only 'ro' or 'rw' may follow"),
        };
        let (source, target) = (PathBuf::from(source), PathBuf::from(target));
        let climbs = |path: &PathBuf| path.components().any(|part| part == std::path::Component::ParentDir);
        if !source.is_absolute() || !target.is_absolute() {
            return refused("a path is not absolute");
        }
        if climbs(&source) || climbs(&target) {
            return refused("'..' may not be in it");
        }
        if target.components().count() < 2 {
            return refused("the root itself cannot be covered");
        }
        Ok(Self { source, target, read_only })
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = if self.read_only { ":ro" } else { "" };
        write!(out, "{}:{}{end}", self.source.display(), self.target.display())
    }
}

/// A host device inside the server: `PATH[:rwm]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The node on the host, below /dev.
    pub path: PathBuf,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// A node for it may be made.
    pub mknod: bool,
}

impl FromStr for Device {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        let (path, access) = text.split_once(':').unwrap_or((text, "rw"));
        let path = PathBuf::from(path);
        let inside = path.starts_with("/dev") && path.components().count() > 2;
        let climbs = path.components().any(|part| part == std::path::Component::ParentDir);
        if !inside || climbs || access.is_empty() || access.chars().any(|c| !"rwm".contains(c)) {
            return Err(bad(format!("device: '{text}' is no device")).hint("/dev/NAME or /dev/NAME:rwm"));
        }
        let has = |c| access.contains(c);
        Ok(Self { path, read: has('r'), write: has('w'), mknod: has('m') })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |on, letter: &'static str| if on { letter } else { "" };
        let access = [letter(self.read, "r"), letter(self.write, "w"), letter(self.mknod, "m")].concat();
        write!(out, "{}:{access}", self.path.display())
    }
}

/// A change to the bounding set: `+net_raw`, `-sys_time`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapabilityChange(String);

impl CapabilityChange {
    /// The change as [`kernel::capability::Set::apply_change`] reads it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for CapabilityChange {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        let mut trial = kernel::capability::Set::default_for_servers();
        match trial.apply_change(text) {
            Ok(()) => Ok(Self(text.to_owned())),
            Err(_) => {
                Err(bad(format!("cap: '{text}' is no change of a capability"))
                    .hint("+name or -name, an example: +net_raw"))
            }
        }
    }
}

impl fmt::Display for CapabilityChange {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

text_type!(Memory);
text_type!(Swap);
text_type!(Hostname);
text_type!(NetworkMode);
text_type!(Sysinfo);
text_type!(VolumeKind);
text_type!(Bind);
text_type!(Device);
text_type!(CapabilityChange);

/// Whether `address` can be one of a server: a host's unicast address.
pub fn is_host_address(address: IpNet) -> bool {
    let host = address.addr() != address.network() && address.addr() != address.broadcast();
    let long = address.prefix_len() >= address.max_prefix_len() - 1;
    (host || long)
        && match address.addr() {
            IpAddr::V4(v4) => !v4.is_multicast() && !v4.is_loopback() && !v4.is_unspecified(),
            IpAddr::V6(v6) => !v6.is_multicast() && !v6.is_loopback() && !v6.is_unspecified(),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"
template = "busybox"
hostname = "www.example"
memory = "512M"
swap = 0
cpus = 1.5
cpuset = "0-1"
pids = 512
net = "bridge"
ip = ["10.88.0.5/24", "fd00::5/64"]
mount = ["/srv/data:/data:ro"]
device = ["/dev/fuse:rwm"]
cap = ["-net_raw"]
autostart = true
sysinfo = "host"
volume = "dir"
"#;

    #[test]
    fn a_full_spec_survives_writing_and_reading() {
        let spec = Spec::parse(FULL, "server.toml").unwrap();
        assert_eq!(spec.memory, Some(Memory(512 << 20)));
        assert_eq!(spec.mount[0].target, PathBuf::from("/data"));
        assert_eq!(Spec::parse(&spec.to_toml(), "again").unwrap(), spec);
    }

    #[test]
    fn calls_are_answered_unless_it_says_no_or_can_be_migrated() {
        let answers = |line: &str| {
            Spec::parse(&format!("template = \"busybox\"\n{line}\n"), "server.toml").unwrap().answers_calls()
        };
        assert!(answers("") && answers("sysinfo = \"own\"") && answers("privileged = true"));
        assert!(!answers("sysinfo = \"host\"") && !answers("migratable = true"));
        assert!(!answers("migratable = true\nsysinfo = \"own\""));
    }

    #[test]
    fn every_field_has_its_row_in_the_table() {
        let spec = Spec::parse(FULL, "server.toml").unwrap();
        let table: toml::Table = toml::from_str(&spec.to_toml()).unwrap();
        for key in table.keys() {
            assert!(KEYS.iter().any(|(known, ..)| known == key), "{key}");
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_the_nearest() {
        let failure = Spec::parse("template = \"busybox\"\nmemroy = \"1G\"\n", "server.toml").unwrap_err();
        assert_eq!(failure.to_string(), "server.toml:2: unknown key 'memroy'");
        let error = anyhow::Error::new(failure);
        assert_eq!(crate::failure::hint_of(&error), Some("did you mean 'memory'?"));
    }

    #[test]
    fn bad_values_are_refused_with_their_line() {
        for (line, word) in [
            ("memory = \"0\"", "too little"),
            ("memory = -1", "negative"),
            ("memory = 1", "too little"),
            ("memory = \"99E\"", "too large"),
            ("cpus = \"x\"", "no amount"),
            ("cpus = 0", "no amount"),
            ("cpuset = \"a\"", "no list"),
            ("pids = 0", "no limit"),
            ("net = \"moon\"", "no kind"),
            ("sysinfo = \"moon\"", "nobody's"),
            ("ip = [\"10.0.0.0.1\"]", "invalid"),
            ("mount = [\"/a\"]", "target is missing"),
            ("mount = [\"/a:b\"]", "not absolute"),
            ("mount = [\"/a:/../b\"]", "'..'"),
            ("mount = [\"/a:/\"]", "covered"),
            ("device = [\"/etc/passwd\"]", "no device"),
            ("device = [\"/dev/../etc/passwd\"]", "no device"),
            ("cap = [\"+everything\"]", "no change"),
            ("hostname = \"a b\"", "no host name"),
            ("hostname = \"-a\"", "no host name"),
            ("autostart = 3", "invalid type"),
        ] {
            let text = format!("template = \"busybox\"\n{line}\n");
            let message = Spec::parse(&text, "server.toml").unwrap_err().to_string();
            assert!(message.starts_with("server.toml:2: ") && message.contains(word), "{line}: {message}");
        }
    }

    #[test]
    fn a_file_cut_in_half_is_refused() {
        for end in 1..FULL.trim_end().len() {
            // Every prefix either is refused or says what its whole lines say.
            let _ =
                Spec::parse(&FULL[..end], "server.toml").map_err(|failure| assert!(!failure.to_string().is_empty()));
        }
        assert!(Spec::parse("template = \"busy", "server.toml").is_err());
        assert!(Spec::parse("", "server.toml").unwrap_err().to_string().contains("template"));
    }
}
