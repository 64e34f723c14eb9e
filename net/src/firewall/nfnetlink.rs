//! The nfnetlink socket: transactions and questions.
//!
//! The kernel works through a message while it is being sent, so that all answers lie ready when `send` returns: no
//! waiting, no runtime; an answer that is not there will not come.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::NfTablesMessage, none::ControlMessage,
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
        Self {
            family,
            message,
            flags: NLM_F_CREATE,
        }
    }

    /// Takes something away; that it is gone already is `ENOENT`, and the whole transaction fails.
    pub(super) fn delete(family: NetfilterProtoFamily, message: NfTablesMessage) -> Self {
        Self {
            family,
            message,
            flags: 0,
        }
    }
}

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
        Ok(Self {
            socket,
            sequence: 0,
        })
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
        self.socket.send(&packet, 0)?;
        while unanswered > 0 {
            for answer in self.receive()? {
                if let NetlinkPayload::Error(error) = answer.payload {
                    if error.code.is_some() {
                        return Err(refusal(&error));
                    }
                    unanswered -= 1;
                }
            }
        }
        Ok(())
    }

    /// The one object that `message` asks for.
    pub(super) fn ask(
        &mut self,
        family: NetfilterProtoFamily,
        message: NfTablesMessage,
    ) -> io::Result<NfTablesMessage> {
        self.send(family, message, 0)?;
        for answer in self.receive()? {
            match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(refusal(&error));
                }
                payload => {
                    if let Some((_, message)) = table_message(payload) {
                        return Ok(message);
                    }
                }
            }
        }
        Err(io::Error::from(io::ErrorKind::InvalidData))
    }

    /// All objects that `message` asks for, each with its family.
    pub(super) fn dump(
        &mut self,
        family: NetfilterProtoFamily,
        message: NfTablesMessage,
    ) -> io::Result<Vec<(NetfilterProtoFamily, NfTablesMessage)>> {
        self.send(family, message, NLM_F_DUMP)?;
        let mut objects = Vec::new();
        loop {
            for answer in self.receive()? {
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(objects),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(refusal(&error));
                    }
                    payload => objects.extend(table_message(payload)),
                }
            }
        }
    }

    fn send(
        &mut self,
        family: NetfilterProtoFamily,
        message: NfTablesMessage,
        flags: u16,
    ) -> io::Result<()> {
        let header = NetfilterHeader::new(family, 0, 0);
        let mut packet = Vec::new();
        self.append(&mut packet, NetfilterMessage::new(header, message), flags);
        self.socket.send(&packet, 0).map(drop)
    }

    fn append(&mut self, packet: &mut Vec<u8>, message: NetfilterMessage, flags: u16) {
        let mut message = NetlinkMessage::from(message);
        self.sequence += 1;
        message.header.sequence_number = self.sequence;
        message.header.flags = NLM_F_REQUEST | flags;
        message.finalize();
        let start = packet.len();
        packet.resize(start + message.buffer_len(), 0);
        message.serialize(&mut packet[start..]);
    }

    fn receive(&self) -> io::Result<Vec<NetlinkMessage<NetfilterMessage>>> {
        let (bytes, _) = self.socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let message = NetlinkMessage::deserialize(rest)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
            // A length of 0 would never end.
            let step = length.max(1).next_multiple_of(4).min(rest.len());
            rest = &rest[step..];
            messages.push(message);
        }
        Ok(messages)
    }
}

fn control(message: ControlMessage) -> NetfilterMessage {
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFTABLES);
    NetfilterMessage::new(header, message)
}

fn table_message(
    payload: NetlinkPayload<NetfilterMessage>,
) -> Option<(NetfilterProtoFamily, NfTablesMessage)> {
    let NetlinkPayload::InnerMessage(message) = payload else {
        return None;
    };
    match message.inner {
        NetfilterMessageInner::NfTables(inner) => Some((message.header.family, inner)),
        _ => None,
    }
}
