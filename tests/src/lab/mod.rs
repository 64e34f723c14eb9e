//! The lab: hosts as users have them, in virtual machines, for promises that this machine cannot keep by itself.
//!
//! ```text
//! hosts.toml ─► Definition ─► Image (disk, kernels; cached by what is in it)
//! programs, test binary, keys ─► Payload (a tar archive as second disk; of this run)
//! Image + Payload ─► Host (a qemu process and a copy of the disk) ─► commands by ssh
//! ```
//!
//! Nothing outside `target/lab` and the qemu processes is touched: no mounts, links, cgroups or files of the machine that
//! runs it. A qemu process is killed by the kernel when the lab ends, however it ends.

pub mod definition;
pub mod host;
pub mod image;
pub mod initrd;
pub mod machine;
pub mod pair;
pub mod payload;
pub mod serial;
pub mod workshop;

pub use definition::Definition;
pub use host::{Host, Larger};
pub use image::Image;
pub use pair::{pair, pair_with};
pub use payload::Payload;
pub use workshop::Workshop;
