//! Checkpoints: what goes on after a suspend and a resume, and what stays when they are interrupted.

use std::{
    fs,
    io::Read,
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kernel::lock::Flock;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use system_tests::{
    ability,
    command::{eventually, patient, repeated},
    promise::skip,
    promises,
    server::{GUEST_LIMIT, Running},
    site::Site,
};

use crate::bad_input::SmallDisk;

#[path = "checkpoint/connections.rs"]
mod connections;

use connections::{
    a_connection_goes_on_after_resume, a_connection_that_it_made_goes_on, neighbours_are_told_where_it_is, stream_later,
};

promises![
    a_connection_goes_on_after_resume,
    a_connection_that_it_made_goes_on,
    a_console_goes_on_after_resume,
    neighbours_are_told_where_it_is,
    a_damaged_checkpoint_starts_nothing,
    what_cannot_be_dumped_is_named_and_goes_on,
    a_suspended_server_is_neither_running_nor_stopped,
    all_of_a_host_are_suspended_and_resumed,
    a_disk_that_is_full_lets_it_go_on,
    killed_at_any_moment_of_suspend_it_runs_or_is_suspended,
    killed_at_every_step_of_resume_it_stays_suspended,
    units_that_come_and_go_hinder_no_dump,
    suspended_and_resumed_again_and_again_nothing_is_lost,
    after_an_upgrade_it_goes_on_in_the_program_that_it_had,
    a_stopped_server_gets_the_disk_back_that_was_kept,
    a_disk_that_was_kept_and_is_damaged_is_not_given_back,
    killed_at_any_moment_of_a_restore_it_has_one_disk_or_the_other,
    of_several_checkpoints_each_brings_back_its_own_state,
    a_checkpoint_that_leaves_it_running_is_not_noticed,
    a_kept_checkpoint_that_is_damaged_or_of_another_spec_changes_nothing,
    killed_at_any_moment_a_checkpoint_is_whole_or_not_there;
    each of ["busybox", "debian-12", "debian-13"]:
    resumed_it_goes_on_where_it_was
];

/// Skips where CRIU cannot work.
fn needs_criu() -> Result<()> {
    ability::lacks_for_checkpoints()?.map_or(Ok(()), |why| Err(skip(why)))
}

/// A migratable server with a process that counts in its memory, and writes what it has come to into /run/count.
fn counting<'s>(site: &'s Site, template: &str) -> Result<Running<'s>> {
    needs_criu()?;
    let server = site.template(template)?.server("web1").with("--migratable").start()?;
    if template != "busybox" {
        server.booted()?;
    }
    count(&server, template)?;
    Ok(server)
}

fn count(server: &Running, template: &str) -> Result<()> {
    let script = "i=0; echo $$ >/run/counter; while :; do i=$((i+1)); echo $i >/run/new; mv /run/new /run/count; sleep 0.05; done";
    match template {
        // Away from the one who calls: nobody comes back whose terminal or pipe is outside.
        "busybox" => server.sh(&format!("setsid sh -c '{script}' >/dev/null 2>&1 </dev/null &"))?,
        _ => server.sh(&format!("systemd-run --quiet --unit=counter sh -c '{}'", script.replace('$', "$$")))?,
    };
    server.until("test -s /run/count")
}

fn counted(server: &Running) -> Result<(i32, u64)> {
    let text = server.sh("cat /run/counter /run/count")?;
    let mut lines = text.lines();
    let mut next = || lines.next().with_context(|| format!("two numbers: {text:?}"));
    Ok((next()?.parse()?, next()?.parse()?))
}

/// The counter is the same process and has lost nothing since `before`.
fn goes_on(server: &Running, before: (i32, u64)) -> Result<()> {
    let now = counted(server)?;
    ensure!(now.0 == before.0 && now.1 >= before.1, "it counts {now:?}, and had counted {before:?}");
    server.until(&format!("test $(cat /run/count) -gt {}", now.1))
}

