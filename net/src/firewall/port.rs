//! Which addresses belong to which bridge port: elements of the sets `macs`, `v4`, `v6` and `v6_targets` in our bridge
//! table (`bridge.nft`).
//!
//! A key is a concatenation, each part padded to a multiple of 4 bytes as nft does it: the port's name in 16 bytes,
//! then the address.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv6Addr},
};

use netlink_packet_core::NlasIterator;
use netlink_packet_netfilter::{
    NetfilterProtoFamily,
    nftables::{DataAttribute, ListAttribute, NfTablesMessage, SetElementAttribute, SetElementList, SetElementMessage},
};
use serde::{Deserialize, Serialize};

use super::{
    ENOENT, Firewall,
    nfnetlink::{Object, Request},
};
use crate::{Error, Mac, Result, error::errno_of};

/// `IFNAMSIZ`, with the NUL that ends a name.
const NAME_BYTES: usize = 16;

/// What a guest may send from a bridge port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// Name of the port, the host's end of a veth pair. It need not exist yet.
    pub port: String,
    /// The guest's Ethernet address; its IPv6 link-local address is allowed with it.
    pub mac: Mac,
    /// The guest's addresses.
    pub addresses: Vec<IpAddr>,
}

impl Firewall {
    /// Lets a port send from these addresses, beside those that it already has; twice is fine. All or nothing.
    pub fn bind(&mut self, binding: &Binding) -> Result<()> {
        let fail = |e| Error::new("bind addresses to port", &binding.port, e);
        let requests = elements(binding).map_err(fail)?;
        let requests = requests.iter().map(|(set, key)| {
            let message = NfTablesMessage::NewSetElement(self.element(set, Some(key)));
            Request::create(NetfilterProtoFamily::Bridge, message)
        });
        let requests = requests.collect();
        self.socket.commit(requests).map_err(fail)
    }

    /// Takes these addresses from a port; those that it does not have, or a table that is gone, are fine.
    ///
    /// A port without any binding may send nothing, so that it is safe to do this before the link is deleted.
    pub fn unbind(&mut self, binding: &Binding) -> Result<()> {
        let fail = |e| Error::new("unbind addresses of port", &binding.port, e);
        let mut elements = elements(binding).map_err(fail)?;
        loop {
            // One that is gone would fail the transaction, and taking that back costs the kernel a grace period.
            let mut present = Vec::new();
            for (set, key) in elements {
                if self.has(set, &key).map_err(fail)? {
                    present.push((set, key));
                }
            }
            if present.is_empty() {
                return Ok(());
            }
            let requests = present.iter().map(|(set, key)| {
                let message = NfTablesMessage::DeleteSetElement(self.element(set, Some(key)));
                Request::delete(NetfilterProtoFamily::Bridge, message)
            });
            let requests = requests.collect();
            match self.socket.commit(requests) {
                // Somebody else was faster; each round has fewer of them.
                Err(e) if errno_of(&e) == Some(ENOENT) => elements = present,
                result => return result.map_err(fail),
            }
        }
    }

