//! The Linux facilities that are not networking, as values: one module per facility, its noun is the type.
//!
//! This crate knows the kernel and no container: no spec, no server, no project path.
//! Nothing here logs what it also returns; an [`Error`] says what failed, on which object, and the kernel's reason.
//!
//! `unsafe` has one address in the whole workspace, the private module `sys`.
#![deny(unsafe_code)]

mod error;
#[allow(unsafe_code)]
mod sys;

pub mod bpf;
pub mod capability;
pub mod cgroup;
pub mod channel;
pub mod file;
pub mod fuse;
pub mod idmap;
pub mod keyring;
pub mod lock;
pub mod memfd;
pub mod mount;
pub mod namespace;
mod poll;
pub mod process;
pub mod pty;
pub mod seccomp;

pub use error::{Error, Result};
