//! What a host needs for virtual servers, and what would make it better.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Result;
use kernel::cgroup::{Controller, Hierarchies};

use super::{Finding, Verdict, trial};
use crate::checkpoint;
use crate::migrate;
use crate::site::Site;

/// Looks at the host.
pub fn examine(site: &Site) -> Vec<Finding> {
    let mut findings = vec![
        release(),
        namespaces(),
        tried("overlay in a user namespace", trial::overlay(), "modprobe overlay; Linux 5.11 or newer"),
        tried("bridge and veth", trial::links(), "modprobe bridge veth"),
        fuse(),
    ];
    findings.extend(cgroups());
    findings.extend(programs(site));
    findings.extend(capabilities());
    findings.extend(sysctls());
    findings.push(forwarding(site));
    findings
}

fn tried(subject: &str, outcome: Result<()>, remedy: &str) -> Finding {
    match outcome {
        Ok(()) => Finding::ok(subject, "tried out"),
        Err(error) => Finding::new(Verdict::Missing, subject, format!("{error:#}")).remedy(remedy),
    }
}

/// The oldest Linux on which an overlay takes idmapped layers.
const OLDEST: (u32, u32) = (5, 19);

fn release() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let (major, minor) = OLDEST;
    if parse_release(release).is_some_and(|found| found >= OLDEST) {
        return Finding::ok("kernel", format!("Linux {release}"));
    }
    Finding::new(Verdict::Missing, "kernel", format!("Linux {release}"))
        .remedy(format!("Linux {major}.{minor} or newer: older ones refuse overlays over idmapped layers"))
}

fn parse_release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn namespaces() -> Finding {
    let kinds = ["user", "pid", "mnt", "net", "uts", "ipc", "cgroup", "time"];
    let missing: Vec<&str> = kinds.into_iter().filter(|kind| !Path::new("/proc/self/ns").join(kind).exists()).collect();
    let none = number("/proc/sys/user/max_user_namespaces") == Some(0);
    if none {
        return Finding::new(Verdict::Missing, "namespaces", "user namespaces are forbidden")
            .remedy("sysctl -w user.max_user_namespaces=65536");
    }
    if missing.is_empty() {
        return Finding::ok("namespaces", kinds.join(" "));
    }
    Finding::new(Verdict::Missing, "namespaces", format!("the kernel has no {}", missing.join(", ")))
        .remedy("another kernel: that of Debian has all")
}

fn fuse() -> Finding {
    match fs::File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Finding::ok("FUSE", "/dev/fuse"),
        Err(error) => Finding::new(Verdict::Missing, "FUSE", format!("/dev/fuse: {error}")).remedy("modprobe fuse"),
    }
}

fn cgroups() -> Vec<Finding> {
    let hierarchies = match Hierarchies::detect() {
        Ok(hierarchies) => hierarchies,
        Err(error) => return vec![Finding::new(Verdict::Missing, "cgroups", format!("{error}"))],
    };
    let Some(unified) = hierarchies.unified() else {
        return vec![
            Finding::new(Verdict::Missing, "cgroup2", "no cgroup2 hierarchy is mounted")
                .remedy("boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 cgroup2 /sys/fs/cgroup"),
        ];
    };
    let kind = if hierarchies.is_pure_v2() { "" } else { ", with v1 controllers" };
    let mut findings = vec![Finding::ok("cgroup2", format!("{}{kind}", unified.display()))];
    for (controller, limit) in unlimited(&hierarchies) {
        let word = controller.as_str();
        let finding = Finding::new(Verdict::Missing, format!("cgroup {word}"), format!("{limit} cannot be limited"));
        findings.push(finding.remedy(format!("boot with cgroup_enable={word}")));
    }
    findings
}

/// The controllers that the host lacks, and the keys of a spec that need them.
pub fn unlimited(hierarchies: &Hierarchies) -> Vec<(Controller, &'static str)> {
    let unified = hierarchies.unified().map(|unified| fs::read_to_string(unified.join("cgroup.controllers")));
    let available = unified.and_then(Result::ok).unwrap_or_default();
    let is_there = |controller: Controller| {
        hierarchies.v1(controller).is_some() || available.split_whitespace().any(|name| name == controller.as_str())
    };
    let all = [
        (Controller::Memory, "memory and swap"),
        (Controller::Cpu, "cpus"),
        (Controller::Cpuset, "cpuset"),
        (Controller::Pids, "pids"),
    ];
    all.into_iter().filter(|(controller, _)| !is_there(*controller)).collect()
}

/// The programs: where they come from, and whether nothing works without them.
fn programs(site: &Site) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in ["vsinit", "lxcfs-fuse"] {
        findings.push(match site.program(name) {
            Ok(path) => Finding::ok(name, path.display().to_string()),
            Err(error) => Finding::new(Verdict::Missing, name, error.to_string())
                .remedy("make programs install; or `programs` in vsos.toml says where it is"),
        });
    }
    for (name, package, verdict, without) in [
        ("nft", "nftables", Verdict::Missing, "no server can be started"),
        ("busybox", "busybox-static", Verdict::Warning, "the template busybox cannot be built"),
        ("mmdebstrap", "mmdebstrap", Verdict::Warning, "the templates of Debian cannot be built"),
        ("ssh-keygen", "openssh-client", Verdict::Warning, "servers make their host keys at their first boot"),
    ] {
        findings.push(match in_path(name) {
            Some(path) => Finding::ok(name, path.display().to_string()),
            None => Finding::new(verdict, name, format!("not installed: {without}"))
                .remedy(format!("apt install {package}")),
        });
    }
    findings.push(criu(site));
    findings
}

