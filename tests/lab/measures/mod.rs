//! Measures of checkpoints and migrations, between two hosts with systemd: `make bench-lab`. It judges nothing but the ratios that are
//! wanted, and writes a figure that falls short as such.

mod disk;
mod ground;
mod outside;
mod pause;
mod report;
mod timed;
mod volume;

use std::{fs, process::ExitCode, time::Instant};

use anyhow::{Context, Result};
use system_tests::lab::{Image, Larger, Payload, Workshop, definition, pair::Pair, pair_with};

use crate::Options;
use disk::Disk;
use ground::{Kind, LOAD};
use pause::Pause;
use report::{Table, per_100_mib, ratio, replace, seconds};

/// The host, twice.
const HOST: &str = "debian-13";
/// Room for the largest server and, several times, for its images.
const LARGER: Larger = Larger { memory_mib: 3072, disk_gib: 16 };
/// How often each is measured, and one that takes minutes.
const ROUNDS: usize = 3;
const ONCE: usize = 1;

const KINDS: [Kind; 5] = [
    Kind { what: "busybox, idle", template: "busybox", mib: 0, changes_kib: 0, rounds: ROUNDS },
    Kind { what: "Debian 13 with systemd, idle", template: "debian-13", mib: 0, changes_kib: 0, rounds: ROUNDS },
    Kind { what: "64 MiB, of which 512 KiB/s change", template: "busybox", mib: 64, changes_kib: 512, rounds: ROUNDS },
    Kind { what: "256 MiB, of which 512 KiB/s change", template: "busybox", mib: 256, changes_kib: 512, rounds: ONCE },
    Kind { what: "1 GiB, of which 512 KiB/s change", template: "busybox", mib: 1024, changes_kib: 512, rounds: ONCE },
];

/// Downtime wanted of pre-copy, against stop-and-copy.
const LIVE: f64 = 0.4;
/// Time wanted of suspend and resume, against CRIU alone.
const DISK: f64 = 1.3;
/// Bytes wanted of a volume on the wire, against bytes changed.
const VOLUME: f64 = 1.1;

