//! The FUSE overlay: what `/proc` and `/sys` say inside a server is the server's own truth.
//!
//! ```text
//! snapshot  (the only reader: host files, cgroup files)
//!    └─> render/*  (pure: values in, the text of one file out)
//!           └─> filesystem  (FUSE: inodes, paging, time-outs)
//! ```
//!
//! Limits: it changes nothing on the host but its own mount; it knows a server only by its registration file;
//! who the reader is does not matter, because the inode says which server is asked about.
#![forbid(unsafe_code)]

pub mod account;
pub mod clock;
pub mod filesystem;
pub mod handshake;
pub mod inode;
pub mod load;
pub mod mountpoint;
pub mod registration;
pub mod render;
pub mod run_directory;
pub mod snapshot;
pub mod supervisor;
pub mod text;
pub mod watch;
pub mod worker;
