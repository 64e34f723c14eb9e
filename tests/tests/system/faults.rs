//! Faults: whatever dies or fails, the next command finds its way, and nothing is left behind.
//!
//! `VSOS_FAULT=<plan>:<n>:kill|fail` makes `vsctl` kill itself at, or fail, step n of a plan.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use system_tests::{
    ability,
    command::{Finished, eventually, kill_hard, patient},
    host::{HostState, Scope},
    promise::skip,
    promises,
    server::{GUEST_LIMIT, Running, Server},
    site::Site,
};

promises![
    killed_at_every_step_of_create_doctor_mends_it,
    killed_at_every_step_of_start_doctor_mends_it,
    killed_while_what_servers_share_is_set_up_doctor_mends_it,
    killed_at_every_step_of_stop_doctor_mends_it,
    killed_at_every_step_of_destroy_doctor_mends_it,
    a_create_that_fails_at_any_step_leaves_nothing,
    a_start_that_fails_at_any_step_leaves_nothing,
    a_first_start_that_fails_to_set_up_the_host_leaves_nothing,
    killed_anywhere_the_next_command_copes_without_doctor,
    start_and_stop_at_once_a_hundred_times,
    two_starts_at_once,
    two_destroys_at_once,
    two_creates_of_one_name_at_once,
    the_last_destroy_takes_nothing_from_a_server_that_comes_meanwhile,
    a_killed_monitor_harms_no_server,
    a_monitor_that_was_told_nothing_does_not_hold_up_the_last_destroy,
    consoles_of_a_distribution_outlive_monitor_and_supervisor,
    a_killed_init_is_an_orderly_stop,
    a_killed_fuse_worker_is_not_noticed,
    a_killed_fuse_worker_costs_an_error_where_the_kernel_cannot_resend,
    a_killed_fuse_supervisor_is_replaced_without_a_command,
    a_hundred_killed_fuse_supervisors_are_replaced,
    a_fuse_supervisor_that_dies_while_servers_stop_leaves_nothing,
    a_fuse_service_that_cannot_start_is_tried_less_and_less
];

/// No plan is that long: a loop that gets there does not end by itself.
const STEPS_MAX: usize = 200;

/// The number of steps that a plan tells.
fn told_steps(site: &Site, command: &[&str]) -> Result<usize> {
    let plan = site.json(command.iter().copied().chain(["--plan", "--json"]))?;
    let count = plan.as_array().map_or(0, Vec::len);
    ensure!(count > 0, "a plan without steps: {plan}");
    Ok(count)
}

/// Runs a command with a fault at step `n` of a plan; `None` when the plan has no such step, so that it went through.
fn with_fault(site: &Site, command: &[&str], plan: &str, n: usize, how: &str) -> Result<Option<Finished>> {
    let done = site.keep(site.vsctl(command).env("VSOS_FAULT", format!("{plan}:{n}:{how}")))?;
    if done.code == 0 {
        return Ok(None);
    }
    // The one that was killed is the command, or the monitor that works for it.
    let killed = done.code == 137 || done.errors().contains("killed");
    ensure!(
        killed || how == "fail" && done.errors().contains("VSOS_FAULT"),
        "not the fault that was asked for: {done}"
    );
    Ok(Some(done))
}

/// Calls `body` with 1, 2, 3, … until it says that there is no such step; returns how many there were.
fn each_step(mut body: impl FnMut(usize) -> Result<bool>) -> Result<usize> {
    for n in 1..=STEPS_MAX {
        if !body(n).with_context(|| format!("at step {n}"))? {
            return Ok(n - 1);
        }
    }
    anyhow::bail!("no end of steps")
}

/// What the site has on the host, to be compared with a moment before.
fn present(site: &Site) -> HostState {
    HostState::capture(&own(site))
}

/// A created server, and what the site has on the host when it is stopped: what servers share is set up.
fn settled<'s>(site: &'s Site, flags: &str) -> Result<(Server<'s>, HostState)> {
    let server = site.template("busybox")?.server("web1").with(flags).start()?.stop()?;
    // `stop` waits until the monitor has let go of the server, not until its process has ended.
    let state = eventually("the end of the monitor", GUEST_LIMIT, || {
        let state = present(site);
        let ends = state.of("process").any(|line| line.contains(" monitor web1"));
        (!ends).then_some(state)
    })?;
    Ok((server, state))
}

