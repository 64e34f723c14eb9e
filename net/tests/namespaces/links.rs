//! Links, addresses and routes.

use std::{
    fs::File,
    io::ErrorKind,
    os::fd::AsFd,
    process::{Command, ExitCode},
};

use libtest_mimic::Trial;
use net::{Netlink, Veth, subnet};

use crate::{
    fixture::{BRIDGE, Namespace, Site, exchange, ip, lost, net, udp},
    trial,
};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("links::creation_is_exclusive_and_removal_is_not", creation_is_exclusive),
        trial("links::a_link_is_described", a_link_is_described),
        trial("links::a_veth_is_born_where_it_belongs", a_veth_is_born_where_it_belongs),
        trial("links::the_kernels_words_reach_the_error", the_kernels_words_reach_the_error),
        trial("links::guests_reach_host_and_each_other_at_once", guests_reach_each_other),
        trial("links::isolated_ports_reach_only_the_host", isolated_ports),
        trial("links::addresses_and_routes_are_listed", addresses_and_routes),
        trial("links::a_bridge_keeps_its_address", a_bridge_keeps_its_address),
        trial("links::a_single_thread_comes_back", a_single_thread_comes_back),
    ]
}

fn creation_is_exclusive() {
    let host = Netlink::open().unwrap();
    host.create_bridge("br", None).unwrap();
    let error = host.create_bridge("br", None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(error.to_string(), "create bridge br");
    let guest = Namespace::new();
    let veth = veth("br", &guest);
    assert_eq!(host.create_veth(&veth).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert!(guest.netlink().link("eth0").unwrap().is_none());

    host.add_address("br", net("10.77.0.1/24")).unwrap();
    let twice = host.add_address("br", net("10.77.0.1/24")).unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::AlreadyExists);
    for _ in 0..2 {
        host.delete_address("br", net("10.77.0.1/24")).unwrap();
    }
    for _ in 0..2 {
        host.delete_link("br").unwrap();
    }
    assert!(host.link("br").unwrap().is_none());
    assert_eq!(host.set_up("br").unwrap_err().raw_os_error(), Some(19));
    assert!(host.create_bridge("a-name-of-16-byt", None).is_err());
}

fn veth<'a>(name: &'a str, guest: &'a Namespace) -> Veth<'a> {
    Veth {
        name,
        mac: None,
        mtu: None,
        bridge: None,
        peer_name: "eth0",
        peer_mac: None,
        peer_namespace: guest.as_fd(),
        up: false,
    }
}

fn a_link_is_described() {
    let site = Site::new();
    let bridge = site.host.link(BRIDGE).unwrap().unwrap();
    assert_eq!((bridge.kind.as_str(), bridge.up, bridge.mtu), ("bridge", true, 1500));
    let port = site.host.link(&site.a.port).unwrap().unwrap();
    assert_eq!((port.kind.as_str(), port.up), ("veth", true));
    assert_eq!(port.master, Some(bridge.index));
    site.host.set_master(&site.a.port, None).unwrap();
    assert_eq!(site.host.link(&site.a.port).unwrap().unwrap().master, None);
    site.host.set_master(&site.a.port, Some(BRIDGE)).unwrap();

    let before = site.host.link(&site.a.port).unwrap().unwrap();
    exchange(&site.a.namespace.udp((site.a.v4, 0)), &udp((ip("10.77.0.1"), 0)));
    let after = site.host.link(&site.a.port).unwrap().unwrap();
    assert!(after.rx_packets > before.rx_packets && after.rx_bytes > before.rx_bytes);
    assert!(after.tx_packets > before.tx_packets && after.tx_bytes > before.tx_bytes);

    let names: Vec<String> = site.host.links().unwrap().into_iter().map(|l| l.name).collect();
    for name in ["lo", BRIDGE, &site.a.port, &site.b.port] {
        assert!(names.iter().any(|n| n == name), "{name} in {names:?}");
    }
    site.host.set_down(&site.a.port).unwrap();
    assert!(!site.host.link(&site.a.port).unwrap().unwrap().up);
}

fn a_veth_is_born_where_it_belongs() {
    let (host, guest) = (Netlink::open().unwrap(), Namespace::new());
    let [near, far] = [1, 2].map(|id| subnet::local_mac([2, 0, 9, 0, 0, id]));
    host.create_veth(&Veth { mac: Some(near), mtu: Some(1400), peer_mac: Some(far), ..veth("nt-9", &guest) }).unwrap();
    let port = host.link("nt-9").unwrap().unwrap();
    assert_eq!((port.mac, port.mtu, port.up, port.master), (Some(near), 1400, false, None));
    let eth0 = guest.netlink().link("eth0").unwrap().unwrap();
    assert_eq!((eth0.mac, eth0.mtu, eth0.up), (Some(far), 1400, false));
    assert!(host.link("eth0").unwrap().is_none());
    host.delete_link("nt-9").unwrap();
    assert!(guest.netlink().link("eth0").unwrap().is_none());
}

fn the_kernels_words_reach_the_error() {
    let site = Site::new();
    site.host.create_bridge("second", None).unwrap();
    let error = site.host.set_master("second", Some(BRIDGE)).unwrap_err();
    assert_eq!(error.to_string(), "set bridge of second");
    const ELOOP: i32 = 40;
    assert_eq!(error.raw_os_error(), Some(ELOOP));
    let reason = error.source.to_string();
    assert!(reason.contains("(os error 40): "), "only a number: {reason}");
    assert!(error.source.to_string().contains("bridge"), "{reason}");
}

fn guests_reach_each_other() {
    let site = Site::new();
    let host = |text: &str| udp((ip(text), 0));
    for (a, b, gateway) in [(site.a.v4, site.b.v4, "10.77.0.1"), (site.a.v6, site.b.v6, "fd77::1")] {
        let socket = site.a.namespace.udp((a, 0));
        assert_eq!(exchange(&socket, &site.b.namespace.udp((b, 0))).ip(), a);
        assert_eq!(exchange(&socket, &host(gateway)).ip(), a);
    }
}

fn isolated_ports() {
    let site = Site::new();
    let a = site.a.namespace.udp((site.a.v4, 0));
    let b = site.b.namespace.udp((site.b.v4, 0));
    exchange(&a, &b);
    for guest in [&site.a, &site.b] {
        site.host.set_isolated(&guest.port, true).unwrap();
    }
    lost(&a, &b);
    exchange(&a, &udp((ip("10.77.0.1"), 0)));
    site.host.set_isolated(&site.a.port, false).unwrap();
    exchange(&a, &b);
}

fn addresses_and_routes() {
    let site = Site::new();
    let inside = site.a.namespace.netlink();
    let eth0 = inside.link("eth0").unwrap().unwrap();
    let addresses: Vec<_> = inside.addresses().unwrap().into_iter().collect();
    for address in ["10.77.0.2/24", "fd77::2/64"] {
        let address = net(address);
        let found = addresses.iter().any(|a| a.address == address && a.link_index == eth0.index);
        assert!(found, "{address} in {addresses:?}");
    }
    let routes = inside.routes().unwrap();
    for (destination, gateway) in
        [("0.0.0.0/0", Some("10.77.0.1")), ("::/0", Some("fd77::1")), ("10.77.0.0/24", None), ("fd77::/64", None)]
    {
        let (destination, gateway) = (net(destination), gateway.map(ip));
        let found = routes.iter().any(|route| {
            (route.destination, route.gateway, route.link_index) == (destination, gateway, Some(eth0.index))
        });
        assert!(found, "{destination} in {routes:?}");
    }
    let kernels_own = net("10.77.0.2/32");
    assert!(routes.iter().all(|route| route.destination != kernels_own));

    let taken: Vec<_> = routes.iter().map(|route| route.destination).collect();
    assert_eq!(subnet::choose_v4(&taken).unwrap().to_string(), "10.77.32.0/19");
    let again = inside.add_default_route(ip("10.77.0.1"), "eth0").unwrap_err();
    assert_eq!(again.kind(), ErrorKind::AlreadyExists);
}

fn a_bridge_keeps_its_address() {
    let site = Site::new();
    let wanted = Some(subnet::local_mac([2, 0, 1, 0, 0, 0]));
    assert_eq!(site.host.link(BRIDGE).unwrap().unwrap().mac, wanted);
    site.host.delete_link(&site.a.port).unwrap();
    assert_eq!(site.host.link(BRIDGE).unwrap().unwrap().mac, wanted);
}

/// Set for the process that [`a_single_thread_comes_back`] starts: these tests' own program, before it has threads.
pub const ALONE: &str = "NET_TEST_ALONE";

fn a_single_thread_comes_back() {
    let program = std::env::current_exe().unwrap();
    let status = Command::new(program).env(ALONE, "1").status().unwrap();
    assert!(status.success(), "{status}");
}

/// What that process does; it started in a namespace of the test's.
pub fn alone() -> ExitCode {
    let own = || std::fs::read_link("/proc/self/ns/net").unwrap();
    let home = own();
    // The test's thread is gone from this process, so the namespace of another one is made the same way.
    let guest = Namespace::new();
    Netlink::open().unwrap().create_bridge("here", None).unwrap();
    // The thread that made it may be counted for a moment still; then the other way is taken, which others test.
    while std::fs::read_dir("/proc/self/task").unwrap().count() > 1 {
        std::thread::yield_now();
    }
    let there = Netlink::in_namespace(guest.as_fd()).unwrap();
    assert_eq!(own(), home);
    assert!(there.link("here").unwrap().is_none());
    there.create_bridge("there", None).unwrap();
    assert!(Netlink::open().unwrap().link("there").unwrap().is_none());

    let not_a_namespace = File::open("/dev/null").unwrap();
    assert!(Netlink::in_namespace(not_a_namespace.as_fd()).is_err());
    let panics = || net::namespace::within(guest.as_fd(), || panic!("on purpose")).unwrap();
    std::panic::set_hook(Box::new(|_| ()));
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
    let stayed_home = own() == home;
    if stayed_home { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
