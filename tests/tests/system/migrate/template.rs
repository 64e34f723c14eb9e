//! The template goes before the server where it is missing, whole or not at all.

use std::{fs, os::unix::fs::symlink, path::PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, makedev, mknodat};
use system_tests::{
    command::{Finished, Invocation, eventually},
    server::{GUEST_LIMIT, Running},
    site::Site,
};

use crate::bad_input::SmallDisk;

use super::{
    hosts::{Hosts, MOVE, hosts, manifest, reach, same},
    is_stopped, kill, resolved,
};

const SEND: [&str; 5] = ["migrate", "web1", "there", "--offline", "--send-template"];

fn place(site: &Site) -> PathBuf {
    site.path("var/lib/vsos/templates")
}

/// What lies there beside the lock, whole or not.
fn templates(site: &Site) -> Vec<String> {
    let entries = fs::read_dir(place(site)).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name != ".lock").collect();
    names.sort();
    names
}

/// A template of the source's own, with what only a root can hold that came from somewhere else.
fn own_template(site: &Site) -> Result<()> {
    let (tree, archive) = (site.path("tree"), site.path("own.tar"));
    Invocation::new("cp").args(["-a"]).args([&place(site).join("busybox/root"), &tree]).succeed()?;
    fs::write(tree.join("etc/note"), "of the template\n")?;
    fs::hard_link(tree.join("etc/note"), tree.join("etc/again"))?;
    symlink("../nowhere", tree.join("etc/dangling"))?;
    mknodat(CWD, tree.join("etc/pipe"), FileType::Fifo, Mode::from_raw_mode(0o640), makedev(0, 0))?;
    lsetxattr(tree.join("etc/note"), "user.note", b"of mine\0\xff", XattrFlags::empty())?;
    std::os::unix::fs::chown(tree.join("etc/note"), Some(1000), Some(65534))?;
    let caps = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    lsetxattr(tree.join("etc/note"), "security.capability", &caps, XattrFlags::empty())?;
    let hole = fs::File::create(tree.join("etc/hole"))?;
    hole.set_len(8 << 20)?;
    let tar = ["--format=posix", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--sparse", "-C"];
    Invocation::new("tar").args(tar).args([&tree]).args(["-cf"]).args([&archive]).args(["."]).succeed()?;
    site.ok(["template", "import", "own", &archive.display().to_string()])?;
    Ok(())
}

pub fn the_template_is_sent_along_when_asked(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    own_template(site)?;
    // The first template of a host that has none.
    fs::remove_dir_all(place(&hosts.to))?;
    let flags = "--memory 64M";
    site.ok(["create", "web1", "--template", "own"].into_iter().chain(flags.split(' ')))?;
    site.ok(["start", "web1"])?;
    let server = Running::adopt(site, "web1");
    server.sh("test \"$(cat /etc/again)\" = 'of the template'; echo kept >/root/file")?;
    let before = manifest(&place(site).join("own"))?;
    let kept = |line: &String| line.contains("user.note") && line.contains("security.capability");
    ensure!(kept(&before["root/etc/note"]) || kept(&before["root/etc/again"]), "{before:#?}");
    // Without the flag: as it was, and the hint names it.
    let dry = ["--dry-run"];
    for command in [MOVE.to_vec(), [&MOVE[..], &dry].concat()] {
        site.run(command)?.failure(91, &["there is no template 'own'", "`--send-template` sends it along"])?;
    }
    let said = site.ok([&SEND[..], &dry].concat())?.text();
    ensure!(said.contains("its template goes before it: "), "{said}");
    ensure!(templates(&hosts.to).is_empty() && server.state()? == "running", "a dry run has changed something");
    let done = site.ok(SEND)?;
    ensure!(done.errors().contains("web1: sending the template"), "{done}");
    hosts.nothing_at(site)?;
    ensure!(templates(&hosts.to) == ["own"], "there are {:?}", templates(&hosts.to));
    let mut after = manifest(&place(&hosts.to).join("own"))?;
    // Written there: with another time, and what it takes on that disk.
    for file in ["record.toml", "template.toml", ""] {
        after.insert(file.into(), before[file].clone());
    }
    same(&before, &after)?;
    let record = |site: &Site| -> Result<Vec<String>> {
        let text = fs::read_to_string(place(site).join("own/record.toml"))?;
        Ok(text.lines().filter(|line| !line.starts_with("size_bytes")).map(ToOwned::to_owned).collect())
    };
    ensure!(record(site)? == record(&hosts.to)?, "the records differ");
    let there = Running::adopt(&hosts.to, "web1");
    ensure!(there.state()? == "running" && there.file("/root/file")? == "kept");
    ensure!(there.sh("cat /etc/again; stat -c %u:%g:%h /etc/note")? == "of the template\n1000:65534:2");
    hosts.to.ok(["template", "show", "own"])?;
    for side in [site, &hosts.to] {
        side.ok(["doctor"])?;
    }
    // Back to where it is: the flag asks for nothing that is not needed.
    let done = hosts.to.ok(SEND)?;
    ensure!(!done.errors().contains("sending the template"), "{done}");
    ensure!(server.file("/root/file")? == "kept");
    Ok(())
}

pub fn another_template_of_that_name_is_not_replaced(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/file")?;
    let record = place(&hosts.to).join("busybox/record.toml");
    let text = fs::read_to_string(&record)?;
    // Not written to in place: the templates of all sites are one file.
    fs::remove_file(&record)?;
    fs::write(&record, text.replace("digest = \"", "digest = \"0"))?;
    for command in [&SEND[..], &[&SEND[..], &["--dry-run"]].concat()] {
        let done = site.run(command)?.failure(91, &["template 'busybox' is another"])?;
        ensure!(done.errors().contains("`vsctl template remove busybox` there makes room"), "{done}");
    }
    ensure!(server.state()? == "running" && fs::read_to_string(&record)?.contains("digest = \"0"));
    // Something of that name that is no template.
    fs::remove_file(&record)?;
    site.run(SEND)?.failure(43, &["templates/busybox is left from something"])?;
    // As the hint says.
    fs::remove_dir_all(place(&hosts.to).join("busybox"))?;
    site.ok(SEND)?;
    drop(server);
    ensure!(Running::adopt(&hosts.to, "web1").file("/root/file")? == "kept");
    Ok(())
}

/// Begins to send the template, and does something there before it has come: the source stands before it says that it comes, or, at
/// the second moment, when the other side has made room for it.
fn meanwhile(site: &Site, moment: u32, act: impl FnOnce() -> Result<()>) -> Result<Finished> {
    let mut moving = site.vsctl(SEND).env("VSOS_FAULT", format!("migrate:{moment}:stop")).spawn()?;
    eventually("a command that stops", GUEST_LIMIT, || is_stopped(moving.pid()).then_some(()))?;
    act()?;
    kill(moving.pid(), Signal::SIGCONT)?;
    moving.wait()
}

pub fn a_template_that_is_made_there_meanwhile_is_used_or_named(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let to = &hosts.to;
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/file")?;
    let away = || to.ok(["template", "remove", "busybox"]).map(drop);
    // Another one of that name.
    away()?;
    let built = || to.ok(["template", "build", "busybox"]).map(drop);
    meanwhile(site, 1, built)?.failure(91, &["template 'busybox' is another", "template remove busybox"])?;
    ensure!(server.state()? == "running" && templates(to) == ["busybox"]);
    // While it comes, nobody else makes one.
    away()?;
    let refused = || {
        let mut building = to.vsctl(["template", "build", "busybox"]).spawn()?;
        std::thread::sleep(std::time::Duration::from_millis(500));
        ensure!(building.is_running(), "a build did not wait: {:?}", building.wait());
        kill(building.pid(), Signal::SIGTERM)?;
        building.wait().map(drop)
    };
    meanwhile(site, 2, refused)?.success()?;
    to.ok(MOVE)?;
    // The same, brought by somebody who was faster: it is used, and not sent.
    away()?;
    meanwhile(site, 1, || to.template("busybox").map(drop))?.success()?;
    ensure!(Running::adopt(to, "web1").file("/root/file")? == "kept" && templates(to) == ["busybox"]);
    hosts.nothing_at(site)?;
    drop(server);
    Ok(())
}

/// Moves it with a fault; `None` when there is no such moment, so that it went through. What is left of the template is
/// nothing, or all of it.
fn with_fault(hosts: &Hosts<'_>, fault: &str) -> Result<Option<Finished>> {
    let (from, to) = (hosts.from, &hosts.to);
    if templates(to) == ["busybox"] {
        to.ok(["template", "remove", "busybox"])?;
    }
    let server = from.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/file")?;
    let done = from.keep(from.vsctl(SEND).env("VSOS_FAULT", fault))?;
    let is_met = done.code != 0;
    // One that was killed leaves what the next command or this takes away.
    eventually("the other side to end", GUEST_LIMIT, || super::receivers(to).is_empty().then_some(()))?;
    if fault.ends_with("kill") {
        to.run(["doctor", "--fix"])?;
    }
    let whole = |site: &Site| manifest(&place(site).join("busybox/root"));
    match templates(to).as_slice() {
        [] => ensure!(is_met, "it went through without its template"),
        [one] if one == "busybox" => same(&whole(from)?, &whole(to)?)?,
        left => ensure!(false, "left are {left:?}"),
    }
    to.ok(["template", "list"])?;
    if is_met && hosts.state(from)? == "running" {
        // The next attempt finds nothing in its way.
        from.ok(SEND)?;
    }
    resolved(hosts)?;
    drop(server);
    Ok(is_met.then_some(done))
}

/// The last moment of the source, and of the other side, that is of the template's.
const MOMENTS: [(&str, u32); 2] = [("migrate", 4), ("migrate-receive", 3)];

pub fn a_template_whose_way_fails_or_is_killed_is_whole_or_not_there(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    for how in ["fail", "kill"] {
        for (word, last) in MOMENTS {
            for n in 1..=last {
                let fault = format!("{word}:{n}:{how}");
                let done = with_fault(&hosts, &fault).context(fault.clone())?.context("it went through")?;
                let at_end = templates(&hosts.to) == ["busybox"];
                ensure!(at_end, "{fault}: the next attempt brought none");
                if how == "fail" {
                    ensure!(done.errors().contains("VSOS_FAULT"), "the error says nothing of the fault: {done}");
                }
            }
        }
    }
    Ok(())
}

pub fn a_template_that_does_not_arrive_whole_is_not_there(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/file")?;
    to_nothing(&hosts)?;
    for bytes in [2_000, 30_000, 1_000_000] {
        reach(site, &hosts.to, &format!("dd bs=1 count={bytes} 2>/dev/null | \"$vsctl\" \"$@\""))?;
        let done = site.run(SEND)?.complains(&["cannot move 'web1' to there"])?;
        ensure!(!done.errors().contains("runs here again") && server.state()? == "running", "{done}");
        eventually("the other side to end", GUEST_LIMIT, || super::receivers(&hosts.to).is_empty().then_some(()))?;
        ensure!(templates(&hosts.to).is_empty(), "after {bytes} bytes there are {:?}", templates(&hosts.to));
        hosts.to.ok(["doctor"])?;
    }
    reach(site, &hosts.to, "exec \"$vsctl\" \"$@\"")?;
    // Nor is one that the disk is too small for.
    let small = SmallDisk::at(&hosts.to, "var/lib/vsos/templates", 1 << 20)?;
    let done = site.run(SEND)?.failure(46, &["the disk is full"])?;
    ensure!(done.errors().contains("template 'busybox'") && server.state()? == "running", "{done}");
    ensure!(templates(&hosts.to).is_empty(), "left are {:?}", templates(&hosts.to));
    drop(small);
    // Nor what has come to a side that is killed while it takes it in: it is nobody's, and the next attempt takes it away.
    let killed = || {
        ensure!(templates(&hosts.to) == [".new-busybox"], "there are {:?}", templates(&hosts.to));
        super::receivers(&hosts.to).into_iter().try_for_each(|pid| kill(pid, Signal::SIGKILL))
    };
    meanwhile(site, 3, killed)?.complains(&["connection to the other host has ended"])?;
    ensure!(templates(&hosts.to) == [".new-busybox"] && hosts.to.ok(["template", "list", "-H"])?.text().is_empty());
    let found = hosts.to.run(["doctor"])?;
    ensure!(found.code != 0 && found.text().contains(".new-busybox"), "{found}");
    // A template that its source has spoilt does not become one.
    let spoilt = place(site).join("busybox/root/etc/spoilt");
    fs::write(&spoilt, "x")?;
    site.run(SEND)?.failure(20, &["is not the one that the server was made from"])?;
    ensure!(templates(&hosts.to).is_empty() && server.state()? == "running");
    fs::remove_file(&spoilt)?;
    site.ok(SEND)?;
    ensure!(Running::adopt(&hosts.to, "web1").file("/root/file")? == "kept");
    drop(server);
    Ok(())
}

fn to_nothing(hosts: &Hosts<'_>) -> Result<()> {
    hosts.to.ok(["template", "remove", "busybox"]).map(drop)
}
