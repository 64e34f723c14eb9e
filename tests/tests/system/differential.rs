//! The files beside those of Debian's lxcfs, for the same server at the same instant: the same figures where lxcfs is right, and
//! where it is not, what it says instead.
//!
//! Its packages are fetched and unpacked, never installed: that would start a service. It runs in a mount namespace of its own.
//! docs/statistics.md has the differences in words.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::{Background, FOREVER, Invocation, eventually},
    promise::skip,
    promises,
    server::{GUEST_LIMIT, Running},
    site::Site,
};

promises![lxcfs_says_the_same_where_it_is_right];

/// The version that the differences were found in.
const VERSION: &str = "5.0.3";

/// Lines of meminfo that lxcfs leaves as the host has them.
const OF_THE_HOST: [&str; 19] = [
    "Mlocked",
    "KReclaimable",
    "KernelStack",
    "PageTables",
    "SecPageTables",
    "Zswap",
    "Zswapped",
    "NFS_Unstable",
    "Bounce",
    "WritebackTmp",
    "CommitLimit",
    "Committed_AS",
    "VmallocUsed",
    "VmallocChunk",
    "Percpu",
    "FileHugePages",
    "FilePmdMapped",
    "HardwareCorrupted",
    "Balloon",
];

/// Keys of cpuinfo that lxcfs leaves as the host has them, though it numbers `processor` anew.
const PLACES_OF_CPUS: [&str; 6] = ["physical id", "siblings", "core id", "cpu cores", "apicid", "initial apicid"];

/// A running lxcfs that nobody else sees.
struct Lxcfs {
    process: Background,
    mount: PathBuf,
}

impl Lxcfs {
    fn start(site: &Site) -> Result<Self> {
        let place = site.path("lxcfs");
        let mount = place.join("mount");
        fs::create_dir_all(&mount)?;
        let packages = ["lxcfs", "libfuse3-3"];
        let fetched = Invocation::new("apt-get").args(["download", "-qq"]).args(packages).directory(&place).run();
        let Ok(fetched) = fetched else { return Err(skip("there is no apt")) };
        if fetched.code != 0 {
            return Err(skip(format!("lxcfs {VERSION} cannot be fetched: {}", fetched.errors())));
        }
        for package in packages {
            let file = find(&place, |name| name.starts_with(package) && name.ends_with(".deb"))?;
            Invocation::new("dpkg-deb").args(["-x"]).args([&file, &place]).succeed()?;
        }
        let architecture = find(&place.join("usr/lib"), |name| name.contains("-linux-"))?;
        let name = architecture.file_name().context("no architecture")?;
        let libraries = [architecture.join("lxcfs"), architecture.clone(), place.join("lib").join(name)];
        let library = std::env::join_paths(libraries)?;
        let program = place.join("usr/bin/lxcfs");
        let version = Invocation::new(&program).args(["--version"]).env("LD_LIBRARY_PATH", &library).run()?;
        if !version.errors().contains(VERSION) {
            return Err(skip(format!("this is not lxcfs {VERSION}: {version}")));
        }
        // What it puts into /run is its own as well.
        let script = "mount -t tmpfs none /run && exec \"$0\" --foreground --enable-loadavg --enable-cfs \"$1\"";
        let call = Invocation::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", script]);
        let call = call.args([&program, &mount]).env("LD_LIBRARY_PATH", &library).limit(FOREVER);
        let lxcfs = Self { process: call.spawn()?, mount };
        let seen = PathBuf::from(format!("/proc/{}/root", lxcfs.process.pid())).join(lxcfs.mount.strip_prefix("/")?);
        eventually("the files of lxcfs", GUEST_LIMIT, || seen.join("proc/meminfo").exists().then_some(()))?;
        Ok(lxcfs)
    }