/// What the CRIU that is here can do with this kernel.
fn criu(site: &Site) -> Finding {
    let known = checkpoint::criu_version(site).and_then(|version| Ok((version, checkpoint::doubt(site)?)));
    let known = known.and_then(|(version, doubt)| Ok((version, doubt, checkpoint::features(site)?)));
    match known {
        Ok((version, None, features)) => {
            let mut can = vec!["migratable servers can be suspended".to_owned()];
            can.push(match features.notes_changes {
                Some(true) => "moved with --live".to_owned(),
                _ => "not moved with --live: the kernel does not note which memory changes (soft-dirty)".to_owned(),
            });
            can.push(match (features.brings_pages, migrate::faults_are_told()) {
                (Some(true), Ok(())) => "taken with --postcopy".to_owned(),
                (Some(true), Err(error)) => format!("not taken with --postcopy: {error}"),
                _ => "not taken with --postcopy: the kernel's userfaultfd(2) cannot do what it needs".to_owned(),
            });
            Finding::ok("criu", format!("{version}: {}", can.join(", ")))
        }
        Ok((version, Some(doubt), _)) => Finding::new(Verdict::Warning, "criu", format!("{version}: {doubt}"))
            .remedy("a newer CRIU (`checkpoint.criu` in vsos.toml says where it is), or an older kernel"),
        Err(error) => {
            let remedy = "apt install criu (Debian 13 or newer); or `checkpoint.criu` in vsos.toml says where it is";
            Finding::new(Verdict::Warning, "criu", format!("{error:#}: no server can be suspended")).remedy(remedy)
        }
    }
}

fn in_path(name: &str) -> Option<PathBuf> {
    // Where the administrator's programs are, also when PATH is a user's.
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    places.map(|place| place.join(name)).find(|path| path.is_file())
}

fn capabilities() -> Vec<Finding> {
    // Bits of linux/capability.h.
    let wanted = [
        (21, "CAP_SYS_ADMIN", Verdict::Missing, "no server can be started"),
        (12, "CAP_NET_ADMIN", Verdict::Missing, "no server can be connected"),
        (
            24,
            "CAP_SYS_RESOURCE",
            Verdict::Warning,
            "hard limits of servers cannot be raised, nor their oom score lowered",
        ),
    ];
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    let held = effective.unwrap_or_default();
    let finding = |(bit, name, verdict, without): (u32, &str, Verdict, &str)| {
        let lacks = held & (1 << bit) == 0;
        lacks.then(|| Finding::new(verdict, name, format!("root lacks it here: {without}")))
    };
    wanted.into_iter().filter_map(finding).collect()
}

/// Values below which the number of servers is limited: key, least value, what it bounds.
const SYSCTLS: &[(&str, u64, &str)] = &[
    ("user.max_user_namespaces", 4096, "a server has one, and more when it nests"),
    ("fs.inotify.max_user_instances", 1024, "a server with systemd has about ten"),
    ("fs.inotify.max_user_watches", 65_536, "a server with systemd has some hundreds"),
    ("kernel.keys.maxkeys", 2000, "each service of systemd has a keyring"),
    ("kernel.pid_max", 131_072, "all servers share the host's process ids"),
    ("net.ipv4.neigh.default.gc_thresh3", 4096, "a server has an entry, and its neighbours"),
    ("net.ipv6.neigh.default.gc_thresh3", 4096, "a server has an entry, and its neighbours"),
];

fn sysctls() -> Vec<Finding> {
    let mut findings = Vec::new();
    for (key, least, why) in SYSCTLS {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        if let Some(value) = number(&path).filter(|value| value < least) {
            let detail = format!("{value} is little for many servers: {why}");
            findings.push(Finding::new(Verdict::Warning, *key, detail).remedy(format!("sysctl -w {key}={least}")));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok("sysctls", "room for many servers"));
    }
    findings
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Other firewalls that drop what is forwarded: nothing that we accept can overrule them.
fn forwarding(site: &Site) -> Finding {
    let subject = "forwarding";
    match net::firewall::forward_drops() {
        Ok(drops) if drops.is_empty() => Finding::ok(subject, "no other firewall drops it"),
        Ok(drops) => {
            let chains: Vec<String> =
                drops.iter().map(|drop| format!("{} {} {}", drop.family, drop.table, drop.chain)).collect();
            let bridge = site.bridge();
            Finding::new(Verdict::Warning, subject, format!("dropped by policy of {}", chains.join(", "))).remedy(
                format!(
                    "accept it there; with Docker: iptables -I DOCKER-USER -i {bridge} -j ACCEPT; \
                 iptables -I DOCKER-USER -o {bridge} -j ACCEPT"
                ),
            )
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Finding::new(Verdict::Missing, subject, format!("{error}")).remedy("run as root with CAP_NET_ADMIN")
        }
        Err(error) => Finding::new(Verdict::Missing, subject, format!("nftables: {:#}", anyhow::Error::new(error)))
            .remedy("modprobe nf_tables"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        assert_eq!(parse_release("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(parse_release("5.19"), Some((5, 19)));
        assert!(parse_release("5.4.0").unwrap() < OLDEST);
        assert_eq!(parse_release("linux"), None);
    }
}
