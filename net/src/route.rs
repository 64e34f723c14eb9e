//! Routes: the default route of a namespace, and what the host already reaches.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use rtnetlink::RouteMessageBuilder;

use crate::{Error, Netlink, Result};

/// A route that sends, or refuses, packets; the kernel's own (local, broadcast, multicast) are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// What it is for; prefix length 0 is the default route.
    pub destination: IpNet,
    /// The router, if the destination is not on the link.
    pub gateway: Option<IpAddr>,
    /// The interface; absent for refusing routes and for those with several ways.
    pub link_index: Option<u32>,
}

impl Netlink {
    /// Sends everything that has no better route to `gateway` on `link`. The gateway must be on the link.
    pub fn add_default_route(&self, gateway: IpAddr, link: &str) -> Result<()> {
        self.add_default_route_at(self.index(link)?, gateway, link)
    }

    /// The same, on the interface with that index; `link` is its name, for messages.
    pub(crate) fn add_default_route_at(&self, index: u32, gateway: IpAddr, link: &str) -> Result<()> {
        let message = match gateway {
            IpAddr::V4(gateway) => {
                RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index).build()
            }
            IpAddr::V6(gateway) => {
                RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway).output_interface(index).build()
            }
        };
        self.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
            .map_err(|e| Error::new("add default route", format!("via {gateway} on {link}"), e))
    }

    /// The routes of all tables, IPv4 and IPv6.
    pub fn routes(&self) -> Result<Vec<Route>> {
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let mut routes = Vec::new();
        for mut message in [v4, v6] {
            // A filter of the builder's (table main, protocol static) would hide the routes of a VPN.
            message.header.table = 0;
            let answers =
                self.dump(RouteNetlinkMessage::GetRoute(message)).map_err(|e| Error::new("list", "routes", e))?;
            routes.extend(answers.into_iter().filter_map(route_in));
        }
        Ok(routes)
    }
}

fn route_in(message: RouteNetlinkMessage) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = message else {
        return None;
    };
    let wanted = [RouteType::Unicast, RouteType::BlackHole, RouteType::Unreachable, RouteType::Prohibit];
    if !wanted.contains(&message.header.kind) {
        return None;
    }
    let mut route = Route { destination: destination(&message)?, gateway: None, link_index: None };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Gateway(address) => route.gateway = ip_of(address),
            RouteAttribute::Oif(index) => route.link_index = Some(*index),
            _ => {}
        }
    }
    Some(route)
}

/// The kernel leaves `RTA_DST` out for a default route.
fn destination(message: &RouteMessage) -> Option<IpNet> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip_of(address),
        _ => None,
    });
    let any = match message.header.address_family {
        netlink_packet_route::AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        netlink_packet_route::AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    IpNet::new(address.unwrap_or(any), message.header.destination_prefix_length).ok()
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}
