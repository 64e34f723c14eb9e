//! Frames that no ordinary program sends. The guest's own nftables bend its packets on their way out; a table of the
//! test's, behind ours on the same hook, counts what comes through.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use libtest_mimic::Trial;

use crate::{
    fixture::{PATIENCE, SILENCE, Site, apart, load, nft},
    trial,
};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("frames::arp_with_a_foreign_sender_is_dropped", arp_sender),
        trial("frames::arp_of_another_shape_is_dropped", arp_shape),
        trial("frames::other_protocols_are_dropped", other_protocols),
        trial("frames::what_a_guest_without_address_asks_is_let_through", questions),
        trial("frames::duplicate_detection_is_let_through", duplicate_detection),
    ]
}

/// Bends what guest a sends, and counts at the host what looks like `seen`: without our rules, and with them.
fn counted(bend: &str, seen: &str, patience: Duration) -> (u64, u64) {
    let (bend, seen) = (bend.to_owned(), seen.to_owned());
    // A host of its own each time: a trial has several cases.
    apart(move || counted_here(&bend, &seen, patience)).unwrap_or_else(|text| panic!("{text}"))
}

fn counted_here(bend: &str, seen: &str, patience: Duration) -> (u64, u64) {
    let site = Site::new();
    site.a.namespace.within(|| load(bend));
    watch(&site, seen);
    let socket = site.a.namespace.udp(([0, 0, 0, 0], 68));
    // Nobody has these addresses: each is asked for by ARP. The last goes to the host itself.
    let speak = |unknown: u8| {
        for to in [[10, 77, 0, unknown], [10, 77, 0, 1]] {
            socket.send_to(b"word", (std::net::Ipv4Addr::from(to), 67)).expect("send");
        }
    };
    speak(50);
    let without = wait_for(1, PATIENCE);
    let _firewall = site.guard();
    sleep(SILENCE);
    let before = count();
    speak(51);
    (without, wait_for(before + 1, patience) - before)
}

fn watch(site: &Site, seen: &str) {
    let port = &site.a.port;
    load(&format!(
        "table bridge watch {{ chain seen {{ type filter hook prerouting priority filter; \
         iifname \"{port}\" {seen} counter; }}; }}"
    ));
}

fn count() -> u64 {
    let listed = nft(&["list", "table", "bridge", "watch"]);
    let packets = listed.split("counter packets ").nth(1).expect(&listed);
    packets.split(' ').next().unwrap().parse().unwrap()
}

/// The count when it has reached `packets`, or when the time is over.
fn wait_for(packets: u64, patience: Duration) -> u64 {
    let start = Instant::now();
    loop {
        let seen = count();
        if seen >= packets || start.elapsed() > patience {
            return seen;
        }
        sleep(Duration::from_millis(20));
    }
}

fn dropped(bend: &str, seen: &str) {
    let (without, with) = counted(bend, seen, SILENCE);
    assert!(without > 0, "never sent: {bend}");
    assert_eq!(with, 0, "came through: {bend}");
}

fn passes(bend: &str, seen: &str) {
    let (without, with) = counted(bend, seen, PATIENCE);
    assert!(without > 0, "never sent: {bend}");
    assert!(with > 0, "did not come through: {bend}");
}

fn arp(change: &str) -> String {
    format!("table arp bend {{ chain out {{ type filter hook output priority 0; {change}; }}; }}")
}

fn ip(change: &str) -> String {
    format!("table ip bend {{ chain out {{ type filter hook output priority 0; {change}; }}; }}")
}

fn ether(change: &str) -> String {
    format!("table netdev bend {{ chain out {{ type filter hook egress device eth0 priority 0; {change}; }}; }}")
}

fn arp_sender() {
    dropped(&arp("arp saddr ip set 10.77.0.3"), "arp saddr ip 10.77.0.3");
    dropped(&arp("arp saddr ether set 02:00:00:00:00:63"), "arp saddr ether 02:00:00:00:00:63");
    passes(&arp("arp saddr ip 10.77.0.2 accept"), "arp saddr ip 10.77.0.2");
}

fn arp_shape() {
    dropped(&arp("arp htype set 6"), "arp htype 6");
    dropped(&arp("arp ptype set 0x0801"), "arp ptype 0x0801");
    dropped(&arp("arp hlen set 5"), "arp hlen 5");
    dropped(&arp("arp plen set 5"), "arp plen 5");
}

fn other_protocols() {
    // Experimental, VLAN, provider's VLAN, PPPoE.
    for kind in ["0x88b5", "0x8100", "0x88a8", "0x8864"] {
        let bend = ether(&format!("ether type ip ether type set {kind}"));
        dropped(&bend, "ether type != { arp, ip, ip6 }");
    }
}

fn questions() {
    passes(&arp("arp saddr ip set 0.0.0.0"), "arp saddr ip 0.0.0.0");
    let asks = "ip saddr 0.0.0.0 udp sport 68 udp dport 67";
    passes(&ip("udp dport 67 ip saddr set 0.0.0.0"), asks);
    let other = ip("udp dport 67 udp sport set 69 ip saddr set 0.0.0.0");
    dropped(&other, "ip saddr 0.0.0.0 udp sport 69");
}

fn duplicate_detection() {
    let site = Site::new();
    let _firewall = site.guard();
    watch(&site, "ip6 saddr :: icmpv6 type nd-neighbor-solicit");
    // An interface that comes up looks for its own link-local address, after up to a second.
    let inside = site.a.namespace.netlink();
    inside.set_down("eth0").unwrap();
    inside.set_up("eth0").unwrap();
    assert!(wait_for(1, PATIENCE) > 0, "no neighbour solicitation came through");
}
