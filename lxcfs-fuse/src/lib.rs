//! The FUSE overlay: what `/proc` and `/sys` say inside a server is the server's own truth.
//!
//! ```text
//! snapshot  (the only reader: host files, cgroup files)
//!    └─> render/*  (pure: values in, the text of one file out)
//!    │      └─> filesystem  (inodes, texts), there (which places a server has)
//!    │             └─> serving  (FUSE: whose turn it is, deadlines)
//!    └─> answer    (the same values for two system calls, which no file system can answer for)
//! ```
//!
//! Limits: it changes nothing on the host but its own mount; it knows a server only by its registration file;
//! who the reader is does not matter, because the inode says which server is asked about.
#![forbid(unsafe_code)]

pub mod account;
pub mod answer;
pub mod clock;
pub mod filesystem;
pub mod handover;
pub mod handshake;
pub mod inode;
pub mod last;
pub mod load;
pub mod mountpoint;
pub mod parking;
pub mod registration;
pub mod render;
pub mod run_directory;
pub mod serving;
pub mod snapshot;
pub mod supervisor;
pub mod text;
pub mod there;
pub mod turns;
pub mod watch;
pub mod worker;
