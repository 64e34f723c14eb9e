//! The kernel's text formats, as values. Pure; anything that is not as documented reads as "unknown".

/// The highest CPU number believed (`NR_CPUS` of the biggest kernels is 8192): a nonsense list costs no memory.
const CPUS_MAX: u32 = 8192;

/// Above this a v1 memory limit means "none": the kernel prints `LONG_MAX` rounded down to a page.
const V1_NO_LIMIT_BYTES: u64 = 1 << 62;

/// A file with one number, such as `memory.current`.
pub fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A limit in bytes; `None` when there is none (`max`, `-1`, or v1's huge number) or it cannot be read.
pub fn limit(text: &str) -> Option<u64> {
    number(text).filter(|&bytes| bytes < V1_NO_LIMIT_BYTES)
}

/// The `key value` lines of a flat keyed file; lines of another form are left out.
pub fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        while !rest.is_empty() {
            let (pair, length) = pair(rest);
            rest = &rest[length..];
            if pair.is_some() {
                return pair;
            }
        }
        None
    })
}

/// The pair in the first line, and the line's length. Each byte is looked at once: `memory.stat` has many, and is read often.
fn pair(text: &str) -> (Option<(&str, u64)>, usize) {
    let bytes = text.as_bytes();
    let is_end = |byte: u8| byte == b' ' || byte == b'\n';
    let key = bytes.iter().position(|&byte| is_end(byte)).unwrap_or(bytes.len());
    let (mut at, mut number) = (key + 1, Some(0_u64));
    while let Some(digit) = bytes.get(at).map(|byte| byte.wrapping_sub(b'0')).filter(|digit| *digit <= 9) {
        number = number.and_then(|number| number.checked_mul(10)?.checked_add(digit.into()));
        at += 1;
    }
    if bytes.get(key) == Some(&b' ') && at > key + 1 && matches!(bytes.get(at), None | Some(b'\n')) {
        return (number.map(|number| (&text[..key], number)), bytes.len().min(at + 1));
    }
    let end = bytes[key..].iter().position(|&byte| byte == b'\n');
    (None, end.map_or(bytes.len(), |end| key + end + 1))
}

/// Name and value of each line of `/proc/meminfo`, the value with the blanks before it.
pub fn meminfo(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// A block of `/proc/cpuinfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuBlock {
    /// The number of the CPU that it describes; `None` for one about the machine as a whole (arm).
    pub number: Option<u32>,
    /// Its lines, and of each the key with the tabs after it; an empty one where a line has none.
    pub lines: Vec<(String, String)>,
}

/// The blocks of `/proc/cpuinfo`.
pub fn cpuinfo(text: &str) -> Vec<CpuBlock> {
    let blocks = text.split_terminator("\n\n").map(|block| block.trim_matches('\n'));
    blocks.filter(|block| !block.trim().is_empty()).map(cpu_block).collect()
}

fn cpu_block(block: &str) -> CpuBlock {
    let key = |line: &str| line.split_once(':').map_or("", |(key, _)| key).to_owned();
    let lines: Vec<_> = block.lines().map(|line| (key(line), line.to_owned())).collect();
    let first = lines.first().filter(|(key, _)| key.trim_end() == "processor");
    let number = first.and_then(|(_, line)| line.split_once(':')?.1.trim().parse().ok());
    CpuBlock { number, lines }
}

/// The value of one key of a flat keyed file.
pub fn value(text: &str, key: &str) -> Option<u64> {
    pairs(text).find_map(|(found, value)| (found == key).then_some(value))
}

/// A list of CPUs such as `0-3,8`, sorted and without doubles.
pub fn cpu_list(text: &str) -> Vec<u32> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<u32>(), last.trim().parse::<u32>()) {
            cpus.extend(first..=last.min(CPUS_MAX - 1));
        }
    }
    cpus.sort_unstable();
    cpus.dedup();
    cpus
}

/// How many CPUs a quota is worth, rounded up and at least 1; `None` without a quota.
///
/// v2: the text of `cpu.max`, `QUOTA|max PERIOD`.
pub fn quota_cpus(cpu_max: &str) -> Option<u64> {
    let mut words = cpu_max.split_whitespace();
    let quota: u64 = words.next()?.parse().ok()?;
    let period: u64 = words.next().map_or(Some(100_000), |word| word.parse().ok())?;
    cpus_of(quota, period)
}

/// How many CPUs `quota_us` in every `period_us` is worth, rounded up and at least 1.
pub fn cpus_of(quota_us: u64, period_us: u64) -> Option<u64> {
    (period_us > 0).then(|| quota_us.div_ceil(period_us).max(1))
}

/// v1's `cpuacct.usage_all`: of each CPU its nanoseconds in user mode and in the kernel, as far as the kernel knows them.
pub fn usage_all(text: &str) -> Vec<super::PhysicalCpu> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            Some(super::PhysicalCpu {
                number: words.next()?.parse().ok().filter(|&number| number < CPUS_MAX)?,
                user_ns: words.next()?.parse().ok()?,
                system_ns: words.next()?.parse().ok()?,
            })
        })
        .collect()
}

