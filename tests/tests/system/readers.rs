//! Readers of statistics, as many and as quick as can be, while workers are killed and servers freeze, stop and go.

use std::{
    collections::BTreeSet,
    fs, io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use system_tests::{
    ability,
    command::{Invocation, eventually, kill_hard, patient},
    promise::skip,
    promises,
    server::{GUEST_LIMIT, Running},
    site::Site,
};

promises![
    a_hundred_killed_workers_and_an_upgrade_are_not_noticed,
    servers_that_are_destroyed_while_they_are_read_are_gone,
    a_frozen_server_is_read_like_any_other,
    files_that_were_unmounted_on_the_host_are_put_back_by_doctor
];

/// The longest that a read may take whose worker is killed.
const KILLED_READ_MAX: Duration = Duration::from_millis(200);
/// The longest that any other read may take.
const READ_MAX: Duration = Duration::from_secs(1);

/// The worker that this supervisor has now; none between two.
fn worker_of(supervisor: i32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).ok()?;
    let worker = children.split_whitespace().next()?.parse().ok()?;
    // Until its program is executed it is a copy of the supervisor.
    let command = fs::read(format!("/proc/{worker}/cmdline")).ok()?;
    command.windows(6).any(|word| word == b"worker").then_some(worker)
}

/// Threads that read files from outside, as quickly as can be, until they are told to end.
struct Readers {
    done: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    seen: mpsc::Receiver<Seen>,
    count: usize,
}

/// A file, and what its reader got instead of the truth.
type Refused = (String, io::Error);

/// What one of them saw.
#[derive(Default)]
struct Seen {
    failures: Vec<Refused>,
    longest: Duration,
}

impl Readers {
    /// One for each file with the word that is always in it.
    fn of(files: impl IntoIterator<Item = (PathBuf, &'static str)>) -> Self {
        let (done, reads) = <(Arc<AtomicBool>, Arc<AtomicU64>)>::default();
        let (tell, seen) = mpsc::channel();
        let mut count = 0;
        for (file, word) in files {
            let (done, reads, tell) = (done.clone(), reads.clone(), tell.clone());
            count += 1;
            thread::spawn(move || {
                let mut seen = Seen::default();
                while !done.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    let text = fs::read_to_string(&file);
                    seen.longest = seen.longest.max(begun.elapsed());
                    let error = match text {
                        Ok(text) if text.contains(word) && text.ends_with('\n') => None,
                        Ok(text) => Some(io::Error::other(format!("a false text: {text:?}"))),
                        Err(error) => Some(error),
                    };
                    seen.failures.extend(error.map(|error| (file.display().to_string(), error)));
                    reads.fetch_add(1, Ordering::Relaxed);
                }
                tell.send(seen)
            });
        }
        Self { done, reads, seen, count }
    }

    /// Waits until they have read some more.
    fn go_on(&self) -> Result<()> {
        let before = self.reads.load(Ordering::Relaxed);
        eventually("reads to go on", GUEST_LIMIT, || (self.reads.load(Ordering::Relaxed) > before + 100).then_some(()))
    }

    /// Ends them; who gets no answer is an error. The number of reads, the failures and the longest read.
    fn end(self) -> Result<(u64, Vec<Refused>, Duration)> {
        self.done.store(true, Ordering::Relaxed);
        let mut all = Seen::default();
        for _ in 0..self.count {
            let seen = self.seen.recv_timeout(patient(GUEST_LIMIT)).context("a reader has got no answer")?;
            all.failures.extend(seen.failures);
            all.longest = all.longest.max(seen.longest);
        }
        Ok((self.reads.load(Ordering::Relaxed), all.failures, all.longest))
    }
}

