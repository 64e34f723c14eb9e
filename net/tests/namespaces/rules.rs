//! Loading and removing the rules, forwarding and address translation, other people's firewalls.

use std::{
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    process::Command,
};

use libtest_mimic::Trial;
use net::{
    Netlink, Veth,
    firewall::{Firewall, ForwardDrop, forward_drops},
    sysctl::{Family, Sysctl},
};

use crate::{
    fixture::{Guest, Namespace, PATIENCE, SILENCE, Site, TABLE, V4, V6, exchange, ip, load, lost, net, nft},
    trial,
};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("rules::come_and_go_without_a_trace", come_and_go),
        trial("rules::bindings_survive_a_second_install", bindings_survive),
        trial("rules::unbinding_is_exact_and_repeatable", unbinding),
        trial("rules::guests_reach_the_outside_under_the_hosts_address", outside),
        trial("rules::a_connection_that_begins_in_its_middle_keeps_the_address_of_who_has_returned", returned),
        trial("rules::a_dropping_firewall_of_others_is_found", dropping_firewall),
        trial("rules::a_missing_table_is_named", missing_table),
    ]
}

fn come_and_go() {
    load("table inet strangers { chain c { accept; }; }");
    let before = nft(&["list", "ruleset"]);
    let site = Site::new();
    let mut firewall = Firewall::open(TABLE).unwrap();
    assert!(!firewall.exists().unwrap());
    firewall.remove().unwrap();
    site.ruleset().install().unwrap();
    assert!(firewall.exists().unwrap());
    firewall.bind(&site.a.binding()).unwrap();
    // nft can list what netlink put.
    let listed = nft(&["list", "table", "bridge", TABLE]);
    assert!(listed.contains(&site.a.mac.to_string()), "{listed}");
    nft(&["delete", "table", "inet", TABLE]);
    assert!(!firewall.exists().unwrap());
    site.ruleset().install().unwrap();
    firewall.remove().unwrap();
    assert!(!firewall.exists().unwrap());
    assert_eq!(nft(&["list", "ruleset"]), before);
}

fn bindings_survive() {
    let site = Site::new();
    let mut firewall = site.guard();
    let rules = |text: String| text.lines().filter(|l| l.contains("saddr")).count();
    let before = rules(nft(&["list", "table", "bridge", TABLE]));
    site.ruleset().install().unwrap();
    assert_eq!(rules(nft(&["list", "table", "bridge", TABLE])), before);
    let wanted = [site.a.binding(), site.b.binding()];
    assert_eq!(firewall.bindings().unwrap(), wanted);
    let a = site.a.namespace.udp((site.a.v4, 0));
    exchange(&a, &site.b.namespace.udp((site.b.v4, 0)));
}

fn unbinding() {
    let site = Site::new();
    let mut firewall = site.guard();
    let a = site.a.namespace.udp((site.a.v4, 0));
    let b = site.b.namespace.udp((site.b.v4, 0));
    exchange(&a, &b);
    firewall.bind(&site.a.binding()).unwrap();
    for _ in 0..2 {
        firewall.unbind(&site.a.binding()).unwrap();
    }
    assert_eq!(firewall.bindings().unwrap(), [site.b.binding()]);
    lost(&a, &b);
    // One of several is gone already: the others go all the same.
    let mut half = site.b.binding();
    half.addresses.truncate(1);
    firewall.unbind(&half).unwrap();
    firewall.unbind(&site.b.binding()).unwrap();
    assert_eq!(firewall.bindings().unwrap(), []);
    firewall.remove().unwrap();
    firewall.unbind(&site.b.binding()).unwrap();
}

/// The outside: a namespace on a link of the host's, which knows no way to the guests.
fn uplink(host: &Netlink) -> Namespace {
    let outside = Namespace::new();
    host.create_veth(&Veth {
        name: "uplink",
        mac: None,
        mtu: None,
        bridge: None,
        peer_name: "eth0",
        peer_mac: None,
        peer_namespace: outside.as_fd(),
        up: true,
    })
    .unwrap();
    let there = outside.netlink();
    there.set_up("eth0").unwrap();
    for (ours, theirs) in [("198.51.100.1/24", "198.51.100.2/24"), ("2001:db8::1/64", "2001:db8::2/64")] {
        host.add_address("uplink", net(ours)).unwrap();
        there.add_address("eth0", net(theirs)).unwrap();
    }
    outside
}

