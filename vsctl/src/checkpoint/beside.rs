//! Checksums of memory while CRIU writes it.
//!
//! A server stands still until its images are summed and on the disk, and nearly all of them is memory. CRIU writes it once, from the
//! front to the back, so a thread follows close behind, on a processor of its own if there is one; what it has not come to when CRIU is
//! done is summed then.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kernel::process;
use rustix::thread::gettid;

use super::thin::holds_pages;
use crate::checksum::Summing;

/// How long it looks away when there was nothing new.
const PAUSE: Duration = Duration::from_millis(10);

/// What has been summed of each image, by its name.
pub type Begun = BTreeMap<String, Summing>;

/// Somebody who follows what is written.
#[derive(Debug)]
pub struct Beside {
    ends: Arc<AtomicBool>,
    follower: Option<JoinHandle<(i32, Begun)>>,
}

impl Beside {
    /// Begins to follow what is written to `directory`. When the system has no thread for that, all is left for later.
    pub fn begin(directory: &Path) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let (told, directory) = (Arc::clone(&ends), directory.to_owned());
        let follow = move || (gettid().as_raw_nonzero().get(), follow(&directory, &told));
        let follower = thread::Builder::new().name("sums".into()).spawn(follow);
        let follower = follower.inspect_err(|error| log::info!("images are summed when they are written: {error}"));
        Self { ends, follower: follower.ok() }
    }

    /// Ends, and tells what is summed.
    pub fn end(&mut self) -> Begun {
        self.ends.store(true, Ordering::Release);
        let Some(follower) = self.follower.take() else { return Begun::new() };
        follower.thread().unpark();
        let Ok((thread, begun)) = follower.join() else { return Begun::new() };
        // Who forks next must be alone.
        process::wait_for_joined_thread(thread);
        begun
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.end();
    }
}

fn follow(directory: &Path, ends: &AtomicBool) -> Begun {
    let mut begun = Begun::new();
    while !ends.load(Ordering::Acquire) {
        if !pass(directory, &mut begun, ends) {
            thread::park_timeout(PAUSE);
        }
    }
    begun
}

/// Sums what is new; whether there was any. What cannot be read is left to who reads all of it at the end, and says why.
fn pass(directory: &Path, begun: &mut Begun, ends: &AtomicBool) -> bool {
    let Ok(entries) = fs::read_dir(directory) else { return false };
    let images = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| holds_pages(path));
    let mut found = false;
    for path in images.collect::<Vec<PathBuf>>() {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let summing = begun.entry(name.to_owned()).or_default();
        match add_new(&path, summing, ends) {
            Ok(added) => found |= added,
            Err(_) => drop(begun.remove(name)),
        }
    }
    found
}

fn add_new(path: &Path, summing: &mut Summing, ends: &AtomicBool) -> io::Result<bool> {
    let before = summing.bytes();
    if fs::metadata(path)?.size() == before {
        return Ok(false);
    }
    let file = File::open(path)?;
    summing.go_on(&file, || !ends.load(Ordering::Acquire))?;
    // What fails is told to whoever waits for it.
    let _ = kernel::file::begin_writing(&file);
    Ok(summing.bytes() > before)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::checksum::Sum;

    fn wait_until(done: impl Fn() -> bool) {
        for _ in 0..1000 {
            if done() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not come");
    }

    #[test]
    fn what_grows_is_followed_and_finished_by_who_comes_later() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pages-1.img");
        let mut file = File::create(&path).unwrap();
        fs::write(directory.path().join("core-1.img"), "not memory").unwrap();
        let ends = AtomicBool::new(false);
        let mut begun = Begun::new();
        for round in 0..3_u8 {
            file.write_all(&vec![round; 700_000]).unwrap();
            assert!(pass(directory.path(), &mut begun, &ends));
            assert!(!pass(directory.path(), &mut begun, &ends), "nothing is new");
            assert_eq!(begun["pages-1.img"].bytes(), (u64::from(round) + 1) * 700_000);
        }
        file.write_all(b"the end").unwrap();
        assert_eq!(begun.keys().collect::<Vec<_>>(), ["pages-1.img"]);
        let summing = begun.remove("pages-1.img").unwrap();
        assert_eq!(Sum::of_rest(&path, summing).unwrap(), Sum::of(&path).unwrap());
    }

    /// As when CRIU is done, or has failed, in the middle of much memory.
    #[test]
    fn it_ends_at_once_when_it_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pages-1.img");
        fs::write(&path, vec![7; 3 << 20]).unwrap();
        let mut begun = Begun::new();
        pass(directory.path(), &mut begun, &AtomicBool::new(true));
        let summing = begun.remove("pages-1.img").unwrap();
        assert!(summing.bytes() < 3 << 20, "{summing:?}");
        assert_eq!(Sum::of_rest(&path, summing).unwrap(), Sum::of(&path).unwrap());
    }

    #[test]
    fn a_thread_follows_and_is_gone_afterwards() {
        let directory = tempfile::tempdir().unwrap();
        let threads = || {
            fs::read_dir("/proc/self/task")
                .unwrap()
                .filter_map(|task| {
                    let name = fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
                    (name.trim() == "sums").then_some(())
                })
                .count()
        };
        let mut beside = Beside::begin(directory.path());
        wait_until(|| threads() == 1);
        fs::write(directory.path().join("pages-1.img"), [7; 5000]).unwrap();
        // It looks each 10 ms.
        thread::sleep(Duration::from_millis(500));
        let begun = beside.end();
        assert_eq!(begun["pages-1.img"].bytes(), 5000);
        assert_eq!(threads(), 0);
        assert!(beside.end().is_empty());
    }

    #[test]
    fn what_became_shorter_is_summed_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pages-1.img");
        fs::write(&path, [7; 5000]).unwrap();
        let mut begun = Begun::new();
        assert!(pass(directory.path(), &mut begun, &AtomicBool::new(false)));
        fs::write(&path, [7; 100]).unwrap();
        let summing = begun.remove("pages-1.img").unwrap();
        assert_eq!(Sum::of_rest(&path, summing).unwrap(), Sum::of(&path).unwrap());
    }
}
