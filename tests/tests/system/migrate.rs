//! Migration: a server moves to another host with everything, and whatever is killed or cut, one host has it.
//!
//! The other host is a second installation on this one: `migrate.shell` runs a script instead of ssh.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lgetxattr, llistxattr, lsetxattr, makedev, mknodat};
use sha2::{Digest, Sha256};
use system_tests::{
    command::{Finished, eventually},
    host::{HostState, Scope},
    promises,
    server::{GUEST_LIMIT, Running, Server},
    site::Site,
};

promises![
    a_stopped_server_moves_with_all_its_files,
    a_running_server_is_stopped_moved_and_started,
    a_full_copy_and_a_privileged_server_move_too,
    what_changes_while_it_is_sent_arrives_too,
    it_moves_there_and_back_again,
    a_dry_run_changes_nothing,
    all_that_speaks_against_it_is_said_at_once,
    what_is_no_vsctl_of_this_version_is_refused,
    a_start_that_fails_there_is_said_and_the_server_is_there,
    between_two_hosts_no_command_starts_it,
    an_attempt_that_was_killed_does_not_hinder_the_next,
    failed_at_any_moment_it_goes_on_where_it_was,
    killed_at_any_moment_one_host_has_it,
    the_other_side_killed_at_any_moment_one_host_has_it,
    the_connection_cut_anywhere_one_host_has_it
];

/// Where a server comes from, and a second installation that it goes to.
struct Hosts<'s> {
    from: &'s Site,
    to: Site,
}

impl Drop for Hosts<'_> {
    fn drop(&mut self) {
        self.to.scrub();
    }
}

/// Two hosts with the same networks, as operators of two hosts have to give them.
fn hosts(from: &Site) -> Result<Hosts<'_>> {
    let hosts = Hosts { from, to: Site::new()? };
    let digits = u16::from_str_radix(&from.suffix(), 16)?;
    let [high, low] = digits.to_be_bytes();
    let networks = format!("ipv4 = \"10.{}.{low}.0/24\"\nipv6 = \"fdd1:{digits:x}::/64\"\n", 100 + high % 64);
    for (site, other) in [(from, &hosts.to), (&hosts.to, from)] {
        fs::create_dir_all(site.path("etc/vsos"))?;
        let shell = format!("[migrate]\nshell = [{:?}]\n", site.path("shell"));
        fs::write(site.path("etc/vsos/vsos.toml"), networks.clone() + &shell)?;
        reach(site, other, "exec \"$vsctl\" \"$@\"")?;
        site.template("busybox")?;
    }
    Ok(hosts)
}

/// How `site` reaches `other`: a script in the place of `ssh HOST vsctl …`, which ends with `line`.
fn reach(site: &Site, other: &Site, line: &str) -> Result<()> {
    let vsctl = system_tests::site::programs()?.join("vsctl");
    let root = other.root().display();
    let script = format!(
        "#!/bin/sh\ntest \"$1 $2\" = 'there vsctl' || exit 99\nshift 2\nvsctl={vsctl:?}\nexport VSOS_ROOT={root}\n{line}\n"
    );
    let path = site.path("shell");
    // Put into its place whole: the old one may be running.
    let new = site.path("shell.new");
    fs::write(&new, script)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
    fs::rename(new, path).context("put the script into its place")
}

const MOVE: [&str; 4] = ["migrate", "web1", "there", "--offline"];

impl Hosts<'_> {
    /// What a site has of the server, once nobody works on it.
    fn state(&self, site: &Site) -> Result<String> {
        if site.servers().iter().all(|name| name != "web1") {
            return Ok("gone".into());
        }
        eventually("the server to be left alone", GUEST_LIMIT, || {
            let status = site.vsctl(["status", "web1", "--json"]).succeed().ok()?.json().ok()?;
            let state = status.as_array().map_or(&status, |list| &list[0])["state"].as_str()?.to_owned();
            (state != "ready").then_some(state)
        })
    }

    /// Nothing of a server is here any more, nor of what it needed.
    fn nothing_at(&self, site: &Site) -> Result<()> {
        ensure!(site.servers().is_empty(), "left are {:?}", site.servers());
        for directory in ["ids", "addresses", "journal"] {
            let left: Vec<_> = entries(&site.path("var/lib/vsos").join(directory));
            ensure!(left.is_empty(), "left in {directory}: {left:?}");
        }
        let own = Scope::Site { root: site.root().to_owned(), suffix: site.suffix() };
        Ok(HostState::default().compare_when_settled(&own)?)
    }
}

