//! Addresses of interfaces.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
};
use rtnetlink::AddressMessageBuilder;

use crate::{Error, Netlink, Result, error::errno_of};

/// An address on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The interface that has it.
    pub link_index: u32,
    /// Address and prefix length; host bits are kept.
    pub address: IpNet,
}

impl Netlink {
    /// Gives `link` an address, usable at once: IPv6 without duplicate-address detection, IPv4 with the usual broadcast address.
    pub fn add_address(&self, link: &str, address: IpNet) -> Result<()> {
        self.add_address_at(self.index(link)?, link, address)
    }

    /// The same, to the interface with that index; `link` is its name, for messages.
    pub(crate) fn add_address_at(&self, index: u32, link: &str, address: IpNet) -> Result<()> {
        let message = address_message(index, address);
        self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
            .map_err(|e| Error::new("add address", format!("{address} to {link}"), e))
    }

    /// Takes an address from `link`; gone already is fine.
    pub fn delete_address(&self, link: &str, address: IpNet) -> Result<()> {
        const EADDRNOTAVAIL: i32 = 99;
        let message = address_message(self.index(link)?, address);
        match self.change(RouteNetlinkMessage::DelAddress(message), 0) {
            Err(e) if errno_of(&e) != Some(EADDRNOTAVAIL) => {
                let object = format!("{address} from {link}");
                Err(Error::new("delete address", object, e))
            }
            _ => Ok(()),
        }
    }

    /// The addresses of all interfaces, IPv4 and IPv6.
    pub fn addresses(&self) -> Result<Vec<Address>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.dump(request).map_err(|e| Error::new("list", "addresses", e))?;
        Ok(answers.into_iter().filter_map(address_in).collect())
    }
}

fn address_message(index: u32, address: IpNet) -> AddressMessage {
    match address {
        IpNet::V4(v4) => {
            AddressMessageBuilder::<std::net::Ipv4Addr>::new().index(index).address(v4.addr(), v4.prefix_len()).build()
        }
        IpNet::V6(v6) => {
            let mut message = AddressMessageBuilder::<std::net::Ipv6Addr>::new()
                .index(index)
                .address(v6.addr(), v6.prefix_len())
                .build();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message
        }
    }
}

fn address_in(message: RouteNetlinkMessage) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = message else {
        return None;
    };
    // On a point-to-point link IFA_ADDRESS is the other side and IFA_LOCAL ours; IPv6 often sends IFA_ADDRESS only.
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    let local = find(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let any = find(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    Some(Address {
        link_index: message.header.index,
        address: IpNet::new(local.or(any)?, message.header.prefix_len).ok()?,
    })
}
