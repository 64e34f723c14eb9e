//! Runs this program from memory when the guest's root could write its file.
//!
//! What is executed inside can be a script whose interpreter is `/proc/self/exe`: then this very program is executed
//! inside, and a guest process finds its file through `/proc/PID/exe` (CVE-2019-5736). The root of a user namespace may
//! not write a file of the host. A privileged server's may, so before it is joined this program goes on as a sealed copy.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;

use anyhow::{Context, Result};
use kernel::{memfd, process};
use rustix::fs::SealFlags;

use super::target::Target;

/// Executes this program anew from a sealed copy, when `target` calls for it and it is not one already.
///
/// # Errors
/// When there is no memory for it.
pub fn leave_file(target: &Target) -> Result<()> {
    if !target.is_privileged() {
        return Ok(());
    }
    let own = File::open("/proc/self/exe").context("open the own program")?;
    // An ordinary file has no seals, or none that keeps writers out.
    if rustix::fs::fcntl_get_seals(&own).is_ok_and(|seals| seals.contains(SealFlags::WRITE)) {
        return Ok(());
    }
    let copy = memfd::sealed_copy("vsctl", &own)?;
    let arguments = std::env::args_os().map(|argument| CString::new(argument.into_vec()));
    let arguments: Vec<CString> = arguments.collect::<Result<_, _>>().context("an argument with NUL")?;
    let variables = std::env::vars_os().map(|(key, value)| {
        let mut bytes = key.into_vec();
        bytes.push(b'=');
        bytes.extend(value.into_vec());
        CString::new(bytes)
    });
    let variables: Vec<CString> = variables.collect::<Result<_, _>>().context("a variable with NUL")?;
    Err(process::exec_descriptor(copy.as_fd(), &arguments, &variables).into())
}