fn outside() {
    let site = Site::new();
    let outside = uplink(&site.host);
    for family in [Family::V4, Family::V6] {
        Sysctl::default().enable_forwarding(family).unwrap();
    }
    let server4 = outside.udp((ip("198.51.100.2"), 0));
    let server6 = outside.udp((ip("2001:db8::2"), 0));
    let a4 = site.a.namespace.udp((site.a.v4, 0));
    let a6 = site.a.namespace.udp((site.a.v6, 0));
    // Without translation a packet arrives under the guest's own address, to which the outside has no way back.
    let mut firewall = site.guard();
    assert_eq!(exchange(&a4, &server4).ip(), ip("198.51.100.1"));
    assert_eq!(exchange(&a6, &server6).ip(), ip("2001:db8::1"));
    // Neighbours keep their own.
    let b4 = site.b.namespace.udp((site.b.v4, 0));
    assert_eq!(exchange(&a4, &b4).ip(), site.a.v4);
    firewall.remove().unwrap();
    let fresh = site.a.namespace.udp((site.a.v4, 0));
    assert_ne!(crate::fixture::send(&fresh, &server4, "bare").unwrap().ip(), ip("198.51.100.1"));
}

fn returned() {
    let site = Site::new();
    let outside = uplink(&site.host);
    for (family, way) in [(Family::V4, [V4, "198.51.100.1"]), (Family::V6, [V6, "2001:db8::1"])] {
        Sysctl::default().enable_forwarding(family).unwrap();
        let [network, gateway] = way;
        let added = outside.within(|| Command::new("ip").args(["route", "add", network, "via", gateway]).status());
        assert!(added.unwrap().success());
    }
    // Before there are rules: nobody follows connections here, and so nobody knows who has made these.
    let connect = |guest: &Guest, address: IpAddr| {
        let listener = guest.namespace.within(|| TcpListener::bind((address, 80))).unwrap();
        let there = outside.within(|| TcpStream::connect(listener.local_addr().unwrap())).unwrap();
        there.set_read_timeout(Some(PATIENCE)).unwrap();
        (listener.accept().unwrap().0, there)
    };
    let known = [connect(&site.a, site.a.v4), connect(&site.a, site.a.v6)];
    let (mut unknown, mut far) = connect(&site.b, site.b.v4);
    let mut firewall = site.guard();
    for _ in 0..2 {
        firewall.note_return(&[site.a.v4, site.a.v6]).unwrap();
    }
    // The rules come anew, and what they know of guests stays.
    site.ruleset().install().unwrap();
    let mut heard = [0; 5];
    for (mut guest, mut there) in known {
        guest.write_all(b"hello").unwrap();
        there.read_exact(&mut heard).unwrap();
        assert_eq!(heard, *b"hello");
    }
    // One that nobody has noted is taken for a guest that has made the connection itself.
    far.set_read_timeout(Some(SILENCE)).unwrap();
    unknown.write_all(b"hello").unwrap();
    far.read_exact(&mut heard).unwrap_err();
}

fn dropping_firewall() {
    let site = Site::new();
    site.ruleset().install().unwrap();
    assert_eq!(forward_drops().unwrap(), []);
    load(
        "table ip filter { chain FORWARD { type filter hook forward priority filter; policy drop; }; \
         chain INPUT { type filter hook input priority filter; policy drop; }; chain USER { drop; }; }",
    );
    let wanted = ForwardDrop { family: "ip", table: "filter".to_owned(), chain: "FORWARD".to_owned() };
    assert_eq!(forward_drops().unwrap(), [wanted]);
}

fn missing_table() {
    let site = Site::new();
    let mut firewall = Firewall::open("nosuchtable").unwrap();
    let error = firewall.bind(&site.a.binding()).unwrap_err();
    assert_eq!(error.to_string(), format!("bind addresses to port {}", site.a.port));
    assert_eq!(error.raw_os_error(), Some(2));
    assert_eq!(firewall.bindings().unwrap_err().raw_os_error(), Some(2));
}