/// v1's `cpuacct.usage_percpu`: nanoseconds of each CPU, in the order of the lines of `cpuacct.usage_all`.
pub fn usage_percpu(text: &str) -> impl Iterator<Item = u64> {
    text.split_ascii_whitespace().map_while(|word| word.parse().ok())
}

/// The state letter of `/proc/PID/task/TID/stat`, which follows the last `)`.
pub fn task_state(stat: &str) -> Option<char> {
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// `MAJOR:MINOR`.
pub fn device_number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// `io.stat`: device, then `rbytes=… wbytes=… rios=… wios=… dbytes=… dios=…`. Devices without I/O are left out.
pub fn io_stat(text: &str) -> Vec<super::Disk> {
    let mut disks = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some((major, minor)) = words.next().and_then(device_number) else {
            continue;
        };
        let mut disk = super::Disk { major, minor, ..Default::default() };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let Ok(value) = value.parse::<u64>() else {
                continue;
            };
            match key {
                "rbytes" => disk.read_bytes = value,
                "wbytes" => disk.written_bytes = value,
                "dbytes" => disk.discarded_bytes = value,
                "rios" => disk.reads = value,
                "wios" => disk.writes = value,
                "dios" => disk.discards = value,
                _ => {}
            }
        }
        if disk.reads > 0 || disk.writes > 0 || disk.discards > 0 {
            disks.push(disk);
        }
    }
    disks
}

/// v1's `blkio.throttle.io_service_bytes_recursive` and `io_serviced_recursive`: lines `MAJOR:MINOR Read N`.
pub fn blkio(bytes: &str, operations: &str) -> Vec<super::Disk> {
    let mut disks: Vec<super::Disk> = Vec::new();
    for (text, is_bytes) in [(bytes, true), (operations, false)] {
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let Some((major, minor)) = words.next().and_then(device_number) else {
                continue;
            };
            let (Some(kind), Some(value)) = (words.next(), words.next().and_then(|word| word.parse().ok())) else {
                continue;
            };
            let found = disks.iter().position(|disk| (disk.major, disk.minor) == (major, minor));
            let index = found.unwrap_or_else(|| {
                disks.push(super::Disk { major, minor, ..Default::default() });
                disks.len() - 1
            });
            let disk = &mut disks[index];
            let field = match (kind, is_bytes) {
                ("Read", true) => &mut disk.read_bytes,
                ("Write", true) => &mut disk.written_bytes,
                ("Discard", true) => &mut disk.discarded_bytes,
                ("Read", false) => &mut disk.reads,
                ("Write", false) => &mut disk.writes,
                ("Discard", false) => &mut disk.discards,
                _ => continue,
            };
            *field = value;
        }
    }
    disks.retain(|disk| disk.reads > 0 || disk.writes > 0 || disk.discards > 0);
    disks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("0-1\n"), [0, 1]);
        assert_eq!(cpu_list("4,0-2,2"), [0, 1, 2, 4]);
        assert_eq!(cpu_list("\n"), [0u32; 0]);
        assert_eq!(cpu_list("x,3-1,5"), [5]);
        assert_eq!(cpu_list("0-4294967295").len(), 8192);
    }

    #[test]
    fn a_pair_is_a_key_a_blank_and_a_number() {
        let text = "a 1\nb\nc  2\nd 18446744073709551615\ne 18446744073709551616\n\nf -1\ng 1 2\n 3\nh \n4\ni 5\r\nj 7";
        let found: Vec<_> = pairs(text).collect();
        assert_eq!(found, [("a", 1), ("d", u64::MAX), ("", 3), ("j", 7)]);
        assert_eq!(pairs("\n\na 0\n").collect::<Vec<_>>(), [("a", 0)]);
        assert_eq!(pairs("a ").chain(pairs("")).chain(pairs("ü ü")).count(), 0);
    }

    #[test]
    fn quotas_round_up_and_are_never_zero() {
        assert_eq!(quota_cpus("max 100000\n"), None);
        assert_eq!(quota_cpus("150000 100000\n"), Some(2));
        assert_eq!(quota_cpus("200000 100000\n"), Some(2));
        assert_eq!(quota_cpus("1000 100000\n"), Some(1));
        assert_eq!(quota_cpus("1000 0\n"), None);
        assert_eq!(cpus_of(250_000, 100_000), Some(3));
    }

    #[test]
    fn limits() {
        assert_eq!(limit("max\n"), None);
        assert_eq!(limit("9223372036854771712\n"), None);
        assert_eq!(limit("536870912\n"), Some(536_870_912));
    }

    #[test]
    fn a_command_name_cannot_fake_a_state() {
        assert_eq!(task_state("7 (a) R (b) S 1 7"), Some('S'));
        assert_eq!(task_state("7 (sleep"), None);
    }

    #[test]
    fn disks_of_both_versions() {
        let v2 = io_stat("254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n8:0 \n7:0 rbytes=0 wbytes=0\n");
        let bytes = "254:0 Read 4096\n254:0 Write 0\n254:0 Sync 4096\n254:0 Total 4096\nTotal 4096\n";
        let v1 = blkio(bytes, "254:0 Read 1\n254:0 Write 0\nTotal 1\n");
        assert_eq!(v1, v2);
        assert_eq!((v1.len(), v1[0].read_bytes, v1[0].reads), (1, 4096, 1));
    }
}
