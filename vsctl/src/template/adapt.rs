//! Rules that make a distribution's root fit for a server: computed from the tree, once for a template.
//!
//! What is different in each server is [`super::personalise`]; what systemd needs is in `templates/systemd`.

use anyhow::Result;
use serde::Deserialize;

use super::edit::{Access, Change, Edit};
use super::family::Family;
use super::root::{Entry, Root};

/// One rule, by the name it has in `families.toml`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// What makes a machine that machine, and must not be shared by all servers of a template.
    Identity,
    /// Disks of another machine.
    Fstab,
    /// `eth0` of ifupdown: the manager configures it.
    Ifupdown,
    /// `eth0` of Red Hat's network scripts.
    Ifcfg,
    /// `eth0` of NetworkManager.
    NetworkManager,
    /// OpenRC has words for containers.
    Openrc,
}

/// All edits of the family's rules for the tree as it is.
pub fn plan(root: &Root, family: &Family) -> Result<Vec<Edit>> {
    let mut edits = Vec::new();
    for rule in &family.adapt {
        edits.extend(match rule {
            Rule::Identity => identity(root)?,
            Rule::Fstab => rewrite(root, "etc/fstab", fstab)?,
            Rule::Ifupdown => rewrite(root, "etc/network/interfaces", interfaces)?,
            Rule::Ifcfg => ifcfg(root)?,
            Rule::NetworkManager => network_manager(root)?,
            Rule::Openrc => rewrite(root, "etc/rc.conf", rc_conf)?,
        });
    }
    Ok(edits)
}

/// Replaces a file that exists by what `change` makes of it; mode and owner stay.
fn rewrite(root: &Root, path: &str, change: fn(&str) -> String) -> Result<Vec<Edit>> {
    let (Some(text), Some(access)) = (root.text(path)?, root.access(path)?) else {
        return Ok(Vec::new());
    };
    Ok(vec![Edit::file(path, access, change(&text))])
}

/// systemd takes an empty machine-id as "give me one"; without the file it could not keep it on a read-only /etc.
fn identity(root: &Root) -> Result<Vec<Edit>> {
    let mut edits = Vec::new();
    if root.entry("etc/machine-id")?.is_some() {
        edits.push(Edit::file("etc/machine-id", Access::root(0o444), ""));
    }
    if root.entry("var/lib/dbus/machine-id")? == Some(Entry::File) {
        edits.push(Edit::link("var/lib/dbus/machine-id", "/etc/machine-id"));
    }
    let single =
        ["var/lib/systemd/random-seed", "var/lib/systemd/credential.secret", "var/lib/NetworkManager/secret_key"];
    for path in single {
        if root.entry(path)? == Some(Entry::File) {
            edits.push(Edit::absent(path));
        }
    }
    let keys = |name: &str| name.starts_with("ssh_host_") && name.contains("_key");
    let leases = |name: &str| name.ends_with(".leases") || name.ends_with(".lease");
    edits.extend(files_in(root, "etc/ssh", keys)?);
    edits.extend(files_in(root, "var/lib/dhcp", leases)?);
    Ok(edits)
}

fn files_in(root: &Root, directory: &str, unwanted: impl Fn(&str) -> bool) -> Result<Vec<Edit>> {
    let mut edits = Vec::new();
    for name in root.names(directory)?.into_iter().filter(|name| unwanted(name)) {
        let path = format!("{directory}/{name}");
        if root.entry(&path)? == Some(Entry::File) {
            edits.push(Edit { path, change: Change::Absent });
        }
    }
    Ok(edits)
}

/// Comments out what names a disk: a server has none, and waiting for it would fail the boot.
fn fstab(text: &str) -> String {
    let names_a_disk = |line: &str| {
        let mut words = line.split_whitespace();
        let device = words.next().unwrap_or_default();
        let kind = words.nth(1).unwrap_or_default();
        ["UUID=", "LABEL=", "PARTUUID=", "PARTLABEL=", "/dev/"].iter().any(|prefix| device.starts_with(prefix))
            || kind == "swap"
    };
    lines(text, |line| match names_a_disk(line) {
        true => Some(format!("# not in a server: {line}")),
        false => Some(line.to_owned()),
    })
}

