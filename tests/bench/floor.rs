//! The floor: a file system with one file of an unchanging text, by the library that `lxcfs-fuse` uses. No answer of ours
//! can come faster than this one does.

use std::{
    ffi::OsStr,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, MountOption,
    OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request, Session, SessionACL,
};

/// The word that makes the bench's program the floor.
pub const FLOOR: &str = "floor";
/// Its file.
pub const FILE: &str = "text";

/// Kept by the kernel for as long as anybody measures.
const TTL: Duration = Duration::from_secs(24 * 3600);
const FILE_NUMBER: INodeNo = INodeNo(2);

struct Floor {
    /// As long as meminfo.
    text: String,
}

/// Serves the floor at `directory` until it is killed, with as many threads as `lxcfs-fuse` has.
pub fn serve(directory: &str) -> Result<()> {
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.mount_options = vec![MountOption::RO, MountOption::DefaultPermissions, MountOption::FSName(FLOOR.into())];
    config.n_threads = Some(std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 4));
    let floor = Floor { text: "Unchanging:         1234 kB\n".repeat(50) };
    Session::new(floor, directory, &config).context("mount the floor")?.run().context("serve the floor")
}

fn attributes(inode: INodeNo) -> FileAttr {
    let is_file = inode == FILE_NUMBER;
    let time = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: inode,
        size: if is_file { 4096 } else { 0 },
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: if is_file { FileType::RegularFile } else { FileType::Directory },
        perm: if is_file { 0o444 } else { 0o555 },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Floor {
    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == FILE {
            true => reply.entry(&TTL, &attributes(FILE_NUMBER), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &attributes(inode));
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let rest = self.text.as_bytes().get(offset as usize..).unwrap_or_default();
        reply.data(&rest[..rest.len().min(size as usize)]);
    }
}
