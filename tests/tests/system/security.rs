//! What a guest must not be able to do, and what of the host must not be in it.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use anyhow::{Context, Result, ensure};
use nix::{
    libc,
    sys::stat::{Mode, SFlag, mknod},
};
use system_tests::{
    command::Invocation,
    promise::skip,
    promises,
    server::Running,
    site::{SECRET, Site},
};

promises![
    a_denied_device_cannot_be_opened_even_where_its_node_is,
    a_device_is_granted_as_far_as_asked,
    no_two_servers_share_an_id,
    files_on_disk_keep_plain_owners,
    capabilities_change_by_the_spec,
    a_command_from_outside_is_as_bound_as_init,
    mounts_made_inside_stay_inside,
    writes_do_not_reach_the_template,
    a_privileged_server_has_no_ids_of_its_own;
    each of ["busybox", "debian-13"]:
    root_inside_is_nobody_outside,
    every_namespace_is_its_own,
    a_disk_node_cannot_be_made,
    dangerous_files_are_masked_or_read_only,
    kernel_addresses_are_hidden,
    its_capabilities_are_bounded,
    its_system_calls_are_filtered,
    no_descriptor_of_the_host_is_open_inside,
    no_environment_of_the_host_is_inside
];

fn status_line(text: &str, key: &str) -> Result<String> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {key} in {text}"))?.trim().to_owned())
}

fn root_inside_is_nobody_outside(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    ensure!(server.sh("id -u")? == "0");
    let status = fs::read_to_string(format!("/proc/{}/status", server.init_pid()?))?;
    let uid = status_line(&status, "Uid")?;
    let outside: u32 = uid.split_whitespace().next().context("no uid")?.parse()?;
    ensure!(outside >= 65_536, "root inside is {outside} outside");
    let map = server.file("/proc/self/uid_map")?;
    let words: Vec<&str> = map.split_whitespace().collect();
    ensure!(words.len() == 3 && words[0] == "0" && words[2] == "65536", "{map}");
    Ok(())
}

fn no_two_servers_share_an_id(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let servers = [template.server("a").start()?, template.server("b").start()?, template.server("c").start()?];
    let mut starts = Vec::new();
    for server in &servers {
        let map = fs::read_to_string(format!("/proc/{}/uid_map", server.init_pid()?))?;
        starts.push(map.split_whitespace().nth(1).context("no map")?.parse::<u64>()?);
        ensure!(
            map == fs::read_to_string(format!("/proc/{}/gid_map", server.init_pid()?))?,
            "groups differ from users"
        );
    }
    starts.sort_unstable();
    ensure!(starts.windows(2).all(|pair| pair[1] - pair[0] >= 65_536), "{starts:?} overlap");
    Ok(())
}

fn files_on_disk_keep_plain_owners(site: &Site) -> Result<()> {
    for (name, flags) in [("over", ""), ("full", "--volume dir")] {
        let server = site.template("busybox")?.server(name).with(flags).start()?;
        server.sh("echo x >/root/plain-owner; chown 1234:4321 /root/plain-owner; echo y >/root/of-root")?;
        let server = server.stop()?;
        let volume = server.directory().join("volume");
        let owner = |name: &str| -> Result<(u32, u32)> {
            let found = find(&volume, name).with_context(|| format!("no {name} below {}", volume.display()))?;
            Ok((found.uid(), found.gid()))
        };
        ensure!(owner("plain-owner")? == (1234, 4321), "{name}: {:?}", owner("plain-owner")?);
        ensure!(owner("of-root")? == (0, 0), "{name}: {:?}", owner("of-root")?);
    }
    Ok(())
}

fn find(directory: &Path, name: &str) -> Option<fs::Metadata> {
    for entry in fs::read_dir(directory).ok()?.flatten() {
        if entry.file_name() == name {
            return entry.metadata().ok();
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if let Some(found) = find(&entry.path(), name) {
                return Some(found);
            }
        }
    }
    None
}