/// `eth0` is `manual`: up, and its addresses are whatever it has. `lo` is there. Other interfaces stay.
fn interfaces(text: &str) -> String {
    let mut in_eth0 = false;
    let mut out = lines(text, |line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["iface", "eth0", ..] => {
                in_eth0 = true;
                return None;
            }
            ["iface" | "mapping" | "auto" | "source" | "source-directory", ..] => in_eth0 = false,
            [word, ..] if word.starts_with("allow-") => in_eth0 = false,
            _ => {}
        }
        if in_eth0 {
            return None;
        }
        // `auto eth0` is kept once, below, with the stanza.
        match words.as_slice() {
            [how, names @ ..] if *how == "auto" || how.starts_with("allow-") => {
                let others: Vec<&str> = names.iter().copied().filter(|name| *name != "eth0").collect();
                (!others.is_empty()).then(|| format!("{how} {}", others.join(" ")))
            }
            _ => Some(line.to_owned()),
        }
    });
    if !out.lines().any(|line| line.split_whitespace().take(2).eq(["iface", "lo"])) {
        out.push_str("auto lo\niface lo inet loopback\n");
    }
    out.push_str("auto eth0\niface eth0 inet manual\n");
    out
}

/// Red Hat's network scripts leave the link alone; so does NetworkManager, which reads the same file.
fn ifcfg(root: &Root) -> Result<Vec<Edit>> {
    let directory = "etc/sysconfig/network-scripts";
    if root.entry(directory)? != Some(Entry::Directory) {
        return Ok(Vec::new());
    }
    let content = "DEVICE=eth0\nTYPE=Ethernet\nBOOTPROTO=none\nONBOOT=no\nNM_CONTROLLED=no\n";
    Ok(vec![Edit::file(format!("{directory}/ifcfg-eth0"), Access::root(0o644), content)])
}

fn network_manager(root: &Root) -> Result<Vec<Edit>> {
    if root.entry("etc/NetworkManager")? != Some(Entry::Directory) {
        return Ok(Vec::new());
    }
    let content = "[keyfile]\nunmanaged-devices=interface-name:eth0\n";
    Ok(vec![Edit::file("etc/NetworkManager/conf.d/50-vsos.conf", Access::root(0o644), content)])
}

/// `rc_sys="lxc"` is OpenRC's word for a container of any maker: it leaves out what needs a real machine.
fn rc_conf(text: &str) -> String {
    let kept = lines(text, |line| (!line.trim_start().starts_with("rc_sys=")).then(|| line.to_owned()));
    format!("{kept}rc_sys=\"lxc\"\n")
}

/// Every line that `change` keeps, each ended.
fn lines(text: &str, change: impl FnMut(&str) -> Option<String>) -> String {
    text.lines().filter_map(change).map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_eth0_becomes_manual() {
        let before = "# mine\nauto lo eth0\niface lo inet loopback\n\nallow-hotplug eth0\niface eth0 inet dhcp\n    mtu 1400\n\
                      iface eth0 inet6 auto\nauto eth1\niface eth1 inet static\n    address 10.0.0.1/24\n";
        let after = interfaces(before);
        assert_eq!(
            after,
            "# mine\nauto lo\niface lo inet loopback\n\nauto eth1\niface eth1 inet static\n    address 10.0.0.1/24\n\
             auto eth0\niface eth0 inet manual\n"
        );
        assert_eq!(interfaces(&after), after);
        assert_eq!(interfaces(""), "auto lo\niface lo inet loopback\nauto eth0\niface eth0 inet manual\n");
    }

    #[test]
    fn disks_leave_fstab_once() {
        let before =
            "# static\nUUID=1-2 / ext4 defaults 0 1\n/swapfile none swap sw 0 0\ntmpfs /tmp tmpfs nosuid 0 0\n";
        let after = fstab(before);
        assert_eq!(
            after,
            "# static\n# not in a server: UUID=1-2 / ext4 defaults 0 1\n# not in a server: /swapfile none swap sw 0 0\n\
             tmpfs /tmp tmpfs nosuid 0 0\n"
        );
        assert_eq!(fstab(&after), after);
    }

    #[test]
    fn openrc_learns_the_word_once() {
        let after = rc_conf("#rc_sys=\"\"\nrc_sys=\"xen0\"\nunicode=\"YES\"\n");
        assert_eq!(after, "#rc_sys=\"\"\nunicode=\"YES\"\nrc_sys=\"lxc\"\n");
        assert_eq!(rc_conf(&after), after);
    }
}
