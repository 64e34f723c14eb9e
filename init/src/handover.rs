//! What the manager hands to PID 1 of a new server: one TOML document in a sealed
//! memfd on descriptor 3, and descriptors at the numbers that it names.
//!
//! Pure apart from [`Handover::read`]. It says what to prepare, not how.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The format that this build writes and reads.
pub const VERSION: u32 = 1;

/// The descriptor on which vsinit looks for its handover.
pub const DESCRIPTOR: RawFd = 3;

/// Where the guest's init finds the socket to say that it is ready; the monitor reads it.
pub const NOTIFY_SOCKET: &str = "/run/host/notify";

/// More than any real handover; a longer one is refused instead of read into memory.
const MAX_BYTES: u64 = 1024 * 1024;

/// Everything that PID 1 needs to know about the server that it becomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handover {
    /// Always [`VERSION`]; another one is refused.
    pub version: u32,
    /// The server's name, for messages.
    pub name: String,
    /// What `hostname` says inside.
    pub hostname: String,
    /// The server's UUID, `container_uuid` for the guest's init.
    pub uuid: String,
    /// What PID 1 becomes when the server is prepared.
    pub role: Role,
    /// `SOCK_SEQPACKET` to the monitor; the words on it are in [`word`].
    pub channel: RawFd,
    /// Detached mount of the server's root.
    pub root: RawFd,
    /// An existing directory of the host over which the root is attached before `pivot_root`.
    pub stage: PathBuf,
    /// Detached mounts made by the host, attached in this order after the guest's own file systems.
    #[serde(default)]
    pub mounts: Vec<HostMount>,
    /// Guest paths that are covered by an empty file or directory; those that do not exist are skipped.
    #[serde(default)]
    pub masked: Vec<PathBuf>,
    /// Guest paths that become read-only; those that do not exist are skipped.
    #[serde(default)]
    pub read_only: Vec<PathBuf>,
    /// How many ttys beside the console: `/dev/tty1` to `/dev/ttyN`.
    pub ttys: u8,
    /// The capability bounding set to keep, as the kernel's bit mask.
    pub capabilities: u64,
    /// The system-call filter, or none.
    #[serde(default)]
    pub seccomp: Option<SeccompProfile>,
    /// Whether the server was made privileged: it has no user namespace of its own.
    pub privileged: bool,
    /// Further variables for the guest's init.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}

/// What PID 1 becomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Role {
    /// vsinit stays and supervises the services of `/etc/vsinit`.
    Supervise,
    /// The guest's own init takes over as the same PID 1.
    Exec {
        /// The program's guest path and its arguments; never empty.
        argv: Vec<String>,
    },
    /// Only a root shell on the console, started again whenever it ends.
    Rescue,
}

/// A detached mount that the host made for the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostMount {
    /// The inherited descriptor of the mount.
    pub fd: RawFd,
    /// Where it goes, an absolute path in the guest; made when it is missing.
    pub target: PathBuf,
    /// What to make when the target is missing.
    pub kind: MountKind,
}

/// What a [`HostMount`] covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountKind {
    /// A file, a device node or a socket.
    File,
    /// A directory.
    Directory,
}

/// The system-call filter's switches; the same as the kernel crate's profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeccompProfile {
    /// Refuse what a checkpoint cannot carry (nested namespaces, io_uring).
    pub migratable: bool,
    /// The server has the host's user namespace.
    pub privileged: bool,
    /// `sysinfo` and `sched_getaffinity` are answered by who holds the listener.
    #[serde(default)]
    pub listened: bool,
}

/// The packets on [`Handover::channel`].
pub mod word {
    /// vsinit → monitor, with descriptors: console master, masters of tty1 … ttyN, and the
    /// datagram socket that is bound in the guest at `/run/host/notify`.
    pub const PREPARED: &str = "prepared";
    /// Monitor → vsinit: the network is there, go on.
    pub const PROCEED: &str = "proceed";
    /// vsinit → monitor: stop signals are no longer lost. With the listener, when the filter has one: until the monitor has
    /// seen to it that somebody answers, those calls wait.
    pub const RUNNING: &str = "running";
    /// vsinit → monitor, followed by the chain of causes; exit 1 comes next.
    pub const FAILED_PREFIX: &str = "failed: ";
}

