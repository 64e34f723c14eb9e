//! Whatever the kernel's files say, the answers are well formed: nothing panics, nothing is negative, sums hold.

use std::path::Path;

use lxcfs_fuse::account::Accounts;
use lxcfs_fuse::clock::Now;
use lxcfs_fuse::filesystem::Filesystem;
use lxcfs_fuse::inode::{At, PLACES};
use lxcfs_fuse::load::{Load, Tasks};
use lxcfs_fuse::render;
use lxcfs_fuse::snapshot::{Busy, CpuTimes, Cpus, Memory, MemoryStat, PhysicalCpu, parse};
use proptest::prelude::*;

const MEMINFO: &str = include_str!("golden/v2-limited/host/proc/meminfo");

fn memory() -> impl Strategy<Value = Memory> {
    let any = any::<u64>;
    (any(), any(), any(), any(), any(), any(), any()).prop_map(
        |(total, used, swap_total, swap_used, file, anon, slab)| {
            let stat = MemoryStat {
                file,
                anon,
                slab_reclaimable: slab,
                slab_unreclaimable: anon,
                active_file: file,
                inactive_file: slab,
                active_anon: anon,
                inactive_anon: anon,
                ..MemoryStat::default()
            };
            Memory { total, used, swap_total, swap_used, stat }
        },
    )
}

/// Any bytes, more of them such as numbers and words are made of.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(
        prop_oneof![3 => prop::sample::select(b"0123456789 :-,=()\nkBR".to_vec()), 1 => any::<u8>()],
        0..400,
    )
}

/// The value of a line of meminfo, in kB.
fn value(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// What a server did between two answers.
#[derive(Clone, Debug)]
struct Turn {
    passed_ns: u64,
    busy_ns: u64,
    throttled_ns: u64,
    visible: usize,
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let turn = (0..10_000_000_000_u64, 0..40_000_000_000_u64, 0..1_000_000_000_u64, 1..9_usize)
        .prop_map(|(passed_ns, busy_ns, throttled_ns, visible)| Turn { passed_ns, busy_ns, throttled_ns, visible });
    prop::collection::vec(turn, 1..20)
}

/// Checks that no counter steps back, and that per-CPU lines add up to the first.
fn check_stat(text: &str, before: &mut Vec<u64>, visible: usize, shrunk: bool) -> Result<(), TestCaseError> {
    let line = |line: &str| -> Vec<u64> { line.split_whitespace().skip(1).map(|word| word.parse().unwrap()).collect() };
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("cpu")).collect();
    prop_assert_eq!(lines.len(), visible + 1);
    let total = line(lines[0]);
    prop_assert_eq!(total.len(), 10);
    for (now, then) in total.iter().zip(before.iter()) {
        prop_assert!(now >= then, "{:?} after {:?}", total, before);
    }
    if !shrunk {
        for (column, &sum) in total.iter().enumerate() {
            prop_assert_eq!(lines[1..].iter().map(|cpu| line(cpu)[column]).sum::<u64>(), sum);
        }
    }
    *before = total;
    Ok(())
}