fn every_namespace_is_its_own(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    for kind in ["user", "pid", "mnt", "net", "uts", "ipc", "cgroup", "time"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{kind}"));
        let (host, guest) = (of("self")?, of(&server.init_pid()?.to_string())?);
        ensure!(host != guest, "the {kind} namespace is the host's");
        let inside = server.sh(&format!("readlink /proc/self/ns/{kind}"))?;
        ensure!(Path::new(&inside) == guest, "a command from outside is in another {kind} namespace than init");
    }
    Ok(())
}

/// A device that the host can open and that no server needs.
fn spare_device() -> Result<&'static str> {
    let devices =
        ["/dev/loop-control", "/dev/kvm", "/dev/vhost-net", "/dev/hwrng", "/dev/autofs", "/dev/cpu_dma_latency"];
    devices
        .into_iter()
        .find(|device| fs::File::open(device).is_ok())
        .ok_or_else(|| skip("this host has no device to spare"))
}

fn a_denied_device_cannot_be_opened_even_where_its_node_is(site: &Site) -> Result<()> {
    let copy = site.path("node");
    let open_to_all = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    mknod(&copy, SFlag::S_IFCHR, Mode::empty(), fs::metadata(spare_device()?)?.rdev())?;
    fs::set_permissions(&copy, open_to_all)?;
    fs::File::open(&copy).context("the host itself cannot open it")?;
    let flags = format!("--mount {}:/mnt/node", copy.display());
    let server = site.template("busybox")?.server("web1").with(&flags).start()?;
    server.sh("test -c /mnt/node")?;
    let said = server.sh_fails("exec 3</mnt/node")?;
    ensure!(said.contains("not permitted") || said.contains("denied"), "{said}");
    Ok(())
}

fn a_device_is_granted_as_far_as_asked(site: &Site) -> Result<()> {
    let device = spare_device()?;
    let server = site.template("busybox")?.server("web1").with(&format!("--device {device}:r")).start()?;
    server.sh(&format!("exec 3<{device}"))?;
    let said = server.sh_fails(&format!("exec 3>>{device}"))?;
    ensure!(said.contains("not permitted"), "writing was not asked for: {said}");
    // A node that it was given, and may not open at all.
    let other = site.template("busybox")?.server("web2").with(&format!("--device {device}:m")).start()?;
    let said = other.sh_fails(&format!("test -e {device} && exec 3<{device}"))?;
    ensure!(said.contains("not permitted"), "{said}");
    Ok(())
}

fn a_disk_node_cannot_be_made(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let disk = fs::metadata("/")?.dev();
    let (major, minor) = (libc::major(disk), libc::minor(disk));
    for (kind, major, minor) in [("b", major, minor), ("c", 1, 1), ("c", 5, 1)] {
        for place in ["/root/node", "/dev/node", "/tmp/node"] {
            let said = server.sh_fails(&format!("mknod {place} {kind} {major} {minor} && cat {place}"))?;
            ensure!(said.to_lowercase().contains("not permitted") || said.to_lowercase().contains("denied"), "{said}");
        }
    }
    Ok(())
}

fn dangerous_files_are_masked_or_read_only(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    for file in [
        "/proc/sys/kernel/panic",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/vm/drop_caches",
        "/proc/sysrq-trigger",
        "/proc/irq/default_smp_affinity",
        "/sys/kernel/uevent_helper",
        "/sys/power/state",
        "/sys/kernel/mm/ksm/run",
        "/sys/module/printk/parameters/time",
    ] {
        // What is not there at all cannot be written either.
        server.sh_fails(&format!("test -e {file} || exit 1; echo 1 >{file}"))?;
    }
    for file in
        ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/latency_stats", "/proc/kmsg"]
    {
        let done = server.exec(&["sh", "-c", &format!("head -c 64 {file} 2>/dev/null | wc -c")])?;
        ensure!(done.text() == "0", "{file} can be read");
    }
    for directory in [
        "/sys/firmware",
        "/sys/kernel/debug",
        "/sys/kernel/tracing",
        "/sys/kernel/security",
        "/proc/acpi",
        "/proc/scsi",
    ] {
        let inside = server.exec(&["sh", "-c", &format!("ls -A {directory} 2>/dev/null")])?.text();
        ensure!(inside.is_empty(), "{directory} shows {inside}");
    }
    server.sh_fails("mount -o remount,rw /sys && echo 1 >/sys/kernel/mm/ksm/run")?;
    server.sh_fails("mount -o remount,rw /proc/sys && echo 1 >/proc/sys/kernel/panic")?;
    server.sh_fails("umount /proc/sysrq-trigger && echo h >/proc/sysrq-trigger")?;
    Ok(())
}

