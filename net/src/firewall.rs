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
mod returned;
mod ruleset;

use netlink_packet_netfilter::{
    NetfilterProtoFamily,
    nftables::{NfTablesMessage, TableAttribute, TableMessage},
};

use crate::{Error, Result, error::errno_of};
use nfnetlink::{Nfnetlink, Request};

pub use forward::{ForwardDrop, forward_drops};
pub use port::Binding;
pub use ruleset::Ruleset;

const ENOENT: i32 = 2;

/// Our two tables, the one of family inet and the one of family bridge, reached by an open nfnetlink socket.
///
/// Closing it (drop, or the end of the process) after something was deleted waits until the kernel has freed that: one RCU grace
/// period, 5 to 20 ms. The deletion itself takes effect at once, so keep the value while other slow work is done,
/// such as deleting the link, and the wait is over by then.
#[derive(Debug)]
pub struct Firewall {
    table: String,
    socket: Nfnetlink,
}

impl Firewall {
    /// Opens a socket for the tables called `table`, in the calling thread's network namespace; they need not exist.
    pub fn open(table: impl Into<String>) -> Result<Self> {
        let table = table.into();
        match Nfnetlink::open() {
            Ok(socket) => Ok(Self { table, socket }),
            Err(e) => Err(Error::new("open", "nfnetlink socket", e)),
        }
    }

    /// Whether both tables are there.
    pub fn exists(&mut self) -> Result<bool> {
        for family in FAMILIES {
            let get = NfTablesMessage::GetTable(self.message());
            match self.socket.ask(family, get) {
                Ok(_) => {}
                Err(e) if errno_of(&e) == Some(ENOENT) => return Ok(false),
                Err(e) => return Err(Error::new("find firewall table", &self.table, e)),
            }
        }
        Ok(true)
    }

    /// Removes our tables with all bindings, and only them; gone already is fine.
    pub fn remove(&mut self) -> Result<()> {
        for family in FAMILIES {
            let delete = Request::delete(family, NfTablesMessage::DeleteTable(self.message()));
            match self.socket.commit(vec![delete]) {
                Err(e) if errno_of(&e) != Some(ENOENT) => {
                    return Err(Error::new("remove firewall table", &self.table, e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn message(&self) -> TableMessage {
        TableMessage { attributes: vec![TableAttribute::Name(self.table.clone())] }
    }
}

const FAMILIES: [NetfilterProtoFamily; 2] = [NetfilterProtoFamily::Inet, NetfilterProtoFamily::Bridge];