fn a_hundred_killed_workers_and_an_upgrade_are_not_noticed(site: &Site) -> Result<()> {
    if !ability::resends_fuse_requests()? {
        return Err(skip("this kernel cannot give a dead worker's requests out again"));
    }
    let (programs, built) = (site.path("programs"), system_tests::site::programs()?.join("lxcfs-fuse"));
    let (program, next) = (programs.join("lxcfs-fuse"), programs.join("next"));
    fs::create_dir_all(&programs)?;
    fs::create_dir_all(site.path("etc/vsos"))?;
    fs::write(site.path("etc/vsos/vsos.toml"), format!("programs = {programs:?}\n"))?;
    fs::copy(&built, &program)?;
    let template = site.template("busybox")?;
    let servers: Vec<Running<'_>> = ["web1", "web2", "web3", "web4"]
        .iter()
        .map(|name| template.server(name).with("--memory 64M").start())
        .collect::<Result<_>>()?;
    let supervisor = site.fuse_supervisor().context("no supervisor")?;
    let mut files = Vec::new();
    for (server, pair) in servers.iter().zip([
        [("proc/meminfo", " 65536 kB\n"), ("proc/stat", "\ncpu0 ")],
        [("proc/uptime", "."), ("proc/loadavg", "/")],
        [("proc/cpuinfo", "processor"), ("proc/vmstat", "\nnr_shmem ")],
        [("proc/swaps", "Filename"), ("sys/devices/system/cpu/online", "0")],
    ]) {
        let root = PathBuf::from(format!("/proc/{}/root", server.init_pid()?));
        files.extend(pair.map(|(file, word)| (root.join(file), word)));
    }
    let readers = Readers::of(files.clone());
    let begun = Instant::now();
    let killed = || -> Result<()> {
        for round in 1..=100 {
            readers.go_on().with_context(|| format!("before round {round}"))?;
            if round % 25 == 0 {
                fs::copy(&built, &next)?;
                fs::rename(&next, &program)?;
            }
            if round == 50 {
                site.ok(["host", "reload"])?;
            }
            let old = eventually("a worker", GUEST_LIMIT, || worker_of(supervisor))?;
            kill_hard(old)?;
            eventually("another worker", GUEST_LIMIT, || worker_of(supervisor).filter(|pid| *pid != old))?;
        }
        readers.go_on()
    };
    let killed = killed();
    let (reads, mut failures, longest) = readers.end()?;
    killed?;
    // A host that is busy with something else lets readers wait as well: so long it does without any kill.
    let (readers, took) = (Readers::of(files), begun.elapsed());
    thread::sleep(took);
    let (_, more, usual) = readers.end()?;
    site.note(format!("{reads} reads, the longest {longest:?}; without kills {usual:?}"));
    // The kernel itself says EIO to a reader if its worker is killed in the middle of copying a message, and only then has a page
    // to make for it (fs/fuse/dev.c: an error of `fuse_copy_one`). Seen once in thousands of kills, on an emulated processor.
    if let Some(at) = failures.iter().position(|(_, error)| error.raw_os_error() == Some(nix::libc::EIO)) {
        failures.remove(at);
    }
    failures.extend(more);
    ensure!(failures.is_empty(), "{} of {reads} reads failed: {:?}", failures.len(), failures.first());
    ensure!(longest < patient(KILLED_READ_MAX).max(4 * usual), "a read took {longest:?}, without kills {usual:?}");
    // Who answers now is the program that was put there last, and who supervises the one before that, until it is told.
    let inode = |path: &Path| fs::metadata(path).map(|found| found.ino());
    let runs = |pid: i32| Ok::<bool, io::Error>(inode(&PathBuf::from(format!("/proc/{pid}/exe")))? == inode(&program)?);
    ensure!(runs(worker_of(supervisor).context("no worker")?)?, "the old program still answers");
    ensure!(!runs(supervisor)?, "nobody has told the supervisor");
    ensure!(site.run(["doctor"])?.text().contains("vsctl host reload"), "doctor does not see the old program");
    site.ok(["host", "reload"])?;
    ensure!(site.fuse_supervisor() == Some(supervisor) && runs(supervisor)?, "the supervisor is not the new program");
    ensure!(!site.run(["doctor"])?.text().contains("vsctl host reload"), "doctor sees an old program");
    // The calls that no file system answers are answered by it, too.
    let memory = servers[0].sh("free | awk '/^Mem/ { print $2 }'")?;
    ensure!(memory == "65536", "free says {memory:?}");
    Ok(())
}

/// What a server that is gone answers (errno(3)): it cannot be found, or no more.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ESTALE))
}

