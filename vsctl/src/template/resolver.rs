//! The servers' resolv.conf, from the host's: what a server cannot reach is left out.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};

/// A resolv.conf(5) for servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolver {
    /// The file's text.
    pub text: String,
    /// Why names may not resolve inside, if so.
    pub warning: Option<String>,
}

impl Resolver {
    /// What this host uses now. Behind systemd-resolved's stub it is what that one asks.
    pub fn of_host() -> Result<Self> {
        Self::at(Path::new("/etc/resolv.conf"), Path::new("/run/systemd/resolve/resolv.conf"))
    }

    fn at(own: &Path, upstream: &Path) -> Result<Self> {
        let read = |path: &Path| match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        };
        Ok(Self::choose(&read(own)?.unwrap_or_default(), read(upstream)?.as_deref()))
    }

    /// Takes the host's file, and of `upstream` the servers when the host's own are all local to it.
    pub fn choose(own: &str, upstream: Option<&str>) -> Self {
        let mut servers = reachable(own);
        if servers.is_empty() {
            servers = upstream.map(reachable).unwrap_or_default();
        }
        let others = own
            .lines()
            .map(str::trim)
            .filter(|line| matches!(line.split_whitespace().next(), Some("search" | "domain" | "options")));
        let warning = servers.is_empty().then(|| {
            let named: Vec<&str> = nameservers(own).collect();
            match named.is_empty() {
                true => "the host's /etc/resolv.conf names no name server: names do not resolve in servers".to_owned(),
                false => format!(
                    "the host's name server ({}) answers the host alone: names do not resolve in servers",
                    named.join(", ")
                ),
            }
        });
        let lines = servers.iter().map(|server| format!("nameserver {server}\n"));
        Self { text: lines.chain(others.map(|line| format!("{line}\n"))).collect(), warning }
    }
}

fn nameservers(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then(|| words.next())?
    })
}

/// The name servers that another network namespace can ask. An address with a zone (`fe80::1%eth0`) is no `IpAddr`.
fn reachable(text: &str) -> Vec<IpAddr> {
    let addresses = nameservers(text).filter_map(|word| word.parse::<IpAddr>().ok());
    addresses
        .filter(|address| match address {
            IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_unspecified() && !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unspecified() && (v6.segments()[0] & 0xffc0) != 0xfe80,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_servers_are_taken() {
        let host =
            "# by hand\nnameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch example.org\noptions edns0\nsortlist 1\n";
        let resolver = Resolver::choose(host, None);
        assert_eq!(resolver.text, "nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch example.org\noptions edns0\n");
        assert_eq!(resolver.warning, None);
    }

    #[test]
    fn a_local_stub_is_replaced_by_what_it_asks() {
        let stub = "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n";
        let resolver = Resolver::choose(stub, Some("nameserver 192.0.2.7\nnameserver fe80::1%eth0\nsearch lan\n"));
        assert_eq!(resolver.text, "nameserver 192.0.2.7\noptions edns0 trust-ad\nsearch lan\n");
        assert_eq!(resolver.warning, None);
    }

    #[test]
    fn an_unreachable_one_is_said() {
        let resolver = Resolver::choose("nameserver ::1\n", None);
        assert_eq!(resolver.text, "");
        assert!(resolver.warning.unwrap().contains("::1"));
        assert!(Resolver::choose("", None).warning.is_some());
    }
}
