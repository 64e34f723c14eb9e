//! Telling the neighbours where an address is now: frames that nobody has asked for.
//!
//! [`arp`] and [`advertisement`] build them and do nothing else; an [`Announcer`] lets them out.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    ifaddrs::getifaddrs,
    sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket},
};

use crate::{Error, Mac, Result, namespace};

/// ICMPv6 as a next header (RFC 4443, 1).
const ICMPV6: u8 = 58;
/// All nodes of a segment (RFC 4291, 2.7.1), and the Ethernet address that goes with it (RFC 2464, 7).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);
const BROADCAST: Mac = Mac([0xff; 6]);

/// An ARP announcement (RFC 5227, 2.3 and 3): a request to all in which `address` asks for itself. A request, since some who
/// listen heed no reply that they have not asked for.
pub fn arp(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    // Ethernet, IPv4, the lengths of their addresses, request (RFC 826).
    const HEAD: [u8; 8] = [0, 1, 0x08, 0x00, 6, 4, 0, 1];
    let address = address.octets();
    // The hardware address that is asked for is heeded by nobody: zeros (RFC 5227, 2.1.1).
    let asked = [0; 6];
    [&BROADCAST.0[..], &mac.0, &[0x08, 0x06], &HEAD, &mac.0, &address, &asked, &address].concat()
}

/// An unsolicited Neighbour Advertisement (RFC 4861, 4.4 and 7.2.6) from `address` to all nodes, which overrides what they
/// believed.
pub fn advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    // Its type and code; then, behind the checksum: no router, not solicited, override.
    const KIND: [u8; 2] = [136, 0];
    const FLAGS: [u8; 4] = [0x20, 0, 0, 0];
    // An option of 8 bytes: the target's link-layer address (RFC 4861, 4.6.1).
    const OPTION: [u8; 2] = [2, 1];
    let (from, to) = (address.octets(), ALL_NODES.octets());
    let message = |checksum: [u8; 2]| [&KIND[..], &checksum, &FLAGS, &from, &OPTION, &mac.0].concat();
    let bare = message([0; 2]);
    let length = bare.len() as u8;
    let pseudo_header = [&from[..], &to, &[0, 0, 0, length, 0, 0, 0, ICMPV6]].concat();
    let checksum = checksum(&[pseudo_header, bare].concat());
    // Version 6, and the hop limit that shows that it has crossed no router (RFC 4861, 7.1.2).
    let header = [&[0x60, 0, 0, 0, 0, length, ICMPV6, 255][..], &from, &to].concat();
    [&ALL_NODES_MAC.0[..], &mac.0, &[0x86, 0xdd], &header, &message(checksum)].concat()
}

/// The Internet checksum of an even number of bytes (RFC 1071); for ICMPv6 a pseudo-header is among them (RFC 8200, 8.1).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks_exact(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// A link of another namespace that frames can be sent from, as if somebody there had done it.
///
/// To drop it takes a grace period of the kernel's RCU, some milliseconds (net/packet/af_packet.c, `packet_release`): do that
/// when nobody waits.
#[derive(Debug)]
pub struct Announcer {
    socket: OwnedFd,
    link: LinkAddr,
    name: String,
}

impl Announcer {
    /// Opens a way out by `link` of the network namespace `netns`; nothing is received there.
    pub fn open(netns: BorrowedFd<'_>, link: &str) -> Result<Self> {
        let opened = namespace::within(netns, || {
            // Without a protocol it takes in no packet (packet(7)).
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
            Ok((socket, link_address(link)?))
        })?;
        let (socket, address) = opened.map_err(|e| Error::new("open packet socket at", link, e))?;
        Ok(Self { socket, link: address, name: link.to_owned() })
    }

    /// Tells all on the segment, once, that `address` is at `mac`, and by the way of the frame all bridges where that is.
    ///
    /// Does not wait: a link that takes no frames is an error.
    pub fn announce(&self, mac: Mac, address: IpAddr) -> Result<()> {
        match address {
            IpAddr::V4(v4) => self.send(&arp(mac, v4)),
            IpAddr::V6(v6) => self.send(&advertisement(mac, v6)),
        }
        .map_err(|e| Error::new("announce", format!("{address} from {}", self.name), e))
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        sendto(self.socket.as_raw_fd(), frame, &self.link, MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }
}

/// The address of a link of the calling thread's namespace for packet sockets. Only by way of the list of all it can be had
/// without unsafe code.
fn link_address(name: &str) -> io::Result<LinkAddr> {
    let of_link = getifaddrs()?.filter(|found| found.interface_name == name);
    let mut addresses = of_link.filter_map(|found| found.address?.as_link_addr().copied());
    addresses.next().ok_or_else(|| io::Error::from_raw_os_error(nix::libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([0x02, 0xab, 0xcd, 0x00, 0x00, 0x07]);

    #[test]
    fn an_arp_announcement_is_a_request_for_oneself() {
        let wanted = b"\xff\xff\xff\xff\xff\xff\x02\xab\xcd\x00\x00\x07\x08\x06\
                       \x00\x01\x08\x00\x06\x04\x00\x01\
                       \x02\xab\xcd\x00\x00\x07\x0a\x4d\x00\x07\
                       \x00\x00\x00\x00\x00\x00\x0a\x4d\x00\x07";
        assert_eq!(arp(MAC, Ipv4Addr::new(10, 77, 0, 7)), wanted);
    }

    #[test]
    fn an_advertisement_overrides_and_goes_to_all_nodes() {
        let wanted = b"\x33\x33\x00\x00\x00\x01\x02\xab\xcd\x00\x00\x07\x86\xdd\
                       \x60\x00\x00\x00\x00\x20\x3a\xff\
                       \xfd\x77\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\
                       \xff\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\
                       \x88\x00\x8b\xef\x20\x00\x00\x00\
                       \xfd\x77\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\
                       \x02\x01\x02\xab\xcd\x00\x00\x07";
        assert_eq!(advertisement(MAC, "fd77::7".parse().unwrap()), wanted);
    }

    /// With the checksum in it the sum is all ones, so the checksum of the whole is zero (RFC 1071, 1).
    #[test]
    fn whoever_checks_an_advertisement_finds_it_whole() {
        for address in ["fd77::7", "2001:db8::ffff:ffff", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe", "::1"] {
            let frame = advertisement(MAC, address.parse().unwrap());
            let (addresses, message) = (&frame[22..54], &frame[54..]);
            let whole = [addresses, &[0, 0, 0, 32, 0, 0, 0, 58], message].concat();
            assert_eq!(checksum(&whole), [0, 0], "{address}");
        }
        // The example of RFC 1071, 3.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), (!0xddf2_u16).to_be_bytes());
    }
}
