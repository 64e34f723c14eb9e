//! A server's network: eth0, its addresses, its neighbours, the world outside.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::Invocation,
    outside::{OUTSIDE_V4, OUTSIDE_V6, Outside},
    promises,
    server::Running,
    site::Site,
};

promises![
    eth0_has_the_address_of_its_spec,
    servers_reach_each_other,
    it_reaches_the_outside_translated,
    the_host_reaches_it,
    it_cannot_take_anothers_address,
    it_cannot_see_or_change_the_hosts_links,
    the_subnet_avoids_what_the_host_routes,
    without_a_network_there_is_only_lo,
    several_addresses_are_all_there,
    addresses_and_hardware_addresses_are_never_shared,
    the_last_server_takes_bridge_and_firewall_away;
    each of ["busybox", "debian-13"]:
    both_families_work_at_once,
    names_resolve_as_on_the_host
];

/// A ping that has to be answered at the first try.
fn ping(server: &Running, address: &str) -> Result<()> {
    let family = if address.contains(':') { "-6" } else { "-4" };
    let done = server.exec(&["ping", family, "-c", "1", "-W", "5", address])?;
    ensure!(done.code == 0, "{} does not reach {address}:\n{done}", server.name());
    Ok(())
}

fn no_ping(server: &Running, words: &[&str]) -> Result<()> {
    let done = server.exec(&[&["ping", "-c", "1", "-W", "1"], words].concat())?;
    ensure!(done.code != 0, "this should not be answered:\n{done}");
    Ok(())
}

fn both_families_work_at_once(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let (four, six) = (server.ipv4()?, server.ipv6()?);
    let shown = server.sh("ip address show dev eth0")?;
    ensure!(shown.contains(&four) && shown.contains(&six), "{four} and {six} are not in\n{shown}");
    // The link-local one may wait, the one that is used may not.
    let waiting = shown.lines().any(|line| line.contains(&six) && line.contains("tentative"));
    ensure!(!waiting, "{six} waits for duplicate detection:\n{shown}");
    let parsed: Ipv6Addr = six.parse()?;
    ensure!(parsed.segments()[0] & 0xfe00 == 0xfc00, "{six} is no unique local address");
    let (via_four, via_six) = (server.gateway("-4")?, server.gateway("-6")?);
    if template != "busybox" && server.exec(&["ping", "-V"])?.code != 0 {
        return Err(system_tests::promise::skip("the distribution's minimal root has no ping"));
    }
    ping(&server, &via_four)?;
    ping(&server, &via_six)
}

fn eth0_has_the_address_of_its_spec(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let first = template.server("first").start()?;
    let mut octets = first.ipv4()?.parse::<Ipv4Addr>()?.octets();
    octets[3] = 77;
    let wanted = Ipv4Addr::from(octets);
    let wanted = format!("{wanted}/{}", first.ipv4_length()?);
    let server = template.server("web1").with(&format!("--ip {wanted}")).start()?;
    ensure!(wanted.starts_with(&format!("{}/", server.ipv4()?)));
    ensure!(server.sh("ip -4 address show eth0")?.contains(&wanted));
    ensure!(server.gateway("-4")? == first.gateway("-4")?);
    ping(&server, &first.ipv4()?)
}

fn servers_reach_each_other(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let one = template.server("web1").start()?;
    let two = template.server("web2").start()?;
    for (from, to) in [(&one, &two), (&two, &one)] {
        ping(from, &to.ipv4()?)?;
        ping(from, &to.ipv6()?)?;
    }
    Ok(())
}

fn it_reaches_the_outside_translated(site: &Site) -> Result<()> {
    let outside = Outside::new(&site.suffix())?;
    let server = site.template("busybox")?.server("web1").start()?;
    // Nothing out there has a route back to the server: what is answered was translated.
    let back = outside.command(&["ip", "route", "get", &server.ipv4()?]).run()?;
    ensure!(back.code != 0, "the outside has a route back, so it proves nothing:\n{back}");
    ping(&server, OUTSIDE_V4)?;
    ping(&server, OUTSIDE_V6)?;
    // TCP too, and the far end sees the host's address, not the server's.
    let mut listener = outside.spawn(&["busybox", "nc", "-l", "-p", "7000"])?;
    // From a file, not a pipe: the listener has nothing to say and says so at once, and a client that reads
    // that end before `echo` has written would leave with success and nothing sent.
    let sent = server.until(&format!("echo hello > /tmp/hello && nc -w 2 {OUTSIDE_V4} 7000 < /tmp/hello"));
    let heard = listener.wait()?.text();
    sent?;
    ensure!(heard == "hello", "{heard:?}");
    Ok(())
}

fn the_host_reaches_it(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    for (family, address) in [("-4", server.ipv4()?), ("-6", server.ipv6()?)] {
        Invocation::new("busybox").args(["ping", family, "-c", "1", "-W", "5", &address]).succeed()?;
    }
    Ok(())
}

fn it_cannot_take_anothers_address(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let thief = template.server("thief").start()?;
    let owner = template.server("owner").start()?;
    let gateway = thief.gateway("-4")?;
    ping(&thief, &gateway)?;
    // An address that is another's, one that is nobody's, and another hardware address.
    let mut octets = thief.ipv4()?.parse::<Ipv4Addr>()?.octets();
    octets[3] = 200;
    let free = Ipv4Addr::from(octets).to_string();
    let length = thief.ipv4_length()?;
    for stolen in [owner.stop()?.start()?.ipv4()?, free] {
        thief.sh(&format!("ip address add {stolen}/{length} dev eth0"))?;
        no_ping(&thief, &["-I", &stolen, &gateway])?;
        thief.sh(&format!("ip address del {stolen}/{length} dev eth0"))?;
    }
    thief.sh("ip link set eth0 down; ip link set eth0 address 02:11:22:33:44:55; ip link set eth0 up")?;
    no_ping(&thief, &[&gateway])
}

