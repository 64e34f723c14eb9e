//! Create, start, change, stop, destroy: what a script or a person types all day.

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use system_tests::{
    command::eventually,
    promises,
    server::{GUEST_LIMIT, Server},
    site::Site,
};

promises![
    a_server_goes_through_its_whole_life,
    create_can_start_at_once,
    start_can_wait_until_the_guest_is_ready,
    a_rescue_start_gives_a_shell,
    status_tells_scripts_what_they_need,
    what_prints_speaks_json,
    what_changes_shows_its_plan_and_changes_nothing,
    several_names_in_one_command,
    list_has_columns_order_and_no_header,
    a_limit_changes_at_once_and_stays,
    a_change_that_needs_a_restart_says_so,
    a_spec_may_be_edited_by_hand,
    edit_opens_the_spec_and_checks_it,
    rename_keeps_data_and_address,
    frozen_means_nothing_moves,
    a_frozen_server_can_be_stopped,
    restart_gives_a_new_init_and_keeps_data,
    wait_returns_when_the_state_is_reached,
    events_tell_what_happened,
    top_prints_once_in_batch_mode,
    ps_and_pid_know_whose_a_process_is,
    push_and_pull_bring_files_there_and_back,
    stop_kills_what_does_not_stop,
    autostart_starts_what_is_marked_and_stop_all_stops_it,
    installations_live_side_by_side,
    doctor_finds_a_sound_host_sound,
    the_programs_are_static;
    each of ["busybox", "debian-13"]:
    reboot_from_inside_keeps_address_and_data,
    poweroff_from_inside_stops_it,
    halt_from_inside_stops_it,
    an_orderly_stop_ends_it
];

fn a_server_goes_through_its_whole_life(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    ensure!(server.state()? == "stopped", "created, it is {}", server.state()?);
    let running = server.start()?;
    ensure!(running.state()? == "running", "started, it is {}", running.state()?);
    ensure!(running.sh("echo hello")? == "hello");
    let server = running.stop()?;
    ensure!(server.state()? == "stopped", "stopped, it is {}", server.state()?);
    site.ok(["destroy", "web1"])?;
    site.run(["status", "web1"])?.failure(44, &["web1"])?;
    ensure!(!server.directory().exists(), "its files are still there");
    Ok(())
}

fn create_can_start_at_once(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--start").create()?;
    ensure!(server.state()? == "running");
    Ok(())
}

fn start_can_wait_until_the_guest_is_ready(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    for level in ["ready", "init", "none"] {
        site.ok(["start", "web1", &format!("--wait={level}")])?;
        server.reaches("running")?;
        site.ok(["stop", "web1", "--kill"])?;
    }
    site.run(["start", "web1", "--wait=soon"])?.complains(&["soon"])?;
    Ok(())
}

fn a_rescue_start_gives_a_shell(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    site.ok(["start", "web1", "--rescue"])?;
    ensure!(server.state()? == "running");
    ensure!(site.ok(["exec", "web1", "--", "echo", "alive"])?.text() == "alive");
    for service in ["syslogd", "crond", "getty"] {
        let done = site.run(["exec", "web1", "--", "pidof", service])?;
        ensure!(done.code != 0, "{service} runs in a rescue start: {done}");
    }
    Ok(())
}

fn status_tells_scripts_what_they_need(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--memory 128M --cpus 1.5").start()?;
    let status = server.status()?;
    ensure!(status["name"] == "web1" && status["state"] == "running", "{status}");
    let pid = status["pid"].as_u64().context("no pid")?;
    ensure!(fs::read_to_string(format!("/proc/{pid}/status"))?.contains("NSpid:"), "{pid} is no process");
    ensure!(status["uptime_s"].is_number(), "{status}");
    ensure!(status["addresses"].as_array().is_some_and(|list| !list.is_empty()), "{status}");
    ensure!(!status["memory"].is_null() && !status["cpus"].is_null(), "{status}");
    let server = server.stop()?;
    let status = server.status()?;
    ensure!(status["state"] == "stopped" && status["pid"].is_null(), "{status}");
    Ok(())
}