fn resumed_it_goes_on_where_it_was(site: &Site, template: &str) -> Result<()> {
    let server = counting(site, template)?;
    server.sh("echo kept >/root/file; mkdir -p /run/mine && echo kept >/run/mine/file; hostname other")?;
    let seen = |what: &str| server.sh(what);
    let names = "hostname; cat /root/file /run/mine/file; ip addr show eth0 | grep -w inet; ip route; id; \
                 grep MemTotal /proc/meminfo; nproc; find /sys/fs/cgroup -type d | grep -v vsos | sort | grep -c .";
    let (before, counted_before) = (seen(names)?, counted(&server)?);
    let uptime = |server: &Running| -> Result<f64> { Ok(server.sh("cut -d ' ' -f 1 /proc/uptime")?.parse()?) };
    let up = uptime(&server)?;
    ensure!(site.ok(["suspend", "web1", "--plan"])?.text().ends_with("end web1") && server.state()? == "running");
    site.ok(["suspend", "web1"])?;
    ensure!(server.state()? == "suspended", "it is {}", server.state()?);
    ensure!(site.ok(["resume", "web1", "--plan"])?.text().contains("restore the processes of web1 from "));
    ensure!(server.state()? == "suspended", "a plan has changed it to {}", server.state()?);
    let listed = site.ok(["list", "-a"])?.text();
    ensure!(listed.contains("suspended"), "{listed}");
    // Time that it does not see pass.
    thread::sleep(Duration::from_secs(3));
    site.ok(["resume", "web1"])?;
    ensure!(server.state()? == "running", "it is {}", server.state()?);
    goes_on(&server, counted_before)?;
    let after = seen(names)?;
    ensure!(after == before, "before: {before}\nafter: {after}");
    // Its clock stood still.
    let status = server.status()?;
    let told = status["uptime_s"].as_f64().context("no uptime")?;
    let now = uptime(&server)?;
    ensure!(
        now >= up && (told - now).abs() < patient(Duration::from_secs(2)).as_secs_f64(),
        "{up}, then {now}; {told}"
    );
    server.sh("ping -c 1 -w 20 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')")?;
    if template != "busybox" {
        ensure!(server.sh("systemctl is-system-running")? == "running");
        let group = server.sh("cat /proc/$(cat /run/counter)/cgroup")?;
        ensure!(group.contains("counter.service"), "{group}");
    }
    // What belongs to a running server does.
    let init = server.init_pid()?;
    ensure!(site.ok(["exec", "web1", "--", "echo", "alive"])?.text() == "alive");
    site.ok(["freeze", "web1"])?;
    site.ok(["thaw", "web1"])?;
    let _ = server.exec(&["reboot"])?;
    ensure!(server.next_init(init)? != init && server.sh("cat /root/file")? == "kept");
    Ok(())
}

fn a_console_goes_on_after_resume(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    site.ok(["suspend", "web1"])?;
    site.ok(["resume", "web1"])?;
    let mut console = server.terminal(&["console", "web1"])?;
    server.sh("echo written-to-the-console >/dev/console")?;
    console.expect("written-to-the-console")?;
    console.send("\r")?;
    console.expect("login:")?;
    Ok(())
}

fn a_damaged_checkpoint_starts_nothing(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    server.sh("setsid sh -c 'while :; do echo >/var/beat; sleep 0.05; done' >/dev/null 2>&1 </dev/null &")?;
    // CRIU leaves a name of its own for it in the volume, which one restore alone can use.
    let open = "echo >/var/one; ln /var/one /var/other; exec 3</var/one; rm /var/one; while :; do sleep 9; done";
    server.sh(&format!("setsid sh -c '{open}' >/dev/null 2>&1 </dev/null &"))?;
    server.until("test -e /var/beat && test -e /var/other && test ! -e /var/one")?;
    let before = counted(&server)?;
    site.ok(["suspend", "web1"])?;
    let (images, log) = (server.directory().join("volume/suspended"), server.directory().join("criu-restore.log"));
    let beat = || -> Result<_> { Ok(fs::metadata(server.directory().join("volume/upper/var/beat"))?.modified()?) };
    let last = beat()?;
    let largest = |kind: &str| -> Result<(PathBuf, Vec<u8>)> {
        let all = fs::read_dir(&images)?.flatten().map(|entry| entry.path());
        let of_kind = all.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(kind)));
        let file = of_kind.max_by_key(|path| path.metadata().map_or(0, |found| found.len()));
        let file = file.with_context(|| format!("no image {kind}"))?;
        let content = fs::read(&file)?;
        Ok((file, content))
    };
    let flipped = |whole: &[u8]| {
        let mut flipped = whole.to_vec();
        flipped[whole.len() / 2] ^= 1;
        flipped
    };
    let refused = |file: &Path, broken: &[u8]| -> Result<()> {
        fs::write(file, broken)?;
        site.run(["resume", "web1"])?.complains(&["damaged", &file.display().to_string(), "nothing was started"])?;
        ensure!(server.state()? == "suspended" && beat()? == last, "it is {}, and has run", server.state()?);
        Ok(())
    };
    // What CRIU acts on is compared before it is run, memory while it reads it.
    let (core, whole) = largest("core-")?;
    refused(&core, &flipped(&whole))?;
    fs::write(&core, &whole)?;
    let (file, whole) = largest("pages-")?;
    refused(&file, &whole[..whole.len() / 2])?;
    ensure!(!log.exists(), "criu was run");
    refused(&file, &flipped(&whole))?;
    ensure!(log.exists(), "criu waited for the checksum of the memory");
    fs::remove_file(&file)?;
    site.run(["resume", "web1"])?.complains(&["damaged", "missing"])?;
    fs::write(&file, &whole)?;
    site.ok(["resume", "web1"])?;
    goes_on(&server, before)
}