fn own(site: &Site) -> Scope {
    Scope::Site { root: site.root().to_owned(), suffix: site.suffix() }
}

fn killed_at_every_step_of_create_doctor_mends_it(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let command = ["create", "web1", "--template", "busybox"];
    let told = told_steps(site, &command)?;
    let before = present(site);
    let seen = each_step(|n| {
        if with_fault(site, &command, "create", n, "kill")?.is_none() {
            drop(Server::adopt(site, "web1"));
            return Ok(false);
        }
        site.ok(["doctor", "--fix"])?;
        // Taken back or completed: either way a server of that name works now.
        let server = match site.run(["status", "web1"])?.code {
            0 => Server::adopt(site, "web1"),
            _ => template.server("web1").create()?,
        };
        let server = server.start()?;
        ensure!(server.sh("echo alive")? == "alive");
        drop(server);
        before.compare_when_settled(&own(site))?;
        Ok(true)
    })?;
    ensure!(seen >= told, "{told} steps were told, {seen} were met");
    Ok(())
}

fn killed_at_every_step_of_start_doctor_mends_it(site: &Site) -> Result<()> {
    let (server, settled) = settled(site, "--memory 64M --cpus 1")?;
    let told = told_steps(site, &["start", "web1"])?;
    let seen = each_step(|n| {
        let met = with_fault(site, &["start", "web1"], "start", n, "kill")?.is_some();
        site.ok(["doctor", "--fix"])?;
        if server.settled_state()? == "running" {
            // The last steps may be behind the point where the server lives; then it must be whole.
            ensure!(site.ok(["exec", "web1", "--", "echo", "alive"])?.text() == "alive");
            site.ok(["stop", "web1"])?;
        }
        settled.compare_when_settled(&own(site))?;
        site.ok(["start", "web1"])?;
        ensure!(site.ok(["exec", "web1", "--", "echo", "alive"])?.text() == "alive");
        site.ok(["stop", "web1"])?;
        Ok(met)
    })?;
    ensure!(seen >= told, "{told} steps were told, {seen} were met");
    Ok(())
}

fn killed_while_what_servers_share_is_set_up_doctor_mends_it(site: &Site) -> Result<()> {
    let before = present(site);
    let template = site.template("busybox")?;
    let seen = each_step(|n| {
        let server = template.server("web1").create()?;
        let met = with_fault(site, &["start", "web1"], "host", n, "kill")?.is_some();
        site.ok(["doctor", "--fix"])?;
        if server.settled_state()? != "running" {
            site.ok(["start", "web1"])?;
        }
        ensure!(site.ok(["exec", "web1", "--", "echo", "alive"])?.text() == "alive");
        drop(server);
        before.compare_when_settled(&own(site))?;
        Ok(met)
    })?;
    ensure!(seen > 0, "the first start sets up nothing?");
    Ok(())
}

fn killed_at_every_step_of_stop_doctor_mends_it(site: &Site) -> Result<()> {
    let (server, settled) = settled(site, "")?;
    site.ok(["start", "web1"])?;
    let told = told_steps(site, &["stop", "web1"])?;
    let seen = each_step(|n| {
        if server.settled_state()? != "running" {
            site.ok(["start", "web1"])?;
        }
        let met = with_fault(site, &["stop", "web1"], "stop", n, "kill")?.is_some();
        site.ok(["doctor", "--fix"])?;
        if server.settled_state()? == "running" {
            site.ok(["stop", "web1"])?;
        }
        ensure!(server.settled_state()? == "stopped", "it is {}", server.settled_state()?);
        settled.compare_when_settled(&own(site))?;
        Ok(met)
    })?;
    ensure!(seen >= told, "{told} steps were told, {seen} were met");
    Ok(())
}

