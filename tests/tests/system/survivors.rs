//! What survives a checkpoint, kind by kind: a program in the server holds one of each, and says which is not as it was.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use system_tests::{
    ability,
    promise::skip,
    promises,
    server::{Running, Server},
    site::Site,
    survivor::{AS_IT_WAS, NOT_HELD, refused},
};

promises![
    what_no_checkpoint_holds_is_refused_by_its_name,
    its_limits_hold_it_still,
    its_services_are_still_heard,
    who_is_just_starting_another_is_waited_for;
    each of ["busybox", "debian-13"]:
    a_login_on_the_console_goes_on,
    every_kind_survives_a_suspend_and_a_checkpoint
];

/// Where the program and what it holds are in a server: in a directory that nothing else knows.
const PROGRAM: &str = "/opt/survivor";
const PLACE: &str = "/srv/survivor";

fn migratable<'s>(site: &'s Site, template: &str, flags: &str) -> Result<Running<'s>> {
    ability::lacks_for_checkpoints()?.map_or(Ok(()), |why| Err(skip(why)))?;
    let server = site.template(template)?.server("web1").with("--migratable").with(flags).start()?;
    if template != "busybox" {
        server.booted()?;
    }
    Ok(server)
}

/// Puts the program into the server.
fn push(site: &Site, server: &Running) -> Result<()> {
    let program = std::env::current_exe().context("find this program")?;
    server.sh(&format!("mkdir -p /opt {PLACE}"))?;
    site.ok(["push", server.name(), &program.display().to_string(), PROGRAM]).map(drop)
}

/// Has the program hold `kinds` in the server, all where none is named.
fn hold(site: &Site, server: &Running, kinds: &str) -> Result<()> {
    push(site, server)?;
    let command = format!("{PROGRAM} survivor hold {PLACE} {kinds}");
    if server.exec(&["test", "-x", "/bin/systemd-run"])?.code == 0 {
        server.sh(&format!("systemd-run --quiet --unit=survivor {command}"))?;
    } else {
        server.sh(&format!("setsid {command} >/dev/null 2>/run/survivor-log </dev/null &"))?;
    }
    server.until(&format!("test -S {PLACE}/ask")).map_err(|error| {
        let log = server.exec(&["sh", "-c", "cat /run/survivor-log || journalctl -u survivor --no-pager"]);
        error.context(log.map_or_else(|error| error.to_string(), |done| done.text() + &done.errors()))
    })
}

/// Each kind is as it was, or cannot be had there; says how many are.
fn all_are_well(site: &Site, server: &Running, when: &str) -> Result<usize> {
    let report = server.exec(&[PROGRAM, "survivor", "ask", PLACE])?.success()?.text();
    let lost: Vec<&str> = report
        .lines()
        .filter(|line| {
            let what = line.split_once(": ").map_or("", |(_, what)| what);
            what != AS_IT_WAS && !what.starts_with(NOT_HELD)
        })
        .collect();
    ensure!(lost.is_empty(), "{when}:\n  {}", lost.join("\n  "));
    report.lines().filter(|line| line.contains(NOT_HELD)).for_each(|line| site.note(line));
    Ok(report.lines().filter(|line| line.ends_with(AS_IT_WAS)).count())
}

/// A parent in vfork(2) cannot be stopped as long as its child stands still: two of three moments are such.
fn who_is_just_starting_another_is_waited_for(site: &Site) -> Result<()> {
    let server = migratable(site, "busybox", "")?;
    push(site, &server)?;
    server.sh(&format!("setsid {PROGRAM} survivor spawner {PLACE} >/dev/null 2>/run/survivor-log </dev/null &"))?;
    server.until(&format!("test -p {PLACE}/spawner"))?;
    for round in 1..=4 {
        site.ok(["suspend", "web1"]).with_context(|| format!("round {round}"))?;
        site.ok(["resume", "web1"]).with_context(|| format!("round {round}"))?;
        server.until("pidof survivor").with_context(|| format!("round {round}"))?;
    }
    ensure!(server.sh("cat /run/survivor-log")?.is_empty(), "it has ended");
    Ok(())
}

