//! Statistics files: ours beside Debian's lxcfs and beside the floor, read in turns from inside one server; with one
//! server and with many.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};
use system_tests::{command::Invocation, sample::Sample};

use crate::{
    Options, floor,
    interrupt::Interrupt,
    memory::{self, Process},
    mounted::Mounted,
    once,
    ours::Ours,
    reader::{FILES, READER},
    report::{Report, Row},
};

/// The memory that the server has, in KiB (`ours::MEMORY`).
const KIB: &str = "131072";
/// Readers at once, how long they read one file system before the other's turn, and turns.
const READERS: &str = "4";
const RATE_MS: &str = "1500";
const RATE_TURNS: usize = 4;
/// How many servers one command starts.
const AT_ONCE: usize = 100;
/// What many readings may take on a slow host.
const LIMIT: Duration = Duration::from_secs(1800);

/// The peer: what Debian's unit runs, in the foreground. Without `-l` its loadavg is the host's.
const LXCFS: &str = "lxcfs -f -l";

/// Readers of another server at once, which keep at it; how long, and turns.
const OTHERS: &str = "8";
const OTHERS_MS: &str = "2000";
const OTHERS_TURNS: usize = 5;
/// When all of them have begun.
const OTHERS_BEGUN: Duration = Duration::from_millis(200);

/// The server that is read.
const NAME: &str = "files";
/// The one whose readers keep at it.
const OTHER: &str = "another";

/// Measures all of it.
pub fn measure(options: &Options, ours: &Ours, interrupt: &Interrupt, report: &mut Report) -> Result<()> {
    ours.create_unslowed(NAME)?;
    ours.start(&[NAME])?;
    let lxcfs = match Mounted::by("lxcfs", &["-f", "-l", "-p", "/run/lxcfs.pid"], "proc/meminfo") {
        Ok(lxcfs) => Some(lxcfs),
        // A peer that does not run here is no reason to lose our own figures.
        Err(error) => {
            report.note(format!("lxcfs is not available here: {}", once::first_line(&error)));
            None
        }
    };
    let bench = std::env::current_exe().context("find this program")?.display().to_string();
    let floor = Mounted::by(&bench, &[floor::FLOOR], floor::FILE)?;
    let inside = Inside::of(ours, NAME)?;
    report.note(format!(
        "Statistics files: {} readings of each, {READERS} readers for rates; lxcfs is run as `{LXCFS}`. Ours keeps what it read of \
         the host for up to a second, nothing of the server's; lxcfs keeps which control group a process belongs to. The \
         static text is a file system of one file, by the library that ours uses",
        options.reads
    ));
    each_file(options, &inside, lxcfs.as_ref(), &floor, report)?;
    interrupt.check()?;
    many_readers(&inside, lxcfs.as_ref(), interrupt, report)?;
    ours.create_unslowed(OTHER)?;
    ours.start(&[OTHER])?;
    beside_others(&inside, &Inside::of(ours, OTHER)?, lxcfs.as_ref(), interrupt, report)?;
    ours.destroy(&[OTHER])?;
    drop(lxcfs);
    many_servers(options, ours, &inside, &floor, interrupt, report)?;
    ours.destroy(&[NAME]).map(drop)
}

/// The way into the server that is read.
struct Inside {
    group: String,
    init: String,
    /// Our files, as a process of the server's finds them.
    files: PathBuf,
    worker: i32,
}

impl Inside {
    fn of(ours: &Ours, name: &str) -> Result<Self> {
        let init = ours.init(name)?;
        Ok(Self {
            group: ours.group(name),
            init: init.to_string(),
            files: PathBuf::from(format!("/proc/{init}/root")),
            worker: worker(ours.root())?,
        })
    }

    fn reader(&self, words: &[&str], sources: &[&Path]) -> Result<Invocation> {
        let reader = Invocation::new(std::env::current_exe().context("find this program")?);
        Ok(reader.args([READER, &self.group, &self.init]).args(words).args(sources).limit(LIMIT))
    }

    /// Runs a reader and returns the numbers that it printed, line by line.
    fn read(&self, words: &[&str], sources: &[&Path]) -> Result<Vec<Vec<u64>>> {
        let read = self.reader(words, sources)?.succeed()?.text();
        let numbers = |line: &str| line.split(' ').map(str::parse).collect::<Result<Vec<u64>, _>>();
        read.lines().map(|line| numbers(line).with_context(|| format!("a reader said {line:?}"))).collect()
    }

    /// The times of each file, by source and file.
    fn times(&self, rounds: usize, sources: &[&Path]) -> Result<Vec<Vec<Sample>>> {
        let mut samples = vec![vec![Sample::default(); FILES.len()]; sources.len()];
        for line in self.read(&["times", KIB, &rounds.to_string()], sources)? {
            let [source, file, nanoseconds] = line[..] else { continue };
            samples[source as usize][file as usize].add_us(Duration::from_nanos(nanoseconds));
        }
        ensure!(samples.iter().flatten().all(|sample| sample.count() > 0), "a reader left out a file");
        Ok(samples)
    }
}

