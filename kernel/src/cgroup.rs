//! Control groups, version 1, version 2, or both at once: the same group in every hierarchy, one face for all (cgroups(7)).
//!
//! What differs: controllers are in one hierarchy each on v1 and all in the unified one on v2. What does not: freezing,
//! killing and device programs use the unified hierarchy wherever there is one, the empty one of a hybrid host too.
//! Limit: `name=systemd` and other named v1 hierarchies are left alone; they belong to the host's init.

mod allowed;
mod attach;
mod cpuset;
mod freeze;
mod group;
mod hierarchies;
mod interface;
mod limit;
mod usage;

pub use allowed::AllowedProcessors;
pub use cpuset::CpuSet;
pub use group::{Group, PRESSURE};
pub use hierarchies::{Controller, Hierarchies};
pub use usage::{Anonymous, Usage};
