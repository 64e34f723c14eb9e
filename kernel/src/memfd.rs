//! Files without a name: content that a process can be given and cannot change (memfd_create(2)).

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::Result;
use crate::error::During;

/// A file of `bytes`, sealed against every change, read position at its start, close-on-exec set.
///
/// It may be executed: it also serves to run a program that its own process cannot overwrite.
pub fn sealed(name: &str, bytes: &[u8]) -> Result<OwnedFd> {
    let mut file = create(name)?;
    file.write_all(bytes).during("write memory file", name)?;
    seal(file, name)
}

/// Like [`sealed`] with the content of an open file, copied by the kernel.
pub fn sealed_copy(name: &str, source: &File) -> Result<OwnedFd> {
    let mut file = create(name)?;
    let mut source = source;
    source.seek(SeekFrom::Start(0)).during("rewind source of memory file", name)?;
    std::io::copy(&mut source, &mut file).during("copy to memory file", name)?;
    seal(file, name)
}

/// A file of `length` zero bytes for processes to share: its length is sealed, so that no mapping of it can lose its memory.
pub fn shared(name: &str, length: u64) -> Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // As in `create`, and never to be executed.
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        other => other,
    };
    let fd = fd.during("create memory file", name)?;
    rustix::fs::ftruncate(&fd, length).during("lengthen memory file", name)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW)
        .during("seal memory file", name)?;
    Ok(fd)
}

/// An empty file that can be sealed.
fn create(name: &str) -> Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // MFD_EXEC says openly what is the default; kernels before 6.3 do not know it, and where the sysctl
    // vm.memfd_noexec is set they would refuse the silent form.
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC) {
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        other => other,
    };
    Ok(File::from(fd.during("create memory file", name)?))
}

/// Rewinds, then seals against everything, the sealing itself included.
fn seal(mut file: File, name: &str) -> Result<OwnedFd> {
    file.seek(SeekFrom::Start(0)).during("rewind memory file", name)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals).during("seal memory file", name)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_sealed_file_reads_and_does_not_change() {
        let mut file = File::from(sealed("test", b"content").unwrap());
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        assert_eq!(file.write_all(b"more").unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(file.set_len(0).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn a_copy_has_the_whole_source() {
        let source = File::open("/proc/self/exe").unwrap();
        let copy = File::from(sealed_copy("exe", &source).unwrap());
        assert_eq!(copy.metadata().unwrap().len(), source.metadata().unwrap().len());
    }
}