fn what_prints_speaks_json(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let pid = server.init_pid()?.to_string();
    for command in [
        &["list", "-a"][..],
        &["status", "web1"],
        &["show", "web1"],
        &["ps"],
        &["ps", "web1"],
        &["pid", &pid],
        &["top", "--batch"],
        &["template", "list"],
        &["template", "show", "busybox"],
        &["doctor"],
    ] {
        let value = site.json(command.iter().copied().chain(["--json"]))?;
        ensure!(value.is_array() || value.is_object(), "vsctl {} --json is {value}", command.join(" "));
    }
    // Events come one by one, so each line is a value.
    for line in site.ok(["events", "--json"])?.text().lines() {
        let _: Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
    }
    Ok(())
}

fn what_changes_shows_its_plan_and_changes_nothing(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let plan = |command: &[&str]| -> Result<String> {
        let text = site.ok(command.iter().copied().chain(["--plan"]))?.text();
        ensure!(!text.is_empty(), "vsctl {} --plan says nothing", command.join(" "));
        Ok(text)
    };
    let created = plan(&["create", "web1", "--template", "busybox"])?;
    let started = plan(&["create", "web1", "--template", "busybox", "--start"])?;
    let two = plan(&["create", "web1", "web2", "--template", "busybox"])?;
    let numbers: BTreeSet<&str> =
        two.lines().filter_map(|line| line.split_once("/ids/")?.1.split(' ').next()).collect();
    ensure!(numbers.len() == 2, "two servers cannot have one number:\n{two}");
    ensure!(site.servers().is_empty(), "create --plan created something");
    let server = template.server("web1").create()?;
    let steps = plan(&["start", "web1"])?;
    ensure!(started.lines().count() == created.lines().count() + steps.lines().count(), "{created}\n---\n{started}");
    ensure!(started.ends_with(&steps), "the plan of both is not that of one after the other:\n{started}\n---\n{steps}");
    ensure!(steps.contains("web1"), "the plan does not name the server:\n{steps}");
    // The first start makes what all servers share, before anything of its own.
    let shared = plan(&["host", "up"])?;
    ensure!(steps.starts_with(&format!("{shared}\n")), "the plan leaves out what the first start makes:\n{steps}");
    ensure!(shared.contains(&site.bridge()), "{shared}");
    let both = plan(&["start", "web1", "web1"])?;
    ensure!(both.matches(&shared).count() == 1, "what all share is made once:\n{both}");
    plan(&["set", "web1", "memory=64M"])?;
    plan(&["rename", "web1", "web2"])?;
    plan(&["destroy", "web1"])?;
    ensure!(server.state()? == "stopped" && server.directory().exists());
    let server = server.start()?;
    let pid = server.init_pid()?;
    let again = plan(&["restart", "web1"])?;
    ensure!(!again.contains(&shared) && again.contains(steps[shared.len()..].trim()), "it is made already:\n{again}");
    for command in [&["stop", "web1"][..], &["restart", "web1"], &["freeze", "web1"], &["destroy", "--force", "web1"]] {
        plan(command)?;
    }
    ensure!(server.init_pid()? == pid && server.state()? == "running", "a plan was carried out");
    Ok(())
}

fn several_names_in_one_command(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let servers = ["web1", "web2", "web3"].map(|name| template.server(name).create());
    site.ok(["start", "web1", "web2", "web3"])?;
    for server in servers.iter().flatten() {
        ensure!(server.state()? == "running", "{}", server.name());
    }
    // One that fails does not keep the others from being done.
    site.run(["stop", "web1", "nobody", "web2", "web3"])?.failure(44, &["nobody"])?;
    for server in servers.iter().flatten() {
        ensure!(server.state()? == "stopped", "{} was not stopped", server.name());
    }
    site.ok(["destroy", "web1", "web2", "web3"])?;
    ensure!(site.servers().is_empty());
    Ok(())
}

fn list_has_columns_order_and_no_header(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let _stopped = template.server("beta").create()?;
    let _running = template.server("alpha").start()?;
    let running = site.ok(["list", "-H", "-o", "name"])?.text();
    ensure!(running == "alpha", "list without -a shows what runs: {running:?}");
    let all = site.ok(["list", "-a", "-H", "-o", "name,state", "-s", "name"])?.text();
    let words: Vec<&str> = all.split_whitespace().collect();
    ensure!(words == ["alpha", "running", "beta", "stopped"], "{all:?}");
    let reversed = site.ok(["list", "-a", "-H", "-o", "name", "-s", "-name"])?.text();
    ensure!(reversed.split_whitespace().eq(["beta", "alpha"]), "{reversed:?}");
    ensure!(site.ok(["list", "-a"])?.text().lines().count() == 3, "a header and two servers");
    site.run(["list", "-o", "nmae"])?.complains(&["nmae"])?;
    Ok(())
}