fn kernel_addresses_are_hidden(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    for file in ["/proc/kallsyms", "/proc/modules"] {
        let text = server.exec(&["sh", "-c", &format!("head -n 50 {file} 2>/dev/null")])?.text();
        let shown = text.split_whitespace().any(|word| {
            let word = word.trim_start_matches("0x");
            word.len() == 16 && word.starts_with("ffff")
        });
        ensure!(!shown, "{file} shows kernel addresses:\n{text}");
    }
    Ok(())
}

/// Numbers of capability(7) that no server has by default.
const NEVER: [(&str, u32); 8] = [
    ("sys_module", 16),
    ("sys_rawio", 17),
    ("sys_time", 25),
    ("audit_control", 30),
    ("mac_override", 32),
    ("mac_admin", 33),
    ("syslog", 34),
    ("wake_alarm", 35),
];

fn bounding(text: &str) -> Result<u64> {
    Ok(u64::from_str_radix(&status_line(text, "CapBnd")?, 16)?)
}

fn its_capabilities_are_bounded(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let set = bounding(&server.file("/proc/1/status")?)?;
    for (name, number) in NEVER {
        ensure!(set & (1 << number) == 0, "init may use {name}: {set:x}");
    }
    // And those without which a distribution is no fun.
    for (name, number) in
        [("chown", 0), ("kill", 5), ("setuid", 7), ("net_admin", 12), ("sys_chroot", 18), ("sys_admin", 21)]
    {
        ensure!(set & (1 << number) != 0, "init lacks {name}: {set:x}");
    }
    Ok(())
}

fn capabilities_change_by_the_spec(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let plain = bounding(&template.server("plain").start()?.file("/proc/1/status")?)?;
    let changed = template.server("changed").with("--cap +syslog,-net_raw").start()?;
    let changed = bounding(&changed.file("/proc/1/status")?)?;
    ensure!(plain & (1 << 34) == 0 && changed & (1 << 34) != 0, "+syslog: {plain:x} became {changed:x}");
    ensure!(plain & (1 << 13) != 0 && changed & (1 << 13) == 0, "-net_raw: {plain:x} became {changed:x}");
    Ok(())
}

fn a_command_from_outside_is_as_bound_as_init(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--cap -net_raw").start()?;
    let init = server.file("/proc/1/status")?;
    let command = server.sh("cat /proc/self/status")?;
    for key in ["CapBnd", "Seccomp", "Seccomp_filters", "NoNewPrivs"] {
        if let (Ok(of_init), Ok(of_command)) = (status_line(&init, key), status_line(&command, key)) {
            ensure!(of_init == of_command, "{key} is {of_command}, init's is {of_init}");
        }
    }
    let group = fs::read_to_string(format!("/proc/{}/cgroup", server.init_pid()?))?;
    let mut sleeper = site.vsctl(["exec", "web1", "--", "sleep", "60"]).spawn()?;
    server.until("pidof sleep")?;
    let pid = server.sh("pidof sleep")?;
    let inside = server.file(&format!("/proc/{pid}/cgroup"))?;
    ensure!(!inside.contains(".."), "it lives outside of the server's control group: {inside}; init's: {group}");
    let listed = site.ok(["ps", "web1"])?.text();
    ensure!(listed.contains("sleep"), "vsctl ps does not count it in:\n{listed}");
    sleeper.kill();
    server.exec(&["killall", "sleep"])?;
    Ok(())
}