/// Measures, prints, and writes what was printed into a document if one is named.
pub fn run(workshop: &Workshop, payload: &Payload, options: &Options) -> Result<ExitCode> {
    let began = Instant::now();
    let load = options.load.as_ref().context("say where the load is: make bench-lab does")?;
    payload.bring(LOAD, load)?;
    let definition = definition::named(HOST)?;
    let image = Image::of(workshop, &definition, &payload.vsctl())?;
    let pair = pair_with(workshop, &definition, &image, payload, Some(LARGER))?;
    ground::prepare(&pair)?;
    eprintln!("lab: two hosts are ready after {} s", began.elapsed().as_secs());
    let (text, ended) = measure(&pair, &options.filter, began);
    println!("\n{text}");
    ended?;
    if let Some(file) = &options.write {
        let document = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let new = replace(&document, &text).with_context(|| format!("write into {}", file.display()))?;
        fs::write(file, new).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What was measured, as text, and what ended it before the end.
fn measure(pair: &Pair, filter: &str, began: Instant) -> (String, Result<()>) {
    let mut tables = Tables::new();
    let ended = tables.measure(pair, filter, began);
    (tables.render(), ended)
}

/// All that is measured, as far as it is.
struct Tables {
    pauses: Table,
    outside: Table,
    whole: Table,
    dumps: Table,
    restores: Table,
    sent: Table,
}

impl Tables {
    fn new() -> Self {
        Self {
            pauses: Table::new(&[
                "server",
                "nothing is done",
                "kept, `--leave-running`",
                "`--near-live`",
                "`--live`",
                "live / near-live",
                "wanted",
                "`--near-live --postcopy`",
                "`--live --postcopy`",
            ]),
            outside: Table::new(&[
                "server",
                "no ping, `--near-live`",
                "`--live`",
                "no TCP echo, `--near-live`",
                "`--live`",
            ]),
            whole: Table::new(&[
                "server",
                "`migrate --near-live`",
                "`--live`",
                "`--near-live --postcopy`",
                "`--live --postcopy`",
            ]),
            dumps: Table::new(&[
                "server",
                "images",
                "`vsctl suspend`",
                "per 100 MiB",
                "CRIU in it",
                "bare `criu dump`",
                "its images synced",
                "ratio (without a bare one: to CRIU in it)",
                "wanted",
            ]),
            restores: Table::new(&["server", "`vsctl resume`", "per 100 MiB", "CRIU in it", "ratio", "wanted"]),
            sent: Table::new(&["server", "sent", "changed", "sent / changed", "wanted"]),
        }
    }

    fn measure(&mut self, pair: &Pair, filter: &str, began: Instant) -> Result<()> {
        let [a, _] = &pair.hosts;
        for kind in KINDS.iter().filter(|kind| kind.what.contains(filter)) {
            kind.begin(a, a).with_context(|| format!("begin {}", kind.what))?;
            let pause = pause::measure(pair, kind.rounds).with_context(|| kind.what.to_owned())?;
            self.add_pause(kind.what, &pause);
            let can_be_bare = kind.template == "busybox";
            let disk = disk::measure(a, kind.rounds, can_be_bare).with_context(|| kind.what.to_owned())?;
            self.add_disk(kind.what, &disk);
            // Last: what it leaves in the server is not in the other figures.
            let outside = outside::measure(pair).with_context(|| kind.what.to_owned())?;
            let cells = outside.ping.iter().chain(&outside.echo).map(|gap| format!("{:.2} s", gap.as_secs_f64()));
            self.outside.add(std::iter::once(kind.what.to_owned()).chain(cells).collect());
            a.sh("vsctl destroy --force web1")?;
            eprintln!("lab: measured after {} s: {}", began.elapsed().as_secs(), kind.what);
        }
        for volume in volume::measure(pair)? {
            let [by, met] = ratio(Some(volume.sent as f64), Some(volume.changed as f64), VOLUME);
            let mb = |bytes: u64| format!("{:.2} MB", bytes as f64 / 1e6);
            self.sent.add(vec![volume.what.to_owned(), mb(volume.sent), mb(volume.changed), by, met]);
        }
        Ok(())
    }

    fn add_pause(&mut self, what: &str, pause: &Pause) {
        let [near_live, live, ..] = &pause.moved;
        let [by, met] = ratio(live.median(), near_live.median(), LIVE);
        let [quiet, kept] = [&pause.quiet, &pause.kept].map(seconds);
        let [near_live, live, later, live_later] = pause.moved.each_ref().map(seconds);
        self.pauses.add(vec![what.to_owned(), quiet, kept, near_live, live, by, met, later, live_later]);
        self.whole.add(std::iter::once(what.to_owned()).chain(pause.took.iter().map(seconds)).collect());
    }

    fn add_disk(&mut self, what: &str, disk: &Disk) {
        let images = format!("{:.1} MiB", disk.bytes as f64 / f64::from(1 << 20));
        let criu = disk.bare_dump.median().or(disk.criu_in_suspend.median());
        let [by, met] = ratio(disk.suspend.median(), criu, DISK);
        let [suspend, criu, bare, sync] =
            [&disk.suspend, &disk.criu_in_suspend, &disk.bare_dump, &disk.bare_sync].map(seconds);
        let per = |sample| per_100_mib(sample, disk.bytes);
        self.dumps.add(vec![what.to_owned(), images, suspend, per(&disk.suspend), criu, bare, sync, by, met]);
        let [by, met] = ratio(disk.resume.median(), disk.criu_in_resume.median(), DISK);
        let [resume, criu] = [&disk.resume, &disk.criu_in_resume].map(seconds);
        self.restores.add(vec![what.to_owned(), resume, per(&disk.resume), criu, by, met]);
    }

    fn render(&self) -> String {
        let Self { pauses, outside, whole, dumps, restores, sent } = self;
        let [pauses, outside, whole, dumps, restores, sent] =
            [pauses, outside, whole, dumps, restores, sent].map(Table::render);
        format!(
            "Silence, as a listener on the network hears it:\n\n{pauses}\nWithout an answer, as who asks from outside sees it (one move \
             each):\n\n{outside}\nWhole commands:\n\n{whole}\nTo the disk:\n\n{dumps}\n\
             Back:\n\n{restores}\nA volume:\n\n{sent}"
        )
    }
}
