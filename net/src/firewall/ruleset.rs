//! The rules as text for nft(8), and their loading.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    process::{Command, Stdio},
};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::{Error, Result};

/// Everything that the rules depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruleset {
    /// Name of the two tables that hold them.
    pub table: String,
    /// The bridge that servers are ports of.
    pub bridge: String,
    /// How the names of its guarded ports begin: a port that has such a name and no binding may send nothing.
    pub port_prefix: String,
    /// The guests' IPv4 network, translated when it leaves by another interface than the bridge.
    pub v4: Option<Ipv4Net>,
    /// The guests' IPv6 network, likewise.
    pub v6: Option<Ipv6Net>,
}

impl Ruleset {
    /// The text for `nft -f -`. Its names must have passed [`Ruleset::install`]'s check to be safe.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for family in ["inet", "bridge"] {
            // `flush table` takes the rules and leaves the sets with their elements, so that the bindings of running servers
            // stay when the rules are loaded again.
            let name = &self.table;
            let _ = writeln!(text, "add table {family} {name}\nflush table {family} {name}");
        }
        text.push_str(&self.forward_and_nat());
        text.push_str(&self.anti_spoof());
        text
    }

    fn forward_and_nat(&self) -> String {
        let bridge = &self.bridge;
        let mut nat = String::new();
        if let Some(v4) = self.v4 {
            let v4 = v4.trunc();
            let _ = writeln!(nat, "\t\tip saddr {v4} oifname != \"{bridge}\" masquerade");
        }
        if let Some(v6) = self.v6 {
            let v6 = v6.trunc();
            let _ = writeln!(nat, "\t\tip6 saddr {v6} oifname != \"{bridge}\" masquerade");
        }
        include_str!("inet.nft")
            .replace("@TABLE@", &self.table)
            .replace("@BRIDGE@", bridge)
            .replace("@PREFIX@", &self.port_prefix)
            .replace("\t\t@NAT@\n", &nat)
    }

    fn anti_spoof(&self) -> String {
        include_str!("bridge.nft").replace("@TABLE@", &self.table).replace("@PREFIX@", &self.port_prefix)
    }

    /// Loads the rules in one transaction: the old ones hold until the new ones do. Bindings stay.
    ///
    /// Fails with `InvalidInput` if a name has characters that the kernel or nft give a meaning to.
    pub fn install(&self) -> Result<()> {
        self.check()
            .and_then(|()| feed_nft(&self.render()))
            .map_err(|e| Error::new("install firewall table", &self.table, e))
    }

    fn check(&self) -> io::Result<()> {
        let table_ok = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let link_ok = |c: char| table_ok(c) || matches!(c, '-' | '.');
        let table = &self.table;
        let starts_well = table.starts_with(|c: char| c.is_ascii_alphabetic());
        let names = [&self.bridge, &self.port_prefix];
        let fine = starts_well
            && table.chars().all(table_ok)
            && names.iter().all(|name| (1..=15).contains(&name.len()) && name.chars().all(link_ok));
        if fine {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "names may have letters, digits, '_' and, for interfaces, '-' and '.'",
        ))
    }
}

/// Runs `nft -f -`; what it says on standard error is the reason of a failure.
fn feed_nft(rules: &str) -> io::Result<()> {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("cannot run nft: {e}")))?;
    // A child that ends early (no permission) closes the pipe; its words say more than EPIPE. nft reads all of its
    // input before it says anything, so writing everything first cannot block for ever.
    let written = nft.stdin.take().map_or(Ok(()), |mut pipe| pipe.write_all(rules.as_bytes()));
    let output = nft.wait_with_output()?;
    if output.status.success() {
        return written;
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("nft: {}", words.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ruleset() -> Ruleset {
        Ruleset {
            table: "vsos_1a2b".to_owned(),
            bridge: "vsbr1a2b".to_owned(),
            port_prefix: "vs1a2b-".to_owned(),
            v4: Some("10.77.0.1/24".parse().unwrap()),
            v6: Some("fd01:203:405::1/64".parse().unwrap()),
        }
    }

    /// `UPDATE_GOLDEN=1 cargo test -p net` writes the file anew; read the difference.
    #[test]
    fn the_rules_are_those_of_the_golden_file() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/ruleset.nft");
        let text = ruleset().render();
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(path, &text).unwrap();
        }
        let golden = std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(text, golden, "see {path}");
    }

    #[test]
    fn a_missing_network_is_not_translated() {
        let (v4, v6) = (None, None);
        let text = Ruleset { v4, v6, ..ruleset() }.render();
        assert!(!text.contains("masquerade"));
        assert!(!text.contains("@NAT@"));
    }

    #[test]
    fn names_with_a_meaning_to_nft_are_refused() {
        let refused = |ruleset: Ruleset| {
            let error = ruleset.install().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{ruleset:?}");
        };
        for name in ["", "a b", "a;b", "a\"", "a*", "0123456789abcdef", "ä"] {
            let name = name.to_owned();
            refused(Ruleset { bridge: name.clone(), ..ruleset() });
            refused(Ruleset { port_prefix: name, ..ruleset() });
        }
        for table in ["", "1a", "a-b", "a b", "a{", "a\n"] {
            let table = table.to_owned();
            refused(Ruleset { table, ..ruleset() });
        }
    }
}
