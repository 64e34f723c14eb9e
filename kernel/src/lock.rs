//! Whole-file locks (flock(2)): they end with the descriptor, so with the process, however it dies.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FlockOperation;

use crate::Result;
use crate::error::During;

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub struct Flock(File);

impl Flock {
    /// Waits until no other holds the lock of `path`. The file is made (mode 0600) if missing.
    pub fn exclusive(path: &Path) -> Result<Flock> {
        Self::take(path, FlockOperation::LockExclusive).map(|lock| lock.expect("a waiting lock is never refused"))
    }

    /// Waits until no other holds it exclusively.
    pub fn shared(path: &Path) -> Result<Flock> {
        Self::take(path, FlockOperation::LockShared).map(|lock| lock.expect("a waiting lock is never refused"))
    }

    /// Does not wait: `None` when another holds it.
    pub fn try_exclusive(path: &Path) -> Result<Option<Flock>> {
        Self::take(path, FlockOperation::NonBlockingLockExclusive)
    }

    /// Does not wait: `None` when another holds it exclusively.
    pub fn try_shared(path: &Path) -> Result<Option<Flock>> {
        Self::take(path, FlockOperation::NonBlockingLockShared)
    }

    /// The locked file.
    pub fn file(&self) -> &File {
        &self.0
    }

    fn take(path: &Path, operation: FlockOperation) -> Result<Option<Flock>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).during("open lock", path.display())?;
        match retry_interrupted(|| rustix::fs::flock(&file, operation)) {
            Ok(()) => Ok(Some(Flock(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(errno).during("lock", path.display()),
        }
    }
}

impl From<Flock> for OwnedFd {
    /// The locked file, for who hands the lock on: it is held until the last copy is closed.
    fn from(lock: Flock) -> Self {
        lock.0.into()
    }
}

/// A signal without `SA_RESTART` must not look like a refused lock.
fn retry_interrupted(mut call: impl FnMut() -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_exclusive_lock_is_refused_until_the_first_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let first = Flock::exclusive(&path).unwrap();
        assert!(Flock::try_exclusive(&path).unwrap().is_none());
        assert!(Flock::try_shared(&path).unwrap().is_none());
        drop(first);
        let shared = Flock::shared(&path).unwrap();
        assert!(Flock::try_shared(&path).unwrap().is_some());
        drop(shared);
        assert!(Flock::try_exclusive(&path).unwrap().is_some());
    }
}