    /// A file as the server would have it. It is the reader's pid namespace that lxcfs goes by.
    fn read(&self, server: &Running, file: &str) -> Result<String> {
        let call = Invocation::new("nsenter")
            .args([format!("--mount=/proc/{}/ns/mnt", self.process.pid())])
            .args([format!("--pid=/proc/{}/ns/pid", server.init_pid()?)]);
        let done = call.args(["cat"]).args([self.mount.join(file)]).directory("/").succeed()?;
        Ok(String::from_utf8(done.stdout)?)
    }
}

fn find(directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let paths = fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?;
    let found = paths.into_iter().find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted));
    found.with_context(|| format!("nothing of that name in {}", directory.display()))
}

/// The lines `name: value kB`.
fn meminfo(text: &str) -> BTreeMap<&str, u64> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.filter_map(|(name, value)| Some((name, value.split_whitespace().next()?.parse().ok()?))).collect()
}

fn words(text: &str) -> Vec<f64> {
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

fn lxcfs_says_the_same_where_it_is_right(site: &Site) -> Result<()> {
    if !Path::new("/sys/fs/cgroup/memory").exists() {
        return Err(skip("the differences were found with version 1 of cgroup"));
    }
    let server = site.template("busybox")?.server("web1").with("--memory 256M --cpuset 0").start()?;
    let lxcfs = Lxcfs::start(site)?;
    let root = PathBuf::from(format!("/proc/{}/root", server.init_pid()?));
    let ours = |file: &str| fs::read_to_string(root.join(file)).with_context(|| file.to_owned());
    server.sh("dd if=/dev/zero of=/dev/shm/ballast bs=1M count=20 2>/dev/null; cat /bin/* >/dev/null")?;
    site.ok(["freeze", "web1"])?;
    compare_memory(&server, &lxcfs, &ours)?;
    compare_cpus(&server, &lxcfs, &ours)?;
    compare_times(&server, &lxcfs, &ours)?;
    // All devices and caches of the host are named.
    let names = |text: &str, column: usize| -> Vec<String> {
        text.lines().filter_map(|line| line.split_whitespace().nth(column).map(str::to_owned)).collect()
    };
    let disks = lxcfs.read(&server, "proc/diskstats")?;
    ensure!(
        names(&disks, 2) == names(&fs::read_to_string("/proc/diskstats")?, 2) && ours("proc/diskstats")?.is_empty()
    );
    let slabs = lxcfs.read(&server, "proc/slabinfo")?;
    ensure!(slabs.lines().count() > 2 && slabs.lines().take(2).eq(ours("proc/slabinfo")?.lines()), "{slabs}");
    // Its list of swap space is the same, but for the width of its head.
    let swaps = lxcfs.read(&server, "proc/swaps")?;
    ensure!(swaps.split_whitespace().eq(ours("proc/swaps")?.split_whitespace()), "{swaps}");
    Ok(())
}

/// What a file says to us.
type Ours<'a> = dyn Fn(&str) -> Result<String> + 'a;

fn compare_memory(server: &Running, lxcfs: &Lxcfs, ours: &Ours<'_>) -> Result<()> {
    // What the kernel had charged in advance it may still take back.
    let (mine, theirs) = eventually("an instant", GUEST_LIMIT, || {
        let (before, theirs) = (ours("proc/meminfo").ok()?, lxcfs.read(server, "proc/meminfo").ok()?);
        (before == ours("proc/meminfo").ok()?).then_some((before, theirs))
    })?;
    let (mine, theirs) = (meminfo(&mine), meminfo(&theirs));
    let host = fs::read_to_string("/proc/meminfo")?;
    let host = meminfo(&host);
    for (name, value) in &theirs {
        match (*name, mine.get(name)) {
            // It counts tmpfs among what can be dropped.
            ("MemAvailable", Some(own)) => {
                ensure!(
                    *value == theirs["MemFree"] + theirs["Cached"] && *value >= own + (20 << 10),
                    "{value} and {own}"
                );
            }
            (name, Some(_)) if OF_THE_HOST.contains(&name) => {
                let of_the_host = host[name];
                ensure!(
                    value.abs_diff(of_the_host) <= of_the_host / 4 + 4096,
                    "{name}: {value}, the host has {of_the_host}"
                );
            }
            (name, None) => ensure!(name.starts_with("DirectMap"), "{name} is missing"),
            (name, own) => ensure!(own == Some(value), "{name}: {value} to lxcfs, {own:?} to us"),
        }
    }
    ensure!(mine["MemTotal"] == 256 << 10 && mine["Shmem"] >= 20 << 10 && mine.len() > 30, "{mine:?}");
    Ok(())
}

fn compare_cpus(server: &Running, lxcfs: &Lxcfs, ours: &Ours<'_>) -> Result<()> {
    let (mine, theirs) = (ours("proc/cpuinfo")?, lxcfs.read(server, "proc/cpuinfo")?);
    let pairs = |text: &str| -> Vec<(String, String)> {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        let pairs = lines.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()));
        pairs.filter(|(key, _)| !PLACES_OF_CPUS.contains(&&**key) && key != "cpu MHz").collect()
    };
    ensure!(pairs(&mine) == pairs(&theirs), "{theirs}");
    ensure!(mine.matches("processor").count() == 1, "{mine}");
    let online = "sys/devices/system/cpu/online";
    ensure!(ours(online)? == "0\n" && lxcfs.read(server, online)? == "0\n");
    // Which there are, and which there may be, it does not change.
    for file in ["present", "possible"].map(|file| format!("sys/devices/system/cpu/{file}")) {
        ensure!(ours(&file)? == "0\n" && lxcfs.read(server, &file)? == fs::read_to_string(Path::new("/").join(&file))?);
    }
    Ok(())
}

