//! Checksums of memory while CRIU writes it.
//!
//! A server stands still until its images are summed and on the disk, and nearly all of them is memory. CRIU writes it once, from the
//! front to the back, so a thread follows close behind, on a processor of its own if there is one; what it has not come to when CRIU is
//! done is summed then.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kernel::process;
use rustix::thread::gettid;

use super::thin::holds_pages;
use crate::checksum::Summing;

/// How long it looks away: what CRIU writes in that time is all that is left when it is done.
const PAUSE: Duration = Duration::from_millis(10);

/// How much is given to the disk at once, in bytes: a queue that is full makes the kernel wait for the disk.
const WRITTEN_AT_ONCE: u64 = 8 << 20;

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

/// An image so far.
#[derive(Debug, Default)]
struct Followed {
    summed: Summing,
    /// As many bytes have begun to come to the disk.
    on_its_way: u64,
}

fn follow(directory: &Path, ends: &AtomicBool) -> Begun {
    let mut images = BTreeMap::new();
    while !ends.load(Ordering::Acquire) {
        pass(directory, &mut images, ends);
        thread::park_timeout(PAUSE);
    }
    images.into_iter().map(|(name, image): (_, Followed)| (name, image.summed)).collect()
}

/// Sums what is new. What cannot be read is left to who reads all of it at the end, and says why.
fn pass(directory: &Path, images: &mut BTreeMap<String, Followed>, ends: &AtomicBool) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| holds_pages(path)) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if images.entry(name.to_owned()).or_default().go_on(&path, ends).is_err() {
            images.remove(name);
        }
    }
}

impl Followed {
    fn go_on(&mut self, path: &Path, ends: &AtomicBool) -> io::Result<()> {
        if ends.load(Ordering::Acquire) || fs::metadata(path)?.size() == self.summed.bytes() {
            return Ok(());
        }
        let file = File::open(path)?;
        self.summed.go_on(&file, || !ends.load(Ordering::Acquire))?;
        while self.on_its_way + WRITTEN_AT_ONCE <= self.summed.bytes() && !ends.load(Ordering::Acquire) {
            let next = self.on_its_way..self.on_its_way + WRITTEN_AT_ONCE;
            self.on_its_way = next.end;
            // What fails is told to whoever waits for the disk.
            let _ = kernel::file::begin_writing(&file, next);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::PathBuf;

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

    /// One image, which somebody has followed.
    struct Image(tempfile::TempDir, BTreeMap<String, Followed>);

    impl Image {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap(), BTreeMap::new())
        }

        fn path(&self) -> PathBuf {
            self.0.path().join("pages-1.img")
        }

        fn pass(&mut self, ends: bool) -> u64 {
            pass(self.0.path(), &mut self.1, &AtomicBool::new(ends));
            self.1["pages-1.img"].summed.bytes()
        }

        fn check(mut self) {
            let path = self.path();
            let followed = self.1.remove("pages-1.img").unwrap();
            assert!(self.1.is_empty(), "{:?}", self.1);
            assert_eq!(Sum::of_rest(&path, followed.summed).unwrap(), Sum::of(&path).unwrap());
        }
    }

    #[test]
    fn what_grows_is_followed_and_finished_by_who_comes_later() {
        let mut image = Image::new();
        let mut file = File::create(image.path()).unwrap();
        fs::write(image.0.path().join("core-1.img"), "not memory").unwrap();
        for round in 1..=3_u8 {
            file.write_all(&vec![round; 5_000_000]).unwrap();
            assert_eq!(image.pass(false), u64::from(round) * 5_000_000);
        }
        assert_eq!(image.1["pages-1.img"].on_its_way, WRITTEN_AT_ONCE);
        file.write_all(b"the end").unwrap();
        image.check();
    }

    /// As when CRIU is done, or has failed, in the middle of much memory.
    #[test]
    fn it_ends_at_once_when_it_is_told() {
        let mut image = Image::new();
        fs::write(image.path(), vec![7; 30 << 20]).unwrap();
        assert_eq!(image.pass(true), 0);
        image.check();
    }

    #[test]
    fn what_became_shorter_is_summed_anew() {
        let mut image = Image::new();
        fs::write(image.path(), [7; 5000]).unwrap();
        image.pass(false);
        fs::write(image.path(), [7; 100]).unwrap();
        image.check();
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
        let path = directory.path().join("pages-1.img");
        fs::write(&path, [7; 5000]).unwrap();
        thread::sleep(10 * PAUSE);
        let begun = beside.end().remove("pages-1.img").unwrap_or_default();
        assert_eq!(threads(), 0);
        assert_eq!(Sum::of_rest(&path, begun).unwrap(), Sum::of(&path).unwrap());
        assert!(beside.end().is_empty());
    }
}
