//! Linux networking over netlink: links, addresses, routes, firewall; and what is told to neighbours.
//!
//! Knows no container: it takes names, addresses and descriptors of namespaces, and nothing of who owns them.
//! The interface is synchronous; a tokio `current_thread` runtime that never leaves the calling thread sits inside
//! [`Netlink`], so none of its calls may be made from inside another tokio runtime.
//!
//! Where a call acts: a [`Netlink`] acts in the network namespace in which its socket was made, wherever the caller
//! goes later. Everything else ([`firewall`], [`sysctl`]) acts in the namespace of the calling thread; see
//! [`namespace::within`].
//!
//! Every creation is exclusive (an object of that name is an error whose [`Error::kind`] is `AlreadyExists`), every
//! removal succeeds when the object is gone. Nothing here logs.

#![forbid(unsafe_code)]

mod address;
pub mod announce;
mod error;
pub mod firewall;
mod link;
mod mac;
pub mod namespace;
mod netlink;
mod route;
pub mod subnet;
pub mod sysctl;

pub use address::Address;
pub use error::{Error, Result};
pub use ipnet::{IpNet, Ipv4Net, Ipv6Net};
pub use link::{Link, Veth};
pub use mac::Mac;
pub use netlink::Netlink;
pub use route::Route;
