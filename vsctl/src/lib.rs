//! The manager of virtual servers: everything that `vsctl` does, without its command line.
//!
//! In reading order: what the user wants (`spec`), what is written down (`site`, `store`, `network`), where roots come
//! from (`template`, `volume`), how a server runs (`lifecycle`, `monitor`), how it is changed (`edit`), how it gets to another host
//! (`migrate`), what is seen of it
//! (`observe`, `processes`, `events`), what is wrong (`doctor`), and how people ask for it (`cli`).

#![forbid(unsafe_code)]

pub mod aside;
pub mod checkpoint;
pub mod checksum;
pub mod cli;
pub mod criu;
pub mod doctor;
pub mod edit;
pub mod enter;
pub mod events;
pub mod failure;
mod guest_file;
mod interrupt;
pub mod lifecycle;
pub mod migrate;
pub mod monitor;
pub mod name;
pub mod network;
pub mod observe;
pub mod processes;
pub mod site;
pub mod size;
pub mod spec;
pub mod store;
pub mod template;
pub mod transfer;
pub mod volume;
