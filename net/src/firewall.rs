//! Two nftables tables: one lets the bridge's packets through and translates addresses (family inet), one keeps
//! guests from using addresses that are not theirs (family bridge).
//!
//! The rules are loaded once by nft(8), in one transaction. What changes with each server, which addresses
//! belong to which port, are elements of sets, put and taken by netlink in microseconds (`port.rs`).
//! The tables are ours alone: no table of others is read for more than [`forward_drops`], and none is changed.
//!
//! Everything acts in the network namespace of the calling thread.
//!
//! A packet is forwarded only if *no* table drops it. Our `accept` therefore cannot overrule a firewall whose chain on the forward
//! hook has the policy drop, as Docker's has: [`forward_drops`] finds those, and the administrator has to let the
//! bridge through there (with Docker: `iptables -I DOCKER-USER -i BRIDGE -j ACCEPT`, and the same with `-o`).

mod forward;
mod nfnetlink;
mod port;
mod ruleset;

use netlink_packet_netfilter::{
    NetfilterProtoFamily,
    nftables::{NfTablesMessage, TableAttribute, TableMessage},
};

use crate::{Error, Result};
use nfnetlink::{Nfnetlink, Request};

pub use forward::{ForwardDrop, forward_drops};
pub use port::Binding;
pub use ruleset::Ruleset;

const ENOENT: i32 = 2;

/// The name that our two tables share, the one of family inet and the one of family bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table(String);

impl Table {
    /// The tables called `name`; no effect. Letters, digits and underscores only, see [`Ruleset::install`].
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Whether both tables are there.
    pub fn exists(&self) -> Result<bool> {
        let mut socket = self.open("find firewall table")?;
        for family in FAMILIES {
            let get = NfTablesMessage::GetTable(self.message());
            match socket.ask(family, get) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(ENOENT) => return Ok(false),
                Err(e) => return Err(Error::new("find firewall table", &self.0, e)),
            }
        }
        Ok(true)
    }

    /// Removes our tables with all bindings, and only them; gone already is fine.
    pub fn remove(&self) -> Result<()> {
        let mut socket = self.open("remove firewall table")?;
        for family in FAMILIES {
            let delete = Request::delete(family, NfTablesMessage::DeleteTable(self.message()));
            match socket.commit(vec![delete]) {
                Err(e) if e.raw_os_error() != Some(ENOENT) => {
                    return Err(Error::new("remove firewall table", &self.0, e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn open(&self, operation: &'static str) -> Result<Nfnetlink> {
        Nfnetlink::open().map_err(|e| Error::new(operation, &self.0, e))
    }

    fn message(&self) -> TableMessage {
        TableMessage {
            attributes: vec![TableAttribute::Name(self.0.clone())],
        }
    }
}

const FAMILIES: [NetfilterProtoFamily; 2] =
    [NetfilterProtoFamily::Inet, NetfilterProtoFamily::Bridge];
