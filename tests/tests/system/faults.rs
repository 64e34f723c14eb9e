//! Faults: whatever dies or fails, the next command finds its way, and nothing is left behind.
//!
//! `VSOS_FAULT=<plan>:<n>:kill|fail` makes `vsctl` kill itself at, or fail, step n of a plan.

use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use system_tests::{
    command::{Finished, eventually},
    host::{HostState, Scope},
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
    a_killed_monitor_harms_no_server,
    a_killed_init_is_an_orderly_stop,
    a_killed_fuse_worker_is_not_noticed,
    a_dead_fuse_overlay_is_put_back_into_running_servers
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
    let state = present(site);
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
        if server.state()? == "running" {
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
        if server.state()? != "running" {
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
        if server.state()? != "running" {
            site.ok(["start", "web1"])?;
        }
        let met = with_fault(site, &["stop", "web1"], "stop", n, "kill")?.is_some();
        site.ok(["doctor", "--fix"])?;
        if server.state()? == "running" {
            site.ok(["stop", "web1"])?;
        }
        ensure!(server.state()? == "stopped", "it is {}", server.state()?);
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

/// Processes of this site that run `program` and have `word` on their command line.
fn processes(site: &Site, program: &str, word: &str) -> Vec<i32> {
    let state = present(site);
    let named = state.of("process").filter(|line| line.split(' ').nth(1).is_some_and(|exe| exe.contains(program)));
    named.filter(|line| line.contains(word)).filter_map(|line| line.split(' ').next()?.parse().ok()).collect()
}

fn kill_hard(pid: i32) -> Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("kill {pid}"))
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

fn a_killed_fuse_worker_is_not_noticed(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--memory 64M").start()?;
    let total = || server.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo");
    ensure!(total()? == "65536");
    // The worker is the child of the supervisor.
    let all = processes(site, "lxcfs-fuse", "");
    let parent = |pid: i32| -> Option<i32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
    };
    let workers: Vec<i32> =
        all.iter().copied().filter(|pid| parent(*pid).is_some_and(|of| all.contains(&of))).collect();
    ensure!(!workers.is_empty(), "no worker among {all:?}");
    let mut reader = server.spawn(&[
        "exec",
        "web1",
        "--",
        "sh",
        "-c",
        "i=0; while [ $i -lt 400 ]; do cat /proc/meminfo >/dev/null || exit 1; i=$((i+1)); done; echo all-read",
    ])?;
    for _ in 0..3 {
        let all = processes(site, "lxcfs-fuse", "");
        for pid in all.iter().filter(|pid| parent(**pid).is_some_and(|of| all.contains(&of))) {
            // It may be gone already: the next one is on its way.
            let _ = kill_hard(*pid);
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let read = reader.wait()?;
    ensure!(read.text() == "all-read", "a read failed: {read}");
    ensure!(total()? == "65536");
    let next = site.ok(["exec", "web1", "--", "uptime"])?;
    ensure!(!next.text().is_empty());
    Ok(())
}

fn a_dead_fuse_overlay_is_put_back_into_running_servers(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--memory 64M").start()?;
    let init = server.init_pid()?;
    for pid in processes(site, "lxcfs-fuse", "") {
        // The worker ends with its supervisor.
        let _ = kill_hard(pid);
    }
    server.sh_fails("cat /proc/meminfo")?;
    site.ok(["doctor", "--fix"])?;
    ensure!(server.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo")? == "65536");
    ensure!(server.init_pid()? == init, "the server was restarted");
    Ok(())
}
