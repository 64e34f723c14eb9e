//! Which devices the processes of a cgroup may open or make.

use std::collections::HashSet;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::instruction::Instruction;
use crate::error::{During, Error};
use crate::{Result, sys};

/// `BPF_PROG_TYPE_CGROUP_DEVICE`
const PROGRAM_TYPE: u32 = 15;
/// `BPF_CGROUP_DEVICE`
const ATTACH_TYPE: u32 = 6;
/// Programs of the group, of its ancestors and of its descendants all run, and all must allow.
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
const BPF_F_REPLACE: u32 = 1 << 2;
/// By this name `replace` knows a program of ours from a stranger's.
const NAME: &str = "kernel_devices";

/// Which devices a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// Block devices.
    Block,
    /// Character devices.
    Char,
    /// Both.
    Any,
}

/// An access that is allowed; what no rule allows is refused with EPERM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRule {
    /// Block, character or both.
    pub kind: DeviceKind,
    /// Major number; `None` is any.
    pub major: Option<u32>,
    /// Minor number; `None` is any.
    pub minor: Option<u32>,
    /// Opening for reading.
    pub read: bool,
    /// Opening for writing.
    pub write: bool,
    /// Making a node.
    pub mknod: bool,
}

impl DeviceRule {
    /// The kernel's `BPF_DEVCG_ACC_*` bits.
    fn access(&self) -> u32 {
        u32::from(self.mknod) | u32::from(self.read) << 1 | u32::from(self.write) << 2
    }
}

const ACCESS_ALL: u32 = 0b111;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// Rules compiled to a program; it lives in the kernel only when attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceProgram {
    instructions: Vec<Instruction>,
}

impl DeviceProgram {
    /// Compiles rules. Order is of no matter: an access is allowed when one rule allows all of it, and rules about the
    /// same devices count as one (so `r` and `w` allow opening for both).
    pub fn compile(rules: &[DeviceRule]) -> DeviceProgram {
        let mut instructions = vec![
            // struct bpf_cgroup_dev_ctx: access in the high half and kind in the low half of one word, major, minor.
            Instruction::Load { to: KIND, from: CONTEXT, offset: 0 },
            Instruction::Copy { to: ACCESS, from: KIND },
            Instruction::And { to: KIND, value: 0xffff },
            Instruction::ShiftRight { to: ACCESS, bits: 16 },
            Instruction::Load { to: MAJOR, from: CONTEXT, offset: 4 },
            Instruction::Load { to: MINOR, from: CONTEXT, offset: 8 },
        ];
        for rule in merge(rules) {
            let allowed = compile_rule(&rule);
            let unconditional = allowed.len() == 2;
            instructions.extend(allowed);
            if unconditional {
                // The verifier refuses what cannot be reached.
                return DeviceProgram { instructions };
            }
        }
        instructions.extend([Instruction::Set { to: 0, value: 0 }, Instruction::Exit]);
        DeviceProgram { instructions }
    }

    /// Attaches the program to the cgroup2 directory. It stays until the group is removed; nobody has to hold it.
    pub fn attach(&self, cgroup_directory: &Path) -> Result<()> {
        self.load()?.attach(cgroup_directory)
    }

    /// Puts this program in the place of the one attached before, with no moment without one. None before: attaches.
    pub fn replace(&self, cgroup_directory: &Path) -> Result<()> {
        let group = open_group(cgroup_directory)?;
        let mut ours = attached_by_us(group.as_fd(), cgroup_directory)?.into_iter();
        let Some(old) = ours.next() else {
            return self.attach(cgroup_directory);
        };
        let program = self.load()?;
        let flags = BPF_F_ALLOW_MULTI | BPF_F_REPLACE;
        sys::bpf_program_attach(group.as_fd(), program.0.as_fd(), ATTACH_TYPE, flags, Some(old.as_fd()))
            .during("replace device program of", cgroup_directory.display())?;
        // More than one is left only by somebody who attached twice; all would have to allow.
        for surplus in ours {
            sys::bpf_program_detach(group.as_fd(), surplus.as_fd(), ATTACH_TYPE)
                .during("detach old device program of", cgroup_directory.display())?;
        }
        Ok(())
    }

    /// How many programs made here are loaded on the host. One goes away a moment after the group it was attached to.
    pub fn count_loaded() -> Result<usize> {
        let mut count = 0;
        let mut id = 0;
        loop {
            id = match sys::bpf_program_next_id(id) {
                Ok(next) => next,
                Err(end) if end.raw_os_error() == Some(libc::ENOENT) => return Ok(count),
                Err(other) => return Err(Error::new("list programs after", id, other)),
            };
            // Gone since it was listed is not loaded.
            let name = sys::bpf_program_by_id(id).and_then(|program| sys::bpf_program_name(program.as_fd()));
            count += usize::from(name.is_ok_and(|name| name == NAME));
        }
    }

