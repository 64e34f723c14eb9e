//! What processes that go along need of the host that they come to, and whether it is there.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};
use kernel::cgroup::Group;

use super::wire::Processes;
use crate::checkpoint;
use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::processes::{field, text};
use crate::site::Site;

/// What `/proc/cpuinfo` calls those features of an x86 processor that a program can use without asking the kernel. Most of what else
/// stands there is the kernel's, and another kernel on the same processor says other things.
const X86: &[&str] = &[
    "3dnowprefetch",
    "abm",
    "adx",
    "aes",
    "bmi1",
    "bmi2",
    "clflush",
    "clflushopt",
    "clwb",
    "clzero",
    "cmov",
    "cx16",
    "cx8",
    "erms",
    "f16c",
    "fma",
    "fma4",
    "fpu",
    "fsgsbase",
    "fsrm",
    "fxsr",
    "gfni",
    "hle",
    "lahf_lm",
    "lm",
    "mmx",
    "movbe",
    "movdir64b",
    "movdiri",
    "pclmulqdq",
    "pku",
    "pni",
    "popcnt",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "serialize",
    "sha_ni",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "tbm",
    "tsc",
    "user_shstk",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "wbnoinvd",
    "xgetbv1",
    "xop",
    "xsave",
    "xsavec",
    "xsaveopt",
];

/// … and how more of them begin.
const X86_FAMILIES: &[&str] = &["amx_", "avx"];

/// How much memory the images of the processes in `group` hold, in bytes: what they have in common since a fork comes to each of them.
///
/// # Errors
/// When the group cannot be read.
pub fn memory_bytes(group: &Group) -> Result<u64> {
    let known = group.anonymous()?;
    // One that ends meanwhile has none.
    let each = group.processes()?.into_iter().filter_map(|pid| text(pid, "status").ok());
    let own: u64 = each.map(|status| own_bytes(&status)).sum();
    Ok(own.max(known.own_bytes) + known.shared_bytes)
}

/// Anonymous memory in a file `status` of /proc, and what of it is swapped out (proc_pid_status(5)).
fn own_bytes(status: &str) -> u64 {
    let kib = |name| field(status, name)?.strip_suffix(" kB")?.trim().parse::<u64>().ok();
    ["RssAnon:", "VmSwap:"].into_iter().filter_map(kib).sum::<u64>() << 10
}

/// What this host has for the processes of `name`.
///
/// # Errors
/// When it lacks CRIU, or does not say what its processors can.
pub fn here(site: &Site, name: &Name) -> Result<Processes> {
    with(site, name, checkpoint::criu_version(site)?)
}

/// What the processes of a server here need: those that are on the disk, the CRIU that wrote them.
///
/// # Errors
/// As [`here`], or when the images cannot be read.
pub fn of(site: &Site, name: &Name) -> Result<Processes> {
    match checkpoint::written_by(site, name)? {
        Some(criu) => with(site, name, criu),
        None => here(site, name),
    }
}

fn with(site: &Site, name: &Name, criu: String) -> Result<Processes> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    Ok(Processes { criu, cgroup: site.server_cgroup(name), cpu: features(&cpuinfo) })
}

/// What the first processor can, of what programs use.
fn features(cpuinfo: &str) -> BTreeSet<String> {
    let is_x86 = |word: &&str| X86.contains(word) || X86_FAMILIES.iter().any(|family| word.starts_with(family));
    let line =
        |key: &str| cpuinfo.lines().find_map(|line| line.strip_prefix(key)?.split_once(':')).map(|(_, words)| words);
    let words: Vec<&str> = match (line("flags"), line("Features")) {
        (Some(flags), _) => flags.split_whitespace().filter(is_x86).collect(),
        (None, features) => features.unwrap_or_default().split_whitespace().collect(),
    };
    words.into_iter().map(str::to_owned).collect()
}

