//! Guests whose connections are older than what this host knows of them: elements of the sets `returned_v4` and `returned_v6` in
//! our inet table (`inet.nft`).

use std::net::IpAddr;

use netlink_packet_netfilter::{NetfilterProtoFamily, nftables::NfTablesMessage};

use super::{Firewall, nfnetlink::Request};
use crate::{Error, Result};

impl Firewall {
    /// Lets connections that were made to these addresses of a guest go on, of which this host has not seen the beginning: they are not
    /// taken for the guest's own, whose addresses are translated. Holds for a day from the first time on; twice is fine.
    pub fn note_return(&mut self, addresses: &[IpAddr]) -> Result<()> {
        let requests = addresses.iter().map(|address| {
            let (set, key) = match address {
                IpAddr::V4(address) => ("returned_v4", address.octets().to_vec()),
                IpAddr::V6(address) => ("returned_v6", address.octets().to_vec()),
            };
            let message = NfTablesMessage::NewSetElement(self.element(set, Some(&key)));
            Request::create(NetfilterProtoFamily::Inet, message)
        });
        let requests: Vec<Request> = requests.collect();
        if requests.is_empty() {
            return Ok(());
        }
        self.socket.commit(requests).map_err(|e| Error::new("note the return of a guest in", &self.table, e))
    }
}