    /// Has the kernel check it, so that any number of groups can share it. It goes away when nobody holds it and no group has it.
    pub fn load(&self) -> Result<LoadedDeviceProgram> {
        self.load_once().map(LoadedDeviceProgram)
    }

    /// When the verifier refuses, once more for its reasons.
    fn load_once(&self) -> Result<OwnedFd> {
        let words: Vec<u64> = self.instructions.iter().map(|instruction| instruction.encode()).collect();
        sys::bpf_program_load(PROGRAM_TYPE, ATTACH_TYPE, NAME, &words, None).or_else(|first| {
            let mut log = vec![0_u8; 16 * 1024];
            sys::bpf_program_load(PROGRAM_TYPE, ATTACH_TYPE, NAME, &words, Some(&mut log)).map_err(|_| {
                let text = String::from_utf8_lossy(&log);
                let reasons = text.trim_matches('\0').trim();
                Error::new("load device program", format_args!("of {} instructions: {reasons}", words.len()), first)
            })
        })
    }
}

/// A program that the kernel has checked.
#[derive(Debug)]
pub struct LoadedDeviceProgram(OwnedFd);

impl LoadedDeviceProgram {
    /// Attaches it to the cgroup2 directory, as [`DeviceProgram::attach`] does.
    pub fn attach(&self, cgroup_directory: &Path) -> Result<()> {
        let group = open_group(cgroup_directory)?;
        sys::bpf_program_attach(group.as_fd(), self.0.as_fd(), ATTACH_TYPE, BPF_F_ALLOW_MULTI, None)
            .during("attach device program to", cgroup_directory.display())
    }
}

/// The program as text, one instruction a line.
impl fmt::Display for DeviceProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.instructions.iter().enumerate().try_for_each(|(at, instruction)| writeln!(f, "{at:03}: {instruction}"))
    }
}

/// One rule for each set of devices, with all that is allowed on it; rules that allow nothing are left out.
fn merge(rules: &[DeviceRule]) -> Vec<DeviceRule> {
    let mut merged: Vec<DeviceRule> = Vec::new();
    for rule in rules.iter().filter(|rule| rule.access() != 0) {
        let same =
            |other: &&mut DeviceRule| (other.kind, other.major, other.minor) == (rule.kind, rule.major, rule.minor);
        match merged.iter_mut().find(same) {
            Some(known) => {
                known.read |= rule.read;
                known.write |= rule.write;
                known.mknod |= rule.mknod;
            }
            None => merged.push(*rule),
        }
    }
    merged
}

/// `allow` behind one comparison for each thing the rule is particular about.
fn compile_rule(rule: &DeviceRule) -> Vec<Instruction> {
    // (register to compare, value, is the access check)
    let mut checks: Vec<(u8, u32)> = Vec::with_capacity(4);
    match rule.kind {
        DeviceKind::Block => checks.push((KIND, 1)),
        DeviceKind::Char => checks.push((KIND, 2)),
        DeviceKind::Any => {}
    }
    checks.extend(rule.major.map(|major| (MAJOR, major)));
    checks.extend(rule.minor.map(|minor| (MINOR, minor)));
    let refused = ACCESS_ALL & !rule.access();
    let allow = [Instruction::Set { to: 0, value: 1 }, Instruction::Exit];
    let access_check = [
        Instruction::Copy { to: SCRATCH, from: ACCESS },
        Instruction::And { to: SCRATCH, value: refused as i32 },
        Instruction::SkipUnless { register: SCRATCH, value: 0, skip: allow.len() as i16 },
    ];
    let mut tail = Vec::with_capacity(access_check.len() + allow.len());
    if refused != 0 {
        tail.extend(access_check);
    }
    tail.extend(allow);
    let count = checks.len();
    let compare = checks.into_iter().enumerate().map(|(index, (register, value))| {
        let skip = (count - index - 1 + tail.len()) as i16;
        Instruction::SkipUnless { register, value, skip }
    });
    compare.chain(tail.iter().copied()).collect()
}

fn open_group(directory: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::empty()).during("open cgroup", directory.display())
}

