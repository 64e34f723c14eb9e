//! What a read costs: open, read to the end, close, for each file, beside the host's own file and a static text
//! through the same FUSE library.
//!
//! `cargo run --release -p lxcfs-fuse --example bench [-- PROGRAM [ROUNDS]]`, as root.
#![forbid(unsafe_code)]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, LockOwner, MountOption, OpenFlags,
    ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request, SessionACL,
};

#[path = "../tests/stage/mod.rs"]
mod stage;

const FILES: [&str; 7] = ["stat", "meminfo", "cpuinfo", "uptime", "loadavg", "swaps", "vmstat"];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let program = arguments.next().unwrap_or_else(|| "target/release/lxcfs-fuse".to_owned());
    let rounds: usize = arguments.next().map_or(20_000, |rounds| rounds.parse().expect("ROUNDS is a number"));
    let program = PathBuf::from(program).canonicalize().expect("PROGRAM exists");

    let stage = stage::Stage::new(&program);
    stage.group.set_memory(Some(256 << 20), None).expect("limit memory");
    stage.serve();
    let floor = Floor::mount(&std::fs::read_to_string("/proc/meminfo").expect("read meminfo"));

    let mut paths = vec![("static text through the same library".to_owned(), floor.file())];
    for name in FILES {
        paths.push((format!("served proc/{name}"), stage.file(&format!("proc/{name}"))));
        paths.push((format!("host's /proc/{name}"), Path::new("/proc").join(name)));
    }
    let online = "sys/devices/system/cpu/online";
    paths.push((format!("served {online}"), stage.file(online)));
    println!("{:<44} {:>9} {:>9} {:>9}", "microseconds: open, read to the end, close", "median", "p90", "p99");
    for ((name, _), times) in paths.iter().zip(measure(&paths, rounds)) {
        line(name, &times);
    }
    for name in ["stat", "meminfo"] {
        let per_second = together(&stage.file(&format!("proc/{name}")), 4, rounds / 4);
        println!("{:<44} {per_second:>9.0} reads/s", format!("4 readers of served proc/{name}"));
    }
    let per_second = together(&floor.file(), 4, rounds / 4);
    println!("{:<44} {per_second:>9.0} reads/s", "4 readers of the static text");
    memory("supervisor", stage.supervisor());
    memory("worker", stage.worker().expect("there is a worker"));
}

/// Sorted times of `rounds` readings of each file, after some to warm up. The files take turns, so that whatever else
/// the machine does is the same for all.
fn measure(paths: &[(String, PathBuf)], rounds: usize) -> Vec<Vec<Duration>> {
    let mut buffer = vec![0; 128 * 1024];
    let mut times = vec![Vec::with_capacity(rounds); paths.len()];
    for round in 0..rounds + rounds / 10 {
        for ((_, path), times) in paths.iter().zip(&mut times) {
            let begun = Instant::now();
            read_once(path, &mut buffer);
            if round >= rounds / 10 {
                times.push(begun.elapsed());
            }
        }
    }
    times.iter_mut().for_each(|times| times.sort_unstable());
    times
}

fn read_once(path: &Path, buffer: &mut [u8]) {
    let mut file = std::fs::File::open(path).expect("open");
    while file.read(buffer).expect("read") > 0 {}
}

/// Readings per second of `readers` threads together.
fn together(path: &Path, readers: usize, rounds: usize) -> f64 {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..readers {
            scope.spawn(|| {
                let mut buffer = vec![0; 128 * 1024];
                (0..rounds).for_each(|_| read_once(path, &mut buffer));
            });
        }
    });
    (readers * rounds) as f64 / begun.elapsed().as_secs_f64()
}

fn line(name: &str, times: &[Duration]) {
    let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)].as_secs_f64() * 1e6;
    println!("{name:<44} {:>9.1} {:>9.1} {:>9.1}", at(50), at(90), at(99));
}

fn memory(name: &str, pid: i32) {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let of = |key: &str| rollup.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("?").trim().to_owned();
    println!("{name}: Rss {}, Pss {}, Anonymous {}", of("Rss:"), of("Pss:"), of("Anonymous:"));
}

/// The floor: one file whose text never changes, with the same flags, time-outs and mount options.
struct Floor {
    directory: tempfile::TempDir,
    session: Option<fuser::BackgroundSession>,
}

impl Floor {
    fn mount(text: &str) -> Floor {
        let directory = tempfile::tempdir().expect("make a temporary directory");
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(2);
        config.mount_options = vec![MountOption::RO, MountOption::DefaultPermissions];
        let session = fuser::spawn_mount(Static(text.as_bytes().to_vec()), directory.path(), &config).expect("mount");
        Floor { directory, session: Some(session) }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("static")
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
    }
}

struct Static(Vec<u8>);

const FOREVER: Duration = Duration::from_secs(24 * 3600);

impl Static {
    fn attributes(inode: INodeNo) -> FileAttr {
        let (kind, perm) =
            if inode == INodeNo(1) { (FileType::Directory, 0o555) } else { (FileType::RegularFile, 0o444) };
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size: 0,
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl fuser::Filesystem for Static {
    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &std::ffi::OsStr, reply: ReplyEntry) {
        if name == "static" {
            reply.entry(&FOREVER, &Static::attributes(INodeNo(2)), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &Static::attributes(inode));
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let rest = self.0.get(offset as usize..).unwrap_or_default();
        reply.data(&rest[..rest.len().min(size as usize)]);
    }
}
