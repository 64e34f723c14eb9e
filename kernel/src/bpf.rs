//! Device access of a cgroup as a BPF program (bpf(2), `BPF_PROG_TYPE_CGROUP_DEVICE`; on v2 and on the empty v2 of a hybrid host).
//!
//! The program asks nothing of user space and no map: rules are compiled into comparisons, so a live change is a new program.
//! Limit: one kind of program. Other kinds would get a module each beside this one's loader.

mod device;
mod instruction;

pub use device::{DeviceKind, DeviceProgram, DeviceRule, LoadedDeviceProgram};
