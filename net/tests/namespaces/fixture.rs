//! The stage: a namespace that plays the host with a bridge, two that play guests, one that plays the outside.

use std::{
    fs::File,
    io::{self, Write},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use net::{
    IpNet, Mac, Netlink, Veth,
    firewall::{Binding, Firewall, Ruleset},
    subnet,
};
use nix::sched::CloneFlags;

/// Longer than any packet needs here; only what must not arrive waits for its end.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long to listen for what must not arrive. The same is shown to arrive where it may, so a slow machine
/// cannot turn right into wrong.
pub const SILENCE: Duration = Duration::from_millis(300);

pub const TABLE: &str = "nettest";
pub const BRIDGE: &str = "nettestbr";
pub const PREFIX: &str = "nt-";

#[expect(clippy::disallowed_methods, reason = "kernel::namespace stands beside this crate, not below it")]
fn leave_network() {
    nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("unshare the network namespace");
}

/// Runs `test` in a thread with a network namespace of its own; a panic becomes the error.
pub fn apart<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let body = move || {
        leave_network();
        test()
    };
    let outcome = thread::spawn(body).join();
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "panicked".to_owned())
    })
}

/// A throw-away network namespace, held by its descriptor.
pub struct Namespace(File);

impl Namespace {
    pub fn new() -> Self {
        let body = || {
            leave_network();
            File::open("/proc/thread-self/ns/net").expect("open the new namespace")
        };
        Self(thread::spawn(body).join().expect("thread of the namespace"))
    }

    pub fn netlink(&self) -> Netlink {
        Netlink::in_namespace(self.0.as_fd()).expect("socket in the namespace")
    }

    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        net::namespace::within(self.0.as_fd(), work).expect("enter the namespace")
    }

    pub fn udp(&self, address: impl Into<SocketAddr>) -> UdpSocket {
        let address = address.into();
        self.within(|| udp(address))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A socket in the calling thread's namespace. That it binds at all shows that the address is usable already.
pub fn udp(address: impl Into<SocketAddr>) -> UdpSocket {
    let address = address.into();
    let socket = UdpSocket::bind(address).unwrap_or_else(|e| panic!("bind {address}: {e}"));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A guest: a namespace with `eth0`, whose other end is a port of the bridge.
pub struct Guest {
    pub namespace: Namespace,
    pub port: String,
    pub mac: Mac,
    pub v4: IpAddr,
    pub v6: IpAddr,
}

impl Guest {
    pub fn binding(&self) -> Binding {
        Binding { port: self.port.clone(), mac: self.mac, addresses: vec![self.v4, self.v6] }
    }
}

/// The calling thread's namespace as a host with a bridge and two guests.
pub struct Site {
    pub host: Netlink,
    pub a: Guest,
    pub b: Guest,
}

pub const V4: &str = "10.77.0.0/24";
pub const V6: &str = "fd77::/64";

pub fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn with_length(address: IpAddr) -> IpNet {
    let length = if address.is_ipv4() { 24 } else { 64 };
    IpNet::new(address, length).unwrap()
}

impl Site {
    pub fn new() -> Self {
        let host = Netlink::open().unwrap();
        host.create_bridge(BRIDGE, Some(subnet::local_mac([2, 0, 1, 0, 0, 0]))).unwrap();
        for family in [V4, V6] {
            let gateway = subnet::host_address(net(family), 1).unwrap();
            host.add_address(BRIDGE, with_length(gateway)).unwrap();
        }
        let (a, b) = (guest(&host, 2), guest(&host, 3));
        Self { host, a, b }
    }

    pub fn ruleset(&self) -> Ruleset {
        let (IpNet::V4(v4), IpNet::V6(v6)) = (net(V4), net(V6)) else { unreachable!("the constants are one of each") };
        Ruleset {
            table: TABLE.to_owned(),
            bridge: BRIDGE.to_owned(),
            port_prefix: PREFIX.to_owned(),
            v4: Some(v4),
            v6: Some(v6),
        }
    }

    /// Installs the rules and binds both guests.
    pub fn guard(&self) -> Firewall {
        self.ruleset().install().unwrap();
        let mut firewall = Firewall::open(TABLE).unwrap();
        for guest in [&self.a, &self.b] {
            firewall.bind(&guest.binding()).unwrap();
        }
        firewall
    }
}

fn mac(number: u32) -> Mac {
    subnet::local_mac([2, 0, 1, 0, 0, number as u8])
}

fn guest(host: &Netlink, number: u32) -> Guest {
    let guest = Guest {
        namespace: Namespace::new(),
        port: format!("{PREFIX}{number}"),
        mac: mac(number),
        v4: subnet::host_address(net(V4), number).unwrap(),
        v6: subnet::host_address(net(V6), number).unwrap(),
    };
    host.create_veth(&Veth {
        name: &guest.port,
        mac: None,
        mtu: None,
        bridge: Some(BRIDGE),
        peer_name: "eth0",
        peer_mac: Some(guest.mac),
        peer_namespace: guest.namespace.as_fd(),
        up: true,
    })
    .unwrap();
    let inside = guest.namespace.netlink();
    inside.set_up("lo").unwrap();
    inside.set_up("eth0").unwrap();
    for (address, family) in [(guest.v4, V4), (guest.v6, V6)] {
        inside.add_address("eth0", with_length(address)).unwrap();
        let gateway = subnet::host_address(net(family), 1).unwrap();
        inside.add_default_route(gateway, "eth0").unwrap();
    }
    guest
}

/// Sends `word`, and says from where the receiver saw it come.
pub fn send(from: &UdpSocket, to: &UdpSocket, word: &str) -> io::Result<SocketAddr> {
    from.send_to(word.as_bytes(), to.local_addr()?)?;
    let mut buffer = [0; 64];
    let (length, source) = to.recv_from(&mut buffer)?;
    assert_eq!(&buffer[..length], word.as_bytes());
    Ok(source)
}

/// There and back; says from where the receiver saw it come.
pub fn exchange(from: &UdpSocket, to: &UdpSocket) -> SocketAddr {
    let source = send(from, to, "question").unwrap_or_else(|e| panic!("{from:?} to {to:?}: {e}"));
    to.send_to(b"answer", source).unwrap();
    let mut buffer = [0; 64];
    let (length, _) = from.recv_from(&mut buffer).expect("the answer");
    assert_eq!(&buffer[..length], b"answer");
    source
}

/// That nothing arrives of what is sent.
pub fn lost(from: &UdpSocket, to: &UdpSocket) {
    to.set_read_timeout(Some(SILENCE)).unwrap();
    let outcome = send(from, to, "lost");
    to.set_read_timeout(Some(PATIENCE)).unwrap();
    if let Ok(source) = outcome {
        panic!("a packet from {source} arrived that should not have");
    }
}

/// What nft(8) says, in the calling thread's namespace.
pub fn nft(arguments: &[&str]) -> String {
    let output = Command::new("nft").args(arguments).output().expect("run nft");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Loads rules in the calling thread's namespace.
pub fn load(rules: &str) {
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success());
}