fn killed_at_every_step_of_destroy_doctor_mends_it(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let before = present(site);
    let server = template.server("web1").create()?;
    let told = told_steps(site, &["destroy", "web1"])?;
    let seen = each_step(|n| {
        if !server.directory().exists() {
            site.ok(template.server("web1").command())?;
        }
        let met = with_fault(site, &["destroy", "web1"], "destroy", n, "kill")?.is_some();
        site.ok(["doctor", "--fix"])?;
        if site.run(["status", "web1"])?.code == 0 {
            site.ok(["destroy", "web1"])?;
        }
        ensure!(site.servers().is_empty(), "left are {:?}", site.servers());
        before.compare_when_settled(&own(site))?;
        Ok(met)
    })?;
    ensure!(seen >= told, "{told} steps were told, {seen} were met");
    Ok(())
}

fn a_create_that_fails_at_any_step_leaves_nothing(site: &Site) -> Result<()> {
    let _template = site.template("busybox")?;
    let before = present(site);
    each_step(|n| {
        let Some(done) = with_fault(site, &["create", "web1", "--template", "busybox"], "create", n, "fail")? else {
            drop(Server::adopt(site, "web1"));
            return Ok(false);
        };
        done.complains(&["web1"])?;
        ensure!(site.servers().is_empty(), "it left {:?}", site.servers());
        before.compare_when_settled(&own(site))?;
        ensure!(numbers(site).is_empty(), "it left the numbers {:?}", numbers(site));
        Ok(true)
    })?;
    Ok(())
}

fn a_start_that_fails_at_any_step_leaves_nothing(site: &Site) -> Result<()> {
    let (server, settled) = settled(site, "--memory 64M --cpus 1")?;
    let seen = each_step(|n| {
        let Some(done) = with_fault(site, &["start", "web1"], "start", n, "fail")? else { return Ok(false) };
        done.complains(&["web1"])?;
        ensure!(server.state()? == "stopped", "it is {}", server.state()?);
        settled.compare_when_settled(&own(site))?;
        Ok(true)
    })?;
    ensure!(seen > 0, "no step was met");
    ensure!(site.ok(["exec", "web1", "--", "echo", "alive"])?.text() == "alive");
    Ok(())
}

fn a_first_start_that_fails_to_set_up_the_host_leaves_nothing(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    let before = present(site);
    let seen = each_step(|n| {
        let Some(done) = with_fault(site, &["start", "web1"], "host", n, "fail")? else { return Ok(false) };
        done.complains(&[])?;
        before.compare_when_settled(&own(site))?;
        Ok(true)
    })?;
    ensure!(seen > 0, "no step was met");
    ensure!(server.state()? == "running");
    Ok(())
}

fn killed_anywhere_the_next_command_copes_without_doctor(site: &Site) -> Result<()> {
    for plan in ["start", "host"] {
        each_step(|n| {
            let server = site.template("busybox")?.server("web1").create()?;
            let met = with_fault(site, &["start", "web1"], plan, n, "kill")?.is_some();
            let done = site.run(["start", "web1"])?;
            ensure!(done.code == 0 || done.code == 32, "{done}");
            ensure!(site.ok(["exec", "web1", "--", "echo", "alive"])?.text() == "alive");
            site.ok(["stop", "web1"])?;
            ensure!(server.state()? == "stopped");
            Ok(met)
        })?;
    }
    Ok(())
}

fn start_and_stop_at_once_a_hundred_times(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    for round in 1..=100 {
        site.ok(["start", "web1"]).with_context(|| format!("round {round}"))?;
        site.ok(["stop", "web1"]).with_context(|| format!("round {round}"))?;
    }
    ensure!(server.state()? == "stopped");
    Ok(())
}

/// The numbers of servers that are taken.
fn numbers(site: &Site) -> Vec<String> {
    let entries = fs::read_dir(site.path("var/lib/vsos/ids")).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.starts_with('.')).collect()
}

/// Runs the same command twice at the same time; exactly one may succeed, the other has one of `codes`.
fn race(site: &Site, command: &[&str], codes: &[i32]) -> Result<()> {
    let results = thread::scope(|scope| {
        let both = [(), ()].map(|()| scope.spawn(|| site.vsctl(command).run()));
        both.map(|thread| thread.join().expect("a thread that runs a command"))
    });
    let results = results.into_iter().collect::<Result<Vec<_>>>()?;
    results.iter().for_each(|done| site.note(done.to_string()));
    let won = results.iter().filter(|done| done.code == 0).count();
    ensure!(won == 1, "{won} of two succeeded");
    for done in results.iter().filter(|done| done.code != 0) {
        ensure!(codes.contains(&done.code), "{done}");
    }
    Ok(())
}

