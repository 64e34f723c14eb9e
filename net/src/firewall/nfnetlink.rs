//! The nfnetlink socket: transactions and questions.
//!
//! The kernel works through a message while it is being sent, so that all answers lie ready when `send` returns: no
//! waiting, no runtime; an answer that is not there will not come.

use std::io;

use netlink_packet_core::{
    ErrorBuffer, ErrorMessage, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NetlinkBuffer, NetlinkMessage, Parseable,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily, nftables::NfTablesMessage, none::ControlMessage,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::netlink::refusal;

/// The subsystem that a transaction is for: `NFNL_SUBSYS_NFTABLES`.
const NFTABLES: u16 = 10;

/// One change of a transaction.
pub(super) struct Request {
    family: NetfilterProtoFamily,
    message: NfTablesMessage,
    flags: u16,
}

impl Request {
    /// Puts something; that it is there already is fine.
    pub(super) fn create(family: NetfilterProtoFamily, message: NfTablesMessage) -> Self {
        Self { family, message, flags: NLM_F_CREATE }
    }

    /// Takes something away; that it is gone already is `ENOENT`, and the whole transaction fails.
    pub(super) fn delete(family: NetfilterProtoFamily, message: NfTablesMessage) -> Self {
        Self { family, message, flags: 0 }
    }
}

#[derive(Debug)]
pub(super) struct Nfnetlink {
    socket: Socket,
    sequence: u32,
}

impl Nfnetlink {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes all changes, or none and says which error was the first.
    pub(super) fn commit(&mut self, requests: Vec<Request>) -> io::Result<()> {
        let mut packet = Vec::new();
        self.append(&mut packet, control(ControlMessage::BatchBegin), 0);
        let mut unanswered = requests.len();
        for request in requests {
            let header = NetfilterHeader::new(request.family, 0, 0);
            let message = NetfilterMessage::new(header, request.message);
            self.append(&mut packet, message, NLM_F_ACK | request.flags);
        }
        self.append(&mut packet, control(ControlMessage::BatchEnd), 0);
        self.start(&packet)?;
        while unanswered > 0 {
            let answers = self.receive()?;
            unanswered -= answers.len().min(unanswered);
        }
        Ok(())
    }

    /// Whether the one object that `message` asks for is there; its absence is `ENOENT`.
    pub(super) fn ask(&mut self, family: NetfilterProtoFamily, message: NfTablesMessage) -> io::Result<()> {
        self.send(family, message, 0)?;
        let answers = self.receive()?;
        let found = answers.iter().any(|a| matches!(a, Answer::Object(_)));
        found.then_some(()).ok_or_else(broken)
    }

    /// All objects that `message` asks for.
    pub(super) fn dump(&mut self, family: NetfilterProtoFamily, message: NfTablesMessage) -> io::Result<Vec<Object>> {
        self.send(family, message, NLM_F_DUMP)?;
        let mut objects = Vec::new();
        loop {
            for answer in self.receive()? {
                match answer {
                    Answer::Object(object) => objects.push(object),
                    Answer::End => return Ok(objects),
                }
            }
        }
    }

    fn send(&mut self, family: NetfilterProtoFamily, message: NfTablesMessage, flags: u16) -> io::Result<()> {
        let header = NetfilterHeader::new(family, 0, 0);
        let mut packet = Vec::new();
        self.append(&mut packet, NetfilterMessage::new(header, message), flags);
        self.start(&packet)
    }

    fn append(&mut self, packet: &mut Vec<u8>, message: NetfilterMessage, flags: u16) {
        let mut message = NetlinkMessage::from(message);
        self.sequence = self.sequence.wrapping_add(1);
        message.header.sequence_number = self.sequence;
        message.header.flags = NLM_F_REQUEST | flags;
        message.finalize();
        let start = packet.len();
        packet.resize(start + message.buffer_len(), 0);
        message.serialize(&mut packet[start..]);
    }

    /// Sends a packet. What is left of an exchange that failed half-way goes first, so that it is not taken for an answer.
    fn start(&self, packet: &[u8]) -> io::Result<()> {
        let mut stale = Vec::with_capacity(PACKET_BYTES);
        while self.socket.recv(&mut stale, 0).is_ok() {
            stale.clear();
        }
        let sent = self.socket.send(packet, 0)?;
        if sent == packet.len() { Ok(()) } else { Err(broken()) }
    }

    /// The messages of one packet; an error among them fails the whole.
    fn receive(&self) -> io::Result<Vec<Answer>> {
        let mut bytes = Vec::with_capacity(PACKET_BYTES);
        self.socket.recv(&mut bytes, 0)?;
        answers_in(&bytes)
    }
}

/// The kernel fills a dump's packets up to the size that is asked for, 32 KiB at most, and walks the set from its beginning for each.
const PACKET_BYTES: usize = 64 * 1024;

/// A message of the kernel's.
#[derive(Debug)]
enum Answer {
    /// An acknowledgement, or the end of a list.
    End,
    Object(Object),
}

/// An object of nftables as the kernel sends it.
///
/// Not decoded by the crate that encodes: with each element of a set that one formats the whole list for an error message that
/// nobody asks for, which makes seconds of a thousand elements.
#[derive(Debug)]
pub(super) struct Object {
    pub(super) family: NetfilterProtoFamily,
    /// Its attributes, each with length and kind before it.
    pub(super) attributes: Vec<u8>,
}

fn answers_in(mut rest: &[u8]) -> io::Result<Vec<Answer>> {
    let mut answers = Vec::new();
    while !rest.is_empty() {
        let message = NetlinkBuffer::new_checked(rest).map_err(|_| broken())?;
        let payload = message.payload();
        answers.push(match message.message_type() {
            NLMSG_ERROR => {
                let buffer = ErrorBuffer::new_checked(&payload).map_err(|_| broken())?;
                let error = ErrorMessage::parse(&buffer).map_err(|_| broken())?;
                if error.code.is_some() {
                    return Err(refusal(&error));
                }
                Answer::End
            }
            NLMSG_DONE => Answer::End,
            _ => match payload {
                [family, _, _, _, attributes @ ..] => {
                    Answer::Object(Object { family: (*family).into(), attributes: attributes.to_vec() })
                }
                _ => return Err(broken()),
            },
        });
        let length = usize::try_from(message.length()).map_err(|_| broken())?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(answers)
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is cut short")
}

fn control(message: ControlMessage) -> NetfilterMessage {
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFTABLES);
    NetfilterMessage::new(header, message)
}