/// Pages of 2 MiB that the host keeps for whoever asks, as long as this is there.
struct HugePages {
    before: String,
}

impl HugePages {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";

    /// At least 4 more; how many there really are, the kernel says: kinds that want one are not held where there is none.
    fn reserve() -> Result<Self> {
        let before = std::fs::read_to_string(Self::FILE).context("read how many huge pages there are")?;
        let more = before.trim().parse::<u32>().context("a number of pages")? + 4;
        std::fs::write(Self::FILE, more.to_string()).context("reserve huge pages")?;
        Ok(Self { before })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::FILE, self.before.trim());
    }
}

fn every_kind_survives_a_suspend_and_a_checkpoint(site: &Site, template: &str) -> Result<()> {
    let _pages = HugePages::reserve()?;
    let server = migratable(site, template, "")?;
    hold(site, &server, "")?;
    let held = all_are_well(site, &server, "before anything")?;
    site.note(format!("{held} kinds are held"));
    ensure!(held >= 58, "only {held} kinds are held");
    let well = |when: &str| -> Result<()> {
        let now = all_are_well(site, &server, when)?;
        ensure!(now == held, "{when}: {now} kinds of {held}");
        Ok(())
    };
    well("once more")?;
    site.ok(["suspend", "web1"])?;
    // Time that it does not see pass.
    thread::sleep(Duration::from_secs(3));
    site.ok(["resume", "web1"])?;
    well("after a suspend and a resume")?;
    site.ok(["checkpoint", "create", "web1", "one", "--leave-running"])?;
    well("after a checkpoint that left it running")?;
    site.ok(["stop", "--kill", "web1"])?;
    site.ok(["checkpoint", "restore", "web1", "one"])?;
    well("after the checkpoint was restored")?;
    site.ok(["suspend", "web1"])?;
    site.ok(["resume", "web1"])?;
    well("after another suspend and resume")
}

fn what_no_checkpoint_holds_is_refused_by_its_name(site: &Site) -> Result<()> {
    let server = migratable(site, "busybox", "")?;
    for (kind, words) in [
        ("message-queue", &["mounted nowhere", "/survivor-open"][..]),
        ("message-queue-that-nobody-has-open", &["POSIX message queue", "/survivor-closed"]),
        ("tcp-listener-with-one-waiting", &["TCP port 7073", "not accepted"]),
        ("eventfd-that-is-a-semaphore", &["survivor", "eventfd"]),
        ("socket-to-the-hypervisor", &["survivor", "AF_VSOCK"]),
        ("removed-file-that-is-large", &["survivor", "removed", "more than 64 MiB", "(deleted)"]),
    ] {
        ensure!(refused().any(|known| known == kind), "no kind is {kind}");
        hold(site, &server, kind)?;
        for plan in [&["suspend", "web1"][..], &["suspend", "web1", "--plan"], &["checkpoint", "create", "web1"]] {
            site.run(plan.iter().copied())?.failure(5, words).with_context(|| kind.to_owned())?;
            ensure!(server.state()? == "running", "it is {} after {plan:?}", server.state()?);
        }
        server.sh(&format!("kill $(pidof survivor); rm -r {PLACE}"))?;
        server.until("! pidof survivor")?;
    }
    Ok(())
}