fn two_starts_at_once(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    for _ in 0..20 {
        race(site, &["start", "web1"], &[9, 32])?;
        ensure!(server.state()? == "running");
        ensure!(site.ok(["exec", "web1", "--", "echo", "alive"])?.text() == "alive");
        site.ok(["stop", "web1", "--kill"])?;
    }
    Ok(())
}

fn two_destroys_at_once(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    for _ in 0..20 {
        let server = template.server("web1").create()?;
        race(site, &["destroy", "web1"], &[9, 44])?;
        ensure!(!server.directory().exists());
    }
    Ok(())
}

fn two_creates_of_one_name_at_once(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    for _ in 0..20 {
        race(site, &["create", "web1", "--template", "busybox"], &[9, 43])?;
        let server = Server::adopt(site, "web1").start()?;
        ensure!(server.sh("echo alive")? == "alive");
    }
    drop(template);
    Ok(())
}

fn the_last_destroy_takes_nothing_from_a_server_that_comes_meanwhile(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let last = template.server("web1").start()?;
    // Held as `destroy` holds it while it takes back what servers share, so that it waits just before that.
    let lock = fs::File::options().write(true).open(site.path("run/vsos/host/lock"))?;
    let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    let mut destroy = last.spawn(&["destroy", "--force", "web1"])?;
    eventually("the end of web1", GUEST_LIMIT, || (!last.directory().exists()).then_some(()))?;
    thread::sleep(Duration::from_millis(300));
    let next = template.server("web2").start()?;
    drop(lock);
    let done = destroy.wait()?;
    ensure!(done.code == 0, "{}", done.errors());
    let address = next.gateway("-4")?;
    next.sh(&format!("grep -q MemTotal /proc/meminfo && ping -c 1 -W 5 {address}"))?;
    site.ok(["doctor"])?;
    next.stop()?.start().map(drop)
}

/// Processes of this site that run `program` and have `word` on their command line.
fn processes(site: &Site, program: &str, word: &str) -> Vec<i32> {
    let state = present(site);
    let named = state.of("process").filter(|line| line.split(' ').nth(1).is_some_and(|exe| exe.contains(program)));
    named.filter(|line| line.contains(word)).filter_map(|line| line.split(' ').next()?.parse().ok()).collect()
}

fn gone(pid: i32) -> Result<()> {
    eventually(&format!("the end of {pid}"), GUEST_LIMIT, || {
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).ok();
        state.is_none_or(|text| text.contains(") Z ")).then_some(())
    })
}

/// The monitor of a server: as the status says, else the vsctl that names it.
fn monitor(server: &Running) -> Result<i32> {
    let status = server.status()?;
    if let Some(pid) = status["monitor"].as_i64().or_else(|| status["monitor_pid"].as_i64()) {
        return Ok(i32::try_from(pid)?);
    }
    let found = processes(server.site(), "vsctl", server.name());
    found.first().copied().with_context(|| format!("no monitor of {} in {:?}", server.name(), present(server.site())))
}

fn a_killed_monitor_harms_no_server(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("sleep 4321 >/dev/null 2>&1 </dev/null &")?;
    let init = server.init_pid()?;
    let old = monitor(&server)?;
    kill_hard(old)?;
    gone(old)?;
    ensure!(server.state()? == "running" && server.init_pid()? == init, "the server died with its monitor");
    ensure!(server.sh("pidof sleep")?.split_whitespace().count() == 1);
    // A new monitor has it: console and reboot work.
    site.ok(["doctor", "--fix"])?;
    let new = eventually("a new monitor", GUEST_LIMIT, || monitor(&server).ok().filter(|pid| *pid != old))?;
    ensure!(new != old);
    let mut console = server.terminal(&["console", "web1"])?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    server.sh("echo after-adoption >/dev/console")?;
    console.expect("after-adoption")?;
    console.send("\u{1}q")?;
    console.finish()?;
    site.run(["exec", "web1", "--", "reboot"])?;
    server.next_init(init)?;
    // Without anybody's help a server whose monitor is dead can be stopped.
    kill_hard(monitor(&server)?)?;
    let server = server.stop()?;
    ensure!(server.state()? == "stopped");
    Ok(())
}