    fn has(&mut self, set: &str, key: &[u8]) -> io::Result<bool> {
        let get = NfTablesMessage::GetSetElement(self.element(set, Some(key)));
        match self.socket.ask(NetfilterProtoFamily::Bridge, get) {
            Ok(_) => Ok(true),
            Err(e) if errno_of(&e) == Some(ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// All bindings, by port. For finding what was left behind; with many ports this takes milliseconds.
    ///
    /// A port that has more than one Ethernet address, bound one after the other, is listed once for each.
    pub fn bindings(&mut self) -> Result<Vec<Binding>> {
        let mut found: BTreeMap<String, (Vec<Mac>, Vec<IpAddr>)> = BTreeMap::new();
        for set in ["macs", "v4", "v6"] {
            let request = NfTablesMessage::GetSetElement(self.element(set, None));
            let answers = self
                .socket
                .dump(NetfilterProtoFamily::Bridge, request)
                .map_err(|e| Error::new("list port bindings of", &self.table, e))?;
            for key in answers.into_iter().flat_map(keys_in) {
                let Some((name, value)) = key.split_at_checked(NAME_BYTES) else {
                    continue;
                };
                let (macs, addresses) = found.entry(name_in(name)).or_default();
                match *value {
                    [a, b, c, d, e, f, _, _] => macs.push(Mac([a, b, c, d, e, f])),
                    [a, b, c, d] => addresses.push(IpAddr::from([a, b, c, d])),
                    _ => addresses.extend(<[u8; 16]>::try_from(value).map(IpAddr::from)),
                }
            }
        }
        Ok(found.into_iter().flat_map(by_mac).collect())
    }

    pub(super) fn element(&self, set: &str, key: Option<&[u8]>) -> SetElementMessage {
        let mut attributes = vec![SetElementList::Table(self.table.clone()), SetElementList::Set(set.to_owned())];
        attributes.extend(key.map(|key| {
            let key = SetElementAttribute::Key(DataAttribute::Value(key.to_vec()));
            SetElementList::Elements(vec![ListAttribute::Element(vec![key])])
        }));
        SetElementMessage { attributes }
    }
}

fn by_mac((port, (macs, mut addresses)): (String, (Vec<Mac>, Vec<IpAddr>))) -> Vec<Binding> {
    addresses.retain(|address| !macs.iter().any(|mac| *address == mac.link_local()));
    addresses.sort();
    let bindings = macs.into_iter().map(|mac| Binding { port: port.clone(), mac, addresses: addresses.clone() });
    bindings.collect()
}

/// The elements of a binding: name of the set, and key.
fn elements(binding: &Binding) -> io::Result<Vec<(&'static str, Vec<u8>)>> {
    let name = binding.port.as_bytes();
    if name.is_empty() || name.len() >= NAME_BYTES || name.contains(&0) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a name of a network interface"));
    }
    let key = |address: &[u8]| {
        let mut key = name.to_vec();
        key.resize(NAME_BYTES, 0);
        key.extend(address);
        key.resize(key.len().next_multiple_of(4), 0);
        key
    };
    let v6 = |address: Ipv6Addr| {
        let key = key(&address.octets());
        [("v6", key.clone()), ("v6_targets", key)]
    };
    let mut elements = vec![("macs", key(&binding.mac.0))];
    elements.extend(v6(binding.mac.link_local()));
    for address in &binding.addresses {
        match address {
            IpAddr::V4(address) => elements.push(("v4", key(&address.octets()))),
            IpAddr::V6(address) => elements.extend(v6(*address)),
        }
    }
    Ok(elements)
}

/// The keys of the elements in what the kernel sends for a set.
fn keys_in(object: Object) -> Vec<Vec<u8>> {
    // include/uapi/linux/netfilter/nf_tables.h: list, its elements, of each the key, of that the value.
    const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
    const NFTA_LIST_ELEM: u16 = 1;
    const NFTA_SET_ELEM_KEY: u16 = 1;
    const NFTA_DATA_VALUE: u16 = 1;
    let mut found = vec![object.attributes];
    for kind in [NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE] {
        found = found.iter().flat_map(|bytes| values_of(kind, bytes)).collect();
    }
    found
}

fn values_of(kind: u16, bytes: &[u8]) -> Vec<Vec<u8>> {
    let attributes = NlasIterator::new(bytes).map_while(std::result::Result::ok);
    let wanted = attributes.filter(|attribute| attribute.kind() == kind);
    wanted.map(|attribute| attribute.value().to_vec()).collect()
}

fn name_in(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binding(port: &str) -> Binding {
        Binding {
            port: port.to_owned(),
            mac: Mac([2, 0, 0, 0, 0, 7]),
            addresses: vec![[10, 77, 0, 7].into(), "fd00::7".parse().unwrap()],
        }
    }

    #[test]
    fn each_part_of_a_key_is_padded() {
        let elements = elements(&binding("vs-7")).unwrap();
        let sizes: Vec<_> = elements.iter().map(|(set, key)| (*set, key.len())).collect();
        let v6 = [("v6", 32), ("v6_targets", 32)];
        assert_eq!(sizes, [&[("macs", 24)], &v6[..], &[("v4", 20)], &v6[..]].concat());
        assert_eq!(elements[0].1, *b"vs-7\0\0\0\0\0\0\0\0\0\0\0\0\x02\0\0\0\0\x07\0\0");
        assert_eq!(elements[3].1, *b"vs-7\0\0\0\0\0\0\0\0\0\0\0\0\x0a\x4d\0\x07");
    }

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for port in ["", "0123456789abcdef", "a\0b"] {
            let kind = elements(&binding(port)).unwrap_err().kind();
            assert_eq!(kind, io::ErrorKind::InvalidInput, "{port:?}");
        }
        assert!(elements(&binding("0123456789abcde")).is_ok());
    }
}
