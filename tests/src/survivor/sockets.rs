//! Sockets, with bytes and descriptors on the way.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kernel::channel;
use nix::{
    fcntl::OFlag,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket, socketpair, sockopt},
    unistd::pipe2,
};

use super::{Check, Kind, same};

pub const KINDS: &[Kind] = &[
    ("unix-stream-pair", unix_pair),
    ("unix-stream-half-closed", unix_half_closed),
    ("unix-datagrams", unix_datagrams),
    ("unix-sequenced-packets", unix_packets),
    ("unix-listener-with-one-waiting", unix_waiting),
    ("unix-listener-without-a-name", unix_removed),
    ("unix-abstract-listener", unix_abstract),
    ("descriptor-on-the-way", descriptor_on_the_way),
    ("tcp-connection", |_| tcp(Ipv4Addr::LOCALHOST.into())),
    ("tcp-connection-over-ipv6", |_| tcp(Ipv6Addr::LOCALHOST.into())),
    ("tcp-half-closed", tcp_half_closed),
    ("tcp-listener", tcp_listener),
    ("udp", udp),
    ("socket-options", options),
    ("netlink-socket", netlink),
    ("packet-socket", packet),
];

const IN_FLIGHT: &[u8] = b"sent and not yet received";
const PATIENCE: Option<Duration> = Some(Duration::from_secs(60));

/// Takes what is on its way from `to` to `from`, and sends it again.
fn in_flight(what: &str, from: &mut impl Read, to: &mut impl Write) -> Result<()> {
    let mut bytes = vec![0; IN_FLIGHT.len()];
    from.read_exact(&mut bytes).with_context(|| format!("receive {what}"))?;
    to.write_all(IN_FLIGHT).with_context(|| format!("send {what}"))?;
    same(what, bytes.as_slice(), IN_FLIGHT)
}

fn unix_pair(_: &Path) -> Result<Check> {
    let (mut one, mut other) = UnixStream::pair()?;
    one.set_read_timeout(PATIENCE)?;
    other.set_read_timeout(PATIENCE)?;
    one.write_all(IN_FLIGHT)?;
    other.write_all(IN_FLIGHT)?;
    Ok(Box::new(move || {
        in_flight("the way there", &mut other, &mut one)?;
        in_flight("the way back", &mut one, &mut other)
    }))
}

fn unix_half_closed(_: &Path) -> Result<Check> {
    let (one, mut other) = UnixStream::pair()?;
    one.shutdown(Shutdown::Write)?;
    Ok(Box::new(move || {
        same("what is read behind the end", other.read(&mut [0])?, 0)?;
        other.write_all(b"x")?;
        (&one).read_exact(&mut [0]).context("read the other way")
    }))
}

fn unix_datagrams(place: &Path) -> Result<Check> {
    let (named, other_name) = (place.join("to"), place.join("from"));
    let (receiver, sender) = (UnixDatagram::bind(&named)?, UnixDatagram::bind(&other_name)?);
    receiver.set_read_timeout(PATIENCE)?;
    sender.connect(&named)?;
    let send = move || -> Result<()> {
        sender.send(b"one")?;
        sender.send(b"and two")?;
        Ok(())
    };
    send()?;
    Ok(Box::new(move || {
        let mut bytes = [0; 64];
        for expected in [&b"one"[..], b"and two"] {
            let (length, from) = receiver.recv_from(&mut bytes)?;
            same("a message", &bytes[..length], expected)?;
            same("who sent it", from.as_pathname(), Some(other_name.as_path()))?;
        }
        send()
    }))
}

fn unix_packets(_: &Path) -> Result<Check> {
    let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let say = move || -> Result<()> {
        send(std::os::fd::AsRawFd::as_raw_fd(&one), b"one", MsgFlags::empty())?;
        send(std::os::fd::AsRawFd::as_raw_fd(&one), b"and two", MsgFlags::empty())?;
        Ok(())
    };
    say()?;
    Ok(Box::new(move || {
        let mut bytes = [0; 64];
        for expected in [&b"one"[..], b"and two"] {
            let length = recv(std::os::fd::AsRawFd::as_raw_fd(&other), &mut bytes, MsgFlags::MSG_DONTWAIT)?;
            same("a message", &bytes[..length], expected)?;
        }
        say()
    }))
}

