//! Rules that make a root one server's own: computed from the tree, printed as edits, applied by [`super::root`].
//!
//! Every rule may run again on what it left (a new host name, a new password) and changes only that.
//! What is the same in all servers of a template is [`super::adapt`].

use anyhow::Result;
use serde::Deserialize;

use super::edit::{Access, Edit};
use super::family::Family;
use super::host_keys::{self, HostKey};
use super::resolver::Resolver;
use super::root::{Entry, Root};
use crate::failure::{Exit, Failure};

/// One rule, by the name it has in `families.toml`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// `/etc/hostname`
    Hostname,
    /// `HOSTNAME=` in Red Hat's `/etc/sysconfig/network`, where there is one
    SysconfigHostname,
    /// The own name in `/etc/hosts`
    Hosts,
    /// `/etc/resolv.conf`
    Resolver,
    /// `/etc/machine-id` and D-Bus's copy
    MachineId,
    /// sshd's keys
    HostKeys,
    /// Root's line in `/etc/shadow`
    Password,
    /// Root's `authorized_keys`
    AuthorizedKeys,
}

/// What makes a server itself. What is `None` or empty is left as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// Host name, with or without a domain.
    pub hostname: Option<String>,
    /// Name servers.
    pub resolver: Option<Resolver>,
    /// 32 lower-case hexadecimal digits (machine-id(5)).
    pub machine_id: Option<String>,
    /// sshd's keys; written where there is an sshd.
    pub host_keys: Option<Vec<HostKey>>,
    /// A crypt(5) hash; [`super::password::hash`] makes one.
    pub password_hash: Option<String>,
    /// Lines of `authorized_keys`, added to what is there.
    pub authorized_keys: Vec<String>,
}

/// All edits of the family's rules for the tree as it is.
pub fn plan(root: &Root, family: &Family, identity: &Identity) -> Result<Vec<Edit>> {
    let mut edits = Vec::new();
    for rule in &family.personalise {
        edits.extend(match rule {
            Rule::Hostname => hostname(identity),
            Rule::SysconfigHostname => sysconfig_hostname(root, identity)?,
            Rule::Hosts => hosts_file(root, identity)?,
            Rule::Resolver => resolver(identity),
            Rule::MachineId => machine_id(root, identity)?,
            Rule::HostKeys => host_key_files(root, identity)?,
            Rule::Password => password(root, identity)?,
            Rule::AuthorizedKeys => authorized_keys(root, identity)?,
        });
    }
    Ok(edits)
}

fn hostname(identity: &Identity) -> Vec<Edit> {
    let edit = |name: &String| Edit::file("etc/hostname", Access::root(0o644), format!("{name}\n"));
    identity.hostname.iter().map(edit).collect()
}

fn sysconfig_hostname(root: &Root, identity: &Identity) -> Result<Vec<Edit>> {
    let path = "etc/sysconfig/network";
    let (Some(name), Some(text)) = (&identity.hostname, root.text(path)?) else {
        return Ok(Vec::new());
    };
    if !text.lines().any(|line| line.starts_with("HOSTNAME=")) {
        return Ok(Vec::new());
    }
    let line = |line: &str| {
        if line.starts_with("HOSTNAME=") { format!("HOSTNAME={name}\n") } else { format!("{line}\n") }
    };
    Ok(vec![Edit::file(path, Access::root(0o644), text.lines().map(line).collect::<String>())])
}

fn hosts_file(root: &Root, identity: &Identity) -> Result<Vec<Edit>> {
    let Some(name) = &identity.hostname else {
        return Ok(Vec::new());
    };
    let text = root.text("etc/hosts")?.unwrap_or_default();
    Ok(vec![Edit::file("etc/hosts", Access::root(0o644), hosts(&text, name))])
}

