//! Migration: a server moves to another host with everything, and whatever is killed or cut, one host has it.
//!
//! The other host is a second installation on this one: `migrate.shell` runs a script instead of ssh.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use nix::{sys::signal::Signal, unistd::Pid};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, makedev, mknodat};
use system_tests::{
    command::{Background, Finished, eventually},
    host::{HostState, Scope},
    promises,
    server::{GUEST_LIMIT, Running, Server},
    site::Site,
};

use crate::bad_input::SmallDisk;

#[path = "migrate/blocks.rs"]
mod blocks;
#[path = "migrate/changes.rs"]
mod changes;
#[path = "migrate/hosts.rs"]
mod hosts;
#[path = "migrate/template.rs"]
mod template;

use blocks::of_a_large_file_the_blocks_that_change_are_sent;
use changes::{what_changes_in_the_first_pass_is_sent_while_it_runs, what_changes_while_it_is_sent_arrives_too};
use hosts::{Hosts, MOVE, hosts, manifest, nothing_kept_at, reach, same};
use template::{
    a_template_that_does_not_arrive_whole_is_not_there, a_template_that_is_made_there_meanwhile_is_used_or_named,
    a_template_whose_way_fails_or_is_killed_is_whole_or_not_there, another_template_of_that_name_is_not_replaced,
    the_template_is_sent_along_when_asked,
};

promises![
    a_stopped_server_moves_with_all_its_files,
    a_running_server_is_stopped_moved_and_started,
    a_full_copy_and_a_privileged_server_move_too,
    what_changes_while_it_is_sent_arrives_too,
    what_changes_in_the_first_pass_is_sent_while_it_runs,
    of_a_large_file_the_blocks_that_change_are_sent,
    it_moves_there_and_back_again,
    a_dry_run_changes_nothing,
    all_that_speaks_against_it_is_said_at_once,
    what_is_no_vsctl_of_this_version_is_refused,
    what_cannot_go_along_is_left_behind_when_asked,
    a_start_that_fails_there_is_said_and_the_server_is_there,
    between_two_hosts_no_command_starts_it,
    an_attempt_that_was_killed_does_not_hinder_the_next,
    a_server_that_reboots_meanwhile_stays,
    a_command_that_was_killed_when_the_server_stood_still_is_told_of,
    a_disk_that_is_full_there_leaves_it_here,
    a_side_that_is_stopped_is_taken_for_lost,
    long_work_is_no_silence,
    failed_at_any_moment_it_goes_on_where_it_was,
    killed_at_any_moment_one_host_has_it,
    the_other_side_killed_at_any_moment_one_host_has_it,
    the_connection_cut_anywhere_one_host_has_it,
    the_template_is_sent_along_when_asked,
    another_template_of_that_name_is_not_replaced,
    a_template_that_is_made_there_meanwhile_is_used_or_named,
    a_template_whose_way_fails_or_is_killed_is_whole_or_not_there,
    a_template_that_does_not_arrive_whole_is_not_there
];

/// Files of all kinds, made inside.
const FILES: &str = "set -e
    mkdir -p /srv/empty /srv/shared; chown 33:33 /srv/shared; chmod 3775 /srv/shared
    echo kept >/srv/a; ln /srv/a /srv/shared/b; chown 1000:65534 /srv/a; chmod 4751 /srv/a
    ln -s ../nowhere /srv/link; mkfifo /srv/pipe
    dd if=/dev/zero of=/srv/hole bs=1 count=1 seek=8388607 2>/dev/null
    head -c 3000000 /dev/urandom >/srv/big
    touch -d '2001-02-03 04:05:06' /srv/big
    for n in grown shrunk mode still; do head -c 1300000 /dev/urandom >/srv/$n; done
    chown 33:44 /srv/grown; chmod 4640 /srv/grown; touch -d '2001-02-03 04:05:06' /srv/shrunk
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

/// Begins to move the server: all of it was sent while it ran (the third moment), it runs still, and the command is stopped.
fn sent_once(site: &Site) -> Result<Background> {
    stopped_at(site, "migrate:3:stop")
}

/// Begins to move the server, and has the command stop at a moment.
fn stopped_at(site: &Site, moments: &str) -> Result<Background> {
    let moving = site.vsctl(MOVE).env("VSOS_FAULT", moments).env("RUST_LOG", "info").spawn()?;
    until_stopped(&moving)?;
    Ok(moving)
}