/// With what it had in its variables, and its terminal's keys still reach who is in the foreground.
fn a_login_on_the_console_goes_on(site: &Site, template: &str) -> Result<()> {
    ability::lacks_for_checkpoints()?.map_or(Ok(()), |why| Err(skip(why)))?;
    let draft = site.template(template)?.server("web1").with("--migratable --password-stdin");
    site.keep(site.vsctl(draft.command()).input("open sesame\n"))?.success()?;
    let server = Server::adopt(site, "web1").start()?;
    if template != "busybox" {
        server.booted()?;
    }
    let dialogue = |steps: &[(&str, &str)]| -> Result<()> {
        let mut console = server.terminal(&["console", "web1"])?;
        for (typed, shown) in steps {
            console.send(typed)?;
            console.expect(shown).with_context(|| format!("after {typed:?}"))?;
        }
        Ok(())
    };
    let pause = || site.ok(["suspend", "web1"]).and_then(|_| site.ok(["resume", "web1"])).map(drop);
    // A booted agetty has written it, and would throw away what is typed while it answers an empty line.
    let first = if template == "busybox" { "\r" } else { "" };
    dialogue(&[(first, "login:"), ("root\r", "assword:")])?;
    pause()?;
    // What is typed before a prompt is lost where login or agetty begin anew with the terminal.
    dialogue(&[("open sesame\r", "# "), ("word=kept; echo set-$((40+2))\r", "set-42"), ("", "# ")])?;
    if template == "busybox" {
        // Its shell has /dev/tty open for as long as it runs, and leads no session.
        site.run(["suspend", "web1"])?.failure(5, &["(-sh,", "/dev/tty"])?;
    } else {
        pause()?;
    }
    dialogue(&[
        ("echo $word-$((40+3))\r", "kept-43"),
        ("", "# "),
        ("sh -c 'echo front-$((40+1)); sleep 999'\r", "front-41"),
        ("\u{3}", "# "),
        ("echo back-$((40+4))\r", "back-44"),
        ("exit\r", "login:"),
    ])?;
    pause()?;
    dialogue(&[("\r", "login:")])
}

/// systemd hears its services as before: it tells them from others by their pids, not by pidfds, which come back as others.
fn its_services_are_still_heard(site: &Site) -> Result<()> {
    let server = migratable(site, "debian-13", "")?;
    let often = "d=/run/systemd/system/systemd-logind.service.d; mkdir -p $d; \
                 printf '[Service]\\nWatchdogSec=20s\\n' >$d/often.conf; \
                 systemctl daemon-reload; systemctl restart systemd-logind";
    server.sh(often)?;
    let shown = |what: &str| server.sh(&format!("systemctl show -P {what} systemd-logind"));
    let pid = shown("MainPID")?;
    site.ok(["suspend", "web1"])?;
    site.ok(["resume", "web1"])?;
    let heard = shown("WatchdogTimestampMonotonic")?;
    server
        .until(&format!("test $(systemctl show -P WatchdogTimestampMonotonic systemd-logind) != {}", heard.trim()))?;
    let now = shown("MainPID")?;
    ensure!(now == pid, "it was killed and started again: {pid} {now}");
    Ok(())
}

/// What is set for the server, and what its systemd has set for a service. (What they have used is counted anew.)
fn its_limits_hold_it_still(site: &Site) -> Result<()> {
    let server = migratable(site, "debian-13", "--memory 256M --cpus 1.5 --pids 222")?;
    let work = "while :; do i=$(($$i+1)); done";
    let given = "-p MemoryMax=33M -p TasksMax=17 -p CPUQuota=30% -p CPUWeight=77";
    server.sh(&format!("systemd-run --quiet --unit=limited {given} sh -c '{work}'"))?;
    let limits = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; cd system.slice/limited.service; \
                  cat memory.max pids.max cpu.max cpu.weight cgroup.procs cgroup.controllers";
    let before = server.sh(limits)?;
    ensure!(before.contains("34603008\n17\n30000 100000\n77\n"), "{before}");
    site.ok(["suspend", "web1"])?;
    site.ok(["resume", "web1"])?;
    let after = server.sh(limits)?;
    ensure!(after == before, "before: {before}\nafter: {after}");
    // It is held back still: the number is not only written there.
    server.until("grep -q '^nr_throttled [1-9]' /sys/fs/cgroup/system.slice/limited.service/cpu.stat")
}