fn its_system_calls_are_filtered(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    ensure!(status_line(&server.file("/proc/1/status")?, "Seccomp")? == "2", "init has no filter");
    ensure!(status_line(&server.file("/proc/self/status")?, "Seccomp")? == "2", "a command from outside has none");
    // Swap and accounting are the host's.
    server.sh_fails(
        "dd if=/dev/zero of=/root/swap bs=1M count=1 2>/dev/null; mkswap /root/swap >/dev/null; swapon /root/swap",
    )?;
    Ok(())
}

fn no_descriptor_of_the_host_is_open_inside(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let root = site.root().display().to_string();
    // As root of the host: what init and a command really hold.
    let check = |server: &Running, pid: i32| -> Result<()> {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            let shown = target.display().to_string();
            ensure!(!shown.contains(&root), "{pid} in {} holds {shown}", server.name());
            ensure!(!shown.starts_with("/sys/fs/cgroup") || !shown.contains("vsos"), "{pid} holds {shown}");
        }
        Ok(())
    };
    check(&server, server.init_pid()?)?;
    let open = server.sh("ls -l /proc/self/fd | awk 'NR > 1 { print $9 }' | sort -n | tail -n 1")?;
    // ls itself has 0, 1, 2 and the directory.
    ensure!(open == "3", "a command was given descriptor {open}: {}", server.sh("ls -l /proc/self/fd")?);
    Ok(())
}

fn no_environment_of_the_host_is_inside(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    let all = server.sh("cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'; env")?;
    ensure!(!all.contains(SECRET.1) && !all.contains("VSOS_ROOT") && !all.contains("CARGO"), "{all}");
    let told = server.sh("tr '\\0' '\\n' </proc/1/environ; sed 's/^/container=/' /run/host/container-manager")?;
    ensure!(told.contains("container="), "the guest is not told what it runs in: {told}");
    Ok(())
}

fn mounts_made_inside_stay_inside(site: &Site) -> Result<()> {
    // As on most hosts, where systemd has made every mount a shared one.
    let source = site.path("shared");
    fs::create_dir_all(&source)?;
    let mount = |words: &[&str]| Invocation::new("mount").args(words).args([&source]).succeed();
    mount(&["-t", "tmpfs", "vsos-test"])?;
    fs::create_dir(source.join("below"))?;
    mount(&["--make-shared"])?;
    let kept = (|| {
        let server = site.template("busybox")?.server("web1").with(&format!("--mount {}:/srv", source.display()));
        let server = server.start()?;
        server.sh("mount -t tmpfs none /srv/below && touch /srv/below/inside")?;
        ensure!(!source.join("below/inside").exists(), "a mount of the guest's is the host's too");
        Ok(())
    })();
    Invocation::new("umount").args(["-R"]).args([&source]).succeed()?;
    kept
}

fn writes_do_not_reach_the_template(site: &Site) -> Result<()> {
    for (name, flags) in [("over", ""), ("full", "--volume dir")] {
        let server = site.template("busybox")?.server(name).with(flags).start()?;
        server.sh("echo changed >>/etc/passwd; rm -f /etc/hosts; echo new >/root/new")?;
        let template = site.path("var/lib/vsos/templates/busybox/root");
        ensure!(!fs::read_to_string(template.join("etc/passwd"))?.contains("changed"), "{name}");
        ensure!(!template.join("root/new").exists(), "{name}");
    }
    Ok(())
}

fn a_privileged_server_has_no_ids_of_its_own(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--privileged").start()?;
    let status = fs::read_to_string(format!("/proc/{}/status", server.init_pid()?))?;
    ensure!(status_line(&status, "Uid")?.starts_with("0\t"), "{}", status_line(&status, "Uid")?);
    // It is still held back by capabilities and filters.
    let set = bounding(&server.file("/proc/1/status")?)?;
    ensure!(set & (1 << 16) == 0 && set & (1 << 17) == 0, "{set:x}");
    server.sh_fails("echo 1 >/proc/sys/kernel/panic")?;
    server.sh_fails("mknod /root/disk b 254 0 && head -c 1 /root/disk")?;
    Ok(())
}