/// The worker that answers for the installation in `root`.
fn worker(root: &Path) -> Result<i32> {
    let found = Process::all()?.into_iter().find(|process| process.is_our_worker(&root.join("run/vsos/lxcfs")));
    found.map(|process| process.pid()).context("no worker of our FUSE service runs")
}

/// Each file by itself, one reader: beside lxcfs as the scheduler will have it, and beside the floor on one CPU. How long
/// a process takes to wake on another CPU is several times what is compared there, and the one or the other has luck.
fn each_file(
    options: &Options,
    inside: &Inside,
    lxcfs: Option<&Mounted>,
    floor: &Mounted,
    report: &mut Report,
) -> Result<()> {
    let (theirs, text) = (lxcfs.map(Mounted::place), floor.place().join(floor::FILE));
    let mut sources = vec![inside.files.as_path(), &text];
    sources.extend(theirs.as_deref());
    let found = inside.times(options.reads, &sources)?;
    for (number, file) in FILES.iter().enumerate() {
        let none = Sample::default();
        let theirs = found.get(2).map_or(&none, |samples| &samples[number]);
        report.add(Row::reads(&format!("`/{file}`"), "lxcfs", &found[0][number], theirs, 0.4));
    }
    let all_of = |side: &[Sample]| {
        let mut all = Sample::default();
        side.iter().for_each(|sample| all.extend(sample));
        format!("{:.1} µs (p99 {:.1})", all.median().unwrap_or_default(), all.ninety_ninth().unwrap_or_default())
    };
    let sides = ["ours", "a static text", "lxcfs"].iter().zip(&found);
    let sides: Vec<_> = sides.map(|(side, samples)| format!("{side} {}", all_of(samples))).collect();
    report.note(format!("All these files together, in the same turns: {}", sides.join(", ")));
    let _together = OneCpu::of([inside.worker, floor.pid()])?;
    let found = inside.times(options.reads, &[&inside.files, &text])?;
    for (number, file) in FILES.iter().enumerate() {
        let (ours, text) = (&found[0][number], &found[1][number]);
        report.add(Row::median_of_reads(&format!("`/{file}`, all on one CPU"), "a static text", ours, text, 1.5));
    }
    Ok(())
}

/// Processes with all their threads on one CPU, and this one with what it starts. Dropped, all go where they may.
struct OneCpu {
    threads: Vec<Pid>,
    all: CpuSet,
}

impl OneCpu {
    fn of(processes: impl IntoIterator<Item = i32>) -> Result<Self> {
        let all = sched_getaffinity(None).context("ask for the CPUs")?;
        let mut threads = Vec::new();
        for process in processes {
            for thread in fs::read_dir(format!("/proc/{process}/task")).context("list a daemon's threads")? {
                let thread = thread?.file_name().to_string_lossy().parse().context("a thread's number")?;
                threads.extend(Pid::from_raw(thread));
            }
        }
        let together = Self { threads, all };
        let mut last = CpuSet::new();
        last.set((0..CpuSet::MAX_CPU).rev().find(|cpu| all.is_set(*cpu)).context("no CPU")?);
        together.put(&last).context("bring a reader and its daemons together")?;
        Ok(together)
    }

    fn put(&self, cpus: &CpuSet) -> rustix::io::Result<()> {
        self.threads.iter().copied().map(Some).chain([None]).try_for_each(|thread| sched_setaffinity(thread, cpus))
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        if let Err(error) = self.put(&self.all) {
            eprintln!("bench: let a reader and its daemons go: {error}");
        }
    }
}

/// Several readers at once, and what the daemons use for a reading.
fn many_readers(inside: &Inside, lxcfs: Option<&Mounted>, interrupt: &Interrupt, report: &mut Report) -> Result<()> {
    let (mut rates, mut costs) = ([Sample::default(), Sample::default()], [Sample::default(), Sample::default()]);
    let theirs = lxcfs.map(|lxcfs| (lxcfs.place(), lxcfs.pid()));
    for _ in 0..RATE_TURNS {
        let sides = [Some((inside.files.clone(), inside.worker)), theirs.clone()];
        for (side, (place, daemon)) in sides.into_iter().enumerate().filter_map(|(side, found)| Some((side, found?))) {
            interrupt.check()?;
            let before = cpu_time(daemon)?;
            let read = inside.read(&["rate", KIB, RATE_MS, READERS], &[&place])?;
            let used = cpu_time(daemon)?.saturating_sub(before);
            let Some(&[reads, nanoseconds]) = read.first().map(Vec::as_slice) else { continue };
            rates[side].add_rate(reads, Duration::from_nanos(nanoseconds));
            costs[side].add_us(used.div_f64(reads.max(1) as f64));
        }
    }
    let measure = format!("all these files in turn, {READERS} readers");
    report.add(Row::rates(&measure, "lxcfs", &rates[0], &rates[1], 3.0));
    report.add(Row::compared("CPU time of the worker for each", "of lxcfs", &costs[0], &costs[1], 0.4, "µs"));
    Ok(())
}

