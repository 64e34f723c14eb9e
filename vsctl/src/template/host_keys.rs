//! sshd's host keys of one server, made by ssh-keygen(1) of the host.
//!
//! Limit: Ed25519 and ECDSA, some milliseconds each; an RSA key would take longer than all the rest of a creation,
//! and sshd does without.

use std::fmt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use super::edit::{Access, Edit};
use super::make_directory;
use super::root::Root;

const ALGORITHMS: [&str; 2] = ["ed25519", "ecdsa"];

/// A key pair as sshd wants it.
#[derive(Clone, PartialEq, Eq)]
pub struct HostKey {
    /// `ed25519`, `ecdsa`
    pub algorithm: String,
    /// The private key's file.
    pub private: String,
    /// The public key's file, one line.
    pub public: String,
}

impl HostKey {
    /// The private key's file name.
    pub fn file(&self) -> String {
        format!("ssh_host_{}_key", self.algorithm)
    }

    /// The public key's file name.
    pub fn public_file(&self) -> String {
        format!("{}.pub", self.file())
    }
}

/// Never the private key.
impl fmt::Debug for HostKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "HostKey({})", self.public.trim())
    }
}

/// Whether the root has an sshd whose keys are missing or not its own.
pub fn wanted(root: &Root) -> Result<bool> {
    Ok(root.exists("usr/sbin/sshd")? || root.exists("usr/bin/sshd")? || root.exists("etc/ssh/sshd_config")?)
}

/// New keys for the server `hostname`, made in a directory of their own inside `private`, which is a directory that
/// only root can enter; nothing stays there. `None` when the host has no ssh-keygen.
pub fn generate(hostname: &str, private: &Path) -> Result<Option<Vec<HostKey>>> {
    let scratch = private.join(format!(".host-keys-{}", std::process::id()));
    make_directory(&scratch, 0o700)?;
    let keys = generate_in(hostname, &scratch);
    std::fs::remove_dir_all(&scratch).with_context(|| format!("remove {}", scratch.display()))?;
    keys
}

fn generate_in(hostname: &str, scratch: &Path) -> Result<Option<Vec<HostKey>>> {
    // All at once: each is a process that computes for a while.
    let mut running: Vec<Child> = Vec::new();
    for algorithm in ALGORITHMS {
        let mut command = Command::new("ssh-keygen");
        command
            .args(["-q", "-t", algorithm, "-N", "", "-C", &format!("root@{hostname}"), "-f"])
            .arg(scratch.join(algorithm));
        match command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn() {
            Ok(child) => running.push(child),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("run ssh-keygen"),
        }
    }
    for child in running {
        let output = child.wait_with_output().context("wait for ssh-keygen")?;
        if !output.status.success() {
            bail!("ssh-keygen failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    let read = |path: &Path| std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
    let key = |algorithm: &&str| {
        let private = scratch.join(algorithm);
        Ok(HostKey {
            algorithm: (*algorithm).into(),
            private: read(&private)?,
            public: read(&private.with_extension("pub"))?,
        })
    };
    ALGORITHMS.iter().map(key).collect::<Result<Vec<_>>>().map(Some)
}

/// Makes a systemd guest generate them at its first boot: for a host without ssh-keygen. Other inits' sshd scripts do
/// it by themselves.
pub fn at_first_boot() -> Vec<Edit> {
    let unit = "[Unit]\nDescription=Generate the host keys of sshd\nBefore=ssh.service sshd.service\n\
                ConditionPathExistsGlob=!/etc/ssh/ssh_host_*_key\n\n\
                [Service]\nType=oneshot\nExecStart=/usr/bin/ssh-keygen -A\n\n[Install]\nWantedBy=multi-user.target\n";
    let directory = "etc/systemd/system";
    vec![
        Edit::file(format!("{directory}/vsos-host-keys.service"), Access::root(0o644), unit),
        Edit::link(format!("{directory}/multi-user.target.wants/vsos-host-keys.service"), "../vsos-host-keys.service"),
    ]
}
