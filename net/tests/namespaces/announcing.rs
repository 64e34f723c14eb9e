//! What neighbours believe when a guest's addresses are announced from its link.

use std::{
    net::IpAddr,
    os::fd::AsFd,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use libtest_mimic::Trial;
use net::{Mac, announce::Announcer, firewall::Binding};

use crate::{
    fixture::{BRIDGE, PATIENCE, SILENCE, Site},
    trial,
};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("announcing::a_stale_neighbour_learns_through_the_rules", stale_neighbour),
        trial("announcing::the_bridge_learns_the_port", bridge_learns),
        trial("announcing::a_foreign_address_is_not_announced", foreign_address),
        trial("announcing::a_link_that_is_off_or_not_there_is_an_error", no_link),
    ]
}

/// Where the address was before.
const FORMER: Mac = Mac([2, 0, 0, 0, 0, 99]);

fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split(' ')).output().expect("run ip");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Makes the host believe what was true before.
fn mislead(address: IpAddr) {
    ip(&format!("neigh replace {address} lladdr {FORMER} nud reachable dev {BRIDGE}"));
    assert!(believed(address).contains(&FORMER.to_string()));
}

fn believed(address: IpAddr) -> String {
    ip(&format!("neigh show {address} dev {BRIDGE}"))
}

fn learns(address: IpAddr, mac: Mac, patience: Duration) -> bool {
    is_so(patience, || believed(address).contains(&mac.to_string()))
}

/// Whether it becomes so while `patience` lasts.
fn is_so(patience: Duration, what: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !what() {
        if start.elapsed() > patience {
            return false;
        }
        sleep(Duration::from_millis(20));
    }
    true
}

fn stale_neighbour() {
    let site = Site::new();
    let _firewall = site.guard();
    [site.a.v4, site.a.v6].into_iter().for_each(mislead);
    let announcer = Announcer::open(site.a.namespace.as_fd(), "eth0").unwrap();
    for address in [site.a.v4, site.a.v6] {
        announcer.announce(site.a.mac, address).unwrap();
        assert!(learns(address, site.a.mac, PATIENCE), "{}", believed(address));
    }
}

/// As a link that was off the bridge while its server was moved: it is a port again, and forwards at once.
fn bridge_learns() {
    let site = Site::new();
    let mut firewall = site.guard();
    // An address that the guest's kernel does not have, so that nothing else that it says can teach the bridge.
    let mac = Mac([2, 0, 0, 0, 0, 98]);
    firewall.bind(&Binding { mac, ..site.a.binding() }).unwrap();
    let listed = || {
        let output = Command::new("bridge").args(["fdb", "show", "br", BRIDGE]).output().expect("run bridge");
        String::from_utf8(output.stdout).unwrap()
    };
    let is_known = || listed().lines().any(|line| line.starts_with(&format!("{mac} dev {} ", site.a.port)));
    let announcer = Announcer::open(site.a.namespace.as_fd(), "eth0").unwrap();
    for address in [site.a.v4, site.a.v6] {
        // What the bridge knew goes with the port.
        site.host.set_master(&site.a.port, None).unwrap();
        assert!(!is_known(), "{}", listed());
        site.host.set_master(&site.a.port, Some(BRIDGE)).unwrap();
        announcer.announce(mac, address).unwrap();
        assert!(is_so(PATIENCE, is_known), "{}", listed());
    }
}

/// Whoever announces for a guest is bound by what the guest may say.
fn foreign_address() {
    let site = Site::new();
    let announcer = Announcer::open(site.a.namespace.as_fd(), "eth0").unwrap();
    let is_heeded = |address: IpAddr, patience| {
        mislead(address);
        announcer.announce(site.a.mac, address).unwrap();
        learns(address, site.a.mac, patience)
    };
    let foreign = [site.b.v4, site.b.v6];
    assert!(foreign.iter().all(|address| is_heeded(*address, PATIENCE)), "{}", foreign.map(believed).concat());
    let _firewall = site.guard();
    assert!(!foreign.iter().any(|address| is_heeded(*address, SILENCE)), "{}", foreign.map(believed).concat());
}

fn no_link() {
    let site = Site::new();
    let missing = Announcer::open(site.a.namespace.as_fd(), "eth1").unwrap_err();
    assert_eq!(missing.raw_os_error(), Some(nix::libc::ENODEV), "{missing:?}");
    let announcer = Announcer::open(site.a.namespace.as_fd(), "eth0").unwrap();
    site.a.namespace.netlink().set_down("eth0").unwrap();
    let off = announcer.announce(site.a.mac, site.a.v4).unwrap_err();
    assert_eq!(off.raw_os_error(), Some(nix::libc::ENETDOWN), "{off:?}");
}