/// `127.0.1.1` is the own name, as Debian has it: it resolves whatever addresses the server has. Other lines stay.
fn hosts(text: &str, name: &str) -> String {
    let address = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
    let names = match name.split_once('.') {
        Some((short, _)) => format!("{name} {short}"),
        None => name.to_owned(),
    };
    let mut out = String::new();
    if !text.lines().any(|line| address(line) == "127.0.0.1") {
        out.push_str("127.0.0.1\tlocalhost\n");
    }
    let own = format!("127.0.1.1\t{names}\n");
    let mut written = false;
    for line in text.lines() {
        if address(line) != "127.0.1.1" {
            out.push_str(&format!("{line}\n"));
        } else if !written {
            out.push_str(&own);
            written = true;
        }
    }
    if !written {
        out.push_str(&own);
    }
    if !text.lines().any(|line| address(line) == "::1") {
        out.push_str("::1\tlocalhost ip6-localhost ip6-loopback\n");
    }
    out
}

/// A file even where the distribution has a link: the link leads to a daemon that nobody has told of name servers yet.
fn resolver(identity: &Identity) -> Vec<Edit> {
    let edit = |resolver: &Resolver| Edit::file("etc/resolv.conf", Access::root(0o644), resolver.text.as_str());
    identity.resolver.iter().map(edit).collect()
}

fn machine_id(root: &Root, identity: &Identity) -> Result<Vec<Edit>> {
    let Some(id) = &identity.machine_id else {
        return Ok(Vec::new());
    };
    // Without either file nobody there reads one.
    if root.entry("etc/machine-id")?.is_none() && !root.exists("lib/systemd/systemd")? {
        return Ok(Vec::new());
    }
    let mut edits = vec![Edit::file("etc/machine-id", Access::root(0o444), format!("{id}\n"))];
    if root.entry("var/lib/dbus/machine-id")? == Some(Entry::File) {
        edits.push(Edit::link("var/lib/dbus/machine-id", "/etc/machine-id"));
    }
    Ok(edits)
}

/// New keys, and no others: a key that the template had is in every server of it.
fn host_key_files(root: &Root, identity: &Identity) -> Result<Vec<Edit>> {
    let Some(keys) = &identity.host_keys else {
        return Ok(Vec::new());
    };
    if !host_keys::wanted(root)? {
        return Ok(Vec::new());
    }
    let own: Vec<String> = keys.iter().flat_map(|key| [key.file(), key.public_file()]).collect();
    let mut edits = Vec::new();
    for name in root.names("etc/ssh")? {
        if name.starts_with("ssh_host_") && !own.contains(&name) {
            edits.push(Edit::absent(format!("etc/ssh/{name}")));
        }
    }
    for key in keys {
        edits.push(Edit::file(format!("etc/ssh/{}", key.file()), Access::root(0o600), key.private.as_str()));
        edits.push(Edit::file(format!("etc/ssh/{}", key.public_file()), Access::root(0o644), key.public.as_str()));
    }
    Ok(edits)
}

fn password(root: &Root, identity: &Identity) -> Result<Vec<Edit>> {
    let Some(hash) = &identity.password_hash else {
        return Ok(Vec::new());
    };
    let shadow = root.text("etc/shadow")?.unwrap_or_default();
    let access = root.access("etc/shadow")?.unwrap_or(Access::root(0o600));
    let mut edits = vec![Edit::file("etc/shadow", access, with_field(&shadow, hash, "root:*::0:99999:7:::"))];
    // Old roots have the hash, or nothing, in passwd itself: "x" sends login to shadow.
    if let (Some(passwd), Some(access)) = (root.text("etc/passwd")?, root.access("etc/passwd")?) {
        edits.push(Edit::file("etc/passwd", access, with_field(&passwd, "x", "root:x:0:0:root:/root:/bin/sh")));
    }
    Ok(edits)
}