/// One that waits and has said nothing yet: CRIU ends a dump when it has.
fn unix_waiting(place: &Path) -> Result<Check> {
    let path = place.join("socket");
    let listener = UnixListener::bind(&path)?;
    listener.set_nonblocking(true)?;
    let connect = move || UnixStream::connect(&path).context("connect");
    let mut waiting = connect()?;
    Ok(Box::new(move || {
        let (mut accepted, _) = listener.accept().context("accept who waits")?;
        accepted.write_all(b"x")?;
        waiting.read_exact(&mut [0]).context("hear that it was accepted")?;
        waiting = connect()?;
        Ok(())
    }))
}

/// Its name was removed: who was connected stays so.
fn unix_removed(place: &Path) -> Result<Check> {
    let path = place.join("socket");
    let listener = UnixListener::bind(&path)?;
    let mut one = UnixStream::connect(&path)?;
    let (mut other, _) = listener.accept()?;
    fs::remove_file(&path)?;
    other.set_read_timeout(PATIENCE)?;
    one.write_all(IN_FLIGHT)?;
    Ok(Box::new(move || {
        in_flight("what is on its way", &mut other, &mut one)?;
        same("its name", listener.local_addr()?.as_pathname(), Some(path.as_path()))?;
        same("whether the name is there", path.exists(), false)
    }))
}

fn unix_abstract(_: &Path) -> Result<Check> {
    let name = SocketAddr::from_abstract_name("survivor")?;
    let listener = UnixListener::bind_addr(&name)?;
    Ok(Box::new(move || {
        UnixStream::connect_addr(&name).context("connect by its name")?.write_all(b"x")?;
        listener.accept()?.0.read_exact(&mut [0]).context("receive")
    }))
}

/// The end of a pipe that only a message has, which nobody has taken yet.
fn descriptor_on_the_way(_: &Path) -> Result<Check> {
    let (one, other) = channel::pair()?;
    let (from, to) = pipe2(OFlag::O_CLOEXEC)?;
    one.send(b"take it", &[from.as_fd()])?;
    drop(from);
    let mut to = File::from(to);
    to.write_all(b"x")?;
    Ok(Box::new(move || {
        let (text, descriptors) = other.receive()?;
        same("the message", text.as_slice(), b"take it")?;
        let from: OwnedFd = descriptors.into_iter().next().context("no descriptor came with it")?;
        one.send(b"take it", &[from.as_fd()])?;
        let mut from = File::from(from);
        from.read_exact(&mut [0]).context("read from it")?;
        to.write_all(b"x")?;
        Ok(())
    }))
}

fn connected(address: IpAddr) -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((address, 0)).context("listen")?;
    let one = TcpStream::connect(listener.local_addr()?).context("connect")?;
    let (other, _) = listener.accept()?;
    one.set_read_timeout(PATIENCE)?;
    other.set_read_timeout(PATIENCE)?;
    Ok((one, other))
}

fn tcp(address: IpAddr) -> Result<Check> {
    let (mut one, mut other) = connected(address)?;
    one.write_all(IN_FLIGHT)?;
    other.write_all(IN_FLIGHT)?;
    let names = (one.local_addr()?, other.local_addr()?);
    Ok(Box::new(move || {
        same("its addresses", (one.local_addr()?, other.peer_addr()?), (names.0, names.0))?;
        same("its addresses", (other.local_addr()?, one.peer_addr()?), (names.1, names.1))?;
        in_flight("the way there", &mut other, &mut one)?;
        in_flight("the way back", &mut one, &mut other)
    }))
}

fn tcp_half_closed(_: &Path) -> Result<Check> {
    let (one, mut other) = connected(Ipv4Addr::LOCALHOST.into())?;
    one.shutdown(Shutdown::Write)?;
    same("what is read behind the end", other.read(&mut [0])?, 0)?;
    Ok(Box::new(move || {
        same("what is read behind the end", other.read(&mut [0])?, 0)?;
        other.write_all(b"x")?;
        (&one).read_exact(&mut [0]).context("read the other way")
    }))
}

fn tcp_listener(_: &Path) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7071)).context("listen")?;
    Ok(Box::new(move || {
        let mut one = TcpStream::connect((Ipv4Addr::LOCALHOST, 7071)).context("connect")?;
        one.write_all(b"x")?;
        listener.accept()?.0.read_exact(&mut [0]).context("receive")
    }))
}