fn what_cannot_be_dumped_is_named_and_goes_on(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    let before = counted(&server)?;
    server.sh("setsid sh -c 'exec 9</proc/meminfo; exec sleep 1000' >/dev/null 2>&1 </dev/null &")?;
    server.until("pidof sleep")?;
    let done = eventually("the file to be open", GUEST_LIMIT, || {
        let done = site.run(["suspend", "web1"]).ok()?;
        (done.code == 5).then_some(done).or_else(|| site.run(["resume", "web1"]).map(|_| None).ok()?)
    })?;
    done.complains(&["web1", "sleep", "FUSE", "/proc/meminfo"])?;
    site.run(["suspend", "web1", "--plan"])?.complains(&["web1", "sleep", "FUSE", "/proc/meminfo"])?;
    goes_on(&server, before)?;
    server.sh("kill $(pidof sleep | tr ' ' '\\n' | while read p; do test -e /proc/$p/fd/9 && echo $p; done)")?;
    // A visitor, too.
    let mut visitor = server.spawn(&["exec", "web1", "--", "sh", "-c", "echo here; sleep 1000"])?;
    server.until("ps | grep -q '[s]leep 1000'")?;
    site.run(["suspend", "web1"])?.complains(&["come in from outside"])?;
    server.sh("kill $(ps | awk '/[s]leep 1000/ { print $1 }')")?;
    visitor.wait()?;
    let other = site.template("busybox")?.server("web2").start()?;
    site.run(["suspend", "web2"])?.complains(&["migratable=true"])?;
    ensure!(other.state()? == "running");
    site.ok(["suspend", "web1"])?;
    site.ok(["resume", "web1"])?;
    goes_on(&server, before)
}

fn a_suspended_server_is_neither_running_nor_stopped(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    site.run(["resume", "web1"])?.complains(&["is not suspended, it is running"])?;
    site.ok(["suspend", "web1"])?;
    for (command, code) in [
        (&["start", "web1"][..], 32),
        (&["suspend", "web1"], 31),
        (&["stop", "web1"], 31),
        (&["exec", "web1", "--", "true"], 31),
        (&["freeze", "web1"], 31),
    ] {
        let done = site.run(command.iter().copied())?;
        ensure!(done.code == code, "{done}");
    }
    site.run(["start", "web1"])?.complains(&["vsctl resume web1", "--discard"])?;
    ensure!(server.state()? == "suspended");
    site.ok(["start", "--discard", "web1"])?;
    server.sh("! test -e /run/count")?;
    site.ok(["suspend", "web1"])?;
    site.ok(["set", "web1", "autostart=true"])?;
    site.ok(["autostart"])?;
    ensure!(server.state()? == "running", "it is {}", server.state()?);
    site.ok(["suspend", "web1"])?;
    site.ok(["destroy", "web1"])?;
    ensure!(!server.directory().exists());
    Ok(())
}

fn all_of_a_host_are_suspended_and_resumed(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    let other = site.template("busybox")?.server("web2").start()?;
    let third = site.template("busybox")?.server("web3").with("--migratable").start()?;
    let before = counted(&server)?;
    let planned = site.ok(["host", "suspend-all", "--plan"])?.text();
    ensure!(planned == "suspend web1\nsuspend web2\nsuspend web3" && server.state()? == "running", "{planned}");
    // One that cannot be suspended is told, and keeps no other from it.
    site.run(["host", "suspend-all"])?.failure(5, &["'web2' was not started for checkpoints"])?;
    ensure!((server.state()?.as_str(), other.state()?.as_str()) == ("suspended", "running"));
    ensure!(third.state()? == "suspended");
    ensure!(site.ok(["host", "resume-all", "--plan"])?.text() == "resume web1\nresume web3");
    site.ok(["host", "resume-all"])?;
    goes_on(&server, before)?;
    ensure!(third.sh("echo there")? == "there");
    // Nor is a frozen one passed over.
    site.ok(["freeze", "web3"])?;
    site.run(["host", "suspend-all"])?.complains(&["'web3' is frozen", "thaw"])?;
    ensure!((server.state()?.as_str(), third.state()?.as_str()) == ("suspended", "frozen"));
    site.ok(["thaw", "web3"])?;
    site.ok(["host", "resume-all"])?;
    // Told to end, the command tells all that it has begun, and none is left between.
    for after_ms in [5, 50, 200, 500] {
        let mut command = site.vsctl(["suspend", "web1", "web3"]).spawn()?;
        thread::sleep(Duration::from_millis(after_ms));
        let told = kill(Pid::from_raw(command.pid()), Signal::SIGTERM);
        let done = command.wait()?;
        let is_over = [&server, &third].map(|server| server.state()).into_iter().collect::<Result<Vec<_>>>()?;
        let is_known = |state: &String| ["running", "suspended"].contains(&state.as_str());
        ensure!(is_over.iter().all(is_known), "after {after_ms} ms: {is_over:?}: {done}");
        // Before it has looked for the first time it ends as any program does.
        let is_called_off = done.code == 130 || done.code == 128 + 15;
        ensure!(is_called_off || told.is_err() || !is_over.contains(&"running".to_owned()), "{done}");
        site.ok(["doctor"])?;
        site.ok(["host", "resume-all"])?;
    }
    goes_on(&server, before)
}