fn a_monitor_that_was_told_nothing_does_not_hold_up_the_last_destroy(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let (init, monitor) = (server.init_pid()?, monitor(&server)?);
    // It answers no command, so that it learns of the end from init alone, and then wants the lock that `destroy` has.
    kill(Pid::from_raw(monitor), Signal::SIGSTOP)?;
    let mut destroy = server.spawn(&["destroy", "--force", "web1"])?;
    let ended = gone(init);
    kill(Pid::from_raw(monitor), Signal::SIGCONT)?;
    ended?;
    let done = destroy.wait()?;
    ensure!(done.code == 0, "{}", done.errors());
    gone(monitor)
}

fn consoles_of_a_distribution_outlive_monitor_and_supervisor(site: &Site) -> Result<()> {
    let server = site.template("debian-13")?.server("web1").start()?;
    server.booted()?;
    let shows_and_hears = |server: &Running, word: &str| -> Result<()> {
        let old = monitor(server)?;
        kill_hard(old)?;
        gone(old)?;
        site.ok(["list"])?;
        eventually("a new monitor", GUEST_LIMIT, || monitor(server).ok().filter(|pid| *pid != old))?;
        let mut console = server.terminal(&["console", "web1"])?;
        // What is typed reaches the login that waits there.
        console.send("\r")?;
        console.expect("login:")?;
        console.send(&format!("user-{word}\r"))?;
        console.expect("assword")?;
        server.sh(&format!("echo {word} >/dev/console"))?;
        console.expect(word)?;
        console.send("\u{1}q")?;
        console.finish().map(drop)
    };
    shows_and_hears(&server, "once")?;
    // The next supervisor gets them from the monitor, so that the next monitor has them from it.
    let old = site.fuse_supervisor().context("no supervisor")?;
    kill_hard(old)?;
    eventually("another supervisor", GUEST_LIMIT, || site.fuse_supervisor().filter(|pid| *pid != old))?;
    eventually("its files", GUEST_LIMIT, || {
        server.sh("head -1 /proc/meminfo").ok().filter(|line| line.contains("kB"))
    })?;
    shows_and_hears(&server, "again")?;
    // The notify socket was among them: the new monitor hears of a shutdown.
    let init = server.init_pid()?;
    site.run(["exec", "web1", "--", "systemctl", "reboot"])?;
    server.next_init(init).map(drop)
}

