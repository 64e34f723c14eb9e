//! Choosing addresses. Pure: opens nothing, takes no clock and no random source of its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::Mac;

/// Every candidate of [`choose_v4`] overlaps something that the host already uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "no free IPv4 network: no /19 of 10.77, 10.177 and 172.29, and no /24 of them and 192.168.128-255; give one in the settings"
)]
pub struct NoFreeSubnet;

/// The first network of the candidates that overlaps none of `taken`: a /19, which has addresses for 8,189 servers, or
/// where the host leaves no such room a /24, for 253.
///
/// Candidates, in this order: the /19 of 10.77, 10.177, 172.29; the /24 10.77.0-255, 10.177.0-255, 172.29.0-255,
/// 192.168.128-255. They start where the defaults of others do not lie (LXC 10.0.3, OpenVPN 10.8, k3s 10.42, Podman 10.88,
/// Kubernetes 10.96 and 10.244, Docker 172.17 and up, libvirt 192.168.122, home routers 192.168.0 and .1). `taken` are the
/// host's routes and the networks of its addresses; default routes (prefix length 0) reach everything and say nothing, so
/// they do not count.
pub fn choose_v4(taken: &[IpNet]) -> Result<Ipv4Net, NoFreeSubnet> {
    let taken: Vec<Ipv4Net> = taken
        .iter()
        .filter_map(|net| match net {
            IpNet::V4(v4) if v4.prefix_len() > 0 => Some(v4.trunc()),
            _ => None,
        })
        .collect();
    candidates().find(|candidate| !taken.iter().any(|net| overlap(candidate, net))).ok_or(NoFreeSubnet)
}

fn candidates() -> impl Iterator<Item = Ipv4Net> {
    let blocks = [(10, 77, 0), (10, 177, 0), (172, 29, 0), (192, 168, 128)];
    let of = |length: u8| move |(a, b, c): (u8, u8, u8)| Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), length);
    let third = |(a, b, first)| (first..=255).map(move |c| (a, b, c));
    // Half of what is left of 192.168 would be one network in the way of many a home or office.
    let large = blocks.into_iter().take(3).flat_map(third).filter(|(_, _, c)| c % 32 == 0).map(of(19));
    large.chain(blocks.into_iter().flat_map(third).map(of(24)))
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

/// A locally administered unicast address (IEEE 802, clause 8.4) that is made of `bits`: those of who shall never have another's.
pub fn local_mac(bits: [u8; 6]) -> Mac {
    let [first, rest @ ..] = bits;
    let [a, b, c, d, e] = rest;
    Mac([first & !0x03 | 0x02, a, b, c, d, e])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn chosen(taken: &[&str]) -> String {
        choose_v4(&nets(taken)).unwrap().to_string()
    }

    #[test]
    fn an_unused_host_gets_the_first_candidate() {
        assert_eq!(chosen(&[]), "10.77.0.0/19");
        assert_eq!(chosen(&["0.0.0.0/0", "192.0.2.2/24", "::/0"]), "10.77.0.0/19");
    }

    #[test]
    fn smaller_larger_and_unaligned_networks_count() {
        assert_eq!(chosen(&["10.77.0.128/25"]), "10.77.32.0/19");
        assert_eq!(chosen(&["10.77.0.9/24", "10.77.33.1/32"]), "10.77.64.0/19");
        assert_eq!(chosen(&["10.77.200.1/16"]), "10.177.0.0/19");
        assert_eq!(chosen(&["10.0.0.0/8"]), "172.29.0.0/19");
        // Two halves of everything, as VPNs route it, leave nothing.
        assert_eq!(choose_v4(&nets(&["0.0.0.0/1", "128.0.0.0/1"])), Err(NoFreeSubnet));
    }

    #[test]
    fn where_no_large_one_is_free_a_small_one_is_better_than_none() {
        // A host with a route into each /19.
        let crumbs: Vec<String> = (0..8)
            .flat_map(|n| ["10.77", "10.177", "172.29"].map(|block| format!("{block}.{}.0/24", n * 32)))
            .collect();
        let crumbs: Vec<&str> = crumbs.iter().map(String::as_str).collect();
        assert_eq!(chosen(&crumbs), "10.77.1.0/24");
    }

    #[test]
    fn the_last_candidate_is_found_and_then_none() {
        let mut taken = vec!["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/17"];
        taken.extend(["192.168.128.0/18", "192.168.192.0/19", "192.168.224.0/20"]);
        taken.extend(["192.168.240.0/21", "192.168.248.0/22", "192.168.252.0/23", "192.168.254.0/24"]);
        assert_eq!(chosen(&taken), "192.168.255.0/24");
        taken.push("192.168.255.255/32");
        assert_eq!(choose_v4(&nets(&taken)), Err(NoFreeSubnet));
    }

    #[test]
    fn a_chosen_network_has_an_address_for_each_of_many_servers() {
        let network = IpNet::V4(choose_v4(&[]).unwrap());
        let addresses: std::collections::BTreeSet<_> = (1..=4097).map(|n| host_address(network, n)).collect();
        assert!(addresses.len() == 4097 && !addresses.contains(&None));
    }

    #[test]
    fn hosts_are_numbered_from_the_network() {
        let v4: IpNet = "10.77.3.9/24".parse().unwrap();
        assert_eq!(host_address(v4, 1), Some("10.77.3.1".parse().unwrap()));
        assert_eq!(host_address(v4, 254), Some("10.77.3.254".parse().unwrap()));
        for none in [0, 255, 256, u32::MAX] {
            assert_eq!(host_address(v4, none), None, "{none}");
        }
        let v6 = IpNet::V6(unique_local_v6([1, 2, 3, 4, 5]));
        assert_eq!(v6.to_string(), "fd01:203:405::/64");
        assert_eq!(host_address(v6, 0x10002), Some("fd01:203:405::1:2".parse().unwrap()));
    }

    #[test]
    fn made_addresses_are_local_and_of_one_station() {
        assert_eq!(local_mac([0xff, 1, 2, 3, 4, 5]).to_string(), "fe:01:02:03:04:05");
        assert_eq!(local_mac([0, 0, 0, 0, 0, 7]).to_string(), "02:00:00:00:00:07");
    }

    proptest! {
        #[test]
        fn what_is_chosen_overlaps_nothing(taken in prop::collection::vec((any::<u32>(), 1u8..=32), 0..40)) {
            let taken: Vec<IpNet> = taken
                .into_iter()
                .map(|(address, length)| IpNet::new(IpAddr::V4(address.into()), length).unwrap())
                .collect();
            if let Ok(free) = choose_v4(&taken) {
                let free = IpNet::V4(free);
                for net in taken {
                    prop_assert!(!net.contains(&free.addr()) && !free.contains(&net.addr()), "{free} {net}");
                }
            }
        }
    }
}