fn a_limit_changes_at_once_and_stays(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").with("--memory 64M --cpus 1 --pids 100").start()?;
    let total = |server: &system_tests::server::Running| server.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo");
    ensure!(total(&server)? == "65536", "{}", total(&server)?);
    site.ok(["set", "web1", "memory=96M", "cpus=2", "pids=120"])?;
    ensure!(total(&server)? == "98304", "the change is not there at once: {}", total(&server)?);
    let spec = fs::read_to_string(server.directory().join("server.toml"))?;
    ensure!(spec.contains("96M") || spec.contains("100663296"), "not saved:\n{spec}");
    let server = server.stop()?.start()?;
    ensure!(total(&server)? == "98304", "it did not stay: {}", total(&server)?);
    Ok(())
}

fn a_change_that_needs_a_restart_says_so(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let done = site.ok(["set", "web1", "migratable=true"])?;
    let said = done.text() + &done.errors();
    ensure!(said.contains("restart") && said.contains("migratable"), "{done}");
    ensure!(server.state()? == "running");
    site.run(["set", "web1", "memroy=64M"])?.complains(&["memroy", "memory"])?;
    site.run(["set", "web1", "memory"])?.complains(&["memory"])?;
    Ok(())
}

fn a_spec_may_be_edited_by_hand(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    let file = server.directory().join("server.toml");
    let spec = fs::read_to_string(&file)?;
    fs::write(&file, format!("# written by hand\nmemory = \"80M\"\n{spec}"))?;
    let server = server.start()?;
    ensure!(server.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo")? == "81920");
    site.ok(["set", "web1", "pids=99"])?;
    let spec = fs::read_to_string(&file)?;
    ensure!(spec.contains("# written by hand"), "set threw the owner's comment away:\n{spec}");
    Ok(())
}

fn edit_opens_the_spec_and_checks_it(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    let file = server.directory().join("server.toml");
    let editor = site.path("editor.sh");
    let edit = |line: &str| -> Result<_> {
        fs::write(&editor, format!("#!/bin/sh\nprintf '%s\\n' '{line}' >>\"$1\"\n"))?;
        let call = site.vsctl(["edit", "web1"]).env("EDITOR", format!("sh {}", editor.display())).env("VISUAL", "");
        site.keep(call)
    };
    edit("pids = 77")?.success()?;
    ensure!(fs::read_to_string(&file)?.contains("pids = 77"));
    let before = fs::read_to_string(&file)?;
    edit("pdis = 78")?.complains(&["pdis"])?;
    ensure!(fs::read_to_string(&file)? == before, "a bad edit reached the spec");
    Ok(())
}

fn rename_keeps_data_and_address(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("old").start()?;
    server.sh("echo kept >/root/data")?;
    let address = server.ipv4()?;
    let _old = server.stop()?;
    site.ok(["rename", "old", "new"])?;
    let server = Server::adopt(site, "new").start()?;
    ensure!(server.file("/root/data")? == "kept" && server.ipv4()? == address);
    site.run(["status", "old"])?.failure(44, &["old"])?;
    Ok(())
}

fn frozen_means_nothing_moves(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("(i=0; while :; do i=$((i+1)); echo $i >/root/count; done) >/dev/null 2>&1 &")?;
    server.until("[ -s /root/count ]")?;
    site.ok(["freeze", "web1"])?;
    ensure!(server.state()? == "frozen", "{}", server.state()?);
    let root = format!("/proc/{}/root/root/count", server.init_pid()?);
    let count = fs::read_to_string(&root)?;
    std::thread::sleep(Duration::from_millis(200));
    ensure!(fs::read_to_string(&root)? == count, "it counts on although it is frozen");
    site.ok(["thaw", "web1"])?;
    ensure!(server.state()? == "running");
    eventually("the counter goes on", GUEST_LIMIT, || (fs::read_to_string(&root).ok()? != count).then_some(()))
}

fn a_frozen_server_can_be_stopped(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    site.ok(["freeze", "web1"])?;
    site.ok(["stop", "web1", "--kill"])?;
    ensure!(server.state()? == "stopped");
    Ok(())
}

fn restart_gives_a_new_init_and_keeps_data(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo kept >/root/data; echo gone >/run/volatile")?;
    let (init, address) = (server.init_pid()?, server.ipv4()?);
    site.ok(["restart", "web1"])?;
    ensure!(server.init_pid()? != init && server.ipv4()? == address);
    ensure!(server.file("/root/data")? == "kept");
    server.sh_fails("cat /run/volatile")?;
    Ok(())
}

fn wait_returns_when_the_state_is_reached(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    site.ok(["wait", "web1", "stopped"])?;
    let mut waiting = site.vsctl(["wait", "web1", "running"]).spawn()?;
    std::thread::sleep(Duration::from_millis(100));
    ensure!(waiting.is_running(), "it did not wait: {}", waiting.wait()?);
    let _server = server.start()?;
    waiting.wait()?.success()?;
    site.run(["wait", "web1", "dancing"])?.complains(&["dancing"])?;
    Ok(())
}

fn events_tell_what_happened(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let mut follower = site.vsctl(["events", "--follow"]).spawn()?;
    template.server("web1").start()?.stop()?;
    eventually("events of web1", GUEST_LIMIT, || {
        let events = site.run(["events"]).ok()?.text();
        (events.contains("web1") && events.contains("start") && events.contains("stop")).then_some(())
    })?;
    ensure!(follower.is_running(), "events --follow ended: {}", follower.wait()?);
    follower.kill();
    let followed = follower.wait()?.text();
    ensure!(followed.contains("web1"), "the follower saw {followed:?}");
    Ok(())
}

fn top_prints_once_in_batch_mode(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let _one = template.server("web1").with("--memory 64M").start()?;
    let _two = template.server("web2").start()?;
    let text = site.ok(["top", "--batch"])?.text();
    ensure!(text.contains("web1") && text.contains("web2") && text.contains("running"), "{text}");
    ensure!(text.contains("64"), "the limit is not shown:\n{text}");
    ensure!(!text.contains('\u{1b}'), "batch output has no terminal codes:\n{text:?}");
    Ok(())
}

fn ps_and_pid_know_whose_a_process_is(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let one = template.server("web1").start()?;
    let _two = template.server("web2").start()?;
    one.sh("sleep 1234 >/dev/null 2>&1 </dev/null &")?;
    let all = site.ok(["ps"])?.text();
    ensure!(all.contains("web1") && all.contains("web2"), "{all}");
    let line = all.lines().find(|line| line.contains("sleep 1234")).with_context(|| format!("no sleep in\n{all}"))?;
    ensure!(line.contains("web1"), "{line}");
    ensure!(!site.ok(["ps", "web2"])?.text().contains("sleep 1234"));
    let init = one.init_pid()?.to_string();
    ensure!(site.ok(["pid", &init])?.text().contains("web1"));
    site.run(["pid", "1"])?.complains(&["1"])?;
    Ok(())
}

fn push_and_pull_bring_files_there_and_back(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let (there, back) = (site.path("there"), site.path("back"));
    let bytes: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
    fs::create_dir_all(there.join("sub"))?;
    fs::write(there.join("sub/file"), &bytes)?;
    let shown = |path: &std::path::Path| path.display().to_string();
    site.ok(["push", "web1", &shown(&there.join("sub/file")), "/root/file"])?;
    ensure!(server.sh("stat -c '%u:%g' /root/file")? == "0:0", "it does not belong to the guest's root");
    ensure!(server.sh("wc -c </root/file")? == "100000");
    site.ok(["pull", "web1", "/root/file", &shown(&back)])?;
    ensure!(fs::read(&back)? == bytes);
    site.ok(["push", "web1", &shown(&there), "/root/tree"])?;
    ensure!(server.sh("wc -c </root/tree/sub/file")? == "100000");
    // A link that the guest laid must not lead to the host's files.
    server.sh("ln -s /etc/hostname /root/link; ln -s /../../../../../../../etc /root/up")?;
    site.ok(["pull", "web1", "/root/link", &shown(&back)])?;
    ensure!(fs::read_to_string(&back)?.trim() == server.sh("cat /etc/hostname")?, "the link led to the host");
    site.run(["pull", "web1", "/root/none", &shown(&back)])?.complains(&["/root/none"])?;
    Ok(())
}

fn stop_kills_what_does_not_stop(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    let server = server.start()?;
    // An init that is stopped by a signal from outside cannot answer.
    let pid = nix::unistd::Pid::from_raw(server.init_pid()?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?;
    site.ok(["stop", "web1", "--timeout", "1"])?;
    ensure!(server.state()? == "stopped");
    site.run(["stop", "web1"])?.failure(31, &["web1"])?;
    Ok(())
}

fn autostart_starts_what_is_marked_and_stop_all_stops_it(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let marked = template.server("marked").with("--autostart").create()?;
    let plain = template.server("plain").create()?;
    site.ok(["autostart"])?;
    ensure!(marked.state()? == "running" && plain.state()? == "stopped");
    // At boot it is called once; a second call has nothing to do and says nothing bad.
    site.ok(["autostart"])?;
    site.ok(["start", "plain"])?;
    site.ok(["stop", "--all"])?;
    ensure!(marked.state()? == "stopped" && plain.state()? == "stopped");
    site.ok(["stop", "--all"])?;
    Ok(())
}

fn installations_live_side_by_side(site: &Site) -> Result<()> {
    let other = Site::new()?;
    let one = site.template("busybox")?.server("web1").start()?;
    let two = other.template("busybox")?.server("web1").start()?;
    ensure!(fs::exists(format!("/sys/class/net/{}", site.bridge()))?, "the bridge is not called {}", site.bridge());
    ensure!(fs::exists(format!("/sys/class/net/{}", other.bridge()))?, "the bridge is not called {}", other.bridge());
    ensure!(one.ipv4()? != two.ipv4()?, "two installations chose the same address");
    let _one = one.stop()?;
    ensure!(two.state()? == "running" && two.sh("echo alive")? == "alive");
    drop(two);
    other.scrub();
    Ok(())
}

fn doctor_finds_a_sound_host_sound(site: &Site) -> Result<()> {
    site.ok(["doctor"])?;
    let server = site.template("busybox")?.server("web1").start()?;
    site.ok(["doctor"])?;
    site.ok(["doctor", "--fix"])?;
    ensure!(server.state()? == "running", "doctor mended what was not broken");
    Ok(())
}

fn the_programs_are_static(_: &Site) -> Result<()> {
    for program in ["vsctl", "vsinit", "lxcfs-fuse"] {
        let bytes = fs::read(system_tests::site::programs()?.join(program))?;
        ensure!(!has_interpreter(&bytes)?, "{program} needs a loader");
    }
    let size = fs::metadata(system_tests::site::programs()?.join("vsinit"))?.len();
    ensure!(size <= 2 << 20, "vsinit has {size} bytes");
    Ok(())
}

/// Whether a 64-bit ELF program names a loader: it has a program header of the kind `PT_INTERP`; elf(5).
fn has_interpreter(elf: &[u8]) -> Result<bool> {
    let number = |at: usize, size: usize| -> Result<usize> {
        let bytes = elf.get(at..at + size).context("the program is cut short")?;
        Ok(bytes.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    ensure!(elf.starts_with(b"\x7fELF\x02"), "no 64-bit ELF program");
    let (headers, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for index in 0..count {
        // The kind is the first word.
        if number(headers + index * size, 4)? == 3 {
            return Ok(true);
        }
    }
    Ok(false)
}

fn reboot_from_inside_keeps_address_and_data(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    server.sh("echo kept >/root/data")?;
    let (init, address) = (server.init_pid()?, server.ipv4()?);
    server.obeys()?;
    site.run(["exec", "web1", "--", "reboot"])?;
    server.next_init(init)?;
    ensure!(server.ipv4()? == address, "{} became {}", address, server.ipv4()?);
    server.until("true")?;
    ensure!(server.file("/root/data")? == "kept");
    ensure!(server.sh("ip -4 address show eth0")?.contains(&address));
    Ok(())
}

fn poweroff_from_inside_stops_it(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    server.obeys()?;
    site.run(["exec", "web1", "--", "poweroff"])?;
    server.reaches("stopped")
}

fn halt_from_inside_stops_it(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    server.obeys()?;
    site.run(["exec", "web1", "--", "halt"])?;
    server.reaches("stopped")
}

fn an_orderly_stop_ends_it(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?.stop()?;
    ensure!(server.state()? == "stopped");
    let server = server.start()?;
    ensure!(server.sh("echo alive")? == "alive");
    Ok(())
}
