//! A file system that is being set up, and what the kernel says when it refuses.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::tree::{Attributes, Tree};
use crate::Result;
use crate::error::{During, Error};

/// A new instance of a file system, before it is mounted (fsopen(2)).
///
/// An error carries the kernel's own messages from the context, so a refused option is named.
#[derive(Debug)]
pub struct FileSystem {
    context: OwnedFd,
    kind: String,
    /// What was set so far, for the error of a mount: some file systems look at their options only then.
    settings: Vec<String>,
}

impl FileSystem {
    /// Begins a file system of `kind`: `tmpfs`, `overlay`, `proc`, … ENODEV when the kernel does not have it.
    pub fn new(kind: &str) -> Result<Self> {
        let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).during("open file system", kind)?;
        Ok(Self { context, kind: kind.to_owned(), settings: Vec::new() })
    }

    /// Sets `key` to `value`; `source` is a key too. The kernel takes at most 255 bytes.
    pub fn option(&mut self, key: &str, value: impl AsRef<OsStr>) -> Result<&mut Self> {
        let value = value.as_ref();
        let set = rustix::mount::fsconfig_set_string(&self.context, key, value);
        self.note(set, format!("{key}={}", value.to_string_lossy()))
    }

    /// Sets a key that has no value, such as `userxattr` or `newinstance`.
    pub fn flag(&mut self, key: &str) -> Result<&mut Self> {
        let set = rustix::mount::fsconfig_set_flag(&self.context, key);
        self.note(set, key.to_owned())
    }

    /// Sets `key` to an open file or mount. Overlay takes its layers so from Linux 6.13 (`lowerdir+`, `upperdir`, `workdir`).
    pub fn descriptor(&mut self, key: &str, value: BorrowedFd<'_>) -> Result<&mut Self> {
        let set = rustix::mount::fsconfig_set_fd(&self.context, key, value);
        self.note(set, format!("{key}=<descriptor>"))
    }

    /// Makes the file system and a detached mount of it.
    pub fn mount(self, attributes: Attributes) -> Result<Tree> {
        let attributes = MountAttrFlags::from_bits_retain(attributes.bits());
        rustix::mount::fsconfig_create(&self.context)
            .and_then(|()| rustix::mount::fsmount(self.context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes))
            .map(Tree::from)
            .map_err(|errno| self.explain(errno, &self.settings.join(",")))
    }

    /// Remembers a setting that was taken, or explains why it was not.
    fn note(&mut self, result: rustix::io::Result<()>, setting: String) -> Result<&mut Self> {
        result.map_err(|errno| self.explain(errno, &setting))?;
        self.settings.push(setting);
        Ok(self)
    }

    /// Puts what the kernel wrote to the context's log into the error's object; the errno stays the source.
    fn explain(&self, errno: Errno, settings: &str) -> Error {
        let mut object = self.kind.clone();
        if !settings.is_empty() {
            object.push_str(" with ");
            object.push_str(settings);
        }
        let messages = self.messages();
        if !messages.is_empty() {
            object.push_str(&format!(" ({})", messages.join("; ")));
        }
        Error::new("set up file system", object, errno)
    }

    /// The kernel's messages so far; each read(2) takes one, ENODATA says there is none left.
    fn messages(&self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0_u8; 1024];
        loop {
            match rustix::io::read(&self.context, &mut buffer) {
                Ok(0) | Err(Errno::NODATA) => return messages,
                Ok(length) => messages.push(String::from_utf8_lossy(&buffer[..length]).trim().to_owned()),
                Err(Errno::INTR) => {}
                // The log is a help; without it the errno still says that it failed.
                Err(_) => return messages,
            }
        }
    }
}
