//! Finds firewalls of others that drop what is forwarded, so that somebody can be told.
//!
//! Where the kernel hands bridged packets to iptables (`net/bridge/bridge-nf-call-iptables` is 1, as Docker sets it), such a
//! chain drops what one server sends to another too, not only what leaves the bridge.
//!
//! Sees policies only: a rule that drops everything at the end of an accepting chain is not recognised.

use std::{fs, io, process::Command};

use netlink_packet_core::Parseable;
use netlink_packet_netfilter::{
    NetfilterProtoFamily,
    nftables::{ChainAttribute, ChainMessage, Hook, HookNumber, InetHookNumber, NfTablesMessage},
};

use super::nfnetlink::{Nfnetlink, Object};
use crate::{Error, Result};

/// A chain of somebody else's whose policy drops forwarded packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardDrop {
    /// `ip`, `ip6`, `inet` or `bridge` of nftables, `iptables-legacy` or `ip6tables-legacy`.
    pub family: &'static str,
    /// The table, such as `filter`.
    pub table: String,
    /// The chain, such as `FORWARD`.
    pub chain: String,
}

/// The chains on the forward hook that drop by policy: nftables (iptables-nft is that too) and legacy iptables.
pub fn forward_drops() -> Result<Vec<ForwardDrop>> {
    let mut drops = nftables().map_err(|e| Error::new("list", "nftables chains", e))?;
    for (names, program) in [
        ("/proc/thread-self/net/ip_tables_names", "iptables-legacy"),
        ("/proc/thread-self/net/ip6_tables_names", "ip6tables-legacy"),
    ] {
        // Asking the program would load the legacy tables where nobody uses them.
        let used = fs::read_to_string(names).is_ok_and(|text| text.lines().any(|l| l == "filter"));
        if used && legacy_drops(program)? {
            drops.push(ForwardDrop { family: program, table: "filter".to_owned(), chain: "FORWARD".to_owned() });
        }
    }
    Ok(drops)
}

fn nftables() -> io::Result<Vec<ForwardDrop>> {
    let all = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
    let chains = Nfnetlink::open()?.dump(NetfilterProtoFamily::Unspec, all)?;
    Ok(chains.into_iter().filter_map(drop_in).collect())
}

fn drop_in(object: Object) -> Option<ForwardDrop> {
    const NF_DROP: u32 = 0;
    let message = ChainMessage::parse(&object.attributes).ok()?;
    let family = match object.family {
        NetfilterProtoFamily::IPv4 => "ip",
        NetfilterProtoFamily::IPv6 => "ip6",
        NetfilterProtoFamily::Inet => "inet",
        NetfilterProtoFamily::Bridge => "bridge",
        _ => return None,
    };
    // The bridge family gives its forward hook the same number.
    let forward = Hook::Number(HookNumber::Inet(InetHookNumber::Forward));
    let (mut table, mut chain) = (String::new(), String::new());
    let (mut on_forward, mut drops) = (false, false);
    for attribute in message.attributes {
        match attribute {
            ChainAttribute::Table(name) => table = name,
            ChainAttribute::Name(name) => chain = name,
            ChainAttribute::Hook(hook) => on_forward = hook.contains(&forward),
            ChainAttribute::Policy(policy) => drops = policy == NF_DROP,
            _ => {}
        }
    }
    (on_forward && drops).then_some(ForwardDrop { family, table, chain })
}

fn legacy_drops(program: &'static str) -> Result<bool> {
    match Command::new(program).args(["-w", "-S", "FORWARD"]).output() {
        Ok(output) => Ok(policy_is_drop(&String::from_utf8_lossy(&output.stdout))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::new("run", program, e)),
    }
}

fn policy_is_drop(listing: &str) -> bool {
    listing.lines().any(|line| line.trim_end() == "-P FORWARD DROP")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_policy_is_read_from_the_listing() {
        let docker = "-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n";
        assert!(policy_is_drop(docker));
        assert!(!policy_is_drop("-P FORWARD ACCEPT\n-A FORWARD -j DROP\n"));
        assert!(!policy_is_drop(""));
    }
}
