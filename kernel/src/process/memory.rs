//! The memory of another process, by descriptors that cannot pass to a third (/proc/PID/mem).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::error::{During, Error};
use crate::{Result, sys};

/// The memory of one process, as it was when this was opened: after an exec it is the old one's, and then nobody's.
///
/// process_vm_writev(2) would be one call, but names its target by a number that may just have passed to another process.
#[derive(Debug)]
pub struct Memory {
    memory: File,
    mappings: File,
}

impl Memory {
    /// Opens the memory of the process that `thread` belongs to. EACCES: without `CAP_SYS_PTRACE` over it.
    pub fn open(thread: i32) -> Result<Memory> {
        let open = |name: &str, write: bool| {
            let path = format!("/proc/{thread}/{name}");
            File::options().read(!write).write(write).open(&path).during("open", path)
        };
        Ok(Memory { memory: open("mem", true)?, mappings: open("maps", false)? })
    }

    /// Writes what the process itself could write. EFAULT: it could not, and then an unknown part has been written.
    ///
    /// The kernel lets a debugger write private memory that is read-only; before Linux 6.11, and while the process changes its
    /// mappings at this very moment, that is what happens. It may take as long as the process wants: its memory may come from
    /// a file system of its own.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let fault =
            || Error::new("write memory at", format_args!("{address:#x}"), io::Error::from_raw_os_error(libc::EFAULT));
        if !self.may_write(address, bytes.len() as u64) {
            return Err(fault());
        }
        match self.memory.write_at(bytes, address) {
            Ok(written) if written == bytes.len() => Ok(()),
            _ => Err(fault()),
        }
    }

    fn may_write(&self, address: u64, length: u64) -> bool {
        let Some(end) = address.checked_add(length) else { return false };
        let mut at = address;
        while at < end {
            match sys::writable_mapping_end(self.mappings.as_fd(), at) {
                Ok(next) if next > at => at = next,
                // A kernel that cannot be asked.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => return true,
                _ => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Memory {
        Memory::open(std::process::id() as i32).unwrap()
    }

    #[test]
    fn what_is_written_arrives() {
        let target = std::hint::black_box(vec![0_u8; 8192]);
        own().write(target.as_ptr() as u64 + 4090, b"across pages").unwrap();
        assert_eq!(&std::hint::black_box(&target)[4090..4102], b"across pages");
    }

    #[test]
    fn what_is_not_there_or_read_only_is_a_fault() {
        let fault = |address: u64| own().write(address, b"x").unwrap_err().raw_os_error();
        static READ_ONLY: [u8; 16] = *b"not to be change";
        for address in [0, 8, u64::MAX, 1 << 47, 0xffff_8000_0000_0000] {
            assert_eq!(fault(address), Some(libc::EFAULT), "{address:#x}");
        }
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
        if (numbers.next(), numbers.next()) >= (Some(6), Some(11)) {
            assert_eq!(fault(READ_ONLY.as_ptr() as u64), Some(libc::EFAULT));
            assert_eq!(std::hint::black_box(&READ_ONLY)[0], b'n');
        }
    }
}