fn it_cannot_see_or_change_the_hosts_links(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let links = server.sh("ls /sys/class/net 2>/dev/null || ip -o link | cut -d : -f 2 | cut -d @ -f 1")?;
    let mut links: Vec<&str> = links.split_whitespace().filter(|name| !name.contains("masters")).collect();
    links.sort_unstable();
    // The kernel makes tunnel devices of its own in each namespace where their modules are loaded.
    links.retain(|name| {
        !["tunl0", "sit0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6gre0"].contains(name)
    });
    ensure!(links == ["eth0", "lo"], "{links:?}");
    server.sh_fails(&format!("ip link set {} down", site.bridge()))?;
    Ok(())
}

fn the_subnet_avoids_what_the_host_routes(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let server = template.server("web1").start()?;
    let first: Ipv4Addr = server.ipv4()?.parse()?;
    let gateway: Ipv4Addr = server.gateway("-4")?.parse()?;
    let length = server.ipv4_length()?;
    drop(server);
    // The same subnet on a link of the host's own; a new installation has to choose another.
    let link = format!("own-{}", site.suffix());
    let ip = |words: &str| Invocation::new("ip").args(words.split(' ')).succeed();
    ip(&format!("link add {link} type veth peer name {link}p"))?;
    let tried = (|| -> Result<Ipv4Addr> {
        ip(&format!("address add {gateway}/{length} dev {link}"))?;
        ip(&format!("link set {link} up"))?;
        let other = Site::new()?;
        let server = other.template("busybox")?.server("web1").start()?;
        let address = server.ipv4()?.parse()?;
        drop(server);
        other.scrub();
        Ok(address)
    })();
    ip(&format!("link delete {link}"))?;
    let second = tried?;
    let network = |address: Ipv4Addr| u32::from(address) >> (32 - length);
    ensure!(network(first) != network(second), "{second} lies in a subnet that the host had already");
    Ok(())
}

fn without_a_network_there_is_only_lo(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--net none").start()?;
    ensure!(!server.sh("ip -o link")?.contains("eth0"));
    ping(&server, "127.0.0.1")?;
    ensure!(server.addresses()?.is_empty());
    Ok(())
}

fn several_addresses_are_all_there(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let first = template.server("first").start()?;
    let mut octets = first.ipv4()?.parse::<Ipv4Addr>()?.octets();
    octets[3] = 91;
    let one = Ipv4Addr::from(octets);
    octets[3] = 92;
    let two = Ipv4Addr::from(octets);
    let length = first.ipv4_length()?;
    let server = template.server("web1").with(&format!("--ip {one}/{length} --ip {two}/{length}")).start()?;
    for address in [one, two] {
        ping(&first, &address.to_string())?;
    }
    ensure!(server.addresses()?.len() >= 2);
    Ok(())
}

fn addresses_and_hardware_addresses_are_never_shared(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let mut seen = std::collections::BTreeSet::new();
    let servers = ["a", "b", "c"].map(|name| template.server(name).start());
    for server in servers {
        let server = server?;
        // Kept running until the end, so that nothing is handed out twice in turn.
        let mut values = server.addresses()?;
        values.push(
            server
                .sh("cat /sys/class/net/eth0/address 2>/dev/null || ip link show eth0 | awk '/ether/ { print $2 }'")?,
        );
        for value in values {
            ensure!(seen.insert(value.clone()), "{value} is there twice");
        }
        std::mem::forget(server);
    }
    for name in ["a", "b", "c"] {
        drop(system_tests::server::Server::adopt(site, name));
    }
    Ok(())
}

fn the_last_server_takes_bridge_and_firewall_away(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let one = template.server("web1").start()?;
    let two = template.server("web2").start()?;
    let bridge = format!("/sys/class/net/{}", site.bridge());
    drop(one);
    ensure!(std::fs::exists(&bridge)?, "the bridge is gone while a server needs it");
    ping(&two, &two.gateway("-4")?)?;
    drop(two);
    ensure!(!std::fs::exists(&bridge)?, "nobody needs the bridge any more");
    let tables = Invocation::new("nft").args(["list", "tables"]).succeed()?.text();
    ensure!(!tables.contains(&format!("vsos_{}", site.suffix())), "{tables}");
    Ok(())
}

fn names_resolve_as_on_the_host(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let of = |text: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
        lines.map(|rest| rest.trim().to_owned()).collect()
    };
    let host = of(&std::fs::read_to_string("/etc/resolv.conf").context("the host has no resolv.conf")?);
    let inside = of(&server.file("/etc/resolv.conf")?);
    if host.iter().any(|address| address.starts_with("127.") || address == "::1") {
        // The host's own resolver listens where the server cannot reach; another one has to stand there.
        ensure!(!inside.iter().any(|address| address.starts_with("127.")), "{inside:?}");
    } else {
        ensure!(inside == host, "the host asks {host:?}, the server {inside:?}");
    }
    ensure!(server.sh("grep -w web1 /etc/hosts")?.contains("web1"));
    Ok(())
}
