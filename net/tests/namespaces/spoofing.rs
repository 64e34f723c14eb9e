//! What a guest may not send. Each packet is first shown to arrive without the rules.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use libtest_mimic::Trial;
use net::Mac;

use crate::{
    fixture::{Site, exchange, ip, lost, net, send, udp},
    trial,
};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("spoofing::a_bound_guest_is_not_hindered", bound_guest),
        trial("spoofing::a_port_without_binding_is_mute", mute_port),
        trial("spoofing::a_foreign_ethernet_address_is_dropped", foreign_mac),
        trial("spoofing::a_foreign_ip_address_is_dropped", foreign_address),
        trial("spoofing::a_foreign_address_is_not_answered_for", foreign_answer),
        trial("spoofing::a_guest_is_no_dhcp_server", dhcp_server),
        trial("spoofing::a_guest_is_no_router_and_claims_no_foreign_target", neighbour_discovery),
    ]
}

fn bound_guest() {
    let site = Site::new();
    let _firewall = site.guard();
    for (a, b, gateway) in [(site.a.v4, site.b.v4, "10.77.0.1"), (site.a.v6, site.b.v6, "fd77::1")] {
        let socket = site.a.namespace.udp((a, 0));
        exchange(&socket, &site.b.namespace.udp((b, 0)));
        exchange(&socket, &udp((ip(gateway), 0)));
        // The other way round too: the host asks first.
        exchange(&udp((ip(gateway), 0)), &site.b.namespace.udp((b, 0)));
    }
}

fn mute_port() {
    let site = Site::new();
    let a = site.a.namespace.udp((site.a.v4, 0));
    let host = udp((ip("10.77.0.1"), 0));
    exchange(&a, &host);
    let mut firewall = site.guard();
    exchange(&a, &host);
    firewall.unbind(&site.a.binding()).unwrap();
    lost(&a, &host);
    firewall.bind(&site.a.binding()).unwrap();
    exchange(&a, &host);
}

fn foreign_mac() {
    let site = Site::new();
    let a = site.a.namespace.udp((site.a.v4, 0));
    let host = udp((ip("10.77.0.1"), 0));
    exchange(&a, &host);
    let mut firewall = site.guard();
    firewall.unbind(&site.a.binding()).unwrap();
    let mut wrong = site.a.binding();
    wrong.mac = Mac([2, 0, 0, 0, 0, 99]);
    firewall.bind(&wrong).unwrap();
    lost(&a, &host);
    firewall.bind(&site.a.binding()).unwrap();
    exchange(&a, &host);
}

/// The neighbour's addresses, which are bound, but to another port.
fn foreign_address() {
    let site = Site::new();
    let inside = site.a.namespace.netlink();
    for (own, foreign, length, gateway) in
        [(site.a.v4, site.b.v4, 24, "10.77.0.1"), (site.a.v6, site.b.v6, 64, "fd77::1")]
    {
        let network = net(&format!("{foreign}/{length}"));
        inside.add_address("eth0", network).unwrap();
        let spoofed = site.a.namespace.udp((foreign, 0));
        let honest = site.a.namespace.udp((own, 0));
        let host = udp((ip(gateway), 0));
        assert_eq!(send(&spoofed, &host, "spoofed").unwrap().ip(), foreign);
        let mut firewall = site.guard();
        exchange(&honest, &host);
        lost(&spoofed, &host);
        firewall.remove().unwrap();
    }
}

/// Somebody looks for an address (ARP, neighbour solicitation) that a guest has taken without leave.
fn foreign_answer() {
    let site = Site::new();
    let inside = site.a.namespace.netlink();
    for (gateway, taken) in
        [("10.77.0.1", ["10.77.0.98/24", "10.77.0.99/24"]), ("fd77::1", ["fd77::98/64", "fd77::99/64"])]
    {
        let [shown, hidden] = taken.map(|network| {
            inside.add_address("eth0", net(network)).unwrap();
            site.a.namespace.udp((net(network).addr(), 0))
        });
        let host = udp((ip(gateway), 0));
        send(&host, &shown, "found").unwrap();
        let mut firewall = site.guard();
        lost(&host, &hidden);
        firewall.remove().unwrap();
    }
}