fn servers_that_are_destroyed_while_they_are_read_are_gone(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let stays = template.server("stays").with("--memory 64M").start()?;
    let overlay = site.path("run/vsos/lxcfs/mount");
    let present = || -> Result<BTreeSet<PathBuf>> {
        Ok(fs::read_dir(&overlay)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?)
    };
    let others = present()?;
    for how in [&["destroy", "--force", "goes"][..], &["stop", "--kill", "goes"], &["stop", "goes"]] {
        let goes = template.server("goes").with("--memory 64M").start()?;
        let place = present()?.difference(&others).next().cloned().context("it is not in the overlay")?;
        let file = |path: &str| place.join(path);
        // As a bind mount does: no name is looked up. And a file that is open already.
        let path = fs::File::options().read(true).custom_flags(nix::libc::O_PATH).open(file("proc/meminfo"))?;
        let bound = PathBuf::from(format!("/proc/self/fd/{}", path.as_raw_fd()));
        let open = fs::File::open(file("proc/meminfo"))?;
        let text = |open: &fs::File| -> io::Result<usize> { open.read_at(&mut [0; 4096], 0) };
        ensure!(text(&open)? > 0, "an open file is empty");
        let readers = Readers::of(
            [
                ("proc/meminfo", " 65536 kB\n"),
                ("proc/stat", "\ncpu0 "),
                ("proc/loadavg", "/"),
                ("proc/vmstat", "nr_shmem"),
            ]
            .map(|(path, word)| (file(path), word))
            .into_iter()
            .chain([(bound.clone(), " 65536 kB\n")]),
        );
        readers.go_on()?;
        site.ok(how)?;
        readers.go_on()?;
        let (reads, failures, longest) = readers.end()?;
        site.note(format!("{how:?}: {reads} reads, the longest {longest:?}, {} failed", failures.len()));
        let wrong = failures.iter().find(|(_, error)| !is_gone(error));
        ensure!(wrong.is_none(), "{how:?}: {wrong:?}");
        ensure!(longest < patient(READ_MAX), "{how:?}: a read took {longest:?}");
        for error in [fs::read(file("proc/meminfo")).err(), fs::read(&bound).err(), text(&open).err()] {
            ensure!(error.as_ref().is_some_and(is_gone), "{how:?}: {error:?}");
        }
        drop(goes);
        ensure!(stays.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo")? == "65536");
    }
    Ok(())
}

fn a_frozen_server_is_read_like_any_other(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--memory 64M --cpus 1").start()?;
    let root = PathBuf::from(format!("/proc/{}/root", server.init_pid()?));
    let supervisor = site.fuse_supervisor().context("no supervisor")?;
    let up = || -> Result<f64> {
        let text = fs::read_to_string(root.join("proc/uptime"))?;
        Ok(text.split(' ').next().unwrap_or_default().parse()?)
    };
    let before = up()?;
    site.ok(["freeze", "web1"])?;
    let readers = Readers::of(
        [("meminfo", " 65536 kB\n"), ("stat", "\ncpu0 "), ("loadavg", "/"), ("uptime", ".")]
            .map(|(file, word)| (root.join("proc").join(file), word)),
    );
    readers.go_on()?;
    if ability::resends_fuse_requests()? {
        kill_hard(worker_of(supervisor).context("no worker")?)?;
    }
    readers.go_on()?;
    let (reads, failures, longest) = readers.end()?;
    site.note(format!("{reads} reads, the longest {longest:?}"));
    ensure!(failures.is_empty() && longest < patient(READ_MAX), "{failures:?}, the longest {longest:?}");
    ensure!(up()? > before, "its time stands still");
    // Nothing of it runs and nothing waits for a disk.
    let load = fs::read_to_string(root.join("proc/loadavg"))?;
    ensure!(load.split(' ').nth(3).is_some_and(|tasks| tasks.starts_with("1/")), "{load}");
    site.ok(["thaw", "web1"])?;
    ensure!(server.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo")? == "65536");
    Ok(())
}

fn files_that_were_unmounted_on_the_host_are_put_back_by_doctor(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let server = template.server("web1").with("--memory 64M").start()?;
    let file = PathBuf::from(format!("/proc/{}/root/proc/meminfo", server.init_pid()?));
    let overlay = site.path("run/vsos/lxcfs/mount");
    let readers = Readers::of([(file.clone(), " 65536 kB\n")]);
    readers.go_on()?;
    Invocation::new("umount").args([&overlay]).succeed()?;
    readers.go_on()?;
    // Who has them bound keeps them.
    let (_, failures, _) = readers.end()?;
    ensure!(failures.is_empty(), "{failures:?}");
    let found = site.run(["doctor"])?;
    ensure!(found.code != 0 && found.text().contains("it is not mounted"), "{found}");
    site.ok(["doctor", "--fix"])?;
    let next = template.server("web2").with("--memory 64M").start()?;
    for server in [&server, &next] {
        server.until("grep -q 'MemTotal: *65536 kB' /proc/meminfo")?;
    }
    site.ok(["doctor"])?;
    Ok(())
}
