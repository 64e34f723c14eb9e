//! The rtnetlink socket: opening it, asking, and understanding the answer.
//!
//! Requests are built in `link.rs`, `address.rs` and `route.rs`; nothing here knows what they mean.

use std::{future::Future, io, os::fd::BorrowedFd};

use futures_util::StreamExt;
use netlink_packet_core::{ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::AsyncSocket;
use tokio::runtime::{Builder, Runtime};

use crate::{Error, Result, error, namespace};

/// An open rtnetlink socket. All calls act in the network namespace in which it was opened.
///
/// Not to be used across a fork, and not from inside a tokio runtime (its own would nest, and panic).
#[derive(Debug)]
pub struct Netlink {
    handle: rtnetlink::Handle,
    runtime: Runtime,
}

/// A dump that a change of the kernel's tables interrupted is asked again this often (`NLM_F_DUMP_INTR`).
const DUMP_ATTEMPTS: usize = 5;
const NLM_F_DUMP_INTR: u16 = 0x10;

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self> {
        Self::start().map_err(|e| Error::new("open", "rtnetlink socket", e))
    }

    /// Opens a socket in the network namespace `netns`, wherever the caller is; see [`namespace::within`] for how.
    pub fn in_namespace(netns: BorrowedFd<'_>) -> Result<Self> {
        namespace::within(netns, Self::open)?
    }

    fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let handle = {
            let _context = runtime.enter();
            let (mut connection, handle, _) = rtnetlink::new_connection()?;
            // Without this an answered request and a dead socket would look the same.
            connection.set_forward_ack(true);
            let socket = connection.socket_mut().socket_mut();
            // Old kernels (before 4.12) lack both; then errors are only numbers.
            let _ = socket.set_ext_ack(true);
            let _ = socket.set_cap_ack(true);
            runtime.spawn(connection);
            handle
        };
        Ok(Self { handle, runtime })
    }

    /// Sends a change and waits for the kernel's yes or no.
    pub(crate) fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let (_, complete) = self.wait(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        if complete { Ok(()) } else { Err(closed()) }
    }

    /// Asks for one object.
    pub(crate) fn ask(&self, message: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        let (mut answers, _) = self.wait(message, NLM_F_REQUEST)?;
        answers.pop().ok_or_else(closed)
    }

    /// Asks for all objects of a kind.
    pub(crate) fn dump(&self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS {
            let (answers, consistent) = self.wait(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if consistent {
                return Ok(answers);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "the list kept changing while it was read"))
    }

    /// The answers to `message`, and whether they were complete: acknowledged, or a dump that nothing interrupted.
    fn wait(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        self.block_on(async {
            let mut stream = self.handle.clone().request(request).map_err(|_| closed())?;
            let mut answers = Vec::new();
            let mut complete = flags & NLM_F_DUMP == NLM_F_DUMP;
            while let Some(answer) = stream.next().await {
                complete &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    NetlinkPayload::Error(error) if error.code.is_none() => complete = true,
                    NetlinkPayload::Error(error) => return Err(refusal(&error)),
                    _ => {}
                }
            }
            Ok((answers, complete))
        })
    }

    fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the netlink socket gave no answer")
}

/// The kernel's no as an [`io::Error`], with its own words where it sent some.
pub(crate) fn refusal(message: &ErrorMessage) -> io::Error {
    error::explained(message.raw_code().saturating_abs(), explanation(&message.header))
}

/// The text of `NLMSGERR_ATTR_MSG` in what follows the error number (netlink(7), "Extended ACK").
///
/// With `NETLINK_CAP_ACK` set, that is the header of the request (16 bytes) and then the attributes.
fn explanation(payload: &[u8]) -> Option<String> {
    const REQUEST_HEADER: usize = 16;
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let mut rest = payload.get(REQUEST_HEADER..)?;
    while let [l0, l1, k0, k1, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = rest.get(4..length)?;
        if u16::from_ne_bytes([k0, k1]) == NLMSGERR_ATTR_MSG {
            let text = value.strip_suffix(&[0]).unwrap_or(value);
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u16::try_from(value.len() + 4).unwrap().to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn the_kernels_words_are_found_behind_other_attributes() {
        let mut payload = vec![0; 16];
        payload.extend(attribute(2, &[1, 2, 3, 4]));
        payload.extend(attribute(1, b"Device is up\0"));
        assert_eq!(explanation(&payload).as_deref(), Some("Device is up"));
    }

    #[test]
    fn short_or_broken_attributes_say_nothing() {
        let mut whole = vec![0; 16];
        whole.extend(attribute(1, b"text\0"));
        for end in 0..whole.len() {
            let text = explanation(&whole[..end]);
            // The padding behind the last attribute may be missing.
            assert!(text.is_none() || end >= 16 + 4 + 5, "{end}: {text:?}");
        }
        assert_eq!(explanation(&[&whole[..16], &[0, 0, 0, 0]].concat()), None);
        assert_eq!(explanation(&[&whole[..16], &[3, 0, 1, 0]].concat()), None);
    }
}
