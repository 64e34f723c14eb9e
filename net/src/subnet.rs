//! Choosing addresses. Pure: opens nothing, takes no clock and no random source of its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::Mac;

/// Every candidate of [`choose_v4`] overlaps something that the host already uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "no free IPv4 /24 among 10.77, 10.177, 172.29 and 192.168.128-255; give one in the settings"
)]
pub struct NoFreeSubnet;

/// The first /24 of the candidates that overlaps none of `taken`.
///
/// Candidates, in this order: 10.77.0-255, 10.177.0-255, 172.29.0-255, 192.168.128-255. They start where the defaults
/// of others do not lie (LXC 10.0.3, OpenVPN 10.8, k3s 10.42, Podman 10.88, Kubernetes 10.96 and 10.244,
/// Docker 172.17 and up, libvirt 192.168.122, home routers 192.168.0 and .1). `taken` are the host's routes and the networks of
/// its addresses; default routes (prefix length 0) reach everything and say nothing, so they do not count.
pub fn choose_v4(taken: &[IpNet]) -> Result<Ipv4Net, NoFreeSubnet> {
    let taken: Vec<Ipv4Net> = taken
        .iter()
        .filter_map(|net| match net {
            IpNet::V4(v4) if v4.prefix_len() > 0 => Some(v4.trunc()),
            _ => None,
        })
        .collect();
    candidates()
        .find(|candidate| !taken.iter().any(|net| overlap(candidate, net)))
        .ok_or(NoFreeSubnet)
}

fn candidates() -> impl Iterator<Item = Ipv4Net> {
    let blocks = [(10, 77, 0), (10, 177, 0), (172, 29, 0), (192, 168, 128)];
    blocks.into_iter().flat_map(|(a, b, first)| {
        (first..=255).map(move |c| Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), 24))
    })
}

/// Two prefixes overlap when one holds the other.
fn overlap(a: &Ipv4Net, b: &Ipv4Net) -> bool {
    a.contains(b) || b.contains(a)
}

/// The /64 number 0 of a unique local prefix (RFC 4193); `random` is its global identifier.
pub fn unique_local_v6(random: [u8; 5]) -> Ipv6Net {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&random);
    Ipv6Net::new_assert(Ipv6Addr::from(octets), 64)
}

/// Address number `n` of a network, or `None` where it has no such host: number 0 and, in IPv4, the last one are not hosts.
pub fn host_address(net: IpNet, n: u32) -> Option<IpAddr> {
    if n == 0 {
        return None;
    }
    match net {
        IpNet::V4(net) => {
            let address = Ipv4Addr::from(u32::from(net.network()).checked_add(n)?);
            let usable = net.contains(&address) && address != net.broadcast();
            usable.then_some(IpAddr::V4(address))
        }
        IpNet::V6(net) => {
            let address = Ipv6Addr::from(u128::from(net.network()).checked_add(n.into())?);
            net.contains(&address).then_some(IpAddr::V6(address))
        }
    }
}

/// A locally administered address: `seed` tells installations apart, `id` (below 2^24) the interfaces of one.
pub fn mac_for(id: u32, seed: u16) -> Mac {
    let [high, low] = seed.to_be_bytes();
    let [_, a, b, c] = id.to_be_bytes();
    Mac([0x02, high, low, a, b, c])
}
