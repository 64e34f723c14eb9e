//! What is connected to a server that is suspended, and what hears of it.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Ipv6Addr, TcpStream},
    os::fd::AsRawFd,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{self, AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType};
use system_tests::{
    command::{eventually, patient},
    outside::{OUTSIDE_V4, Outside},
    server::GUEST_LIMIT,
    site::Site,
};

use super::counting;

pub fn a_connection_goes_on_after_resume(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    server.sh("setsid nc -l -p 7000 -e cat >/dev/null 2>&1 </dev/null &")?;
    let address = server.ipv4()?;
    let mut stream = eventually("a connection", GUEST_LIMIT, || TcpStream::connect((address.as_str(), 7000)).ok())?;
    stream.set_read_timeout(Some(patient(GUEST_LIMIT)))?;
    let mut echo = |line: &str| -> Result<()> {
        stream.write_all(line.as_bytes())?;
        let mut answer = vec![0; line.len()];
        stream.read_exact(&mut answer).with_context(|| format!("the echo of {line}"))?;
        ensure!(answer == line.as_bytes(), "{:?} came back for {line}", String::from_utf8_lossy(&answer));
        Ok(())
    };
    echo("before")?;
    site.ok(["suspend", "web1"])?;
    site.ok(["resume", "web1"])?;
    echo("after")?;
    // What is sent while it is not there arrives when it is.
    site.ok(["suspend", "web1"])?;
    stream_later(&mut stream, b"meanwhile")?;
    site.ok(["resume", "web1"])?;
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).context("the echo of what was sent meanwhile")?;
    ensure!(&answer == b"meanwhile");
    Ok(())
}

pub fn stream_later(stream: &mut TcpStream, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).context("send into the void")
}

/// RFC 5227, 2.3, and RFC 4861, 7.2.6: where it has come to, those know it who have not asked.
pub fn neighbours_are_told_where_it_is(site: &Site) -> Result<()> {
    const HEARD_BYTES: usize = 128;
    let server = counting(site, "busybox")?;
    let (four, six): (Ipv4Addr, Ipv6Addr) = (server.ipv4()?.parse()?, server.ipv6()?.parse()?);
    let mac = server.sh("ip link show eth0 | awk '/ether/ { print $2 }'")?;
    let mac = mac.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
    site.ok(["suspend", "web1"])?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket::socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
    // It hears all that is said on the host, until somebody listens.
    socket::setsockopt(&socket, socket::sockopt::RcvBufForce, &(16 << 20))?;
    site.ok(["resume", "web1"])?;
    let bridge = nix::net::if_::if_nametoindex(site.bridge().as_str())? as usize;
    // What asks for the address that sends it, and what overrides where an address is.
    let (four, six) = (four.octets(), six.octets());
    let arp = [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac, &four, &[0; 6], &four].concat();
    let to_all = [&[0x33, 0x33, 0, 0, 0, 1][..], &mac, &[0x86, 0xdd]].concat();
    let claim = [&[0x20, 0, 0, 0][..], &six, &[2, 1], &mac].concat();
    let mut told = [false; 2];
    eventually("an ARP request and a neighbour advertisement", GUEST_LIMIT, || {
        let mut bytes = [0; HEARD_BYTES];
        while let Ok((length, from)) = socket::recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut bytes) {
            // Behind the port: what has come as far as the bridge itself has passed the rules, and everybody there has it.
            let frame = if from?.ifindex() == bridge { &bytes[..length.min(HEARD_BYTES)] } else { continue };
            told[0] |= frame == arp;
            let is_claim = frame.len() == 86 && frame.starts_with(&to_all) && frame.ends_with(&claim);
            told[1] |= is_claim && frame[22..38] == six && frame[54] == 136;
        }
        (told == [true; 2]).then_some(())
    })
    .with_context(|| format!("ARP, advertisement: {told:?}"))
}

/// To somebody outside, who sees the host's address in the place of the server's.
pub fn a_connection_that_it_made_goes_on(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    let outside = Outside::new(&site.suffix())?;
    let program = std::env::current_exe().context("find this program")?.display().to_string();
    let kept = site.path("kept");
    let _listener = outside.spawn(&[&program, "dialogue", "serve", "7000", &kept.display().to_string()])?;
    site.ok(["push", "web1", &program, "/root/dialogue"])?;
    let ask = format!("dialogue ask {} {OUTSIDE_V4}:7000 /root/answered", server.ipv4()?);
    let begin = "chmod +x /root/dialogue; until test -s /root/answered; do";
    server.sh(&format!("setsid sh -c '{begin} /root/dialogue {ask}; sleep 0.2; done' >/root/log 2>&1 </dev/null &"))?;
    let answered = || server.sh("cat /root/answered | wc -l").ok()?.trim().parse::<u64>().ok();
    let more = |than: u64| {
        let seen = || server.sh("cat /root/log").unwrap_or_default();
        eventually("answers from outside", GUEST_LIMIT, || answered().filter(|now| *now > than)).with_context(seen)
    };
    let mut last = more(5)?;
    let pid = server.sh("pidof dialogue")?;
    for _ in 0..2 {
        site.ok(["suspend", "web1"])?;
        std::thread::sleep(Duration::from_secs(1));
        site.ok(["resume", "web1"])?;
        last = more(last + 20)?;
    }
    ensure!(server.sh("pidof dialogue")? == pid, "it is another connection: {}", server.sh("cat /root/log")?);
    let told = std::fs::read_to_string(&kept)?;
    let is_whole = told.lines().enumerate().all(|(at, line)| line == (at + 1).to_string());
    ensure!(is_whole && told.lines().count() as u64 >= last, "{last} were answered: {told}");
    Ok(())
}
