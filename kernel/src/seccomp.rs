//! System-call filters for a whole virtual server (seccomp(2)).
pub use profile::Profile;
mod profile {
    /// What a server's processes may ask of the kernel.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Profile {
        /// Refuse what a checkpoint cannot save.
        pub migratable: bool,
        /// Refuse only what harms the host's kernel as a whole.
        pub privileged: bool,
    }
}
use crate::error::During;
use crate::{Result, sys};
/// A compiled filter.
#[derive(Clone, Debug)]
pub struct Filter {
    program: Vec<sys::ClassicInstruction>,
}
impl Filter {
    /// Compiles.
    pub fn compile(_profile: &Profile) -> Filter {
        Filter {
            program: vec![sys::ClassicInstruction {
                code: 0x06,
                jump_true: 0,
                jump_false: 0,
                operand: 0x7fff_0000,
            }],
        }
    }
    /// Installs.
    pub fn install(&self) -> Result<()> {
        sys::seccomp_set_filter(&self.program, 0).during("install", "seccomp filter")
    }
}