fn entries(directory: &Path) -> Vec<String> {
    let found = fs::read_dir(directory).into_iter().flatten().flatten();
    found.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| !name.starts_with('.')).collect()
}

/// Everything of a tree that a move must keep, by path. What an overlay remembers of the file system below is of no use elsewhere.
fn manifest(root: &Path) -> Result<BTreeMap<String, String>> {
    let mut lines = BTreeMap::new();
    let mut links = BTreeMap::<u64, String>::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path)?;
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        let mut line = format!("{:o} {}:{} {:x}", meta.mode(), meta.uid(), meta.gid(), meta.rdev());
        if meta.is_dir() {
            left.extend(fs::read_dir(&path)?.flatten().map(|entry| entry.path()));
        } else {
            // tar keeps the common file of several names for those that hold something; whiteouts, which an overlay makes of one,
            // mean the same apart.
            let holds = meta.is_file() || meta.is_symlink();
            let first = if holds { links.entry(meta.ino()).or_insert_with(|| name.clone()) } else { "itself" };
            line += &format!(" as {first}, {}.{}", meta.mtime(), meta.mtime_nsec());
        }
        if meta.is_symlink() {
            line += &format!(" -> {}", fs::read_link(&path)?.display());
        } else if meta.is_file() {
            // A hole stays one: its blocks are not compared, but that there are fewer than bytes.
            let is_sparse = meta.blocks() * 512 < meta.size();
            line += &format!(" {} {is_sparse} {:x}", meta.size(), Sha256::digest(fs::read(&path)?));
        }
        let mut buffer = vec![0_u8; 4096];
        let length = llistxattr(&path, &mut buffer)?;
        let mut names: Vec<_> = buffer[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
        names.sort_unstable();
        for attribute in names {
            let attribute = String::from_utf8_lossy(attribute).into_owned();
            if attribute.ends_with("overlay.origin") {
                continue;
            }
            let mut value = vec![0_u8; 4096];
            let length = lgetxattr(&path, attribute.as_str(), &mut value)?;
            line += &format!(" {attribute}={:02x?}", &value[..length]);
        }
        lines.insert(name, line);
    }
    Ok(lines)
}

