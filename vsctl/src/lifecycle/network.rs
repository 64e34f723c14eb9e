//! Steps that connect a server: its link, what may come out of it, and its addresses inside.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use ipnet::IpNet;
use net::announce::Announcer;
use net::firewall::{Binding, Firewall};
use net::{Mac, Netlink, Veth};
use serde::{Deserialize, Serialize};

use super::inside::Inside;
use super::step::Step;
use super::world::World;
use crate::network::{Networks, mac};
use crate::site::Site;
use crate::spec::NetworkMode;
use crate::store::Server;

/// The name of a server's own interface.
pub const GUEST_LINK: &str = "eth0";

/// A change to the host's or the server's network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkStep {
    /// A pair of links: ours on the bridge, the other one in the server.
    CreateLink {
        /// The host's end.
        link: String,
        /// The bridge it is put on.
        bridge: String,
        /// The server's end.
        guest_mac: String,
    },
    /// What may come out of the link: its own addresses only.
    BindPort {
        /// The nft tables.
        table: String,
        /// The host's end.
        link: String,
        /// The server's MAC address.
        guest_mac: String,
        /// The server's addresses.
        addresses: Vec<IpNet>,
    },
    /// Loopback, addresses and routes inside. Goes with the namespace.
    Configure {
        /// Addresses of eth0; none when the server has only loopback.
        addresses: Vec<IpNet>,
        /// Default gateways.
        gateways: Vec<IpAddr>,
    },
}

/// The steps that connect `server`.
pub fn plan(site: &Site, networks: &Networks, server: &Server) -> Vec<Step> {
    let addresses = server.addresses().to_vec();
    // One default route a family, however many addresses there are.
    let gateways: BTreeSet<IpAddr> = addresses.iter().filter_map(|address| networks.gateway_for(*address)).collect();
    let gateways = gateways.into_iter().collect();
    let configure = Step::Network(NetworkStep::Configure { addresses: addresses.clone(), gateways });
    if server.spec.net == NetworkMode::None {
        return vec![configure];
    }
    let link = site.link(server.record.id);
    let guest_mac = mac(&server.record.uuid).to_string();
    let create = NetworkStep::CreateLink { link: link.clone(), bridge: site.bridge(), guest_mac: guest_mac.clone() };
    let bind = NetworkStep::BindPort { table: site.table(), link, guest_mac, addresses };
    // A guarded port without a binding sends nothing, so the order is free; undone in this one, the slow removal of the
    // link covers the wait that the removal of a binding costs.
    vec![Step::Network(create), Step::Network(bind), configure]
}

impl NetworkStep {
    /// Makes the change.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn apply(&self, world: &mut World) -> Result<()> {
        match self {
            Self::CreateLink { link, bridge, guest_mac } => {
                let guest_mac: Mac = guest_mac.parse().context("the guest's MAC address")?;
                // CRIU takes it in itself, since it must have the number that it had.
                let waits = waiting(link);
                // And nothing may come in before its connections are there: the kernel would end them.
                let inside = world.inside()?;
                let (peer_name, namespace, bridge) = match inside {
                    Inside::Stage(_) => (GUEST_LINK, inside.network_namespace()?, Some(bridge.as_str())),
                    Inside::Restore(_) => (waits.as_str(), kernel::namespace::open_own("net")?, None),
                };
                Ok(world.netlink()?.create_veth(&Veth {
                    name: link,
                    mac: None,
                    mtu: None,
                    bridge,
                    peer_name,
                    peer_mac: Some(guest_mac),
                    peer_namespace: namespace.as_fd(),
                    up: true,
                })?)
            }
            Self::BindPort { link, guest_mac, addresses, .. } => {
                let binding = binding(link, guest_mac, addresses)?;
                Ok(world.firewall()?.bind(&binding)?)
            }
            Self::Configure { addresses, gateways } => {
                let inside = world.inside()?;
                if matches!(inside, Inside::Restore(_)) {
                    // In the images.
                    return Ok(());
                }
                let namespace = inside.network_namespace()?;
                configure(&Netlink::in_namespace(namespace.as_fd())?, addresses, gateways)
            }
        }
    }

    /// Takes the change back.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn undo(&self, world: &mut World) -> Result<()> {
        match self {
            Self::CreateLink { link, .. } => Ok(world.netlink()?.delete_link(link)?),
            Self::BindPort { link, guest_mac, addresses, .. } => {
                let binding = binding(link, guest_mac, addresses)?;
                Ok(world.firewall()?.unbind(&binding)?)
            }
            Self::Configure { .. } => Ok(()),
        }
    }
}

