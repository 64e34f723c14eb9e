//! The few BPF instructions that we emit, as words and as text (linux/bpf.h, Documentation/bpf/standardization).

use std::fmt;

/// A register.
pub(super) type Register = u8;

/// One instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Instruction {
    /// `to = *(u32 *)(from + offset)`
    Load { to: Register, from: Register, offset: i16 },
    /// `to = from`
    Copy { to: Register, from: Register },
    /// `to = value`
    Set { to: Register, value: i32 },
    /// `to &= value`
    And { to: Register, value: i32 },
    /// `to >>= bits`
    ShiftRight { to: Register, bits: i32 },
    /// Skips `skip` instructions when the low 32 bits differ from `value`.
    SkipUnless { register: Register, value: u32, skip: i16 },
    /// Ends with the value of register 0.
    Exit,
}

impl Instruction {
    /// The instruction as the kernel takes it: opcode, registers, offset, constant from the low byte up.
    pub(super) fn encode(self) -> u64 {
        let (opcode, to, from, offset, constant) = match self {
            // BPF_LDX | BPF_MEM | BPF_W
            Instruction::Load { to, from, offset } => (0x61, to, from, offset, 0),
            // BPF_ALU64 | BPF_MOV | BPF_X, BPF_ALU | BPF_MOV | BPF_K
            Instruction::Copy { to, from } => (0xbf, to, from, 0, 0),
            Instruction::Set { to, value } => (0xb4, to, 0, 0, value),
            // BPF_ALU | BPF_AND | BPF_K, BPF_ALU | BPF_RSH | BPF_K
            Instruction::And { to, value } => (0x54, to, 0, 0, value),
            Instruction::ShiftRight { to, bits } => (0x74, to, 0, 0, bits),
            // BPF_JMP32 | BPF_JNE | BPF_K: the 64-bit form would extend the sign of a large number.
            Instruction::SkipUnless { register, value, skip } => (0x56, register, 0, skip, value as i32),
            // BPF_JMP | BPF_EXIT
            Instruction::Exit => (0x95, 0, 0, 0, 0),
        };
        u64::from(opcode as u8)
            | u64::from(to) << 8
            | u64::from(from) << 12
            | u64::from(offset as u16) << 16
            | u64::from(constant as u32) << 32
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Instruction::Load { to, from, offset } => {
                write!(f, "r{to} = *(u32 *)(r{from} + {offset})")
            }
            Instruction::Copy { to, from } => write!(f, "r{to} = r{from}"),
            Instruction::Set { to, value } => write!(f, "r{to} = {value}"),
            Instruction::And { to, value } => write!(f, "r{to} &= {value}"),
            Instruction::ShiftRight { to, bits } => write!(f, "r{to} >>= {bits}"),
            Instruction::SkipUnless { register, value, skip } => write!(f, "if r{register} != {value} skip {skip}"),
            Instruction::Exit => f.write_str("exit"),
        }
    }
}