/// Why a handover was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptor cannot be read.
    #[error("cannot read the handover")]
    Read(#[source] std::io::Error),
    /// The document is longer than any handover.
    #[error("the handover is longer than {MAX_BYTES} bytes")]
    TooLong,
    /// The text is not a handover; the source tells line and column.
    #[error("the handover is not valid")]
    Parse(#[source] toml::de::Error),
    /// The value cannot be written as TOML, such as a path that is not UTF-8.
    #[error("the handover cannot be written as TOML")]
    Write(#[source] toml::ser::Error),
    /// Written by another version.
    #[error("the handover has version {found}, this vsinit reads version {VERSION}")]
    Version {
        /// The version that it carries.
        found: u32,
    },
    /// A value that no server can have.
    #[error("the handover's {key} {reason}")]
    Invalid {
        /// The key with the bad value.
        key: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl Handover {
    /// The document to put into the sealed memfd.
    pub fn to_toml(&self) -> Result<String, Error> {
        toml::to_string(self).map_err(Error::Write)
    }

    /// Reads a document and checks what its types cannot say.
    pub fn from_toml(text: &str) -> Result<Self, Error> {
        let handover: Handover = toml::from_str(text).map_err(Error::Parse)?;
        handover.check()?;
        Ok(handover)
    }

    /// Reads the document on a descriptor from its present offset to its end, and closes it.
    pub fn read(descriptor: OwnedFd) -> Result<Self, Error> {
        let mut text = String::new();
        let mut limited = File::from(descriptor).take(MAX_BYTES + 1);
        limited.read_to_string(&mut text).map_err(Error::Read)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(Error::TooLong);
        }
        Self::from_toml(&text)
    }

    fn check(&self) -> Result<(), Error> {
        let invalid = |key, reason| Err(Error::Invalid { key, reason });
        if self.version != VERSION {
            return Err(Error::Version { found: self.version });
        }
        if matches!(&self.role, Role::Exec { argv } if argv.is_empty()) {
            return invalid("role", "has no program to execute");
        }
        if self.channel < 0 || self.root < 0 || self.mounts.iter().any(|m| m.fd < 0) {
            return invalid("descriptors", "include a negative number");
        }
        let mut paths = self.masked.iter().chain(&self.read_only);
        if !self.stage.is_absolute()
            || !paths.all(|p| p.is_absolute())
            || !self.mounts.iter().all(|m| m.target.is_absolute())
        {
            return invalid("paths", "include one that is not absolute");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(role: Role) -> Handover {
        Handover {
            version: VERSION,
            name: "web1".into(),
            hostname: "web1.example".into(),
            uuid: "0e7a7c32-6b0a-4a53-9c4f-0d2a9d1f5b11".into(),
            role,
            channel: 4,
            root: 5,
            stage: "/run/vsos/servers/web1/root".into(),
            mounts: vec![HostMount { fd: 6, target: "/dev/null".into(), kind: MountKind::File }],
            masked: vec!["/proc/kcore".into()],
            read_only: vec!["/proc/sys".into()],
            ttys: 4,
            capabilities: 0x1ff_ffff_ffff,
            seccomp: Some(SeccompProfile { migratable: true, privileged: false, listened: true }),
            privileged: false,
            environment: BTreeMap::from([("LANG".into(), "C.UTF-8".into())]),
        }
    }

    #[test]
    fn every_role_survives_the_round_trip() {
        let exec = Role::Exec { argv: vec!["/sbin/init".into(), "--quote=\"'\n".into()] };
        for role in [Role::Supervise, exec, Role::Rescue] {
            let handover = sample(role);
            assert_eq!(Handover::from_toml(&handover.to_toml().unwrap()).unwrap(), handover);
        }
    }

    #[test]
    fn lists_may_be_left_out() {
        let mut text = sample(Role::Supervise).to_toml().unwrap();
        let start = text.find("[[mounts]]").unwrap();
        text.truncate(start);
        let handover = Handover::from_toml(&text).unwrap();
        assert!(handover.mounts.is_empty() && handover.environment.is_empty());
        assert_eq!(handover.seccomp, None);
    }

    #[test]
    fn bad_handovers_are_refused() {
        let good = sample(Role::Supervise).to_toml().unwrap();
        let cases = [
            ("version = 1", "version = 2", "version 2"),
            ("channel = 4", "channel = -1", "negative"),
            ("stage = \"/run", "stage = \"run", "not absolute"),
            ("ttys = 4", "ttys = 4\nttyz = 1", "not valid"),
            ("role = \"supervise\"", "role = { exec = { argv = [] } }", "no program"),
        ];
        for (from, to, message) in cases {
            assert!(good.contains(from), "{from} is not in:\n{good}");
            let error = Handover::from_toml(&good.replacen(from, to, 1)).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
    }

    #[test]
    fn a_half_document_is_an_error() {
        let good = sample(Role::Supervise).to_toml().unwrap();
        assert!(Handover::from_toml(&good[..good.len() / 3]).is_err());
        assert!(Handover::from_toml("").is_err());
    }
}