/// What `here` lacks for `theirs`. All of it is found here, before a server stands still; what is not would be found when it is restored,
/// and it would go on where it was.
pub fn problems(here: &Processes, theirs: &Processes, is_postcopy: bool) -> Vec<Failure> {
    let mut found = Vec::new();
    let mut note = |message: String| found.push(Failure::new(Exit::Unsupported, message));
    let number = |version: &str| version.split('.').map(|part| part.parse::<u32>().unwrap_or(0)).collect::<Vec<_>>();
    if number(&here.criu) < number(&theirs.criu) {
        note(format!("criu is {}, and cannot be relied on for what {} writes", here.criu, theirs.criu));
    }
    if is_postcopy && here.criu != theirs.criu {
        // CRIU 4.2 asks for pages in other words than 4.1.
        note(format!("criu is {}, and post-copy needs the same on both hosts: {}", here.criu, theirs.criu));
    }
    if here.cgroup != theirs.cgroup {
        note(format!("its control group would be {}, and was {}", here.cgroup, theirs.cgroup));
    }
    let lacking: Vec<&str> = theirs.cpu.difference(&here.cpu).map(String::as_str).collect();
    if !lacking.is_empty() {
        note(format!("the processors cannot {}, which its programs may have begun to use", lacking.join(", ")));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Processes {
        let cpu = ["avx2", "sse2"].map(str::to_owned).into();
        Processes { criu: "4.1.1".into(), cgroup: "vsos/web1".into(), cpu }
    }

    #[test]
    fn memory_is_what_a_process_has_in_no_file() {
        assert_eq!(
            own_bytes("Name:\tsh\nVmRSS:\t  900 kB\nRssAnon:\t     100 kB\nRssFile:\t 800 kB\nVmSwap:\t 3 kB\n"),
            103 << 10
        );
        // A thread of the kernel's, or one that has ended.
        assert_eq!(own_bytes("Name:\tsh\nState:\tZ (zombie)\n"), 0);
    }

    #[test]
    fn a_host_that_can_more_does() {
        let more =
            Processes { criu: "4.10.0".into(), cpu: ["avx2", "avx512f", "sse2"].map(str::to_owned).into(), ..host() };
        assert!(problems(&host(), &host(), true).is_empty() && problems(&more, &host(), false).is_empty());
        assert!(problems(&more, &host(), true)[0].to_string().contains("post-copy needs the same"));
    }

    #[test]
    fn each_thing_that_is_missing_is_said() {
        let lesser = Processes { criu: "3.17.1".into(), cgroup: "vsos-2/web1".into(), cpu: ["sse2".to_owned()].into() };
        let said: Vec<String> = problems(&lesser, &host(), false).iter().map(ToString::to_string).collect();
        for (said, word) in said.iter().zip(["3.17.1", "vsos-2/web1", "avx2"]) {
            assert!(said.contains(word), "{said}");
        }
        assert_eq!(said.len(), 3);
    }

    #[test]
    fn processes_on_the_disk_need_the_criu_that_wrote_them() {
        let root = tempfile::tempdir().unwrap();
        let (site, name) = (Site::at(root.path()).unwrap(), "web1".parse().unwrap());
        let images = root.path().join("var/lib/vsos/servers/web1/volume/suspended");
        fs::create_dir_all(&images).unwrap();
        let manifest = "version = 2\nname = \"web1\"\nuuid = \"u\"\ncreated_s = 1\nage_ns = 2\ntemplate_digest = \"d\"\n\
                        with_host = false\nkernel = \"6.12\"\ncriu = \"3.19.7\"\ngroups = []\nsettings = []\ncpu = { user_usec = 1, system_usec = 1 }\n[files]\n";
        fs::write(images.join("checkpoint.toml"), manifest).unwrap();
        assert_eq!(of(&site, &name).unwrap().criu, "3.19.7");
    }

    #[test]
    fn features_are_those_that_programs_use() {
        let x86 =
            "processor\t: 0\nflags\t\t: fpu vme sse2 constant_tsc avx512f ibrs\n\nprocessor\t: 1\nflags\t\t: none\n";
        assert_eq!(features(x86).iter().map(String::as_str).collect::<Vec<_>>(), ["avx512f", "fpu", "sse2"]);
        assert_eq!(features("processor\t: 0\nFeatures\t: fp asimd\n").len(), 2);
        assert!(features("").is_empty());
    }
}
