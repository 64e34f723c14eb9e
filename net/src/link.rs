//! Network interfaces: bridges, veth pairs, and what the kernel counts on them.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{
        BridgeStpState, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
    },
};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec};

use crate::{Error, Mac, Netlink, Result, error::errno_of};

/// A network interface as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Number within its namespace.
    pub index: u32,
    /// Name within its namespace.
    pub name: String,
    /// `bridge`, `veth`, ...; empty for real hardware.
    pub kind: String,
    /// Ethernet address, if it has one.
    pub mac: Option<Mac>,
    /// Switched on by the administrator; says nothing of a carrier.
    pub up: bool,
    /// Largest packet, in bytes.
    pub mtu: u32,
    /// Index of the bridge (or bond) that it is a port of.
    pub master: Option<u32>,
    /// Bytes received, since the interface was made.
    pub rx_bytes: u64,
    /// Bytes sent, since the interface was made.
    pub tx_bytes: u64,
    /// Packets received, since the interface was made.
    pub rx_packets: u64,
    /// Packets sent, since the interface was made.
    pub tx_packets: u64,
}

/// A pair of connected interfaces that is to be made.
#[derive(Debug, Clone, Copy)]
pub struct Veth<'a> {
    /// Name of the end in this namespace.
    pub name: &'a str,
    /// Ethernet address of this end; random if absent.
    pub mac: Option<Mac>,
    /// Largest packet of both ends, in bytes; 1500 if absent.
    pub mtu: Option<u32>,
    /// Bridge to make this end a port of.
    pub bridge: Option<&'a str>,
    /// Name of the end in the other namespace.
    pub peer_name: &'a str,
    /// Ethernet address of the other end; random if absent.
    pub peer_mac: Option<Mac>,
    /// The network namespace in which the other end is born.
    pub peer_namespace: BorrowedFd<'a>,
    /// Switch this end on. The other one is switched on in its own namespace, by [`Netlink::set_up`]: the kernel
    /// refuses (`ENOTCONN`) to do that before the two ends are joined (drivers/net/veth.c, `veth_newlink`).
    pub up: bool,
}

impl Netlink {
    /// All interfaces. With a thousand of them this takes milliseconds; ask for one by [`Netlink::link`] if one is enough.
    pub fn links(&self) -> Result<Vec<Link>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.dump(request).map_err(|e| Error::new("list", "network interfaces", e))?;
        Ok(answers.into_iter().filter_map(link_in).collect())
    }

    /// The interface of that name, or `None`.
    pub fn link(&self, name: &str) -> Result<Option<Link>> {
        let message = LinkUnspec::new_with_name(name).build();
        match self.ask(RouteNetlinkMessage::GetLink(message)) {
            Ok(answer) => Ok(link_in(answer)),
            Err(e) if is_gone(&e) => Ok(None),
            Err(e) => Err(Error::new("find interface", name, e)),
        }
    }

    /// The index of an interface that must exist.
    pub(crate) fn index(&self, name: &str) -> Result<u32> {
        let skip_stats = LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]);
        let message = LinkUnspec::new_with_name(name).append_extra_attribute(skip_stats).build();
        match self.ask(RouteNetlinkMessage::GetLink(message)) {
            Ok(RouteNetlinkMessage::NewLink(link)) => Ok(link.header.index),
            Ok(_) => Err(Error::new("find interface", name, io::Error::from(io::ErrorKind::InvalidData))),
            Err(e) => Err(Error::new("find interface", name, e)),
        }
    }

    /// Makes a bridge, switched on, that forwards on a new port at once (no spanning tree, no delay).
    ///
    /// Without `mac` the bridge takes the lowest address of its ports, and a new one whenever that port leaves.
    pub fn create_bridge(&self, name: &str, mac: Option<Mac>) -> Result<()> {
        let mut builder = LinkBridge::new(name).stp_state(BridgeStpState::Disabled).forward_delay(0);
        if let Some(mac) = mac {
            builder = builder.address(mac.0.to_vec());
        }
        self.create(builder.build()).map_err(|e| Error::new("create bridge", name, e))
    }

    /// Makes a veth pair by one message: it exists whole or not at all, and never shows in a wrong namespace.
    pub fn create_veth(&self, veth: &Veth<'_>) -> Result<()> {
        let bridge = veth.bridge.map(|bridge| self.index(bridge)).transpose()?;
        self.create(veth_message(veth, bridge)).map_err(|e| Error::new("create veth", veth.name, e))
    }

    fn create(&self, message: LinkMessage) -> io::Result<()> {
        self.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Removes an interface, of a veth pair both ends; gone already is fine.
    pub fn delete_link(&self, name: &str) -> Result<()> {
        let message = LinkUnspec::new_with_name(name).build();
        match self.change(RouteNetlinkMessage::DelLink(message), 0) {
            Err(e) if !is_gone(&e) => Err(Error::new("delete link", name, e)),
            _ => Ok(()),
        }
    }

    /// Switches an interface on.
    pub fn set_up(&self, name: &str) -> Result<()> {
        self.set("set link up", LinkUnspec::new_with_name(name).up(), name)
    }

    /// Gives an interface its addresses, switches it on, and sends what has no better route to `gateways`: what
    /// [`Netlink::add_address`], [`Netlink::set_up`] and [`Netlink::add_default_route`] do, with one look-up of the name.
    pub fn configure(&self, name: &str, addresses: &[IpNet], gateways: &[IpAddr]) -> Result<()> {
        let index = self.index(name)?;
        addresses.iter().try_for_each(|address| self.add_address_at(index, name, *address))?;
        self.set_up(name)?;
        gateways.iter().try_for_each(|gateway| self.add_default_route_at(index, *gateway, name))
    }

    /// Switches an interface off; its IPv6 addresses and all its routes go.
    pub fn set_down(&self, name: &str) -> Result<()> {
        self.set("set link down", LinkUnspec::new_with_name(name).down(), name)
    }

    /// Makes an interface a port of `bridge`, or of none.
    pub fn set_master(&self, name: &str, bridge: Option<&str>) -> Result<()> {
        let builder = LinkUnspec::new_with_name(name);
        let builder = match bridge {
            Some(bridge) => builder.controller(self.index(bridge)?),
            None => builder.nocontroller(),
        };
        self.set("set bridge of", builder, name)
    }

    fn set(&self, operation: &'static str, builder: LinkMessageBuilder<LinkUnspec>, name: &str) -> Result<()> {
        self.change(RouteNetlinkMessage::SetLink(builder.build()), 0).map_err(|e| Error::new(operation, name, e))
    }

    /// Whether a bridge port may talk only to ports that are not isolated, and to the bridge itself.
    pub fn set_isolated(&self, port: &str, isolated: bool) -> Result<()> {
        let message = LinkBridgePort::new(0).name(port).isolated(isolated).build();
        // Port settings are taken from RTM_NEWLINK only; without NLM_F_CREATE it changes.
        self.change(RouteNetlinkMessage::NewLink(message), 0).map_err(|e| Error::new("isolate bridge port", port, e))
    }
}