/// Root's line of passwd(5) or shadow(5) with another second field; `line` is put first where root has none.
fn with_field(text: &str, value: &str, line: &str) -> String {
    let own = |line: &str| line.split(':').next() == Some("root");
    let added = if text.lines().any(own) { None } else { Some(line) };
    let changed = |line: &str| {
        let mut fields: Vec<&str> = line.split(':').collect();
        if own(line) && fields.len() > 1 {
            fields[1] = value;
        }
        fields.join(":") + "\n"
    };
    added.into_iter().chain(text.lines()).map(changed).collect()
}

fn authorized_keys(root: &Root, identity: &Identity) -> Result<Vec<Edit>> {
    if identity.authorized_keys.is_empty() {
        return Ok(Vec::new());
    }
    let directory = format!("{}/.ssh", home_of_root(&root.text("etc/passwd")?.unwrap_or_default()));
    let path = format!("{directory}/authorized_keys");
    let mut text = root.text(&path)?.unwrap_or_default();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    for key in &identity.authorized_keys {
        if !text.lines().any(|line| line.trim() == key) {
            text.push_str(&format!("{key}\n"));
        }
    }
    Ok(vec![Edit::directory(directory, Access::root(0o700)), Edit::file(path, Access::root(0o600), text)])
}

fn home_of_root(passwd: &str) -> &str {
    let line = passwd.lines().find(|line| line.starts_with("root:"));
    line.and_then(|line| line.split(':').nth(5)).filter(|home| home.len() > 1).unwrap_or("/root")
}

/// The keys in a public-key file or an `authorized_keys`: one a line, comments left out.
pub fn parse_authorized_keys(text: &str) -> Result<Vec<String>> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    let is_key = |line: &String| {
        let kinds = ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"];
        let named = line.split_whitespace().any(|word| kinds.iter().any(|kind| word.starts_with(kind)));
        named && !line.contains(char::is_control) && !line.contains("PRIVATE KEY")
    };
    match keys.iter().find(|line| !is_key(line)) {
        Some(_) => Err(Failure::new(Exit::BadParameter, "the file holds something that is no public ssh key")
            .hint("give the file that ends in .pub")
            .into()),
        None if keys.is_empty() => Err(Failure::new(Exit::BadParameter, "the file holds no public ssh key").into()),
        None => Ok(keys),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_has_the_own_name_once() {
        let after = hosts("", "web1.example.org");
        assert_eq!(
            after,
            "127.0.0.1\tlocalhost\n127.0.1.1\tweb1.example.org web1\n::1\tlocalhost ip6-localhost ip6-loopback\n"
        );
        assert_eq!(hosts(&after, "web1.example.org"), after);
        let renamed =
            hosts("127.0.0.1 localhost\n127.0.1.1 old\n192.0.2.9 db\n127.0.1.1 older\n::1 localhost\n", "new");
        assert_eq!(renamed, "127.0.0.1 localhost\n127.0.1.1\tnew\n192.0.2.9 db\n::1 localhost\n");
    }

    #[test]
    fn only_roots_hash_changes() {
        let after = with_field("root:*:19000:0:99999:7:::\ndaemon:*:19000::\n", "$6$x$y", "root:*::");
        assert_eq!(after, "root:$6$x$y:19000:0:99999:7:::\ndaemon:*:19000::\n");
        assert_eq!(with_field("daemon:*::\n", "h", "root:*::"), "root:h::\ndaemon:*::\n");
        assert_eq!(home_of_root("root:x:0:0::/var/root:/bin/sh\n"), "/var/root");
        assert_eq!(home_of_root("root:x:0:0::/:/bin/sh\n"), "/root");
    }

    #[test]
    fn a_private_key_is_no_authorized_key() {
        let good = "# laptop\nssh-ed25519 AAAA me@laptop\nfrom=\"192.0.2.0/24\" ssh-rsa AAAA x\n\n";
        assert_eq!(parse_authorized_keys(good).unwrap().len(), 2);
        for bad in ["", "# nothing\n", "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "hello\n"] {
            assert!(parse_authorized_keys(bad).is_err(), "{bad}");
        }
    }
}
