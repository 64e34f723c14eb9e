//! Files that change while their server moves.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use system_tests::{server::Running, site::Site};

use super::FILES;
use super::hosts::{hosts, manifest, same};
use super::{GUEST_LIMIT, eventually, is_stopped, kill, sent_once, stopped_at, until_stopped};

/// Changes of all kinds, made inside after everything was sent once.
const CHANGES: &str = "set -e
    echo more >>/srv/grown; truncate -s 5000000 /srv/grown; echo in a hole >>/srv/grown
    printf other | dd of=/srv/grown bs=1 seek=70000 conv=notrunc 2>/dev/null; truncate -s 1200000 /srv/shrunk
    chmod 600 /srv/mode; printf other | dd of=/srv/mode bs=1 seek=70000 conv=notrunc 2>/dev/null
    echo grown >>/srv/a; truncate -s 1000 /srv/big; echo in the middle | dd of=/srv/hole bs=1 seek=4000000 conv=notrunc 2>/dev/null
    rm '/srv/a name
of two lines'
    mv /srv/shared /srv/moved; ln /srv/big /srv/moved/big; chmod 600 /srv/pipe; chown -h 5:6 /srv/link
    rmdir /srv/empty; echo file >/srv/empty
    rm -r /etc/vsinit; rm /etc/group; mkdir -p /etc/group/was/a/file
    rm -r /etc/ssl 2>/dev/null || :; mkdir -p /etc/ssl; touch /etc/ssl/new
    mv /etc/services /etc/renamed 2>/dev/null || :
    touch -d '2005-01-02 03:04:05' /srv/moved";

/// What the guest itself has below its root, on the disk; what its services write at their end is not ours.
fn files(site: &Site, tree: &str) -> Result<BTreeMap<String, String>> {
    let mut files = manifest(&site.path("var/lib/vsos/servers/web1/volume").join(tree))?;
    files.retain(|path, _| ["srv", "etc", "bin"].iter().any(|own| path.starts_with(own)));
    Ok(files)
}

pub fn what_changes_while_it_is_sent_arrives_too(site: &Site) -> Result<()> {
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
        let mut moving = sent_once(site)?;
        ensure!(server.state()? == "running", "it is {}", server.state()?);
        server.sh(CHANGES)?;
        let before = files(site, tree)?;
        kill(moving.pid(), Signal::SIGCONT)?;
        let done = moving.wait()?.success().context(flags)?;
        for phase in ["sending what has changed", "sending changed blocks"] {
            ensure!(done.errors().contains(&format!("web1: {phase}")), "no word of {phase}: {done}");
        }
        drop(server);
        let there = Running::adopt(&hosts.to, "web1");
        same(&before, &files(&hosts.to, tree)?).context(flags)?;
        ensure!(fs::read_to_string(beside(&hosts.to))? == "an older log", "{flags}");
        ensure!(there.sh("cat /srv/empty; stat -c %h /srv/moved/b")? == "file\n2");
        hosts.nothing_at(site)?;
        hosts.to.ok(["destroy", "--force", "web1"])?;
    }
    Ok(())
}

/// Files enough for a pass of their own, and what is neither sent nor kept by looking at times alone.
const MANY: &str = "set -e; mkdir -p /srv/many /srv/tree/deep /srv/tree/kept /srv/outside
    for n in $(seq 300); do head -c 16384 /dev/urandom >/srv/many/$n; done
    echo deep >/srv/tree/deep/file; echo kept >/srv/tree/kept/file; ln /srv/tree/kept/file /srv/outside/name";

/// All of them anew, directories in the place of files and the other way round, and a tree that is moved.
const MANY_CHANGES: &str = "set -e; for n in $(seq 300); do head -c 16384 /dev/urandom >/srv/many/new; mv /srv/many/new /srv/many/$n; done
    rm -r /srv/tree/deep; echo file >/srv/tree/deep; rm /srv/still /srv/many/300; mkdir -p /srv/many/300/deeper; touch /srv/many/300/deeper/new
    mv /srv/tree/kept /srv/outside/kept; mkfifo /srv/many/pipe; ln -s many /srv/link-to-many";

pub fn what_changes_in_the_first_pass_is_sent_while_it_runs(site: &Site) -> Result<()> {
    let hosts = hosts(site)?;
    for (flags, tree) in [("--net bridge", "upper"), ("--volume dir", "root")] {
        let server = site.template("busybox")?.server("web1").with(flags).start()?;
        server.sh(FILES)?;
        server.sh(MANY)?;
        let mut moving = stopped_at(site, "pass:1:stop,migrate:3:stop")?;
        server.sh(CHANGES)?;
        server.sh(MANY_CHANGES)?;
        // What is younger when it is looked at is sent again in any case.
        std::thread::sleep(Duration::from_millis(5_500));
        kill(moving.pid(), Signal::SIGCONT)?;
        eventually("the pass", GUEST_LIMIT, || (!is_stopped(moving.pid())).then_some(()))?;
        until_stopped(&moving)?;
        // Its blocks were known, and it went with the pass.
        server.sh("head -c 1300000 /dev/urandom >/srv/still")?;
        let before = files(site, tree)?;
        kill(moving.pid(), Signal::SIGCONT)?;
        let moved = moving.wait()?.success().context(flags)?;
        drop(server);
        let said = moved.errors();
        ensure!(said.contains(" of files in pass 2, while it runs"), "{flags}: {said}");
        let left =
            said.lines().find_map(|line| line.split_once(" to send while it stands still")?.0.rsplit(' ').next());
        let mebibytes = left.and_then(|left| left.strip_suffix('M')?.parse::<f64>().ok());
        ensure!(mebibytes.is_some_and(|left| left < 2.0), "{flags}: {left:?} is left of 4.8 MiB: {said}");
        let there = Running::adopt(&hosts.to, "web1");
        same(&before, &files(&hosts.to, tree)?).context(flags)?;
        ensure!(there.sh("stat -c %h /srv/outside/kept/file /srv/outside/name")? == "2\n2", "{flags}");
        hosts.nothing_at(site)?;
        hosts.to.ok(["destroy", "--force", "web1"])?;
    }
    Ok(())
}
