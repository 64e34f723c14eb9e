//! Kinds that no checkpoint holds: a server with one of them is refused by name before anything is frozen.

use std::{
    ffi::CString,
    fs::File,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
};

use anyhow::{Context, Result};
use nix::{
    mqueue::{MQ_OFlag, MqAttr, mq_open, mq_send},
    sys::{
        eventfd::{EfdFlags, EventFd},
        stat::Mode,
    },
};

use rustix::{
    fs::FallocateFlags,
    net::{AddressFamily, SocketType},
};

use super::{Check, Kind};

pub const KINDS: &[Kind] = &[
    ("message-queue", message_queue),
    ("message-queue-that-nobody-has-open", closed_queue),
    ("tcp-listener-with-one-waiting", waiting),
    ("eventfd-that-is-a-semaphore", semaphore),
    ("socket-to-the-hypervisor", hypervisor),
    ("removed-file-that-is-large", removed),
];

/// Each of another name: it outlives its program.
fn queue(name: &str) -> Result<nix::mqueue::MqdT> {
    let name = CString::new(name).context("a name")?;
    let flags = MQ_OFlag::O_CREAT | MQ_OFlag::O_RDWR;
    let queue =
        mq_open(name.as_c_str(), flags, Mode::S_IRWXU, Some(&MqAttr::new(0, 4, 64, 0))).context("make a queue")?;
    mq_send(&queue, b"in the queue", 1).context("send")?;
    Ok(queue)
}

fn message_queue(_: &Path) -> Result<Check> {
    let queue = queue("/survivor-open")?;
    Ok(Box::new(move || {
        let _ = &queue;
        Ok(())
    }))
}

fn closed_queue(_: &Path) -> Result<Check> {
    nix::mqueue::mq_close(queue("/survivor-closed")?).context("close the queue")?;
    Ok(Box::new(|| Ok(())))
}

fn waiting(_: &Path) -> Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 7073)).context("listen")?;
    let waits = TcpStream::connect((Ipv4Addr::LOCALHOST, 7073)).context("connect")?;
    Ok(Box::new(move || {
        let _ = (&listener, &waits);
        Ok(())
    }))
}

fn semaphore(_: &Path) -> Result<Check> {
    let semaphore = EventFd::from_value_and_flags(5, EfdFlags::EFD_SEMAPHORE).context("make a semaphore")?;
    Ok(Box::new(move || {
        let _ = &semaphore;
        Ok(())
    }))
}

fn hypervisor(_: &Path) -> Result<Check> {
    let family = AddressFamily::from_raw(nix::libc::AF_VSOCK as u16);
    let socket = rustix::net::socket(family, SocketType::STREAM, None).context("make a socket")?;
    Ok(Box::new(move || {
        let _ = &socket;
        Ok(())
    }))
}

/// As a log is that was rotated while its program writes on.
fn removed(place: &Path) -> Result<Check> {
    let path = place.join("removed");
    let file = File::create(&path).context("make a file")?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 65 << 20).context("make it large")?;
    std::fs::remove_file(&path).context("remove it")?;
    Ok(Box::new(move || {
        let _ = &file;
        Ok(())
    }))
}