fn until_stopped(command: &Background) -> Result<()> {
    eventually("a command that stops", GUEST_LIMIT, || is_stopped(command.pid()).then_some(()))
}

fn is_stopped(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") T "))
}

fn kill(pid: i32, signal: Signal) -> Result<()> {
    nix::sys::signal::kill(Pid::from_raw(pid), signal).with_context(|| format!("send {signal} to {pid}"))
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
    site.run(MOVE)?.failure(91, &["there is no template 'busybox'", "--send-template"])?;
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

fn what_cannot_go_along_is_left_behind_when_asked(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/file")?;
    // Networks are chosen when they are first asked for.
    site.ok(["migrate", "web1", "there", "--offline", "--dry-run"])?;
    let before = everything(&hosts.to)?;
    let words = ["its programs cannot be taken along", "was not started for checkpoints"];
    for rung in ["--live", "--near-live"] {
        let done = site.run(["migrate", "web1", "there", rung])?.failure(5, &words)?;
        ensure!(done.errors().contains("; or `--fallback` tries --offline"), "{done}");
        let tried = site.ok(["migrate", "web1", "there", rung, "--fallback", "--dry-run"])?;
        ensure!(tried.text().contains("is stopped for it and started there"), "{tried}");
        let reason = format!("{rung} is not possible, trying --offline: {}: 'web1' {}", words[0], words[1]);
        ensure!(tried.errors().matches(&reason).count() == 1, "{tried}");
    }
    same(&before, &everything(&hosts.to)?)?;
    // What no rung helps against is said as it is, and nothing is stopped.
    let taker = hosts.to.template("busybox")?.server("web1").create()?;
    let done =
        site.run(["migrate", "web1", "there", "--live", "--fallback"])?.failure(43, &["there is a server 'web1'"])?;
    ensure!(!done.errors().contains("`--fallback`") && server.state()? == "running", "{done}");
    drop(taker);
    site.run(["migrate", "web1", "there", "--offline", "--fallback"])?.failure(20, &["cannot be used with"])?;
    let done = site.ok(["migrate", "web1", "there", "--live", "--fallback"])?;
    ensure!(done.errors().contains("trying --offline") && done.errors().contains("web1: stopping"), "{done}");
    hosts.nothing_at(site)?;
    ensure!(Running::adopt(&hosts.to, "web1").file("/root/file")? == "kept");
    drop(server);
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

fn a_server_that_reboots_meanwhile_stays(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/file; sync")?;
    let init = server.init_pid()?;
    let mut moving = sent_once(site)?;
    site.run(["exec", "web1", "--", "reboot"])?;
    let ended = |init: i32| {
        let stat = fs::read_to_string(format!("/proc/{init}/stat")).unwrap_or_default();
        (stat.is_empty() || stat.contains(") Z ")).then_some(())
    };
    eventually("its init to end", GUEST_LIMIT, || ended(init))?;
    kill(moving.pid(), Signal::SIGCONT)?;
    moving.wait()?.failure(31, &["'web1' has ended by itself"])?;
    server.next_init(init)?;
    ensure!(server.file("/root/file")? == "kept");
    let mut moving = sent_once(site)?;
    let init = server.init_pid()?;
    site.run(["exec", "web1", "--", "poweroff"])?;
    eventually("its init to end", GUEST_LIMIT, || ended(init))?;
    kill(moving.pid(), Signal::SIGCONT)?;
    let said = moving.wait()?.failure(31, &["'web1' has ended by itself"])?;
    ensure!(!said.errors().contains("runs here again"), "{said}");
    eventually("a server that is stopped", GUEST_LIMIT, || (server.state().ok()? == "stopped").then_some(()))?;
    site.ok(["doctor"])?;
    hosts.nothing_at(&hosts.to)
}

fn a_command_that_was_killed_when_the_server_stood_still_is_told_of(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    let stopped = || with_fault(&hosts, "migrate:4:kill").map(drop);
    stopped()?;
    ensure!(server.state()? == "stopped", "it is {}", server.state()?);
    let found = site.run(["doctor"])?.text();
    ensure!(found.contains("it ran, and is stopped since its migration to there was interrupted"), "{found}");
    site.ok(["doctor", "--fix"])?;
    ensure!(server.state()? == "running" && site.ok(["doctor"])?.text().contains("nothing was left behind"));
    // So does the boot of a host that was shut down meanwhile.
    stopped()?;
    site.ok(["autostop"])?;
    ensure!(site.ok(["autostart", "--plan"])?.text() == "start web1");
    site.ok(["autostart"])?;
    ensure!(server.state()? == "running", "it is {}", server.state()?);
    // Who starts and stops it has said what it is to be.
    stopped()?;
    site.ok(["start", "web1"])?;
    site.ok(["stop", "web1"])?;
    site.ok(["doctor"])?;
    ensure!(server.state()? == "stopped");
    // While it shuts down, its monitor ends what the command has begun; and who migrates it again has it run there.
    site.ok(["start", "web1"])?;
    stops_slowly(site, &server)?;
    let mut moving = site.vsctl(MOVE).spawn()?;
    let mark = server.directory().join("leaving.toml");
    let is_pausing = || fs::read_to_string(&mark).ok().filter(|text| text.contains("stops")).map(drop);
    eventually("a server that is being stopped", GUEST_LIMIT, is_pausing)?;
    // Its service has heard of it.
    server.until(&format!("ps | grep -q '[s]leep {LONG_S}'"))?;
    kill(moving.pid(), Signal::SIGKILL)?;
    moving.wait()?;
    eventually("a server that is stopped", GUEST_LIMIT, || (server.state().ok()? == "stopped").then_some(()))?;
    // Its monitor may hold the lock for a moment longer.
    eventually("a doctor who sees it", GUEST_LIMIT, || {
        site.run(["doctor"]).ok()?.text().contains("it ran, and is stopped since").then_some(())
    })?;
    site.ok(MOVE)?;
    let there = Running::adopt(&hosts.to, "web1");
    ensure!(there.state()? == "running", "it is {}", there.state()?);
    hosts.nothing_at(site)
}

fn a_disk_that_is_full_there_leaves_it_here(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/file")?;
    let init = server.init_pid()?;
    let small = SmallDisk::at(&hosts.to, "var/lib/vsos/servers", 16 << 20)?;
    const GROW: &str = "head -c 24000000 /dev/urandom >/root/big";
    // Once it stands still there is no room for what has become more.
    let mut moving = sent_once(site)?;
    server.sh(GROW)?;
    kill(moving.pid(), Signal::SIGCONT)?;
    moving.wait()?.failure(46, &["the disk is full", "'web1' runs here again"])?;
    nothing_kept_at(&hosts.to)?;
    let second = server.init_pid()?;
    ensure!(second != init, "it was never stopped");
    // Nor for all of it, while it runs: it goes on as if nothing had been.
    let done = site.run(MOVE)?.failure(46, &["the disk is full"])?;
    ensure!(!done.errors().contains("runs here again"), "{done}");
    ensure!(server.init_pid()? == second && server.file("/root/file")? == "kept");
    nothing_kept_at(&hosts.to)?;
    drop(small);
    site.ok(MOVE)?;
    ensure!(Running::adopt(&hosts.to, "web1").file("/root/file")? == "kept");
    drop(server);
    Ok(())
}

/// How long either side may say nothing, in these tests; and what is longer.
const SILENCE_S: u64 = 4;
const LONG_S: u64 = 9;

fn shorten_silence(hosts: &Hosts<'_>) -> Result<()> {
    for site in [hosts.from, &hosts.to] {
        let file = site.path("etc/vsos/vsos.toml");
        let settings = fs::read_to_string(&file)?;
        fs::write(file, format!("{settings}silence = {SILENCE_S}\n"))?;
    }
    Ok(())
}

/// What receives servers at a site.
fn receivers(site: &Site) -> Vec<i32> {
    let root = format!("VSOS_ROOT={}\0", site.root().display());
    let has = |pid: i32, file: &str, word: &str| {
        fs::read(format!("/proc/{pid}/{file}")).is_ok_and(|text| String::from_utf8_lossy(&text).contains(word))
    };
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| has(*pid, "cmdline", "vsctl\0migrate-receive") && has(*pid, "environ", &root)).collect()
}

fn a_side_that_is_stopped_is_taken_for_lost(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    shorten_silence(&hosts)?;
    // As with ssh, which is ended instead of the program that it runs there, in a session and with words of its own.
    reach(site, &hosts.to, "setsid \"$vsctl\" \"$@\" 2>/dev/null; exit $?")?;
    // The other side, before anything was sent, and when all of it is there.
    for (moment, again) in [(2, false), (3, true)] {
        let server = site.template("busybox")?.server("web1").start()?;
        server.sh("echo kept >/root/file")?;
        let done = with_fault(&hosts, &format!("migrate-receive:{moment}:stop"))?.context("it went through")?;
        ensure!(done.errors().contains("has said nothing for"), "{done}");
        ensure!(done.errors().contains("runs here again") == again && server.state()? == "running", "{done}");
        let stopped = receivers(&hosts.to);
        ensure!(stopped.len() == 1 && is_stopped(stopped[0]), "those that receive: {stopped:?}");
        kill(stopped[0], Signal::SIGCONT)?;
        eventually("the other side to end", GUEST_LIMIT, || receivers(&hosts.to).is_empty().then_some(()))?;
        resolved(&hosts)?;
        drop(server);
    }
    // This side: what came is taken back there without it.
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/file")?;
    let mut moving = sent_once(site)?;
    eventually("the other side to end", GUEST_LIMIT, || receivers(&hosts.to).is_empty().then_some(()))?;
    hosts.nothing_at(&hosts.to)?;
    ensure!(is_stopped(moving.pid()) && server.state()? == "running");
    kill(moving.pid(), Signal::SIGCONT)?;
    moving.wait()?.complains(&["connection to the other host has ended", "runs here again"])?;
    ensure!(resolved(&hosts)? == "running/gone");
    drop(server);
    Ok(())
}

/// Has the server take so many seconds for its end as no side may be silent.
fn stops_slowly(site: &Site, server: &Running) -> Result<()> {
    let slow = format!(
        "exec = [\"/bin/sh\", \"-c\", \"trap 'sleep {}; echo slowly >/root/ended; exit 0' TERM; while :; do sleep 0.1; done\"]\nstop_timeout_ms = 600000\n",
        LONG_S
    );
    fs::write(site.path("slow.toml"), slow)?;
    site.ok(["push", "web1", &site.path("slow.toml").display().to_string(), "/etc/vsinit/slow.toml"])?;
    site.ok(["restart", "web1"])?;
    server.until("ps | grep -v grep | grep -q 'trap.*slowly'")?;
    Ok(())
}

fn long_work_is_no_silence(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    shorten_silence(&hosts)?;
    let server = site.template("busybox")?.server("web1").start()?;
    // Here it is the stop that takes long, and there the unpacking: somebody holds its tar.
    stops_slowly(site, &server)?;
    server.sh("head -c 32000000 /dev/urandom >/root/big")?;
    let mut moving = site.vsctl(MOVE).spawn()?;
    let tar = eventually("a tar that unpacks", GUEST_LIMIT, || {
        let [receiver] = receivers(&hosts.to)[..] else { return None };
        // Each thread has children of its own.
        let threads = fs::read_dir(format!("/proc/{receiver}/task")).ok()?.flatten();
        let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
        let pids: Vec<i32> =
            lists.flat_map(|list| list.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
        pids.into_iter().find(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "tar\n"))
    })?;
    kill(tar, Signal::SIGSTOP)?;
    std::thread::sleep(Duration::from_secs(LONG_S));
    ensure!(is_stopped(tar) && moving.is_running(), "it is over: {:?}", moving.wait());
    kill(tar, Signal::SIGCONT)?;
    moving.wait()?.success()?;
    drop(server);
    hosts.nothing_at(site)?;
    ensure!(Running::adopt(&hosts.to, "web1").file("/root/ended")? == "slowly");
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
        // One that stood still when its command was killed goes on again.
        ("running", "gone") => {}
        ("running", "incoming") => drop(from.ok(["migrate", "web1", "there", "--abort"])?),
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
    for expected in ["running/gone", "running/incoming", "moved/incoming", "moved/stopped", "moved/running"] {
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
    // Of a large file the other side tells the sums of its blocks: with that the same words lie elsewhere.
    const SMALL: u32 = 1_040_000;
    let small = [("in", &[0, 60, 700, 30_000, 1_000_000][..]), ("out", &[0, 60, 90, 141, 154, 169, 182, 194])];
    let small = small.into_iter().flat_map(|(direction, all)| all.iter().map(move |bytes| (direction, *bytes, SMALL)));
    for (direction, bytes, size) in small.chain([("in", 1_800_000, 2 * SMALL), ("out", 300, 2 * SMALL)]) {
        let server = site.template("busybox")?.server("web1").start()?;
        server.sh(&format!("echo kept >/root/file; head -c {size} /dev/urandom >/root/more"))?;
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