/// What differs, in words.
fn same(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Result<()> {
    let lost = before.iter().filter(|(path, line)| after.get(*path) != Some(line));
    let new = after.iter().filter(|(path, line)| before.get(*path) != Some(line));
    let all: Vec<String> = lost
        .map(|(path, line)| format!("- {path}: {line}"))
        .chain(new.map(|(path, line)| format!("+ {path}: {line}")))
        .collect();
    ensure!(all.is_empty(), "the files differ:\n{}", all.join("\n"));
    Ok(())
}

/// Files of all kinds, made inside.
const FILES: &str = "set -e
    mkdir -p /srv/empty /srv/shared; chown 33:33 /srv/shared; chmod 3775 /srv/shared
    echo kept >/srv/a; ln /srv/a /srv/shared/b; chown 1000:65534 /srv/a; chmod 4751 /srv/a
    ln -s ../nowhere /srv/link; mkfifo /srv/pipe
    dd if=/dev/zero of=/srv/hole bs=1 count=1 seek=8388607 2>/dev/null
    head -c 3000000 /dev/urandom >/srv/big
    touch -d '2001-02-03 04:05:06' /srv/big
    touch '/srv/a name
of two lines'
    echo changed >>/etc/passwd
    rm /bin/vi
    rm -r /etc/vsinit; mkdir /etc/vsinit; echo own >/etc/vsinit/own";

fn a_stopped_server_moves_with_all_its_files(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let flags = "--memory 64M --cpus 0.5 --pids 200 --hostname www.example.org --autostart";
    let server = site.template("busybox")?.server("web1").with(flags).start()?;
    server.sh(FILES)?;
    let address = server.addresses()?;
    let server = server.stop()?;
    let upper = |site: &Site| site.path("var/lib/vsos/servers/web1/volume/upper");
    // What only the host can make in an unprivileged server's root.
    mknodat(CWD, upper(site).join("srv/null"), FileType::CharacterDevice, Mode::from_raw_mode(0o660), makedev(1, 3))?;
    lsetxattr(upper(site).join("srv/a"), "user.note", b"of mine\0\xff", XattrFlags::empty())?;
    let (ns, caps) = ("security.capability", [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    lsetxattr(upper(site).join("srv/big"), ns, &caps, XattrFlags::empty())?;
    let acl = [
        2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 7, 0, 232, 3, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 7,
        0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255,
    ];
    lsetxattr(upper(site).join("srv/hole"), "system.posix_acl_access", &acl, XattrFlags::empty())?;
    let spec = |site: &Site| fs::read_to_string(site.path("var/lib/vsos/servers/web1/server.toml"));
    let identity = |site: &Site| -> Result<String> {
        let record = fs::read_to_string(site.path("var/lib/vsos/servers/web1/record.toml"))?;
        Ok(record.lines().filter(|line| line.starts_with("uuid") || line.starts_with("created_s")).collect())
    };
    let own = (spec(site)?, identity(site)?);
    let before = manifest(&upper(site))?;
    for word in ["user.overlay.opaque", "user.note", "security.capability", "posix_acl_access"] {
        ensure!(before.values().any(|line| line.contains(word)), "no {word} to be moved:\n{before:#?}");
    }
    ensure!(before["bin/vi"].starts_with("20000 0:0 0 "), "no whiteout: {}", before["bin/vi"]);
    site.ok(MOVE)?;
    drop(server);
    hosts.nothing_at(site)?;
    same(&before, &manifest(&upper(&hosts.to))?)?;
    ensure!((spec(&hosts.to)?, identity(&hosts.to)?) == own);
    ensure!(hosts.state(&hosts.to)? == "stopped");
    hosts.to.ok(["doctor"])?;
    // `autostart` and all else is in the spec, which came.
    hosts.to.ok(["autostart"])?;
    let there = Running::adopt(&hosts.to, "web1");
    ensure!(there.addresses()? == address);
    ensure!(
        there.sh("hostname; cat /srv/a; test ! -e /bin/vi; ls -a /etc/vsinit | wc -l")? == "www.example.org\nkept\n3"
    );
    ensure!(there.sh("stat -c %u:%g /srv/a; stat -c %h /srv/shared/b")? == "1000:65534\n2");
    ensure!(there.sh("sed -n 's/^MemTotal: *//p' /proc/meminfo")? == "65536 kB");
    there.sh("ping -c 1 -w 20 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')")?;
    Ok(())
}

fn a_running_server_is_stopped_moved_and_started(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").with("--memory 64M").start()?;
    server.sh("echo kept >/root/file; sync")?;
    let address = server.addresses()?;
    let done = site.ok(MOVE)?;
    for phase in ["checking", "stopping", "sending the volume", "handing over", "starting"] {
        ensure!(done.errors().contains(&format!("web1: {phase}")), "no word of {phase}: {done}");
    }
    hosts.nothing_at(site)?;
    let there = Running::adopt(&hosts.to, "web1");
    ensure!(there.state()? == "running", "it is {}", there.state()?);
    ensure!(there.file("/root/file")? == "kept" && there.addresses()? == address);
    let happened = |site: &Site| site.ok(["events"]).map(|done| done.text());
    ensure!(happened(site)?.contains("moved") && happened(&hosts.to)?.contains("arrived"));
    drop(server);
    Ok(())
}

fn a_full_copy_and_a_privileged_server_move_too(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    for (flags, tree) in [("--volume dir", "root"), ("--privileged", "upper"), ("--net none", "upper")] {
        let server = site.template("busybox")?.server("web1").with(flags).start()?;
        server.sh(FILES)?;
        let server = server.stop()?;
        let tree = |site: &Site| site.path("var/lib/vsos/servers/web1/volume").join(tree);
        let before = manifest(&tree(site))?;
        if flags == "--privileged" {
            ensure!(before.values().any(|line| line.contains("trusted.overlay.opaque")), "{before:#?}");
        }
        site.ok(MOVE).with_context(|| flags.to_owned())?;
        drop(server);
        same(&before, &manifest(&tree(&hosts.to))?).with_context(|| flags.to_owned())?;
        let there = Server::adopt(&hosts.to, "web1").start()?;
        ensure!(there.sh("cat /srv/shared/b; test ! -e /bin/vi; ls /etc/vsinit")? == "kept\nown", "{flags}");
        drop(there);
        hosts.nothing_at(&hosts.to)?;
    }
    Ok(())
}

/// Changes of all kinds, made inside after everything was sent once.
const CHANGES: &str = "set -e
    echo grown >>/srv/a; truncate -s 1000 /srv/big; echo in the middle | dd of=/srv/hole bs=1 seek=4000000 conv=notrunc 2>/dev/null
    rm '/srv/a name
of two lines'
    mv /srv/shared /srv/moved; ln /srv/big /srv/moved/big; chmod 600 /srv/pipe; chown -h 5:6 /srv/link
    rmdir /srv/empty; echo file >/srv/empty
    rm -r /etc/vsinit; rm /etc/group; mkdir -p /etc/group/was/a/file
    rm -r /etc/ssl 2>/dev/null || :; mkdir -p /etc/ssl; touch /etc/ssl/new
    mv /etc/services /etc/renamed 2>/dev/null || :
    touch -d '2005-01-02 03:04:05' /srv/moved";

fn what_changes_while_it_is_sent_arrives_too(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    for (flags, tree) in [("--net bridge", "upper"), ("--volume dir", "root"), ("--privileged", "upper")] {
        let server = site.template("busybox")?.server("web1").with(flags).start()?;
        server.sh(FILES)?;
        let beside = |site: &Site| site.path("var/lib/vsos/servers/web1/console.log.1");
        fs::write(beside(site), "an older log")?;
        // What is younger when it is first looked at is sent again in any case.
        if tree == "upper" {
            std::thread::sleep(Duration::from_millis(5_500));
        }
        // The third moment: all of it was sent while it ran, and it runs still.
        let mut moving = site.vsctl(MOVE).env("VSOS_FAULT", "migrate:3:stop").spawn()?;
        eventually("a command that stops", GUEST_LIMIT, || {
            let state = fs::read_to_string(format!("/proc/{}/stat", moving.pid())).ok()?;
            state.contains(") T ").then_some(())
        })?;
        ensure!(server.state()? == "running", "it is {}", server.state()?);
        server.sh(CHANGES)?;
        let tree = |site: &Site| site.path("var/lib/vsos/servers/web1/volume").join(tree);
        // What its services write at their end is not ours.
        let files = |site: &Site| -> Result<BTreeMap<String, String>> {
            let mut files = manifest(&tree(site))?;
            files.retain(|path, _| ["srv", "etc", "bin"].iter().any(|own| path.starts_with(own)));
            Ok(files)
        };
        let before = files(site)?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(moving.pid()), nix::sys::signal::Signal::SIGCONT)?;
        let done = moving.wait()?.success().context(flags)?;
        ensure!(done.errors().contains("web1: sending what has changed"), "{done}");
        drop(server);
        let there = Running::adopt(&hosts.to, "web1");
        same(&before, &files(&hosts.to)?).context(flags)?;
        ensure!(fs::read_to_string(beside(&hosts.to))? == "an older log", "{flags}");
        ensure!(there.sh("cat /srv/empty; stat -c %h /srv/moved/b")? == "file\n2");
        hosts.nothing_at(site)?;
        hosts.to.ok(["destroy", "--force", "web1"])?;
    }
    Ok(())
}

fn it_moves_there_and_back_again(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    // Another number is free there, and another here when it comes back.
    let _other = hosts.to.template("busybox")?.server("other").with("--net none").create()?;
    server.sh("echo kept >/root/file")?;
    site.ok(MOVE)?;
    let _second = site.template("busybox")?.server("second").with("--net none").create()?;
    hosts.to.ok(MOVE)?;
    ensure!(hosts.to.servers() == ["other"], "left there: {:?}", hosts.to.servers());
    ensure!(server.file("/root/file")? == "kept" && server.state()? == "running");
    site.ok(["doctor"])?;
    hosts.to.ok(["doctor"])?;
    Ok(())
}

/// All files of an installation with their times, and what it has on the host.
fn everything(site: &Site) -> Result<BTreeMap<String, String>> {
    let mut all = manifest(&site.path("var/lib/vsos"))?;
    // The guest writes to it by itself.
    all.retain(|path, _| !path.ends_with("console.log"));
    let own = Scope::Site { root: site.root().to_owned(), suffix: site.suffix() };
    all.insert("host".into(), format!("{:?}", HostState::capture(&own)));
    Ok(all)
}

fn a_dry_run_changes_nothing(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    let dry = ["migrate", "web1", "there", "--offline", "--dry-run"];
    // Networks are chosen when they are first asked for, as by `create --plan`.
    site.ok(dry)?;
    let before = (everything(site)?, everything(&hosts.to)?);
    let said = site.ok(dry)?.text();
    ensure!(said.contains("web1 can move to there") && said.contains("started there"), "{said}");
    same(&before.0, &everything(site)?)?;
    same(&before.1, &everything(&hosts.to)?)?;
    ensure!(server.state()? == "running");
    // A checkpoint would be lost: it stays here.
    site.ok(["stop", "web1"])?;
    site.ok(["checkpoint", "create", "web1", "now"])?;
    site.run(dry)?.complains(&["has checkpoints, 'now' is one", "vsctl checkpoint delete web1"])?;
    site.ok(["checkpoint", "delete", "web1", "now"])?;
    site.ok(dry).map(drop)
}

fn all_that_speaks_against_it_is_said_at_once(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let shared = site.path("shared");
    fs::create_dir(&shared)?;
    let flags = format!("--mount {}:/mnt", shared.display());
    let server = site.template("busybox")?.server("web1").with(&flags).start()?;
    let taken = server.status()?["addresses"][0].as_str().context("no address")?.to_owned();
    site.run(["migrate", "web1", "there"])?.failure(20, &["how is it to be moved", "--offline"])?;
    site.run(["migrate", "--offline", "web1", "--", "-there"])?.failure(20, &["'-there' is no host"])?;
    site.run(["migrate", "web2", "there", "--offline"])?.failure(44, &["web2"])?;
    let _taker = hosts.to.template("busybox")?.server("other").with(&format!("--ip {taken}")).create()?;
    fs::remove_dir(&shared)?;
    let template = hosts.to.path("var/lib/vsos/templates/busybox");
    let record = fs::read_to_string(template.join("record.toml"))?;
    // Not written to in place: the templates of all sites are one file.
    fs::remove_file(template.join("record.toml"))?;
    fs::write(template.join("record.toml"), record.replace("digest = \"", "digest = \"0"))?;
    let before = everything(&hosts.to)?;
    for command in [&MOVE[..], &["migrate", "web1", "there", "--offline", "--dry-run"]] {
        let done = site.run(command)?.failure(91, &["web1", "there"])?;
        for word in ["template 'busybox' is another", "taken by 'other'", "mount: "] {
            ensure!(done.errors().contains(word), "nothing of {word:?} in {done}");
        }
        ensure!(server.state()? == "running" && server.sh("echo alive")? == "alive");
        same(&before, &everything(&hosts.to)?)?;
    }
    hosts.to.ok(["destroy", "other"])?;
    hosts.to.ok(["template", "remove", "busybox"])?;
    fs::create_dir(&shared)?;
    site.run(MOVE)?.failure(91, &["there is no template 'busybox'"])?;
    hosts.to.template("busybox")?;
    let _same = hosts.to.template("busybox")?.server("web1").create()?;
    site.run(MOVE)?.failure(43, &["there is a server 'web1' already"])?;
    hosts.to.ok(["destroy", "web1"])?;
    fs::remove_file(hosts.to.path("var/lib/vsos/network.toml"))?;
    let settings = fs::read_to_string(hosts.to.path("etc/vsos/vsos.toml"))?;
    fs::write(hosts.to.path("etc/vsos/vsos.toml"), settings.replace("ipv4 = \"10.", "ipv4 = \"172."))?;
    site.run(MOVE)?.failure(20, &["outside the servers' networks"])?;
    ensure!(server.state()? == "running");
    let server = server.stop()?;
    site.ok(["set", "web1", "cpuset=0"])?;
    drop(server);
    Ok(())
}

fn what_is_no_vsctl_of_this_version_is_refused(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    let hello = r#"{"hello":{"protocol":99,"version":"9.9.9","host":"future","more":1}}"#;
    let length = hello.len();
    reach(site, &hosts.to, &format!("printf '\\000\\000\\000\\{length:o}\\001%s' '{hello}'; cat >/dev/null"))?;
    site.run(MOVE)?.failure(5, &["vsctl 9.9.9", "version 99", "same version"])?;
    reach(site, &hosts.to, "echo 'Welcome to this host'; cat >/dev/null")?;
    site.run(MOVE)?.complains(&["no migration protocol", "Welc"])?;
    reach(site, &hosts.to, "echo 'no route' >&2; exit 255")?;
    site.run(MOVE)?.complains(&["no route", "without an answer", "255"])?;
    let settings = fs::read_to_string(site.path("etc/vsos/vsos.toml"))?;
    fs::write(site.path("etc/vsos/vsos.toml"), settings.replace("/shell\"", "/missing\""))?;
    site.run(MOVE)?.complains(&["missing there vsctl", "No such file"])?;
    ensure!(server.state()? == "running" && server.sh("echo alive")? == "alive");
    Ok(())
}

fn a_start_that_fails_there_is_said_and_the_server_is_there(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/file")?;
    site.keep(site.vsctl(MOVE).env("VSOS_FAULT", "start:3:fail"))?
        .complains(&["has moved to there", "does not start there"])?;
    drop(server);
    hosts.nothing_at(site)?;
    let there = Server::adopt(&hosts.to, "web1");
    ensure!(there.state()? == "stopped", "it is {}", there.state()?);
    ensure!(there.start()?.file("/root/file")? == "kept");
    Ok(())
}

/// Runs a migration with a fault; `None` when there is no such moment, so that it went through.
fn with_fault(hosts: &Hosts<'_>, fault: &str) -> Result<Option<Finished>> {
    let done = hosts.from.keep(hosts.from.vsctl(MOVE).env("VSOS_FAULT", fault))?;
    Ok((done.code != 0).then_some(done))
}

fn between_two_hosts_no_command_starts_it(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").with("--autostart").start()?;
    let states = || -> Result<_> { Ok((hosts.state(site)?, hosts.state(&hosts.to)?)) };
    // Before it is given up, and after.
    for (moment, expected) in [(6, ("stopped", "incoming")), (7, ("moved", "incoming")), (8, ("moved", "stopped"))] {
        with_fault(&hosts, &format!("migrate:{moment}:kill"))?.context("it went through")?;
        let now = states()?;
        ensure!((now.0.as_str(), now.1.as_str()) == expected, "at moment {moment} they are {now:?}");
        for (site, state) in [(site, &now.0), (&hosts.to, &now.1)] {
            if state == "stopped" {
                continue;
            }
            for command in [
                &["start", "web1"][..],
                &["start", "--rescue", "web1"],
                &["start", "--discard", "web1"],
                &["restart", "web1"],
                &["set", "web1", "memory=1G"],
                &["rename", "web1", "web2"],
                &["resume", "web1"],
                &["destroy", "web1"],
                &["suspend", "web1"],
                &["checkpoint", "create", "web1", "now"],
            ] {
                let done = site.run(command)?;
                ensure!(done.code != 0, "{state}: {done}");
            }
            site.run(["start", "web1"])?.complains(&["--continue"])?;
            site.ok(["autostart"])?;
            ensure!(site.ok(["list", "-a"])?.text().contains(state.as_str()));
            let found = site.run(["doctor"])?;
            ensure!(found.code != 0 && found.text().contains("--continue"), "{found}");
            site.run(["doctor", "--fix"])?;
        }
        ensure!(states()? == now, "they became {:?}", states()?);
        match moment {
            6 => {
                site.run(["migrate", "web1", "there", "--continue"])?.complains(&["this host's own", "--abort"])?;
                site.ok(["migrate", "web1", "there", "--abort"])?;
                site.ok(["migrate", "web1", "there", "--abort"])?;
                ensure!(states()? == ("stopped".into(), "gone".into()), "{:?}", states()?);
                site.ok(["start", "web1"])?;
            }
            _ => {
                site.run(["migrate", "web1", "there", "--abort"])?.complains(&["--continue"])?;
                site.run(MOVE)?.complains(&["--continue"])?;
                site.ok(["migrate", "web1", "there", "--continue"])?;
                ensure!(states()? == ("gone".into(), "running".into()), "{:?}", states()?);
                site.run(["migrate", "web1", "there", "--continue"])?.failure(44, &["web1"])?;
                hosts.to.ok(MOVE)?;
            }
        }
    }
    ensure!(server.sh("echo alive")? == "alive");
    Ok(())
}

fn an_attempt_that_was_killed_does_not_hinder_the_next(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo old >/root/file")?;
    with_fault(&hosts, "migrate:6:kill")?.context("it went through")?;
    ensure!(hosts.state(&hosts.to)? == "incoming");
    // It belongs to this host, and goes on here.
    site.ok(["start", "web1"])?;
    server.sh("echo new >/root/file")?;
    // Nothing is left of a target that was killed while it took in, either.
    with_fault(&hosts, "migrate-receive:3:kill")?.context("it went through")?;
    ensure!(server.state()? == "running", "it is {}", server.state()?);
    site.ok(MOVE)?;
    hosts.nothing_at(site)?;
    ensure!(Running::adopt(&hosts.to, "web1").file("/root/file")? == "new");
    Ok(())
}

/// After whatever has happened: at most one host may run it, and the documented commands end it. Says what was found.
fn resolved(hosts: &Hosts<'_>) -> Result<String> {
    let (from, to) = (hosts.from, &hosts.to);
    // A side that lost the other takes back what it had made, and holds the lock meanwhile.
    eventually("both sides to be left alone", GUEST_LIMIT, || {
        let is_free = |site: &Site| {
            let lock = site.path("run/vsos/lock/web1");
            !lock.exists() || kernel::lock::Flock::try_exclusive(&lock).is_ok_and(|lock| lock.is_some())
        };
        (is_free(from) && is_free(to)).then_some(())
    })?;
    from.run(["doctor", "--fix"])?;
    to.run(["doctor", "--fix"])?;
    let (here, there) = (hosts.state(from)?, hosts.state(to)?);
    let found = format!("{here}/{there}");
    match (here.as_str(), there.as_str()) {
        ("running" | "stopped", "gone") => {}
        ("running" | "stopped", "incoming") => drop(from.ok(["migrate", "web1", "there", "--abort"])?),
        ("moved", "incoming" | "stopped" | "running") => drop(from.ok(["migrate", "web1", "there", "--continue"])?),
        ("gone", "stopped" | "running") => {}
        _ => bail!("here it is {here}, and there {there}"),
    }
    let owner = if hosts.state(from)? == "gone" { to } else { from };
    let other = if std::ptr::eq(owner, from) { to } else { from };
    hosts.nothing_at(other).with_context(|| found.clone())?;
    for site in [from, to] {
        site.ok(["doctor"]).with_context(|| found.clone())?;
    }
    if hosts.state(owner)? != "running" {
        owner.ok(["start", "web1"])?;
    }
    let kept = owner.ok(["exec", "web1", "--", "cat", "/root/file"])?.text();
    ensure!(kept == "kept", "{found}: its file says {kept:?}");
    owner.ok(["destroy", "--force", "web1"])?;
    hosts.nothing_at(owner).with_context(|| found.clone())?;
    Ok(found)
}

/// Has each moment of a migration of `word` met with a fault, and what that leaves resolved; says what was found.
fn each_moment(hosts: &Hosts<'_>, word: &str, how: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for n in 1..=40 {
        let server = hosts.from.template("busybox")?.server("web1").start()?;
        server.sh("echo kept >/root/file")?;
        let met = with_fault(hosts, &format!("{word}:{n}:{how}"))?;
        let now = resolved(hosts).with_context(|| format!("{how} at {word}:{n}"))?;
        // The other side's word reaches who typed the command.
        if let (Some(done), "fail") = (&met, how) {
            ensure!(done.errors().contains("VSOS_FAULT"), "the error says nothing of the fault: {done}");
        }
        drop(server);
        if met.is_none() {
            ensure!(now == "gone/running", "it went through, and is {now}");
            hosts.from.note(format!("{word}: {found:?}"));
            return Ok(found);
        }
        found.push(now);
    }
    bail!("no end of moments of {word}")
}

fn failed_at_any_moment_it_goes_on_where_it_was(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    for (word, at_least) in [("migrate", 10), ("migrate-receive", 8), ("arrive", 8)] {
        let found = each_moment(&hosts, word, "fail")?;
        ensure!(found.len() >= at_least, "{word} has {} moments", found.len());
        // Nobody was killed: nothing is left stopped here, nor half there.
        ensure!(found.iter().all(|now| !now.starts_with("stopped") && now != "running/incoming"), "{word}: {found:?}");
    }
    Ok(())
}

fn killed_at_any_moment_one_host_has_it(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    for word in ["stop", "destroy"] {
        each_moment(&hosts, word, "kill")?;
    }
    let found = each_moment(&hosts, "migrate", "kill")?;
    for expected in
        ["running/gone", "stopped/gone", "stopped/incoming", "moved/incoming", "moved/stopped", "moved/running"]
    {
        ensure!(found.iter().any(|now| now == expected), "it was never {expected}: {found:?}");
    }
    Ok(())
}

fn the_other_side_killed_at_any_moment_one_host_has_it(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    for word in ["migrate-receive", "arrive", "start"] {
        each_moment(&hosts, word, "kill")?;
    }
    Ok(())
}

fn the_connection_cut_anywhere_one_host_has_it(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let mut found = Vec::new();
    for (direction, bytes) in [
        ("in", 0),
        ("in", 60),
        ("in", 700),
        ("in", 30_000),
        ("in", 1_000_000),
        ("out", 0),
        ("out", 60),
        ("out", 90),
        ("out", 105),
        ("out", 118),
        ("out", 133),
        ("out", 146),
        ("out", 158),
    ] {
        let server = site.template("busybox")?.server("web1").start()?;
        server.sh("echo kept >/root/file; head -c 2000000 /dev/urandom >/root/more")?;
        let line = match direction {
            "in" => format!("dd bs=1 count={bytes} 2>/dev/null | \"$vsctl\" \"$@\""),
            // Nobody but `dd` may hold the way back, or it does not end.
            _ => format!(
                "exec 3>&1 4<&0; \"$vsctl\" \"$@\" <&4 3>&- 4<&- | dd bs=1 count={bytes} 2>/dev/null >&3 3>&- 4<&- &\nexec >&- 3>&- 4<&-; wait"
            ),
        };
        reach(site, &hosts.to, &line)?;
        let done = site.run(MOVE)?;
        ensure!(done.code != 0, "{direction} {bytes}: {done}");
        reach(site, &hosts.to, "exec \"$vsctl\" \"$@\"")?;
        let now = resolved(&hosts).with_context(|| format!("cut after {bytes} bytes {direction}"))?;
        found.push(format!("{direction} {bytes}: {now}"));
        drop(server);
    }
    site.note(found.join("\n"));
    ensure!(found.iter().any(|now| now.contains("moved/")), "it was never cut behind the commit: {found:?}");
    Ok(())
}