fn dhcp_server() {
    let site = Site::new();
    for (from, to, server, client) in [(site.a.v4, site.b.v4, 67, 68), (site.a.v6, site.b.v6, 547, 546)] {
        let a = site.a.namespace.udp((from, server));
        let b = site.b.namespace.udp((to, client));
        send(&a, &b, "offer").unwrap();
        let mut firewall = site.guard();
        lost(&a, &b);
        // It is the pair of ports that is refused.
        let elsewhere = site.b.namespace.udp((to, 0));
        send(&a, &elsewhere, "word").unwrap();
        firewall.remove().unwrap();
    }
}

/// ICMPv6 messages that only routers and owners of an address may send, from an address that is the guest's own.
fn neighbour_discovery() {
    let site = Site::new();
    let IpAddr::V6(gateway) = ip("fd77::1") else { unreachable!() };
    let (IpAddr::V6(own), IpAddr::V6(to)) = (site.a.v6, site.b.v6) else { unreachable!() };
    let refused = [icmp6(134, &[0; 8]), icmp6(137, &[0; 32]), advertisement(gateway)];
    let allowed = [icmp6(129, b"word"), advertisement(own)];
    let a = site.a.namespace.within(|| icmp6_socket(own));
    let b = site.b.namespace.within(|| icmp6_socket(to));
    for message in refused.iter().chain(&allowed) {
        assert!(arrives(&a, &b, to, message), "type {} without rules", message[0]);
    }
    let _firewall = site.guard();
    for message in &allowed {
        assert!(arrives(&a, &b, to, message), "type {}", message[0]);
    }
    for message in &refused {
        assert!(!arrives(&a, &b, to, message), "type {}", message[0]);
    }
}

/// Type, code, checksum (the kernel's work), four bytes, and the rest.
fn icmp6(kind: u8, rest: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0, 0, 0, 0], rest].concat()
}

fn advertisement(target: Ipv6Addr) -> Vec<u8> {
    icmp6(136, &target.octets())
}

fn icmp6_socket(address: Ipv6Addr) -> socket::Raw {
    socket::Raw::new(SocketAddrV6::new(address, 0, 0, 0))
}

/// Whether `message` comes before a marker that is sent after it and is always allowed.
fn arrives(from: &socket::Raw, at: &socket::Raw, to: Ipv6Addr, message: &[u8]) -> bool {
    const MARKER: &[u8] = &[129, 0, 0, 0, b'm', b'a', b'r', b'k'];
    from.send(message, SocketAddr::from((to, 0)));
    from.send(MARKER, SocketAddr::from((to, 0)));
    let mut seen = false;
    loop {
        let packet = at.receive();
        // Byte 2 and 3 are the checksum.
        let same =
            |wanted: &[u8]| packet.len() == wanted.len() && packet[..2] == wanted[..2] && packet[4..] == wanted[4..];
        if same(MARKER) {
            return seen;
        }
        seen |= same(message);
    }
}

/// Raw ICMPv6 sockets, which the standard library does not have.
mod socket {
    use std::{
        net::{SocketAddr, SocketAddrV6},
        os::fd::{AsRawFd, OwnedFd},
    };

    use nix::sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, SockaddrStorage, bind, recv,
            sendto, setsockopt, socket, sockopt::ReceiveTimeout,
        },
        time::{TimeVal, TimeValLike},
    };

    pub struct Raw(OwnedFd);

    impl Raw {
        pub fn new(address: SocketAddrV6) -> Self {
            let kind = SockType::Raw;
            let socket = socket(AddressFamily::Inet6, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::IcmpV6);
            let socket = socket.expect("raw ICMPv6 socket");
            bind(socket.as_raw_fd(), &SockaddrIn6::from(address)).expect("bind the raw socket");
            setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(5)).unwrap();
            Self(socket)
        }

        pub fn send(&self, message: &[u8], to: SocketAddr) {
            let to = SockaddrStorage::from(to);
            sendto(self.0.as_raw_fd(), message, &to, MsgFlags::empty()).expect("send a raw packet");
        }

        pub fn receive(&self) -> Vec<u8> {
            let mut buffer = vec![0; 256];
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty());
            buffer.truncate(length.expect("a raw packet in time"));
            buffer
        }
    }
}