fn a_disk_that_is_full_lets_it_go_on(site: &Site) -> Result<()> {
    needs_criu()?;
    let _small = SmallDisk::at(site, "var/lib/vsos/servers", 24 << 20)?;
    let server = counting(site, "busybox")?;
    server.sh("head -c 30000000 /dev/urandom >/dev/shm/much")?;
    let before = counted(&server)?;
    for command in [&["suspend", "web1"][..], &["checkpoint", "create", "web1", "one", "--leave-running"]] {
        site.run(command)?.failure(46, &["the disk is full"])?;
        goes_on(&server, before).with_context(|| command.join(" "))?;
        site.ok(["doctor"])?;
    }
    server.sh("rm /dev/shm/much")?;
    site.ok(["suspend", "web1"])?;
    site.ok(["resume", "web1"])?;
    goes_on(&server, before)
}

/// After a kill: mended, the server runs or is suspended, and in the end it counts on.
fn mended(site: &Site, server: &Running, before: (i32, u64)) -> Result<String> {
    // CRIU goes on without the command, puts back what it had begun, and holds the lock until then.
    let lock = site.path("run/vsos/lock/web1");
    eventually("the end of CRIU", GUEST_LIMIT, || Flock::try_exclusive(&lock).ok().flatten())?;
    site.ok(["doctor", "--fix"])?;
    let state = server.settled_state()?;
    match state.as_str() {
        "running" => {}
        "frozen" => drop(site.ok(["thaw", "web1"])?),
        "suspended" => drop(site.ok(["resume", "web1"])?),
        other => anyhow::bail!("it is {other}"),
    }
    goes_on(server, before)?;
    server.sh("ping -c 1 -w 20 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')")?;
    for left in ["suspended", "suspended.new", "suspended.used"] {
        ensure!(!server.directory().join("volume").join(left).exists(), "{left} was left, it was {state}");
    }
    Ok(state)
}

fn killed_at_any_moment_of_suspend_it_runs_or_is_suspended(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    let began = std::time::Instant::now();
    site.ok(["suspend", "web1"])?;
    let whole = began.elapsed();
    site.ok(["resume", "web1"])?;
    let mut seen = Vec::new();
    let parts = repeated(6).min(12);
    for part in 1..=parts {
        let before = counted(&server)?;
        let mut command = site.vsctl(["suspend", "web1"]).spawn()?;
        thread::sleep(whole * part / parts);
        command.kill();
        seen.push(mended(site, &server, before).with_context(|| format!("killed after {part}/{parts} of {whole:?}"))?);
    }
    site.note(format!("afterwards it was {seen:?}"));
    Ok(())
}

fn killed_at_every_step_of_resume_it_stays_suspended(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    // In short every second of them, from the first.
    for step in (1..=40).step_by(if repeated(1) > 1 { 1 } else { 2 }) {
        let before = counted(&server)?;
        site.ok(["suspend", "web1"])?;
        let done = site.keep(site.vsctl(["resume", "web1"]).env("VSOS_FAULT", format!("start:{step}:kill")))?;
        if done.code == 0 {
            ensure!(step > 8, "a plan of {step} steps");
            return goes_on(&server, before);
        }
        let state = mended(site, &server, before).with_context(|| format!("killed before step {step}"))?;
        ensure!(state == "suspended", "it was {state} after a kill before step {step}");
    }
    anyhow::bail!("no end of steps")
}

