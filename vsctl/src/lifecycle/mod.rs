//! From a spec to a running server and back.
//!
//! Data flows one way: spec → plan (steps) → execute (journal) → record. A failed start, a stop and the recovery after
//! `kill -9` are the same undo.

pub mod arrive;
pub mod batch;
pub mod boot;
pub mod calls;
pub mod change;
pub mod consoles;
pub mod create;
pub mod execute;
pub mod facilities;
pub mod files;
pub mod freeze;
pub mod gate;
pub mod group;
pub mod guest_groups;
mod inside;
pub mod journal;
pub mod network;
pub mod nodes;
pub mod process;
pub mod restore;
pub mod stage;
pub mod start;
pub mod state;
pub mod step;
pub mod stop;
pub mod thread_settings;
pub mod view;
mod waiters;
pub mod world;
