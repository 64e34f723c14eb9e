//! The words that vsinit and its manager share: the handover that a new server's
//! PID 1 receives, and the requests that a running one answers.
//!
//! Nothing here starts, mounts or supervises anything: that is the program `vsinit`.

#![forbid(unsafe_code)]

pub mod accounts;
pub mod control;
pub mod handover;
