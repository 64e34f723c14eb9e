//! Classic BPF for seccomp: a search tree over system-call numbers (linux/filter.h, linux/seccomp.h).

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::sys::ClassicInstruction;

/// Offsets into `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

/// `BPF_LD | BPF_W | BPF_ABS`
pub(super) const LOAD: u16 = 0x20;
/// `BPF_ALU | BPF_AND | BPF_K`
pub(super) const AND: u16 = 0x54;
/// `BPF_JMP | BPF_JA`
pub(super) const JUMP: u16 = 0x05;
/// `BPF_JMP | BPF_JEQ | BPF_K`
pub(super) const IF_EQUAL: u16 = 0x15;
/// `BPF_JMP | BPF_JGE | BPF_K`
pub(super) const IF_AT_LEAST: u16 = 0x35;
/// `BPF_JMP | BPF_JSET | BPF_K`
pub(super) const IF_ANY_BIT: u16 = 0x45;
/// `BPF_RET | BPF_K`
pub(super) const RETURN: u16 = 0x06;

/// `SECCOMP_RET_ALLOW`
pub(super) const ALLOW: u32 = 0x7fff_0000;
/// `SECCOMP_RET_ERRNO`; the low half is the errno.
pub(super) const ERRNO: u32 = 0x0005_0000;
/// `SECCOMP_RET_USER_NOTIF`: who holds the filter's listener answers.
pub(super) const ASK: u32 = 0x7fc0_0000;

/// `AUDIT_ARCH_X86_64`
pub(super) const X86_64: u32 = 0xc000_003e;
/// `AUDIT_ARCH_I386`
pub(super) const I386: u32 = 0x4000_0003;
/// An x32 call is one of x86_64 with this bit; the numbers below 512 are the same, 512 to 547 are its own.
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// What happens to one system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It fails with this errno.
    Fail(i32),
    /// The holder of the listener answers it.
    Ask,
    /// It fails with `errno` when the low half of argument `argument` has one of `bits`.
    FailOnBits { argument: u32, bits: u32, errno: i32 },
    /// It fails with `errno` when the low half of each argument named is the value beside it.
    FailOnValues { arguments: &'static [(u32, u32)], errno: i32 },
}

impl Verdict {
    fn is_final(self) -> bool {
        matches!(self, Verdict::Fail(_) | Verdict::Ask)
    }
}

/// A program from the tables of both architectures. The tables need not be sorted; of the verdicts on one number the first
/// that applies counts.
pub(super) fn assemble(x86_64: &[(u32, Verdict)], i386: &[(u32, Verdict)]) -> Vec<ClassicInstruction> {
    // x32 shares the table: its bit is taken off first. A native call of 512 or more does not exist, so what is said about
    // those numbers says nothing about x86_64. (It holds for -1, too, that a tracer writes to skip a call: not in the table.)
    let mut native = vec![load(NUMBER_AT), step(AND, !X32_BIT)];
    native.extend(tree(&by_number(x86_64)));
    let mut foreign = vec![load(NUMBER_AT)];
    foreign.extend(tree(&by_number(i386)));

    let mut program = vec![load(ARCHITECTURE_AT), test(IF_EQUAL, X86_64, 1, 0)];
    // An unconditional jump reaches farther than the 255 of a comparison.
    program.push(step(JUMP, native.len() as u32));
    program.extend(native);
    program.push(test(IF_EQUAL, I386, 1, 0));
    program.push(step(RETURN, ERRNO | libc::ENOSYS as u32));
    program.extend(foreign);
    program
}

fn by_number(table: &[(u32, Verdict)]) -> Vec<(u32, Vec<Verdict>)> {
    let mut numbers: BTreeMap<u32, Vec<Verdict>> = BTreeMap::new();
    for (number, verdict) in table {
        let verdicts = numbers.entry(*number).or_default();
        if !verdicts.last().is_some_and(|last| last.is_final()) {
            verdicts.push(*verdict);
        }
    }
    numbers.into_iter().collect()
}

/// Halves the table until few are left; the number is in the accumulator. Every path ends in a return.
fn tree(table: &[(u32, Vec<Verdict>)]) -> Vec<ClassicInstruction> {
    // Three comparisons in a row cost what two more levels would.
    const LEAF: usize = 3;
    if table.len() <= LEAF {
        let mut code: Vec<_> = table.iter().flat_map(|(number, verdicts)| leaf(*number, verdicts)).collect();
        code.push(step(RETURN, ALLOW));
        return code;
    }
    let (low, high) = table.split_at(table.len() / 2);
    let low_code = tree(low);
    let distance = u8::try_from(low_code.len()).expect("the tables are short: a test compiles every profile");
    let mut code = vec![test(IF_AT_LEAST, high[0].0, distance, 0)];
    code.extend(low_code);
    code.extend(tree(high));
    code
}

/// `if number: the first verdict that applies`, else falls through with the accumulator untouched.
fn leaf(number: u32, verdicts: &[Verdict]) -> Vec<ClassicInstruction> {
    let mut body: Vec<_> = verdicts.iter().flat_map(|verdict| judge(*verdict)).collect();
    if !verdicts.last().is_some_and(|last| last.is_final()) {
        body.push(step(RETURN, ALLOW));
    }
    let distance = u8::try_from(body.len()).expect("few verdicts on one number: a test compiles every profile");
    let mut code = vec![test(IF_EQUAL, number, 0, distance)];
    code.extend(body);
    code
}