/// Whether a running server's link is off its bridge.
///
/// # Errors
/// When links cannot be listed.
pub fn is_cut_off(world: &World, server: &Server) -> Result<bool> {
    if server.spec.net != NetworkMode::Bridge {
        return Ok(false);
    }
    let link = world.netlink()?.link(&world.site.link(server.record.id))?;
    Ok(link.is_some_and(|link| link.master.is_none()))
}

/// Connects a server's link to its bridge, or takes it off. The link stays up: the kernel marks routes over one that is down, and does not
/// take such routes back from a checkpoint.
///
/// # Errors
/// When the kernel refuses.
pub fn put_on_bridge(world: &World, server: &Server, on: bool) -> Result<()> {
    if server.spec.net == NetworkMode::Bridge {
        let bridge = world.site.bridge();
        world.netlink()?.set_master(&world.site.link(server.record.id), on.then_some(bridge.as_str()))?;
    }
    Ok(())
}

/// Tells all who share the segment of a server's link where its addresses are: it may have come from another host, or have been away for
/// so long that they have forgotten. Its MAC address is what it was, but switches and bridges have last seen that elsewhere.
///
/// They are told from its own end of the link, in the network of its init `pid`, so that each bridge on the way learns the right port; the
/// firewall lets it say no more than the server could. Nothing of the guest's is waited for. Who drops what is returned waits for the kernel a while.
///
/// # Errors
/// When the guest has taken its link away or off, or the kernel refuses.
pub fn announce(server: &Server, pid: i32) -> Result<Option<Announcer>> {
    let addresses = server.addresses();
    if addresses.is_empty() {
        return Ok(None);
    }
    let namespace = kernel::namespace::open(pid, "net")?;
    let announcer = Announcer::open(namespace.as_fd(), GUEST_LINK)?;
    let mac = mac(&server.record.uuid);
    addresses.iter().try_for_each(|address| announcer.announce(mac, address.addr()))?;
    Ok(Some(announcer))
}

/// Tells the firewall that a server has come back, before its link is on the bridge: connections to it go on, whose beginning another
/// host or another boot has seen.
///
/// # Errors
/// When the kernel refuses; of rules that an older vsctl has loaded (`vsctl host reload`).
pub fn note_return(site: &Site, server: &Server) -> Result<()> {
    let addresses: Vec<_> = server.addresses().iter().map(IpNet::addr).collect();
    if server.spec.net == NetworkMode::Bridge {
        Firewall::open(site.table())?.note_return(&addresses)?;
    }
    Ok(())
}

/// The name of the server's end of `link` while it waits in the host's network to be taken in.
pub fn waiting(link: &str) -> String {
    format!("{link}p")
}

fn binding(port: &str, mac: &str, addresses: &[IpNet]) -> Result<Binding> {
    let mac = mac.parse().context("the guest's MAC address")?;
    Ok(Binding { port: port.to_owned(), mac, addresses: addresses.iter().map(IpNet::addr).collect() })
}

fn configure(inside: &Netlink, addresses: &[IpNet], gateways: &[IpAddr]) -> Result<()> {
    inside.set_up("lo")?;
    if addresses.is_empty() {
        return Ok(());
    }
    Ok(inside.configure(GUEST_LINK, addresses, gateways)?)
}

impl fmt::Display for NetworkStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |addresses: &[IpNet]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Self::CreateLink { link, bridge, .. } => write!(out, "create link {link} on {bridge}"),
            Self::BindPort { link, addresses, .. } => write!(out, "bind {link} to {}", list(addresses)),
            Self::Configure { addresses, .. } if addresses.is_empty() => write!(out, "configure lo inside"),
            Self::Configure { addresses, .. } => write!(out, "configure {GUEST_LINK} inside: {}", list(addresses)),
        }
    }
}