/// The device programs attached to this group itself that have our name.
fn attached_by_us(group: BorrowedFd<'_>, directory: &Path) -> Result<Vec<OwnedFd>> {
    let ids = sys::bpf_program_query(group, ATTACH_TYPE).during("list device programs of", directory.display())?;
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for id in ids.into_iter().filter(|id| seen.insert(*id)) {
        let program = sys::bpf_program_by_id(id).during("open device program", id)?;
        if sys::bpf_program_name(program.as_fd()).during("read name of device program", id)? == NAME {
            found.push(program);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> DeviceRule {
        let mut words = text.split([' ', ':']);
        let kind = match words.next().unwrap() {
            "b" => DeviceKind::Block,
            "c" => DeviceKind::Char,
            _ => DeviceKind::Any,
        };
        let mut number = || words.next().unwrap().parse().ok();
        let (major, minor) = (number(), number());
        let access = words.next().unwrap();
        DeviceRule {
            kind,
            major,
            minor,
            read: access.contains('r'),
            write: access.contains('w'),
            mknod: access.contains('m'),
        }
    }

    fn compiled(rules: &[&str]) -> String {
        DeviceProgram::compile(&rules.iter().map(|text| rule(text)).collect::<Vec<_>>()).to_string()
    }

    const PROLOGUE: &str = "\
000: r2 = *(u32 *)(r1 + 0)
001: r3 = r2
002: r2 &= 65535
003: r3 >>= 16
004: r4 = *(u32 *)(r1 + 4)
005: r5 = *(u32 *)(r1 + 8)
";

    #[test]
    fn no_rule_allows_nothing() {
        assert_eq!(compiled(&[]), format!("{PROLOGUE}006: r0 = 0\n007: exit\n"));
        assert_eq!(compiled(&["c 1:3 -"]), compiled(&[]));
    }

    #[test]
    fn a_rule_for_everything_ends_the_program() {
        assert_eq!(compiled(&["a *:* rwm", "c 1:3 r"]), format!("{PROLOGUE}006: r0 = 1\n007: exit\n"));
    }

    #[test]
    fn each_particular_is_one_comparison() {
        let expected = "\
006: if r2 != 2 skip 4
007: if r4 != 1 skip 3
008: if r5 != 3 skip 2
009: r0 = 1
010: exit
011: if r2 != 1 skip 5
012: r6 = r3
013: r6 &= 6
014: if r6 != 0 skip 2
015: r0 = 1
016: exit
017: r0 = 0
018: exit
";
        assert_eq!(compiled(&["c 1:3 rwm", "b *:* m"]), format!("{PROLOGUE}{expected}"));
    }

    #[test]
    fn rules_about_the_same_device_are_one() {
        assert_eq!(compiled(&["c 1:3 r", "c 1:3 w"]), compiled(&["c 1:3 rw"]));
        assert_ne!(compiled(&["c 1:3 r", "c 1:5 w"]), compiled(&["c 1:3 rw"]));
    }

    /// What the kernel would do with the program, for `access_type`, major and minor.
    fn run(program: &DeviceProgram, context: [u32; 3]) -> bool {
        let mut registers = [0_u64; 11];
        let mut at = 0;
        loop {
            let instruction = program.instructions[at];
            at += 1;
            match instruction {
                Instruction::Load { to, offset, .. } => {
                    registers[to as usize] = u64::from(context[offset as usize / 4])
                }
                Instruction::Copy { to, from } => registers[to as usize] = registers[from as usize],
                Instruction::Set { to, value } => registers[to as usize] = value as u64,
                Instruction::And { to, value } => registers[to as usize] &= value as u64,
                Instruction::ShiftRight { to, bits } => registers[to as usize] >>= bits,
                Instruction::SkipUnless { register, value, skip } if registers[register as usize] as u32 != value => {
                    at += skip as usize
                }
                Instruction::SkipUnless { .. } => {}
                Instruction::Exit => return registers[0] == 1,
            }
        }
    }

    #[test]
    fn programs_decide_as_the_rules_say() {
        let program = DeviceProgram::compile(&[rule("c 1:3 rw"), rule("c 136:* rw"), rule("b 8:0 r"), rule("a *:* m")]);
        let (mknod, read, write, block, char) = (1 << 16, 2 << 16, 4 << 16, 1, 2);
        for (kind, major, minor, expected) in [
            (char | read | write, 1, 3, true),
            (char | read | write, 1, 5, false),
            (char | read, 136, 77, true),
            (block | read, 8, 0, true),
            (block | read | write, 8, 0, false),
            (block | read, 1, 3, false),
            (block | mknod, 99, 99, true),
            (char | mknod | read, 99, 99, false),
        ] {
            assert_eq!(run(&program, [kind, major, minor]), expected, "{kind:x} {major}:{minor}");
        }
    }

    #[test]
    fn words_are_the_kernels() {
        assert_eq!(Instruction::Load { to: 2, from: 1, offset: 4 }.encode(), 0x0000_0000_0004_1261);
        assert_eq!(Instruction::SkipUnless { register: 4, value: u32::MAX, skip: 2 }.encode(), 0xffff_ffff_0002_0456);
        assert_eq!(Instruction::Exit.encode(), 0x95);
    }
}