/// Returns when the verdict applies, else falls through, the accumulator overwritten.
fn judge(verdict: Verdict) -> Vec<ClassicInstruction> {
    let fail = |errno: i32| step(RETURN, ERRNO | errno as u32);
    match verdict {
        Verdict::Fail(errno) => vec![fail(errno)],
        Verdict::Ask => vec![step(RETURN, ASK)],
        Verdict::FailOnBits { argument, bits, errno } => {
            vec![load_argument(argument), test(IF_ANY_BIT, bits, 0, 1), fail(errno)]
        }
        Verdict::FailOnValues { arguments, errno } => {
            // Two instructions for each argument still to come, and the return, are jumped over.
            let compare = |(at, (argument, value)): (usize, &(u32, u32))| {
                let over = 2 * (arguments.len() - 1 - at) + 1;
                [load_argument(*argument), test(IF_EQUAL, *value, 0, over as u8)]
            };
            arguments.iter().enumerate().flat_map(compare).chain([fail(errno)]).collect()
        }
    }
}

/// Little-endian: the low half of an argument comes first. The calls in question take 32 bits of it (or refuse the rest).
fn load_argument(argument: u32) -> ClassicInstruction {
    load(ARGUMENTS_AT + 8 * argument)
}

fn load(offset: u32) -> ClassicInstruction {
    step(LOAD, offset)
}

fn step(code: u16, operand: u32) -> ClassicInstruction {
    ClassicInstruction { code, jump_true: 0, jump_false: 0, operand }
}

fn test(code: u16, operand: u32, jump_true: u8, jump_false: u8) -> ClassicInstruction {
    ClassicInstruction { code, jump_true, jump_false, operand }
}

/// The program as text, one instruction a line; jumps name the line they lead to.
pub(super) fn dump(program: &[ClassicInstruction]) -> String {
    let mut text = String::new();
    for (at, instruction) in program.iter().enumerate() {
        let ClassicInstruction { code, jump_true, jump_false, operand } = *instruction;
        let yes = at + 1 + usize::from(jump_true);
        let no = at + 1 + usize::from(jump_false);
        let line = match code {
            LOAD => format!("load [{operand}]"),
            AND => format!("and {operand:#x}"),
            JUMP => format!("goto {}", at + 1 + operand as usize),
            IF_EQUAL => format!("if == {operand:#x} goto {yes} else {no}"),
            IF_AT_LEAST => format!("if >= {operand:#x} goto {yes} else {no}"),
            IF_ANY_BIT => format!("if & {operand:#x} goto {yes} else {no}"),
            RETURN if operand == ALLOW => "allow".to_owned(),
            RETURN if operand == ASK => "ask".to_owned(),
            RETURN => format!("errno {}", operand & 0xffff),
            _ => format!("code {code:#x} {operand:#x}"),
        };
        writeln!(text, "{at:03}: {line}").expect("writing to a String cannot fail");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seccomp::interpret::{Call, run};
    use proptest::prelude::*;

    #[test]
    fn a_small_program() {
        let program = assemble(
            &[(9, Verdict::Fail(1)), (4, Verdict::FailOnBits { argument: 1, bits: 0x30, errno: 2 })],
            &[(7, Verdict::Ask)],
        );
        let expected = "\
000: load [4]
001: if == 0xc000003e goto 3 else 2
002: goto 13
003: load [0]
004: and 0xbfffffff
005: if == 0x4 goto 6 else 10
006: load [24]
007: if & 0x30 goto 8 else 9
008: errno 2
009: allow
010: if == 0x9 goto 11 else 12
011: errno 1
012: allow
013: if == 0x40000003 goto 15 else 14
014: errno 38
015: load [0]
016: if == 0x7 goto 17 else 18
017: ask
018: allow
";
        assert_eq!(dump(&program), expected);
    }

    #[test]
    fn the_first_verdict_that_applies_counts() {
        let values = Verdict::FailOnValues { arguments: &[(1, 5), (2, 6)], errno: 1 };
        let bits = Verdict::FailOnBits { argument: 0, bits: 4, errno: 2 };
        let program = assemble(&[(9, values), (9, bits), (8, bits), (8, Verdict::Fail(3)), (8, Verdict::Ask)], &[]);
        let answer = |number, arguments: [u64; 3]| {
            let arguments = [arguments[0], arguments[1], arguments[2], 0, 0, 0];
            run(&program, &Call { architecture: X86_64, number, arguments }).0
        };
        assert_eq!(answer(9, [4, 5, 6]), ERRNO | 1);
        assert_eq!(answer(9, [4, 5, 7]), ERRNO | 2);
        assert_eq!(answer(9, [4, 6, 6]), ERRNO | 2);
        assert_eq!(answer(9, [3, 5, 7]), ALLOW);
        assert_eq!(answer(9, [3, 7, 6]), ALLOW);
        assert_eq!(answer(8, [4, 0, 0]), ERRNO | 2);
        assert_eq!(answer(8, [3, 0, 0]), ERRNO | 3);
        assert_eq!(answer(7, [4, 5, 6]), ALLOW);
    }

    proptest! {
        #[test]
        fn every_number_gets_its_verdict_and_no_other(
            refused in proptest::collection::btree_map(0_u32..600, 1_i32..40, 0..60),
            number in 0_u32..600,
        ) {
            let table: Vec<_> = refused.iter().map(|(number, errno)| (*number, Verdict::Fail(*errno))).collect();
            let program = assemble(&table, &table);
            let expected = refused.get(&number).map_or(ALLOW, |errno| ERRNO | *errno as u32);
            for (architecture, number) in [(X86_64, number), (X86_64, number | X32_BIT), (I386, number)] {
                let call = Call { architecture, number, arguments: [0; 6] };
                prop_assert_eq!(run(&program, &call).0, expected);
            }
        }
    }
}