/// One reader of a server while many of another one keep at it; and while as many of that one are busy with a file of the
/// kernel's own, since what is slower then is due to the CPUs, for which they all compete.
fn beside_others(
    inside: &Inside,
    other: &Inside,
    lxcfs: Option<&Mounted>,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<()> {
    let all = |place: &Path| -> Result<Sample> {
        let mut all = Sample::default();
        inside.times(100, &[place])?.concat().iter().for_each(|sample| all.extend(sample));
        Ok(all)
    };
    let beside = |place: &Path, read: &Path| -> Result<Sample> {
        let mut others = other.reader(&["rate", KIB, OTHERS_MS, OTHERS], &[read])?.spawn()?;
        thread::sleep(OTHERS_BEGUN);
        let found = all(place);
        others.wait()?.success()?;
        found
    };
    let theirs = lxcfs.map(Mounted::place);
    let (mut alone, mut ours, mut peer, mut busy) = <(Sample, Sample, Sample, Sample)>::default();
    for _ in 0..OTHERS_TURNS {
        interrupt.check()?;
        alone.extend(&all(&inside.files)?);
        ours.extend(&beside(&inside.files, &other.files)?);
        if let Some(place) = &theirs {
            peer.extend(&beside(place, place)?);
        }
        busy.extend(&beside(&inside.files, Path::new("/proc/version"))?);
    }
    let measure = format!("all these files, beside {OTHERS} readers of another server");
    report.add(Row::median_of_reads(&measure, "ours without them", &ours, &alone, 2.0));
    report.add(Row::median_of_reads(&measure, "lxcfs", &ours, &peer, 1.0));
    report.add(Row::median_of_reads(&measure, "beside as many of a file of the kernel's", &ours, &busy, 2.0));
    Ok(())
}

/// CPU time of a process with all its threads, and of the children it has waited for (fields 14 to 17 of proc_pid_stat(5)).
fn cpu_time(pid: i32) -> Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).context("read a daemon's CPU time")?;
    let (_, fields) = text.rsplit_once(')').context("a process without a name")?;
    let ticks: Vec<u64> = fields.split_whitespace().skip(11).take(4).map(str::parse).collect::<Result<_, _>>()?;
    ensure!(ticks.len() == 4, "no CPU time in {text:?}");
    Ok(Duration::from_millis(10 * ticks.iter().sum::<u64>()))
}

/// The same server's files when it is one of many that the worker knows, and the worker's memory then. The static text, of which
/// nobody has many, says how much of it is the machine's, on which all of them run.
fn many_servers(
    options: &Options,
    ours: &Ours,
    inside: &Inside,
    floor: &Mounted,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<()> {
    let names: Vec<String> = (1..options.registered).map(|number| format!("files{number}")).collect();
    for name in &names {
        interrupt.check()?;
        ours.create(name)?;
    }
    let text = floor.place().join(floor::FILE);
    let read = || -> Result<[Sample; 2]> {
        let mut all = [Sample::default(), Sample::default()];
        let found = inside.times(options.reads / 2, &[&inside.files, &text])?;
        all.iter_mut().zip(&found).for_each(|(all, files)| files.iter().for_each(|sample| all.extend(sample)));
        Ok(all)
    };
    // Before and after, so that a machine that has become slower or faster meets both.
    let [mut alone, mut text_alone] = read()?;
    each_hundred(&names, |names| ours.start(names))?;
    interrupt.check()?;
    let views = fs::read_dir(ours.views()).context("list the views")?.collect::<Result<Vec<_>, _>>()?;
    ensure!(views.len() == options.registered, "{} views of {} servers", views.len(), options.registered);
    for view in &views {
        for file in FILES {
            fs::read(view.path().join(file)).with_context(|| format!("read {file} of a server"))?;
        }
    }
    let mut memory = Sample::default();
    memory.add_kib(memory::resident_kib(inside.worker)?, 1024);
    let [among_many, text_among_many] = read()?;
    ensure!(worker(ours.root())? == inside.worker, "the worker was replaced while it was measured");
    each_hundred(&names, |names| ours.destroy(names))?;
    let [again, text_again] = read()?;
    alone.extend(&again);
    text_alone.extend(&text_again);
    let measure = format!("all these files, {} servers run", options.registered);
    report.add(Row::median_of_reads(&measure, "ours with 1 server", &among_many, &alone, 1.1));
    let median = |sample: &Sample| sample.median().unwrap_or_default();
    report.note(format!(
        "The static text takes {:.1} µs when {} servers run, and {:.1} µs when 1 does",
        median(&text_among_many),
        options.registered,
        median(&text_alone)
    ));
    let measure = format!("worker's resident memory, all files of {} servers read", options.registered);
    report.add(Row::bounded(&measure, memory, 8.0, "MiB"));
    Ok(())
}

fn each_hundred(names: &[String], act: impl Fn(&[&str]) -> Result<Duration>) -> Result<()> {
    names.chunks(AT_ONCE).try_for_each(|names| act(&names.iter().map(String::as_str).collect::<Vec<_>>()).map(drop))
}
