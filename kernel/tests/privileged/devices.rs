//! Device programs attached to a real cgroup.

use std::fs::File;

use kernel::bpf::{DeviceKind, DeviceProgram, DeviceRule};
use kernel::cgroup::Hierarchies;
use kernel::process::{CloneOptions, Fork, fork};

use crate::Outcome;
use crate::cgroups::TestGroup;
use crate::child::{ensure, ensure_equal, skip};

fn allow(minor: u32) -> DeviceProgram {
    let rule = DeviceRule {
        kind: DeviceKind::Char,
        major: Some(1),
        minor: Some(minor),
        read: true,
        write: false,
        mknod: false,
    };
    DeviceProgram::compile(&[rule])
}

/// Which of `paths` a process of the group may open for reading: one bit each.
fn openable(group: &TestGroup, paths: [&str; 2]) -> Result<i32, Box<dyn std::error::Error>> {
    let options = CloneOptions { cgroup: group.0.open_unified()?, ..Default::default() };
    match fork(&options)? {
        Fork::Child => {
            let bits = paths.iter().enumerate().map(|(bit, path)| match File::open(path) {
                Ok(_) => 1 << bit,
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => 0,
                Err(_) => 64,
            });
            std::process::exit(bits.sum())
        }
        Fork::Parent { pidfd, .. } => Ok(pidfd.reap()?.code().ok_or("the child was killed")?),
    }
}

pub fn program_refuses_and_is_replaced_live() -> Outcome {
    if Hierarchies::detect()?.unified().is_none() {
        return skip("no cgroup2 is mounted");
    }
    let (null, zero) = ("/dev/null", "/dev/zero");
    let group = TestGroup::new("")?;
    let directory = group.0.unified_directory().ok_or("no directory")?;
    ensure_equal("without a program", openable(&group, [null, zero])?, 0b11)?;
    allow(3).attach(&directory)?;
    ensure(DeviceProgram::count_loaded()? > 0, "the attached program is counted")?;
    ensure_equal("only null allowed", openable(&group, [null, zero])?, 0b01)?;
    allow(5).replace(&directory)?;
    ensure_equal("only zero allowed", openable(&group, [null, zero])?, 0b10)?;
    // Attached twice by mistake: nothing is allowed by both; replacing leaves one.
    allow(3).attach(&directory)?;
    ensure_equal("both must allow", openable(&group, [null, zero])?, 0b00)?;
    allow(3).replace(&directory)?;
    ensure_equal("one program again", openable(&group, [null, zero])?, 0b01)?;
    ensure(DeviceProgram::compile(&[]).replace(&directory).is_ok(), "a program that allows nothing loads")?;
    ensure_equal("nothing allowed", openable(&group, [null, zero])?, 0b00)
}