fn udp(_: &Path) -> Result<Check> {
    let one = UdpSocket::bind((Ipv4Addr::LOCALHOST, 7072))?;
    let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    one.connect(other.local_addr()?)?;
    other.connect(one.local_addr()?)?;
    other.set_read_timeout(PATIENCE)?;
    let names = (one.local_addr()?, one.peer_addr()?);
    Ok(Box::new(move || {
        same("its addresses", (one.local_addr()?, one.peer_addr()?), names)?;
        one.send(b"said")?;
        let mut bytes = [0; 8];
        let length = other.recv(&mut bytes).context("receive")?;
        same("what was sent", &bytes[..length], b"said")
    }))
}

fn options(_: &Path) -> Result<Check> {
    let (stream, _kept) = connected(Ipv4Addr::LOCALHOST.into())?;
    stream.set_nodelay(true)?;
    stream.set_ttl(33)?;
    stream.set_write_timeout(Some(Duration::from_secs(17)))?;
    let set = |result: nix::Result<()>, name: &str| result.with_context(|| format!("set {name}"));
    use nix::sys::socket::{getsockopt, setsockopt};
    set(setsockopt(&stream, sockopt::KeepAlive, &true), "SO_KEEPALIVE")?;
    set(setsockopt(&stream, sockopt::TcpKeepIdle, &77), "TCP_KEEPIDLE")?;
    set(setsockopt(&stream, sockopt::TcpKeepInterval, &7), "TCP_KEEPINTVL")?;
    set(setsockopt(&stream, sockopt::ReuseAddr, &true), "SO_REUSEADDR")?;
    set(setsockopt(&stream, sockopt::RcvBuf, &50_000), "SO_RCVBUF")?;
    set(setsockopt(&stream, sockopt::SndBuf, &60_000), "SO_SNDBUF")?;
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    udp.set_broadcast(true)?;
    udp.set_nonblocking(true)?;
    let now = move || -> Result<String> {
        let _ = &_kept;
        let keep = (getsockopt(&stream, sockopt::KeepAlive)?, getsockopt(&stream, sockopt::TcpKeepIdle)?);
        let sizes = (getsockopt(&stream, sockopt::RcvBuf)?, getsockopt(&stream, sockopt::SndBuf)?);
        let silent = udp.recv(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        Ok(format!(
            "no delay {}, ttl {}, times {:?} {:?}, keepalive {keep:?} every {}, reuse {}, sizes {sizes:?}, broadcast {}, does not wait {silent}",
            stream.nodelay()?,
            stream.ttl()?,
            stream.read_timeout()?,
            stream.write_timeout()?,
            getsockopt(&stream, sockopt::TcpKeepInterval)?,
            getsockopt(&stream, sockopt::ReuseAddr)?,
            udp.broadcast()?,
        ))
    };
    let before = now()?;
    Ok(Box::new(move || same("what is set", now()?, before.clone())))
}

/// Asks the kernel for all links, and gets them.
fn netlink(_: &Path) -> Result<Check> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute).context("netlink")?;
    // struct nlmsghdr and struct rtgenmsg of RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP (netlink(7)).
    let request: Vec<u8> =
        [20_u32.to_ne_bytes().as_slice(), &18_u16.to_ne_bytes(), &0x301_u16.to_ne_bytes(), &[0; 12]].concat();
    Ok(Box::new(move || {
        let number = std::os::fd::AsRawFd::as_raw_fd(&socket);
        send(number, &request, MsgFlags::empty()).context("ask the kernel")?;
        let mut answer = vec![0; 64 << 10];
        let length = recv(number, &mut answer, MsgFlags::empty()).context("listen to the kernel")?;
        ensure!(length > 100 && answer[4] == 16, "the kernel answers {length} bytes of kind {}", answer[4]);
        while recv(number, &mut answer, MsgFlags::MSG_DONTWAIT).is_ok() {}
        Ok(())
    }))
}

/// As those who ask for an address by DHCP have one.
fn packet(_: &Path) -> Result<Check> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).context("packets")?;
    Ok(Box::new(move || {
        let number = std::os::fd::AsRawFd::as_raw_fd(&socket);
        let mut bytes = [0; 2048];
        while recv(number, &mut bytes, MsgFlags::empty()).is_ok() {}
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        udp.send_to(b"to be overheard", (Ipv4Addr::LOCALHOST, 9))?;
        let length = recv(number, &mut bytes, MsgFlags::empty()).context("overhear a packet")?;
        ensure!(bytes[..length].windows(15).any(|part| part == b"to be overheard"), "it overheard another");
        Ok(())
    }))
}