fn compare_times(server: &Running, lxcfs: &Lxcfs, ours: &Ours<'_>) -> Result<()> {
    let both = |file: &str| -> Result<(String, String)> { Ok((ours(file)?, lxcfs.read(server, file)?)) };
    let (mine, theirs) = both("proc/uptime")?;
    let near = |mine: f64, theirs: f64| (mine - theirs).abs() <= 0.5;
    let up = (words(&mine), words(&theirs));
    ensure!(near(up.0[0], up.1[0]) && near(up.0[1], up.1[1]), "{mine} and {theirs}");
    // It counts from its own first answer, so that it is what passed that can be compared.
    let cpu = |text: &str| words(text.lines().next().unwrap_or_default());
    let before = both("proc/stat")?;
    let site = server.site();
    site.ok(["thaw", "web1"])?;
    server.sh("i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done")?;
    site.ok(["freeze", "web1"])?;
    let after = both("proc/stat")?;
    let passed = |before: &str, after: &str| -> Vec<f64> {
        cpu(before).iter().zip(cpu(after)).map(|(before, after)| after - before).collect()
    };
    let (mine, theirs) = (passed(&before.0, &after.0), passed(&before.1, &after.1));
    ensure!(mine[0] + mine[2] >= 10.0, "it was not busy: {mine:?}");
    for column in [0, 2, 3] {
        ensure!((mine[column] - theirs[column]).abs() <= 10.0, "{mine:?} and {theirs:?}");
    }
    // When the host was started, and how much it does, is told to every server.
    let line = |text: &str, name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    let host = fs::read_to_string("/proc/stat")?;
    ensure!(line(&after.1, "btime ") == line(&host, "btime ") && line(&after.0, "btime ") != line(&host, "btime "));
    for name in ["ctxt ", "processes "] {
        ensure!(line(&after.0, name).is_some_and(|mine| mine == "0"), "{}", after.0);
        ensure!(line(&after.1, name).is_some_and(|theirs| theirs.parse::<u64>().is_ok_and(|count| count > 1000)));
    }
    // The last word is the newest pid of the host.
    let (mine, theirs) = both("proc/loadavg")?;
    ensure!(words(&mine).last() == Some(&0.0) && words(&theirs).last() > Some(&0.0), "{mine} and {theirs}");
    Ok(())
}
