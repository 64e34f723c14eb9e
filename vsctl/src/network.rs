//! The networks of a site: chosen once so that they collide with no route of the host, and kept in `network.toml`.

use std::fs;
use std::io;
use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use net::{Mac, Netlink};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::site::Site;
use crate::spec::is_host_address;

/// The host number of the bridge in each network: the servers' gateway.
const GATEWAY: u32 = 1;

/// The networks that the servers of a site share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Networks {
    /// IPv4, reached from outside through the host's addresses.
    pub ipv4: Ipv4Net,
    /// IPv6, a unique local one unless the settings say otherwise.
    pub ipv6: Ipv6Net,
}

impl Networks {
    /// The networks of the site; chosen and written down at the first call.
    ///
    /// # Errors
    /// When no free network is left, or the disk refuses.
    pub fn of(site: &Site) -> Result<Self> {
        let file = site.state().join("network.toml");
        match fs::read_to_string(&file) {
            Ok(text) => return toml::from_str(&text).with_context(|| format!("read {}", file.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        }
        let chosen = Self::choose(site)?;
        fs::create_dir_all(site.state()).with_context(|| format!("make {}", site.state().display()))?;
        let text = toml::to_string(&chosen).context("write the networks as TOML")?;
        kernel::file::write_atomic(&file, text.as_bytes())?;
        Ok(chosen)
    }

    fn choose(site: &Site) -> Result<Self> {
        let ipv4 = match site.settings.ipv4 {
            Some(given) => given,
            None => {
                let netlink = Netlink::open()?;
                let mut taken: Vec<IpNet> = netlink.routes()?.into_iter().map(|route| route.destination).collect();
                taken.extend(netlink.addresses()?.into_iter().map(|address| address.address));
                net::subnet::choose_v4(&taken)
                    .map_err(|error| Failure::new(Exit::Failed, error.to_string()).hint("set ipv4 in vsos.toml"))?
            }
        };
        let mut random = [0u8; 5];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).context("read random bytes")?;
        let ipv6 = site.settings.ipv6.unwrap_or_else(|| net::subnet::unique_local_v6(random));
        Ok(Self { ipv4, ipv6 })
    }

    fn both(&self) -> [IpNet; 2] {
        [self.ipv4.into(), self.ipv6.into()]
    }

    /// The bridge's own addresses.
    pub fn gateways(&self) -> Vec<IpNet> {
        self.both().iter().filter_map(|net| numbered(*net, GATEWAY)).collect()
    }

    /// The gateway for servers with `address`.
    pub fn gateway_for(&self, address: IpNet) -> Option<IpAddr> {
        let net = self.both().into_iter().find(|net| net.contains(&address.addr()))?;
        net::subnet::host_address(net, GATEWAY)
    }

    /// The addresses that number `id` stands for: its own as long as nobody asked for them by name.
    pub fn defaults_of(&self, id: u32) -> Vec<IpNet> {
        self.both().iter().filter_map(|net| numbered(*net, GATEWAY + id)).collect()
    }

    /// Checks an address that the user asked for.
    ///
    /// # Errors
    /// When it is no host's, outside the site's networks, or the gateway's.
    pub fn check(&self, address: IpNet) -> Result<(), Failure> {
        let refused = |why: &str| {
            let nets = format!("the servers' networks are {} and {}", self.ipv4, self.ipv6);
            Failure::new(Exit::BadParameter, format!("ip: {address} {why}")).hint(nets)
        };
        let Some(net) = self.both().into_iter().find(|net| net.contains(&address.addr())) else {
            return Err(refused("is outside the servers' networks"));
        };
        if address.prefix_len() != net.prefix_len() {
            return Err(refused(&format!("must have the prefix length {}", net.prefix_len())));
        }
        if !is_host_address(address) {
            return Err(refused("is no host's address"));
        }
        if self.gateway_for(address) == Some(address.addr()) {
            return Err(refused("is the gateway's"));
        }
        Ok(())
    }
}

fn numbered(net: IpNet, number: u32) -> Option<IpNet> {
    let address = net::subnet::host_address(net, number)?;
    IpNet::new(address, net.prefix_len()).ok()
}

/// The MAC address of eth0 in the server `uuid`: it keeps it wherever it goes, so that no neighbour has to learn another.
pub fn mac(uuid: &str) -> Mac {
    let digest: [u8; 32] = Sha256::digest(uuid).into();
    let [a, b, c, d, e, f, ..] = digest;
    net::subnet::local_mac([a, b, c, d, e, f])
}

/// The MAC address of the bridge.
pub fn bridge_mac(site: &Site) -> Mac {
    let [_, _, high, low] = site.seed().to_be_bytes();
    net::subnet::local_mac([0x02, high, low, 0, 0, 0])
}

/// The file that says who has `address`.
pub fn reservation(site: &Site, address: IpNet) -> std::path::PathBuf {
    site.state().join("addresses").join(address.addr().to_string())
}

/// Who has `address`, if anybody.
pub fn owner(site: &Site, address: IpNet) -> Option<Name> {
    fs::read_to_string(reservation(site, address)).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks() -> Networks {
        Networks { ipv4: "10.77.0.0/24".parse().unwrap(), ipv6: "fd12::/64".parse().unwrap() }
    }

    #[test]
    fn numbers_become_addresses_beside_the_gateway() {
        let text = |list: Vec<IpNet>| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        assert_eq!(text(networks().gateways()), "10.77.0.1/24 fd12::1/64");
        assert_eq!(text(networks().defaults_of(1)), "10.77.0.2/24 fd12::2/64");
        // The IPv4 network is full, the IPv6 one never is.
        assert_eq!(text(networks().defaults_of(300)), "fd12::12d/64");
    }

    #[test]
    fn every_server_that_the_settings_allow_has_an_address_of_each_family() {
        let chosen = Networks { ipv4: net::subnet::choose_v4(&[]).unwrap(), ..networks() };
        let most = crate::site::Settings::default().max_servers;
        let mut seen = std::collections::BTreeSet::new();
        for id in 1..=most {
            let own = chosen.defaults_of(id);
            assert_eq!(own.iter().filter(|address| matches!(address, IpNet::V4(_))).count(), 1, "server {id}");
            own.into_iter().for_each(|address| {
                chosen.check(address).unwrap();
                assert!(seen.insert(address), "{address} twice");
            });
        }
        assert_eq!(seen.len(), 2 * most as usize);
    }

    #[test]
    fn an_installation_keeps_the_network_it_has() {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        fs::create_dir_all(site.state()).unwrap();
        fs::write(site.state().join("network.toml"), "ipv4 = \"10.77.9.0/24\"\nipv6 = \"fd12::/64\"\n").unwrap();
        assert_eq!(Networks::of(&site).unwrap().ipv4.to_string(), "10.77.9.0/24");
    }

    #[test]
    fn addresses_that_cannot_work_are_refused() {
        for (address, word) in [
            ("192.168.1.5/24", "outside"),
            ("10.77.0.5/16", "prefix"),
            ("10.77.0.0/24", "no host"),
            ("10.77.0.255/24", "no host"),
            ("10.77.0.1/24", "gateway"),
            ("fd12::1/64", "gateway"),
        ] {
            let message = networks().check(address.parse().unwrap()).unwrap_err().to_string();
            assert!(message.contains(word), "{address}: {message}");
        }
        networks().check("10.77.0.5/24".parse().unwrap()).unwrap();
        networks().check("fd12::5/64".parse().unwrap()).unwrap();
    }
}
