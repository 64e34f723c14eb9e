//! FUSE connections: ended by their number, whoever serves them (fs/fuse/control.c).
//!
//! A process that waits for a FUSE server cannot be killed once the server has read its request. Only the end of the connection
//! lets it go: every descriptor of it closed, or this.

use std::io::Write;
use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::Result;
use crate::error::During;
use crate::mount::{Attributes, FileSystem, Tree};

/// The kernel's control files of all connections, seen by nobody else: they need not be mounted anywhere.
#[derive(Debug)]
pub struct Connections(Tree);

impl Connections {
    /// Opens them. ENODEV: this kernel has no FUSE. EPERM: only the host's root may.
    pub fn open() -> Result<Connections> {
        let restricted = Attributes::NOSUID | Attributes::NODEV | Attributes::NOEXEC;
        Ok(Connections(FileSystem::new("fusectl")?.mount(restricted)?))
    }

    /// Ends the connection of the FUSE file system with the device number 0:`minor`: whoever waits for it gets an error, now and
    /// ever after. `false`: there is no such connection.
    pub fn abort(&self, minor: u32) -> Result<bool> {
        let path = format!("{minor}/abort");
        let file = match rustix::fs::openat(self.0.as_fd(), &path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(false),
            other => other.during("open control file of FUSE connection", minor)?,
        };
        std::fs::File::from(file).write_all(b"1").during("abort FUSE connection", minor)?;
        Ok(true)
    }
}
