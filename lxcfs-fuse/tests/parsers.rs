//! Each parser, with any bytes and with texts that are almost right: none panics, and what it lets through is what it promises.
//!
//! Parsers that only their own module can call are met in `properties::nothing_in_a_file_breaks_an_answer`.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use lxcfs_fuse::registration::Registration;
use lxcfs_fuse::snapshot::{Cpus, parse};
use lxcfs_fuse::{handshake, inode, parking, render};
use proptest::prelude::*;

/// What the kernel's files are made of, and what is not far from it.
const WORDS: &[&str] = &[
    "0",
    "1",
    "7",
    "8191",
    "8192",
    "4294967296",
    "4611686018427387904",
    "18446744073709551615",
    "18446744073709551616",
    "-1",
    "+1",
    "max",
    "x",
    "é",
    ":",
    "-",
    ",",
    "=",
    "(",
    ")",
    "\t",
    "\0",
    "254:0",
    "8:16",
    "Read",
    "Write",
    "Total",
    "rbytes=1",
    "wios=0",
    "dios=1",
    "R",
    "D",
    "processor",
    "processor\t: 1",
    "core id",
    "lines",
    "name = \"a\"",
    "started_boottime_ns = 1",
    "[cgroup]",
    "unified = \"/a\"",
    "cpu = \"b\"",
    "",
];

/// What lists of CPUs are made of.
const LIST: &[&str] = &["0", "1", "7", "8191", "8192", "4294967295", "x", ",", ",", ",", "-", " "];

/// Any bytes as the readers of files pass them on, or words in any order.
fn text() -> impl Strategy<Value = String> {
    let bytes = prop::collection::vec(any::<u8>(), 0..300);
    let line = |words: std::ops::Range<usize>| prop::collection::vec(prop::sample::select(WORDS), words);
    let lines = prop::collection::vec(line(1..5).prop_map(|words| words.join(" ")), 0..12);
    prop_oneof![
        bytes.prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        line(0..12).prop_map(|words| words.concat()),
        lines.prop_map(|lines| lines.join("\n")),
        prop::collection::vec(prop::sample::select(LIST), 0..12).prop_map(|parts| parts.concat()),
    ]
}

/// Small numbers, where roundings show, and any.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..20_u64, any::<u64>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn numbers_and_limits(text in text()) {
        prop_assert_eq!(parse::number(&text), text.trim().parse::<u64>().ok());
        if let Some(limit) = parse::limit(&text) {
            prop_assert!(parse::number(&text) == Some(limit) && limit < 1 << 62);
        }
    }

    #[test]
    fn keyed_files(text in text()) {
        for (key, value) in parse::pairs(&text) {
            prop_assert!(!key.contains([' ', '\n']) && text.contains(key));
            let first = parse::pairs(&text).find(|(found, _)| *found == key).map(|(_, value)| value);
            prop_assert_eq!(parse::value(&text, key), first);
            prop_assert_eq!(parse::value(&format!("{key} {value}\n{text}"), key), Some(value));
        }
    }

    #[test]
    fn cpu_lists(text in text(), cpus in prop::collection::btree_set(0..8192_u32, 0..50)) {
        let list = parse::cpu_list(&text);
        prop_assert!(list.windows(2).all(|pair| pair[0] < pair[1]), "{list:?}");
        prop_assert!(list.last().is_none_or(|last| *last < 8192));
        // And as they are written they are read.
        let cpus: Vec<u32> = cpus.into_iter().collect();
        let mut written = String::new();
        render::cpu_list(&mut written, &cpus);
        prop_assert_eq!(parse::cpu_list(&written), cpus);
    }

    #[test]
    fn quotas(text in text(), quota in number(), period in number()) {
        prop_assert_ne!(parse::quota_cpus(&text), Some(0));
        let cpus = parse::cpus_of(quota, period);
        prop_assert_eq!(cpus.is_none(), period == 0);
        // Enough for the quota, and not one more than that.
        if let Some(cpus) = cpus {
            let (quota, period, cpus) = (u128::from(quota), u128::from(period), u128::from(cpus));
            prop_assert!(cpus * period >= quota && (cpus == 1 || (cpus - 1) * period < quota));
        }
        prop_assert_eq!(parse::quota_cpus(&format!("{quota} {period}\n")), cpus);
    }

    #[test]
    fn times_by_cpu(text in text()) {
        let times = parse::usage_all(&text);
        prop_assert!(times.len() <= text.lines().count() && times.iter().all(|cpu| cpu.number < 8192));
        prop_assert!(parse::usage_percpu(&text).count() <= text.len());
    }

    #[test]
    fn states_of_tasks(text in text(), name in "[ -~]{0,15}", state in "[RSDZTtWXxKPI]", rest in "[0-9 -]{0,40}") {
        if let Some(state) = parse::task_state(&text) {
            prop_assert!(text.contains(')') && !state.is_whitespace());
        }
        // Whatever a program calls itself.
        prop_assert_eq!(parse::task_state(&format!("7 ({name}) {state} {rest}")), state.chars().next());
    }

    #[test]
    fn devices(text in text(), major in any::<u32>(), minor in any::<u32>()) {
        if let Some((major, minor)) = parse::device_number(&text) {
            prop_assert_eq!(text.replace('+', "").split(':').map(|part| part.parse().unwrap()).collect::<Vec<u32>>(), [major, minor]);
        }
        prop_assert_eq!(parse::device_number(&format!("{major}:{minor}")), Some((major, minor)));
    }

    #[test]
    fn disks_of_both_versions(first in text(), second in text()) {
        let v1 = parse::blkio(&first, &second);
        let numbers: BTreeSet<_> = v1.iter().map(|disk| (disk.major, disk.minor)).collect();
        prop_assert_eq!(numbers.len(), v1.len());
        for disk in v1.into_iter().chain(parse::io_stat(&first)) {
            prop_assert!(disk.reads > 0 || disk.writes > 0 || disk.discards > 0, "{disk:?}");
        }
    }

    #[test]
    fn registrations(text in text()) {
        if let Ok(registration) = Registration::parse(&text) {
            let directories: Vec<_> = registration.cgroup.directories().collect();
            prop_assert!(!directories.is_empty() && directories.iter().all(|path| path.is_absolute()));
        }
    }

    #[test]
    fn names_of_servers(text in text(), id in any::<u64>()) {
        for name in [text.clone(), id.to_string(), format!("0{id}"), format!("+{id}")] {
            if let Some(found) = inode::id_of(OsStr::from_bytes(name.as_bytes())) {
                prop_assert_eq!(found.to_string(), name);
            }
        }
    }

    #[test]
    fn what_the_host_says_of_its_cpus(text in text(), set in prop::collection::btree_set(0..70_u32, 1..5), visible in 1..5_usize) {
        let cpus = Cpus { visible: visible.min(set.len()), set: set.into_iter().collect() };
        let mut out = String::new();
        render::cpuinfo(&mut out, &parse::cpuinfo(&text), &cpus);
        prop_assert!(out.is_empty() || out.ends_with('\n'));
    }

    #[test]
    fn messages_of_kernel_and_supervisor(bytes in prop::collection::vec(any::<u8>(), 0..200), text in text()) {
        prop_assert!(!handshake::can_resend(&bytes) || bytes.len() >= 60);
        for words in [bytes, [parking::LINES.as_bytes(), text.as_bytes()].concat()] {
            // None of its lines has its two descriptors here.
            prop_assert!(parking::lines(&words, vec![]).is_none_or(|lines| lines.is_empty()));
        }
    }
}
