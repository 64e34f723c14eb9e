//! Runs a filter as the kernel does, for tests: the instructions that we emit and no other.

use super::assemble::{AND, IF_ANY_BIT, IF_AT_LEAST, IF_EQUAL, JUMP, LOAD, RETURN};
use crate::sys::ClassicInstruction;

/// A system call as a filter sees it (`struct seccomp_data`).
pub(super) struct Call {
    pub architecture: u32,
    pub number: u32,
    pub arguments: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.architecture,
            16..64 => {
                let argument = self.arguments[(offset as usize - 16) / 8];
                if offset % 8 == 0 { argument as u32 } else { (argument >> 32) as u32 }
            }
            _ => panic!("no filter of ours reads offset {offset}"),
        }
    }
}

/// What the filter answers, and after how many instructions.
pub(super) fn run(program: &[ClassicInstruction], call: &Call) -> (u32, usize) {
    let mut accumulator = 0;
    let mut at = 0;
    for steps in 1.. {
        let ClassicInstruction { code, jump_true, jump_false, operand } = program[at];
        at += 1;
        let holds = match code {
            LOAD => {
                accumulator = call.word(operand);
                continue;
            }
            AND => {
                accumulator &= operand;
                continue;
            }
            JUMP => {
                at += operand as usize;
                continue;
            }
            RETURN => return (operand, steps),
            IF_EQUAL => accumulator == operand,
            IF_AT_LEAST => accumulator >= operand,
            IF_ANY_BIT => accumulator & operand != 0,
            _ => panic!("no filter of ours has code {code:#x}"),
        };
        at += usize::from(if holds { jump_true } else { jump_false });
    }
    unreachable!("jumps only lead forward")
}