fn veth_message(veth: &Veth<'_>, bridge: Option<u32>) -> LinkMessage {
    let end = |builder: LinkMessageBuilder<LinkUnspec>, mac: Option<Mac>| {
        let mut message = builder.build();
        message.attributes.extend(mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
        message.attributes.extend(veth.mtu.map(LinkAttribute::Mtu));
        // By default a veth has a queue for each possible CPU, each with its directory in sysfs. Without XDP or GRO
        // they gain nothing: a packet goes to the backlog of the CPU that sends it, whatever its queue.
        message.attributes.push(LinkAttribute::NumTxQueues(1));
        message.attributes.push(LinkAttribute::NumRxQueues(1));
        message
    };
    let mut peer = end(LinkUnspec::new_with_name(veth.peer_name), veth.peer_mac);
    peer.attributes.push(LinkAttribute::NetNsFd(veth.peer_namespace.as_raw_fd()));

    let near = LinkUnspec::new_with_name(veth.name);
    let mut near = end(if veth.up { near.up() } else { near }, veth.mac);
    near.attributes.extend(bridge.map(LinkAttribute::Controller));
    near.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    near
}

fn is_gone(error: &io::Error) -> bool {
    const ENODEV: i32 = 19;
    errno_of(error) == Some(ENODEV)
}

fn link_in(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: String::new(),
        mac: None,
        up: message.header.flags.contains(LinkFlags::Up),
        mtu: 0,
        master: None,
        rx_bytes: 0,
        tx_bytes: 0,
        rx_packets: 0,
        tx_packets: 0,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok().map(Mac),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(index) => link.master = Some(index),
            LinkAttribute::Stats64(stats) => {
                link.rx_bytes = stats.rx_bytes;
                link.tx_bytes = stats.tx_bytes;
                link.rx_packets = stats.rx_packets;
                link.tx_packets = stats.tx_packets;
            }
            LinkAttribute::LinkInfo(infos) => link.kind = kind_in(&infos),
            _ => {}
        }
    }
    Some(link)
}

fn kind_in(infos: &[LinkInfo]) -> String {
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    });
    kind.unwrap_or_default()
}