fn a_killed_init_is_an_orderly_stop(site: &Site) -> Result<()> {
    let (server, settled) = settled(site, "")?;
    let server = server.start()?;
    kill_hard(server.init_pid()?)?;
    server.reaches("stopped")?;
    settled.compare_when_settled(&own(site))?;
    site.ok(["start", "web1"])?;
    ensure!(server.sh("echo alive")? == "alive");
    Ok(())
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

/// The workers of the FUSE service: children of its supervisor.
fn workers(site: &Site) -> Vec<i32> {
    let all = processes(site, "lxcfs-fuse", "");
    all.iter().copied().filter(|pid| parent(*pid).is_some_and(|of| all.contains(&of))).collect()
}

/// The total of a server that shall have 64 MiB, read through its init's root as quickly as can be; none when it cannot be read.
fn total_of(init: i32) -> Result<Option<()>> {
    let Ok(text) = fs::read_to_string(format!("/proc/{init}/root/proc/meminfo")) else { return Ok(None) };
    ensure!(text.lines().next().is_some_and(|line| line.contains(" 65536 ")), "a false file: {text}");
    Ok(Some(()))
}

/// Waits until the server's files cannot be read, if that is seen at all, and can be read again; how long they could not.
fn outage(site: &Site, init: i32, is_over: impl Fn() -> bool) -> Result<Duration> {
    let (mut begun, mut last) = (None, Duration::ZERO);
    let started = Instant::now();
    loop {
        match (total_of(init)?, begun) {
            (None, None) => begun = Some(Instant::now()),
            (Some(()), Some(since)) => (begun, last) = (None, Instant::now() - since),
            (Some(()), None) if is_over() => return Ok(last),
            _ => {}
        }
        if started.elapsed() > patient(GUEST_LIMIT) {
            let log = fs::read_to_string(site.path("run/vsos/lxcfs/log")).unwrap_or_default();
            bail!("its files do not come back; lxcfs-fuse says: {log}");
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// The longest that a server's files may be gone.
const OUTAGE_MAX: Duration = Duration::from_secs(1);

fn a_killed_fuse_worker_is_not_noticed(site: &Site) -> Result<()> {
    if !ability::resends_fuse_requests()? {
        return Err(skip("this kernel cannot give a dead worker's requests out again"));
    }
    let server = site.template("busybox")?.server("web1").with("--memory 64M").start()?;
    let total = || server.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo");
    ensure!(total()? == "65536");
    let all = processes(site, "lxcfs-fuse", "");
    ensure!(!workers(site).is_empty(), "no worker among {all:?}");
    let before = site.fuse_supervisor();
    let mut reader = server.spawn(&[
        "exec",
        "web1",
        "--",
        "sh",
        "-c",
        "i=0; while [ $i -lt 400 ]; do cat /proc/meminfo >/dev/null || exit 1; i=$((i+1)); done; echo all-read",
    ])?;
    for _ in 0..3 {
        for pid in workers(site) {
            // It may be gone already: the next one is on its way.
            let _ = kill_hard(pid);
        }
        thread::sleep(Duration::from_millis(100));
    }
    let read = reader.wait()?;
    ensure!(read.text() == "all-read", "a read failed: {read}");
    ensure!(total()? == "65536");
    ensure!(site.fuse_supervisor() == before, "the supervisor ended with a worker");
    let next = site.ok(["exec", "web1", "--", "uptime"])?;
    ensure!(!next.text().is_empty());
    Ok(())
}

/// What a kernel that cannot resend makes of it; one that can is told to be taken for such.
fn a_killed_fuse_worker_costs_an_error_where_the_kernel_cannot_resend(site: &Site) -> Result<()> {
    site.note(format!("this kernel resends: {}", ability::resends_fuse_requests()?));
    let server = site.template("busybox")?.server("web1").with("--memory 64M").create()?;
    let server = server.start_with("LXCFS_FUSE_NO_RESEND", "1")?;
    let init = server.init_pid()?;
    // Readers of all kinds, in flight whenever a worker dies. Each ends, with an error or the truth.
    // They fork nobody: what the kernel keeps of thousands that have just ended counts as the server's memory, to its limit.
    let script = "for r in 1 2 3; do while [ ! -e /done ]; do for file in meminfo stat uptime; do \
                  read word </proc/$file; done 2>/dev/null; done & done; wait; echo all-ended";
    let mut readers = server.spawn(&["exec", "web1", "--", "sh", "-c", script])?;
    let mut longest = Duration::ZERO;
    for round in 0..10 {
        let before = site.fuse_supervisor();
        let workers = workers(site);
        ensure!(!workers.is_empty(), "no worker in round {round}");
        workers.into_iter().try_for_each(kill_hard)?;
        let next = || site.fuse_supervisor().is_some_and(|now| Some(now) != before);
        longest = longest.max(outage(site, init, next).with_context(|| format!("round {round}"))?);
    }
    site.note(format!("the longest outage: {longest:?}"));
    ensure!(longest < patient(OUTAGE_MAX), "the files were gone for {longest:?}");
    server.sh("touch /done")?;
    let ended = readers.wait()?;
    ensure!(ended.text() == "all-ended", "{ended}");
    ensure!(server.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo")? == "65536" && server.init_pid()? == init);
    Ok(())
}

fn a_killed_fuse_supervisor_is_replaced_without_a_command(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let start = |name: &str| template.server(name).with("--memory 64M").start();
    let servers = [start("web1")?, start("web2")?, start("web3")?];
    let inits = servers.iter().map(Running::init_pid).collect::<Result<Vec<_>>>()?;
    // A frozen one is healed like the others.
    site.ok(["freeze", "web3"])?;
    let before = site.fuse_supervisor().context("no supervisor")?;
    kill_hard(before)?;
    let next = || site.fuse_supervisor().is_some_and(|now| now != before);
    for init in &inits {
        outage(site, *init, next)?;
    }
    site.ok(["thaw", "web3"])?;
    for (server, init) in servers.iter().zip(&inits) {
        ensure!(server.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo; nproc")?.starts_with("65536\n"));
        ensure!(server.init_pid()? == *init, "{} was restarted", server.name());
    }
    // Nothing is left for it to mend.
    let found = site.ok(["doctor"])?.text();
    ensure!(!found.contains("served no more"), "{found}");
    // A monitor that comes after the death heals as well.
    let [one, _two, _three] = servers;
    let watching = monitor(&one)?;
    kill_hard(watching)?;
    let before = site.fuse_supervisor().context("no supervisor")?;
    kill_hard(before)?;
    // While it is about to end it still counts as the server's monitor.
    gone(watching)?;
    site.ok(["list"])?;
    outage(site, inits[0], || site.fuse_supervisor().is_some_and(|now| now != before))?;
    Ok(())
}

fn a_hundred_killed_fuse_supervisors_are_replaced(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--memory 64M").start()?;
    let init = server.init_pid()?;
    let mut longest = Duration::ZERO;
    for round in 1..=100 {
        let before = site.fuse_supervisor().context("no supervisor")?;
        kill_hard(before)?;
        let next = || site.fuse_supervisor().is_some_and(|now| now != before);
        longest = longest.max(outage(site, init, next).with_context(|| format!("round {round}"))?);
    }
    site.note(format!("the longest outage: {longest:?}"));
    ensure!(longest < patient(OUTAGE_MAX), "the files were gone for {longest:?}");
    let mounts = server.sh("grep -c ' /proc/meminfo ' /proc/self/mountinfo")?;
    ensure!(mounts == "2", "{mounts} mounts on one file");
    ensure!(!server.sh("nproc")?.is_empty() && server.init_pid()? == init);
    Ok(())
}

fn a_fuse_supervisor_that_dies_while_servers_stop_leaves_nothing(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let before = present(site);
    for round in 0..5 {
        let (one, two) = (template.server("web1").start()?, template.server("web2").start()?);
        kill_hard(site.fuse_supervisor().context("no supervisor")?)?;
        // At another moment of the healing each time.
        thread::sleep(Duration::from_millis(8 * round));
        site.ok(["stop", "web1", "--kill"])?;
        ensure!(one.state()? == "stopped");
        site.ok(["destroy", "web2", "--force"])?;
        // One who starts in the middle of it finds a service.
        site.ok(["start", "web1"])?;
        ensure!(site.ok(["exec", "web1", "--", "cat", "/proc/uptime"])?.text().contains('.'));
        drop((one, two));
        before.compare_when_settled(&own(site)).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

fn a_fuse_service_that_cannot_start_is_tried_less_and_less(site: &Site) -> Result<()> {
    let (programs, count) = (site.path("programs"), site.path("count"));
    fs::create_dir_all(&programs)?;
    fs::create_dir_all(site.path("etc/vsos"))?;
    fs::write(site.path("etc/vsos/vsos.toml"), format!("programs = {programs:?}\n"))?;
    let server = site.template("busybox")?.server("web1").with("--memory 64M").start()?;
    let init = server.init_pid()?;
    let broken = programs.join("lxcfs-fuse");
    fs::write(&broken, format!("#!/bin/sh\necho once >>{}\necho it is broken >&2\nexit 1\n", count.display()))?;
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755))?;
    let before = site.fuse_supervisor().context("no supervisor")?;
    kill_hard(before)?;
    thread::sleep(patient(Duration::from_secs(6)));
    let tried = fs::read_to_string(&count)?.lines().count();
    ensure!((2..=10).contains(&tried), "tried {tried} times");
    let log = fs::read_to_string(site.path("run/vsos/lxcfs/log"))?;
    ensure!(log.matches("it is broken").count() == 1, "told more or less than once: {log}");
    fs::remove_file(&broken)?;
    outage(site, init, || site.fuse_supervisor().is_some_and(|now| now != before)).map(drop)
}