proptest! {
    #[test]
    fn meminfo_is_consistent(memory in memory()) {
        let mut out = String::new();
        render::meminfo(&mut out, &render::Meminfo::of(&parse::meminfo(MEMINFO)), &memory);
        let of = |name| value(&out, name);
        prop_assert!(of("MemFree") <= of("MemTotal"));
        prop_assert!(of("MemAvailable") <= of("MemTotal"));
        prop_assert!(of("MemFree") <= of("MemAvailable"));
        prop_assert!(of("SwapFree") <= of("SwapTotal"));
        prop_assert_eq!(of("MemTotal"), memory.total / 1024);
        render::swaps(&mut out, &memory);
    }

    #[test]
    fn cpu_time_adds_up_and_never_steps_back(turns in turns()) {
        let (mut accounts, mut wall, mut busy, mut throttled) = (Accounts::default(), 0, 0, 0);
        let (mut before, mut most, mut capacity) = (vec![], 0, 0_u64);
        for turn in turns {
            wall += turn.passed_ns;
            busy += turn.busy_ns;
            throttled += turn.throttled_ns;
            capacity += turn.passed_ns * turn.visible as u64;
            let cpus = Cpus { set: (0..turn.visible as u32).collect(), visible: turn.visible };
            let times = CpuTimes {
                busy: Busy::Total { user_ns: busy / 2, nice_ns: busy / 4, system_ns: busy / 4 },
                throttled_ns: throttled,
            };
            accounts.advance(wall, &cpus, &times);
            let mut text = String::new();
            render::stat(&mut text, &render::Stat { accounts: &accounts, started_s: 1, tasks: Tasks::default() });
            most = most.max(turn.visible);
            check_stat(&text, &mut before, turn.visible, turn.visible < most)?;
        }
        let sum: u64 = accounts.all().map(|cpu| cpu.user_ns + cpu.nice_ns + cpu.system_ns + cpu.steal_ns + cpu.idle_ns).sum();
        let used: u64 = accounts.all().map(|cpu| cpu.user_ns + cpu.nice_ns + cpu.system_ns).sum();
        prop_assert_eq!(used, busy / 2 + busy / 4 + busy / 4);
        // All the time there was is accounted for; more only as far as it was used in advance.
        prop_assert!(sum >= capacity && sum <= capacity + used);
    }

    #[test]
    fn an_exact_split_keeps_every_cpus_own_time(
        times in prop::collection::vec((0..1_000_000_000_u64, 0..1_000_000_000_u64), 1..8),
    ) {
        let physical: Vec<PhysicalCpu> = times.iter().enumerate().map(|(number, &(user_ns, system_ns))| {
            PhysicalCpu { number: number as u32 * 2, user_ns, system_ns }
        }).collect();
        let cpus = Cpus { set: physical.iter().map(|cpu| cpu.number).collect(), visible: physical.len() };
        let mut accounts = Accounts::default();
        accounts.advance(10_000_000_000, &cpus, &CpuTimes { busy: Busy::PerCpu(physical), throttled_ns: 0 });
        for (cpu, (user_ns, system_ns)) in accounts.visible().iter().zip(times) {
            prop_assert_eq!((cpu.user_ns, cpu.system_ns), (user_ns, system_ns));
            prop_assert_eq!(cpu.idle_ns, 10_000_000_000 - user_ns - system_ns);
        }
    }

    #[test]
    fn loads_stay_between_none_and_the_highest_count(
        samples in prop::collection::vec((0..100_000_u64, 0..1_000_u64, 0..1_000_u64), 1..50),
    ) {
        let (mut load, mut now) = (Load::default(), 0);
        for (passed_ms, running, blocked) in samples {
            now += passed_ms;
            load.sample(now, 0, Tasks { running, blocked }, None);
            prop_assert!(load.hundredths().iter().all(|&average| average <= 200_100));
        }
    }

    /// Any bytes in any file: every answer is made or refused, and what is made is text with whole lines.
    #[test]
    fn nothing_in_a_file_breaks_an_answer(text in bytes(), numbers in any::<[u64; 4]>(), v1 in any::<bool>()) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        write_tree(root, &text, numbers, v1);
        let filesystem = Filesystem::at(&root.join("host"), &root.join("servers"));
        let now = Now { boottime_ns: numbers[3], realtime_ns: numbers[2] };
        let [a, ..] = numbers;
        for index in 0..PLACES.len() as u8 {
            let at = At { index, cpu: (a % 3) as u16, cache: 0 };
            let _ = filesystem.children(1, at, now);
            let Some(kind) = at.kind() else { continue };
            let mut out = String::new();
            if filesystem.text(1, at, 0, now, &mut out).is_ok() && !at.is_link() {
                prop_assert!(out.is_empty() || out.ends_with('\n'), "{:?}: {:?}", kind, out);
            }
        }
    }
}

/// A host and a server whose files hold `text`, with a few plausible keys in front.
fn write_tree(root: &Path, text: &[u8], numbers: [u64; 4], v1: bool) {
    let write = |path: &str, text: &[u8]| {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let [a, b, c, d] = numbers;
    let head = format!("MemTotal: {a} kB\nMemFree: 1 kB\nSwapTotal: {b} kB\n");
    write("host/proc/meminfo", &[head.as_bytes(), text].concat());
    let shared = "sys/devices/system/cpu/cpu0/cache/index0/shared_cpu_list";
    for name in [
        "proc/cpuinfo",
        "proc/diskstats",
        "proc/vmstat",
        "proc/partitions",
        "proc/cgroups",
        "sys/devices/system/cpu/online",
        shared,
    ] {
        write(&format!("host/{name}"), text);
    }
    let files: &[&str] = if v1 {
        &[
            "memory.usage_in_bytes",
            "memory.stat",
            "memory.oom_control",
            "cpu.cfs_quota_us",
            "cpu.cfs_period_us",
            "cpu.stat",
            "cpuacct.usage_all",
            "cpuacct.usage_percpu",
            "cpuacct.usage",
            "cpuset.effective_cpus",
            "pids.current",
            "tasks",
            "blkio.throttle.io_service_bytes_recursive",
            "blkio.throttle.io_serviced_recursive",
        ]
    } else {
        &[
            "memory.current",
            "memory.stat",
            "memory.events",
            "memory.max",
            "memory.swap.max",
            "memory.swap.current",
            "cpu.max",
            "cpu.stat",
            "cpuset.cpus.effective",
            "io.stat",
            "pids.current",
            "cgroup.threads",
        ]
    };
    for file in files {
        let head = format!("{a}\n{b} {c}\nfile {d}\n254:0 Read {a}\nuser_usec {b}\n");
        write(&format!("group/{file}"), &[head.as_bytes(), text].concat());
    }
    let group = root.join("group");
    let controllers = ["cpu", "cpuacct", "cpuset", "memory", "blkio", "pids"];
    let v1_lines: String = controllers.iter().map(|name| format!("{name} = {group:?}\n")).collect();
    let directories = if v1 { v1_lines } else { format!("unified = {group:?}\n") };
    let registration = format!("name = \"a\"\nstarted_boottime_ns = {}\n[cgroup]\n{directories}", c >> 1);
    write("servers/1.toml", registration.as_bytes());
}