/// systemd watches the control groups of its units, and a dump may find it between the end of one and the end of the watch, a message
/// on its way whose sender the kernel has noted, or a unit's program that it is just about to execute by way of another.
fn units_that_come_and_go_hinder_no_dump(site: &Site) -> Result<()> {
    let server = counting(site, "debian-13")?;
    let churn = "while :; do systemd-run --quiet --wait --collect true; done";
    server.sh(&format!("setsid sh -c '{churn}' >/dev/null 2>&1 </dev/null &"))?;
    for round in 1..=repeated(3) {
        let before = counted(&server)?;
        site.ok(["suspend", "web1"]).with_context(|| format!("round {round}"))?;
        site.ok(["resume", "web1"]).with_context(|| format!("round {round}"))?;
        goes_on(&server, before).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

fn suspended_and_resumed_again_and_again_nothing_is_lost(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    let kept = |server: &Running| {
        server.sh("ls /proc/1/fd | wc -l; grep -c . /proc/self/mountinfo; ls /tmp /run | grep -vx new")
    };
    let (begun, mut before) = (kept(&server)?, counted(&server)?);
    let rounds = repeated(10);
    for round in 1..=rounds {
        site.ok(["suspend", "web1"]).with_context(|| format!("round {round}"))?;
        site.ok(["resume", "web1"]).with_context(|| format!("round {round}"))?;
        goes_on(&server, before).with_context(|| format!("round {round}"))?;
        before = counted(&server)?;
    }
    let ended = kept(&server)?;
    ensure!(ended == begun, "at first: {begun}\nafter {rounds} times: {ended}");
    Ok(())
}

fn after_an_upgrade_it_goes_on_in_the_program_that_it_had(site: &Site) -> Result<()> {
    needs_criu()?;
    let (programs, built) = (site.path("programs"), fs::read(system_tests::site::programs()?.join("vsinit"))?);
    fs::create_dir_all(&programs)?;
    fs::create_dir_all(site.path("etc/vsos"))?;
    fs::write(site.path("etc/vsos/vsos.toml"), format!("programs = {programs:?}\n"))?;
    // As a package does it: the old file is in use.
    let install = |build: &[u8]| -> Result<()> {
        let (new, program) = (programs.join("new"), programs.join("vsinit"));
        fs::write(&new, build)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
        Ok(fs::rename(&new, &program)?)
    };
    install(&built)?;
    let server = counting(site, "busybox")?;
    // A build of another length is none that CRIU takes for the same.
    let next = [&built[..], b"upgraded"].concat();
    let has = |build: &[u8]| -> Result<()> {
        let length: usize = server.sh("stat -c %s /sbin/vsinit")?.parse()?;
        ensure!(length == build.len(), "its init has {length} bytes");
        Ok(())
    };
    let mut before = counted(&server)?;
    // The second time it brings its program along, which this host has nowhere else.
    for round in 1..=2 {
        site.ok(["suspend", "web1"])?;
        install(&next)?;
        site.ok(["resume", "web1"]).with_context(|| format!("round {round}"))?;
        goes_on(&server, before)?;
        has(&built)?;
        before = counted(&server)?;
    }
    site.ok(["service", "web1", "list"])?;
    site.ok(["suspend", "web1"])?;
    let kept = site.path("var/lib/vsos/servers/web1/volume/suspended/vsinit");
    ensure!(fs::read(&kept)? == built, "something else was kept");
    fs::write(&kept, &next)?;
    site.run(["resume", "web1"])?.complains(&["vsinit has", "--discard"])?;
    fs::write(&kept, &built)?;
    site.ok(["resume", "web1"])?;
    goes_on(&server, before)?;
    // Booted anew, it has what the host has now.
    let init = server.init_pid()?;
    let _ = server.exec(&["reboot"])?;
    server.next_init(init)?;
    has(&next)
}

/// The only column of a list that scripts need.
fn labels(site: &Site) -> Result<Vec<String>> {
    let all = site.json(["checkpoint", "list", "web1", "--json"])?;
    let label = |kept: &serde_json::Value| Some(kept["label"].as_str()?.to_owned());
    all.as_array().into_iter().flatten().map(label).collect::<Option<_>>().with_context(|| format!("labels: {all}"))
}

fn a_stopped_server_gets_the_disk_back_that_was_kept(site: &Site) -> Result<()> {
    for kind in ["overlay", "dir"] {
        let server = site.template("busybox")?.server("web1").with(&format!("--volume {kind}")).start()?;
        // What a copy could lose: links, owners, holes, and that a file of the template is gone.
        server.sh(
            "mkdir /root/d; echo one >/root/d/file; ln /root/d/file /root/d/same; chown 7:8 /root/d/file; \
             ln -s file /root/d/link; dd if=/dev/zero of=/root/d/hole bs=1 count=1 seek=9999999 2>/dev/null; rm /etc/hosts",
        )?;
        let look = "cd /root/d; ls -ln . | sed 1d | awk '{ print $1, $2, $3, $4, $5, $9, $11 }'; cat file; test file -ef same && echo linked; \
                    test $(du -k hole | cut -f 1) -lt 1000 && echo sparse; test -e /etc/hosts || echo gone";
        let before = server.sh(look)?;
        ensure!(["one", "linked", "sparse", "gone"].iter().all(|word| before.contains(word)), "{before}");
        site.run(["checkpoint", "create", "web1", "no", "--leave-running"])?.complains(&["migratable=true"])?;
        ensure!(server.state()? == "running" && labels(site)?.is_empty());
        site.ok(["stop", "web1"])?;
        let plan = site.ok(["checkpoint", "create", "web1", "first", "--plan"])?.text();
        ensure!(plan.contains("copy ") && !plan.contains("dump") && labels(site)?.is_empty(), "{plan}");
        ensure!(site.ok(["checkpoint", "create", "web1", "first"])?.text() == "first");
        site.run(["checkpoint", "create", "web1", "first"])?.failure(43, &["'first' already", "another label"])?;
        site.run(["checkpoint", "create", "web1", "../x"])?.failure(20, &["../x"])?;
        let named = site.ok(["checkpoint", "create", "web1"])?.text();
        ensure!(labels(site)?.len() == 2 && labels(site)?.contains(&named), "{named}: {:?}", labels(site)?);
        let listed = site.json(["checkpoint", "list", "web1", "--json"])?;
        ensure!(listed[0]["kind"] == "disk" && listed[0]["memory_bytes"].is_null(), "{listed}");
        for round in 1..=2 {
            site.ok(["start", "web1"])?;
            site.run(["checkpoint", "restore", "web1", "first"])?
                .failure(32, &["'web1' is running", "vsctl stop web1"])?;
            server.sh(
                "echo two >/root/d/file; rm /root/d/same /root/d/link; echo back >/etc/hosts; echo new >/root/new",
            )?;
            site.ok(["stop", "web1"])?;
            let plan = site.ok(["checkpoint", "restore", "web1", "first", "--plan"])?.text();
            ensure!(plan.contains("exchange") && !plan.contains("resume"), "{plan}");
            site.ok(["checkpoint", "restore", "web1", "first"])?;
            ensure!(server.state()? == "stopped", "it is {}", server.state()?);
            site.ok(["start", "web1"])?;
            let after = server.sh(look)?;
            ensure!(after == before, "{kind}, round {round}: before: {before}\nafter: {after}");
            server.sh("! test -e /root/new")?;
            site.ok(["stop", "web1"])?;
        }
        site.run(["checkpoint", "restore", "web1", "second"])?
            .complains(&["no checkpoint 'second'", "checkpoint list web1"])?;
        site.ok(["checkpoint", "delete", "web1", "first", "--plan"])?;
        ensure!(labels(site)?.len() == 2);
        // Its name is in no image.
        site.ok(["rename", "web1", "web2"])?;
        site.ok(["checkpoint", "restore", "web2", "first"])?;
        site.ok(["rename", "web2", "web1"])?;
        site.ok(["checkpoint", "delete", "web1", "first", &named])?;
        ensure!(labels(site)?.is_empty());
        site.run(["checkpoint", "delete", "web1", "first"])?.complains(&["no checkpoint 'first'"])?;
        site.ok(["checkpoint", "create", "web1"])?;
        site.ok(["destroy", "web1"])?;
        ensure!(!server.directory().exists());
    }
    Ok(())
}

fn a_disk_that_was_kept_and_is_damaged_is_not_given_back(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/file; sync")?;
    site.ok(["stop", "web1"])?;
    site.ok(["checkpoint", "create", "web1", "one"])?;
    let file = server.directory().join("checkpoints/one/volume/upper/root/file");
    fs::write(&file, "other")?;
    let refused = |words: &[&str]| -> Result<()> {
        for plan in [&[][..], &["--plan"]] {
            site.run([&["checkpoint", "restore", "web1", "one"], plan].concat())?.complains(words)?;
        }
        ensure!(fs::read_to_string(server.directory().join("volume/upper/root/file"))? == "kept\n");
        ensure!(!server.directory().join("volume.new").exists());
        Ok(())
    };
    refused(&["damaged", "volume/upper", "nothing was changed"])?;
    fs::remove_file(&file)?;
    refused(&["damaged"])?;
    let record = server.directory().join("checkpoints/one/record.toml");
    fs::write(&record, "version = 9")?;
    refused(&["record.toml"])?;
    site.run(["checkpoint", "list", "web1"])?.failure(14, &["record.toml"])?;
    site.ok(["checkpoint", "delete", "web1", "one"])?;
    ensure!(labels(site)?.is_empty());
    Ok(())
}

fn killed_at_any_moment_of_a_restore_it_has_one_disk_or_the_other(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    // Enough that the copy takes a while.
    server.sh("mkdir /root/d; for i in $(seq 1 400); do echo one >/root/d/$i; done")?;
    site.ok(["stop", "web1"])?;
    site.ok(["checkpoint", "create", "web1", "one"])?;
    let files = || -> Result<Vec<String>> {
        let files = fs::read_dir(server.directory().join("volume/upper/root/d"))?;
        files.map(|file| Ok(fs::read_to_string(file?.path())?)).collect()
    };
    let began = std::time::Instant::now();
    site.ok(["checkpoint", "restore", "web1", "one"])?;
    let whole = began.elapsed();
    let mut seen = Vec::new();
    let parts = repeated(6).min(12);
    for part in 1..=parts {
        for file in fs::read_dir(server.directory().join("volume/upper/root/d"))? {
            fs::write(file?.path(), "two\n")?;
        }
        let mut command = site.vsctl(["checkpoint", "restore", "web1", "one"]).spawn()?;
        thread::sleep(whole * part / parts);
        command.kill();
        let found = files()?;
        ensure!(
            found.len() == 400 && found.iter().all(|text| *text == found[0]),
            "killed after {part}/{parts}: {found:?}"
        );
        seen.push(found[0].trim().to_owned());
        // One round in two is left to the next command.
        if part % 2 == 0 {
            site.ok(["doctor", "--fix"])?;
            ensure!(!server.directory().join("volume.new").exists(), "killed after {part}/{parts}");
        }
    }
    site.note(format!("it had the disk {seen:?}"));
    ensure!(seen.contains(&"two".to_owned()), "each kill came too late: {seen:?}");
    site.ok(["checkpoint", "restore", "web1", "one"])?;
    ensure!(files()?.iter().all(|text| text == "one\n") && !server.directory().join("volume.new").exists());
    site.ok(["start", "web1"])?;
    ensure!(server.sh("cat /root/d/7")? == "one");
    Ok(())
}

fn of_several_checkpoints_each_brings_back_its_own_state(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    server.sh("echo first >/root/file")?;
    // An open file without a name is in the images.
    let held =
        "echo $$ >/run/holder; exec 9<>/root/gone; echo nameless >&9; rm /root/gone; while :; do sleep 1000; done";
    server.sh(&format!("setsid sh -c '{held}' >/dev/null 2>&1 </dev/null &"))?;
    let nameless = "! test -e /root/gone && grep -q nameless /proc/$(cat /run/holder)/fd/9";
    server.until(nameless)?;
    let first = counted(&server)?;
    ensure!(site.ok(["checkpoint", "create", "web1", "first"])?.text() == "first");
    ensure!(server.state()? == "stopped", "it is {}", server.state()?);
    let at_first = || -> Result<(i32, u64)> {
        ensure!(server.state()? == "running", "it is {}", server.state()?);
        ensure!(server.sh("cat /root/file")? == "first");
        let now = counted(&server)?;
        ensure!(now.0 == first.0 && now.1 >= first.1, "it counts {now:?}, and had counted {first:?}");
        goes_on(&server, now)?;
        counted(&server)
    };
    site.ok(["checkpoint", "restore", "web1", "first"])?;
    let second = at_first()?;
    server.sh("echo second >/root/file; echo more >/root/more")?;
    // Far behind where the first was made.
    server.until(&format!("test $(cat /run/count) -gt {}", second.1 + 300))?;
    let second = counted(&server)?;
    site.ok(["checkpoint", "create", "web1", "second", "--leave-running"])?;
    goes_on(&server, second)?;
    site.ok(["suspend", "web1"])?;
    // Both have a place: a suspended server's state is copied.
    site.ok(["checkpoint", "create", "web1", "third"])?;
    ensure!(server.state()? == "suspended", "it is {}", server.state()?);
    ensure!(labels(site)? == ["first", "second", "third"], "{:?}", labels(site)?);
    let listed = site.json(["checkpoint", "list", "web1", "--json"])?;
    ensure!(listed[0]["kind"] == "memory+disk" && listed[0]["memory_bytes"].as_u64() > Some(100_000), "{listed}");
    site.run(["checkpoint", "restore", "web1", "first"])?.failure(32, &["suspended", "--discard"])?;
    ensure!(server.state()? == "suspended" && !server.directory().join("volume.new").exists());
    // The older, and again.
    for _ in 0..2 {
        site.ok(["checkpoint", "restore", "web1", "first", "--discard"])?;
        let now = at_first()?;
        ensure!(now.1 < second.1, "it counts {now:?}, and should be before {second:?}");
        server.sh(&format!("! test -e /root/more && {nameless}"))?;
        server.sh("ping -c 1 -w 20 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')")?;
        site.ok(["stop", "--kill", "web1"])?;
    }
    for label in ["second", "third"] {
        site.ok(["checkpoint", "restore", "web1", label])?;
        ensure!(server.sh("cat /root/file /root/more")? == "second\nmore");
        goes_on(&server, second)?;
        site.ok(["stop", "--kill", "web1"])?;
    }
    site.run(["rename", "web1", "web2"])?.complains(&["checkpoints", "vsctl checkpoint delete web1"])?;
    let left = site.ok(["doctor"])?.text();
    ensure!(!left.contains("of no use"), "{left}");
    Ok(())
}

fn a_checkpoint_that_leaves_it_running_is_not_noticed(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    server.sh("setsid nc -l -p 7000 -e cat >/dev/null 2>&1 </dev/null &")?;
    let address = server.ipv4()?;
    let mut stream = eventually("a connection", GUEST_LIMIT, || TcpStream::connect((address.as_str(), 7000)).ok())?;
    stream.set_read_timeout(Some(patient(GUEST_LIMIT)))?;
    let init = server.init_pid()?;
    let kept =
        || server.sh("ls /proc/1/fd | wc -l; grep -c . /proc/self/mountinfo; ls -a /root /tmp /run | grep -vx new");
    let begun = kept()?;
    for label in ["one", "two", "three"] {
        let before = counted(&server)?;
        let mut command = site.vsctl(["checkpoint", "create", "web1", label, "--leave-running"]).spawn()?;
        stream_later(&mut stream, label.as_bytes())?;
        command.wait()?.success()?;
        ensure!(server.state()? == "running" && server.init_pid()? == init, "it is {}", server.state()?);
        goes_on(&server, before)?;
        let mut answer = vec![0; label.len()];
        stream.read_exact(&mut answer).with_context(|| format!("the echo of {label}"))?;
        ensure!(answer == label.as_bytes());
    }
    let ended = kept()?;
    ensure!(ended == begun, "at first: {begun}\nafter three times: {ended}");
    // Both ends are closed, or the kernel would try for minutes to say so where the server was, and keep its control group.
    drop(stream);
    server.until("! pidof nc")?;
    // Its monitor is the one that it had, and still takes it back.
    let _ = server.exec(&["poweroff"])?;
    server.reaches("stopped")?;
    ensure!(site.ok(["doctor"])?.text().matches("of no use").count() == 0);
    Ok(())
}

fn a_kept_checkpoint_that_is_damaged_or_of_another_spec_changes_nothing(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    server.sh("echo kept >/root/file")?;
    let before = counted(&server)?;
    site.ok(["checkpoint", "create", "web1", "one"])?;
    site.ok(["start", "web1"])?;
    server.sh("echo later >/root/file; sync")?;
    site.ok(["stop", "web1"])?;
    let refused = |words: &[&str]| -> Result<()> {
        site.run(["checkpoint", "restore", "web1", "one"])?.complains(words)?;
        ensure!(server.state()? == "stopped", "it is {}", server.state()?);
        ensure!(fs::read_to_string(server.directory().join("volume/upper/root/file"))? == "later\n");
        Ok(())
    };
    let images = server.directory().join("checkpoints/one/volume/suspended");
    let pages = fs::read_dir(&images)?.flatten().map(|entry| entry.path());
    let file = pages.filter(|path| path.to_string_lossy().contains("pages-")).min().context("no pages")?;
    let whole = fs::read(&file)?;
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    fs::write(&file, &flipped)?;
    refused(&["damaged", &file.display().to_string(), "nothing was changed"])?;
    fs::write(&file, &whole)?;
    site.ok(["set", "web1", "memory=77M", "autostart=true"])?;
    refused(&["another spec", "memory", "vsctl set web1 memory=`"])?;
    site.ok(["set", "web1", "memory="])?;
    site.ok(["checkpoint", "restore", "web1", "one"])?;
    ensure!(server.sh("cat /root/file")? == "kept");
    goes_on(&server, before)
}

fn killed_at_any_moment_a_checkpoint_is_whole_or_not_there(site: &Site) -> Result<()> {
    let server = counting(site, "busybox")?;
    let began = std::time::Instant::now();
    site.ok(["checkpoint", "create", "web1", "whole", "--leave-running"])?;
    let whole = began.elapsed();
    let mut seen = Vec::new();
    let parts = repeated(6).min(12);
    for part in 1..=parts {
        let before = counted(&server)?;
        server.sh(&format!("echo {part} >/root/file"))?;
        let mut arguments = vec!["checkpoint", "create", "web1", "one"];
        // With and without an end behind it.
        arguments.extend((part % 2 == 0).then_some("--leave-running"));
        let mut command = site.vsctl(arguments).spawn()?;
        thread::sleep(whole * part / parts);
        command.kill();
        let lock = site.path("run/vsos/lock/web1");
        eventually("the end of CRIU", GUEST_LIMIT, || Flock::try_exclusive(&lock).ok().flatten())?;
        site.ok(["doctor", "--fix"])?;
        let (state, is_kept) = (server.settled_state()?, labels(site)?.contains(&"one".to_owned()));
        seen.push(format!("{state}{}", if is_kept { "+" } else { "" }));
        let entries = fs::read_dir(server.directory().join("checkpoints"))?.count();
        ensure!(entries == 1 + usize::from(is_kept), "{entries} after {seen:?}");
        match state.as_str() {
            "running" => {}
            "frozen" => drop(site.ok(["thaw", "web1"])?),
            // It ends only when there is a checkpoint.
            "stopped" if is_kept => drop(site.ok(["checkpoint", "restore", "web1", "one"])?),
            other => anyhow::bail!("it is {other} after {seen:?}"),
        }
        goes_on(&server, before).with_context(|| format!("{seen:?}"))?;
        server.sh("ping -c 1 -w 20 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')")?;
        if is_kept {
            site.ok(["stop", "--kill", "web1"])?;
            site.ok(["checkpoint", "restore", "web1", "one"])?;
            ensure!(server.sh("cat /root/file")? == part.to_string());
            goes_on(&server, before).with_context(|| format!("restored, {seen:?}"))?;
            site.ok(["checkpoint", "delete", "web1", "one"])?;
        }
    }
    site.note(format!("afterwards it was {seen:?}"));
    ensure!(seen.iter().any(|was| !was.ends_with('+')), "each kill came too late: {seen:?}");
    // And a restore, at its steps.
    let before = counted(&server)?;
    site.ok(["checkpoint", "create", "web1", "one"])?;
    for step in [1, 4, 8, 12] {
        let call = site.vsctl(["checkpoint", "restore", "web1", "one", "--discard"]);
        let _ = site.keep(call.env("VSOS_FAULT", format!("start:{step}:kill")))?;
        site.ok(["doctor", "--fix"])?;
        ensure!(server.settled_state()? == "suspended", "killed before step {step}: {}", server.state()?);
        site.ok(["resume", "web1"])?;
        goes_on(&server, before)?;
        site.ok(["stop", "--kill", "web1"])?;
    }
    Ok(())
}
