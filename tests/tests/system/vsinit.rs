//! vsinit as the init of a small server: services, order, restarts, reaping, signals, size.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::{
    libc,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use system_tests::{
    command::Invocation,
    promises,
    server::{Running, Server},
    site::Site,
};

promises![
    the_templates_services_run,
    services_are_controlled_from_outside_and_inside,
    a_daemon_that_dies_is_started_again,
    order_follows_what_is_required,
    a_cycle_is_an_error_that_shows_it,
    a_service_has_its_user_environment_and_directory,
    limits_hold_for_a_service,
    notify_is_waited_for,
    a_oneshot_runs_once,
    a_failed_requirement_fails_what_needs_it,
    a_bad_service_file_stops_nothing_else,
    the_log_of_a_service_can_be_read_and_is_bounded,
    thousands_of_orphans_are_reaped,
    sigpwr_and_sigusr2_power_off,
    sigterm_and_sigint_reboot,
    sigrtmin_3_and_sigusr1_halt,
    no_other_signal_ends_it,
    idle_it_needs_little_memory_of_its_own,
    its_control_is_for_root_only
];

/// A server with service files of its own, not yet started.
fn with_services<'s>(site: &'s Site, services: &[(&str, &str)]) -> Result<Server<'s>> {
    let server = site.template("busybox")?.server("web1").start()?;
    for (name, text) in services {
        let call = site.vsctl(["exec", "web1", "--", "sh", "-c", &format!("cat >/etc/vsinit/{name}.toml")]);
        site.keep(call.input(*text))?.success()?;
    }
    server.stop()
}

fn state_of(server: &Running, service: &str) -> Result<String> {
    let list = server.site().ok(["service", server.name(), "list"])?.text();
    let line = list.lines().find(|line| line.split_whitespace().any(|word| word == service));
    Ok(line.with_context(|| format!("no service {service} in\n{list}"))?.to_owned())
}

fn the_templates_services_run(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.until("pidof syslogd && pidof crond && pidof getty")?;
    server.sh("logger -t test a-line-for-the-log")?;
    server.until("grep -q a-line-for-the-log /var/log/messages")?;
    Ok(())
}

fn services_are_controlled_from_outside_and_inside(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.until("pidof crond")?;
    site.ok(["service", "web1", "stop", "crond"])?;
    server.sh_fails("pidof crond")?;
    site.ok(["service", "web1", "start", "crond"])?;
    let first = server.sh("pidof crond")?;
    site.ok(["service", "web1", "restart", "crond"])?;
    ensure!(server.sh("pidof crond")? != first);
    ensure!(server.sh("vsinit list")?.contains("crond"));
    server.sh("vsinit stop crond")?;
    server.sh_fails("pidof crond")?;
    server.sh("vsinit start crond")?;
    server.sh("pidof crond")?;
    site.run(["service", "web1", "stop", "corn"])?.complains(&["corn"])?;
    let said = server.sh_fails("vsinit stop corn")?;
    ensure!(said.contains("corn"), "{said}");
    Ok(())
}

fn a_daemon_that_dies_is_started_again(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.until("pidof crond")?;
    let first = server.sh("pidof crond")?;
    server.sh(&format!("kill -9 {first}"))?;
    server.until(&format!("pidof crond && [ \"$(pidof crond)\" != '{first}' ]"))?;
    Ok(())
}

fn order_follows_what_is_required(site: &Site) -> Result<()> {
    let note = |name: &str, extra: &str| {
        format!("exec = [\"/bin/sh\", \"-c\", \"echo {name} >>/root/order\"]\nkind = \"oneshot\"\n{extra}")
    };
    let services = [
        ("c-first", note("first", "")),
        ("b-second", note("second", "requires = [\"c-first\"]\nafter = [\"c-first\"]\n")),
        ("a-third", note("third", "after = [\"b-second\"]\n")),
    ];
    let services: Vec<(&str, &str)> = services.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let server = with_services(site, &services)?.start()?;
    server.until("grep -q third /root/order")?;
    let order = server.file("/root/order")?;
    ensure!(order == "first\nsecond\nthird", "{order}");
    Ok(())
}

fn a_cycle_is_an_error_that_shows_it(site: &Site) -> Result<()> {
    let service = |after: &str| format!("exec = [\"/bin/true\"]\nkind = \"oneshot\"\nafter = [\"{after}\"]\n");
    let (one, two, three) = (service("two"), service("three"), service("one"));
    let server = with_services(site, &[("one", &one), ("two", &two), ("three", &three)])?.start()?;
    // The rest of the server is not taken down by it.
    server.until("pidof syslogd")?;
    let log = site.ok(["console", "web1", "--log"])?.text()
        + &server.sh("cat /var/log/vsinit* /var/log/messages 2>/dev/null; true")?;
    let line = log.lines().find(|line| ["one", "two", "three"].iter().all(|name| line.contains(name)));
    ensure!(line.is_some(), "the cycle is not shown:\n{log}");
    Ok(())
}

fn a_service_has_its_user_environment_and_directory(site: &Site) -> Result<()> {
    let text = "exec = [\"/bin/sh\", \"-c\", \"(id -u; pwd; echo $COLOUR) >/tmp/seen.new; mv /tmp/seen.new /tmp/seen\"]\n\
        kind = \"oneshot\"\nuser = \"daemon\"\ndir = \"/tmp\"\nenv = { COLOUR = \"deep blue\" }\n";
    let server = with_services(site, &[("seen", text)])?;
    let server = server.start()?;
    server.until("test -s /tmp/seen")?;
    let daemon = server.sh("awk -F : '/^daemon:/ { print $3 }' /etc/passwd")?;
    ensure!(server.file("/tmp/seen")? == format!("{daemon}\n/tmp\ndeep blue"), "{}", server.file("/tmp/seen")?);
    Ok(())
}

fn limits_hold_for_a_service(site: &Site) -> Result<()> {
    let text = "exec = [\"/bin/sh\", \"-c\", \"ulimit -n >/root/limit.new; mv /root/limit.new /root/limit\"]\n\
        kind = \"oneshot\"\n[limits]\nnofile = 77\n";
    let server = with_services(site, &[("limited", text)])?.start()?;
    server.until("test -s /root/limit")?;
    ensure!(server.file("/root/limit")? == "77", "{}", server.file("/root/limit")?);
    Ok(())
}

fn notify_is_waited_for(site: &Site) -> Result<()> {
    // busybox nc speaks no datagram sockets of this kind, so this service never gets ready.
    let waiting = "exec = [\"/bin/sleep\", \"1000\"]\nnotify = true\nstart_timeout_ms = 600000\n";
    let after = "exec = [\"/bin/sh\", \"-c\", \"echo too early >/root/early\"]\nkind = \"oneshot\"\nrequires = [\"waiting\"]\nafter = [\"waiting\"]\n";
    let server = with_services(site, &[("waiting", waiting), ("later", after)])?.start()?;
    server.until("pidof sleep && pidof crond")?;
    server.sh_fails("test -e /root/early")?;
    ensure!(!state_of(&server, "waiting")?.contains("running"), "{}", state_of(&server, "waiting")?);
    Ok(())
}

fn a_oneshot_runs_once(site: &Site) -> Result<()> {
    let text = "exec = [\"/bin/sh\", \"-c\", \"echo ran >>/root/ran\"]\nkind = \"oneshot\"\n";
    let server = with_services(site, &[("once", text)])?.start()?;
    server.until("test -s /root/ran && pidof crond")?;
    server.sh("sleep 1")?;
    ensure!(server.file("/root/ran")? == "ran", "{}", server.file("/root/ran")?);
    Ok(())
}

fn a_failed_requirement_fails_what_needs_it(site: &Site) -> Result<()> {
    let fails = "exec = [\"/bin/false\"]\nkind = \"oneshot\"\n";
    let needs = "exec = [\"/bin/sh\", \"-c\", \"echo ran >/root/ran\"]\nkind = \"oneshot\"\nrequires = [\"fails\"]\n";
    let server = with_services(site, &[("fails", fails), ("needs", needs)])?.start()?;
    server.until("pidof crond")?;
    server.until("vsinit list | grep -w needs | grep -qi fail")?;
    server.sh_fails("test -e /root/ran")?;
    Ok(())
}

fn a_bad_service_file_stops_nothing_else(site: &Site) -> Result<()> {
    let services = [
        ("garbage", "this is [ not toml"),
        ("mistyped", "exce = [\"/bin/true\"]\n"),
        ("missing", "exec = [\"/no/such/program\"]\n"),
        ("lonely", "exec = [\"/bin/true\"]\nrequires = [\"no-such-service\"]\n"),
    ];
    let server = with_services(site, &services)?.start()?;
    server.until("pidof syslogd && pidof crond && pidof getty")?;
    let log = site.ok(["console", "web1", "--log"])?.text()
        + &server.sh("cat /var/log/vsinit* /var/log/messages 2>/dev/null; vsinit list")?;
    for name in ["garbage", "mistyped", "missing", "lonely"] {
        ensure!(log.contains(name), "no word about {name}:\n{log}");
    }
    ensure!(log.contains("exec"), "the nearest key of exce is not named:\n{log}");
    Ok(())
}

fn the_log_of_a_service_can_be_read_and_is_bounded(site: &Site) -> Result<()> {
    let text = "exec = [\"/bin/sh\", \"-c\", \"i=0; while [ $i -lt 3000 ]; do echo a line of the talker $i; i=$((i+1)); done; echo the-last-word; exec sleep 1000\"]\n\
        log_size_bytes = 16384\n";
    let server = with_services(site, &[("talker", text)])?.start()?;
    server.until("vsinit log talker | grep -q the-last-word")?;
    ensure!(site.ok(["service", "web1", "log", "talker"])?.text().contains("the-last-word"));
    let bytes: u64 = server.sh("du -sk /var/log | cut -f 1")?.parse()?;
    ensure!(bytes < 512, "/var/log has {bytes} KiB");
    Ok(())
}

fn thousands_of_orphans_are_reaped(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("i=0; while [ $i -lt 3000 ]; do (true & ) ; i=$((i+1)); done")?;
    server.until("! grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | grep -q .")?;
    Ok(())
}

/// Sends a signal to the init of a new server, from the host.
fn signalled(site: &Site, signal: i32) -> Result<(Running<'_>, i32)> {
    let server = site.template("busybox")?.server(&format!("web{signal}")).start()?;
    let init = server.init_pid()?;
    // kill(1): nix has no names for the real-time signals.
    Invocation::new("kill").args([format!("-{signal}"), init.to_string()]).succeed()?;
    Ok((server, init))
}

fn sigpwr_and_sigusr2_power_off(site: &Site) -> Result<()> {
    for signal in [libc::SIGPWR, libc::SIGUSR2, libc::SIGRTMIN() + 4] {
        signalled(site, signal)?.0.reaches("stopped")?;
    }
    Ok(())
}

fn sigterm_and_sigint_reboot(site: &Site) -> Result<()> {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGRTMIN() + 5] {
        let (server, init) = signalled(site, signal)?;
        server.next_init(init)?;
    }
    Ok(())
}

fn sigrtmin_3_and_sigusr1_halt(site: &Site) -> Result<()> {
    for signal in [libc::SIGRTMIN() + 3, libc::SIGUSR1] {
        signalled(site, signal)?.0.reaches("stopped")?;
    }
    Ok(())
}

fn no_other_signal_ends_it(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let init = server.init_pid()?;
    for signal in [Signal::SIGHUP, Signal::SIGPIPE, Signal::SIGALRM, Signal::SIGCHLD, Signal::SIGWINCH] {
        kill(Pid::from_raw(init), signal)?;
    }
    // And from inside, where the kernel protects an init from what it does not handle.
    server.sh("kill -9 1; kill -SEGV 1; kill -STOP 1; true")?;
    ensure!(server.sh("echo alive")? == "alive" && server.init_pid()? == init);
    ensure!(server.sh("vsinit list")?.contains("crond"), "it lives and answers no more");
    Ok(())
}

fn idle_it_needs_little_memory_of_its_own(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    // Two, because what is shared by all servers counts as private where there is only one.
    let (server, other) = (template.server("web1").start()?, template.server("web2").start()?);
    server.until("pidof crond && pidof getty")?;
    other.until("pidof crond && pidof getty")?;
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", server.init_pid()?))?;
    let private: u64 = rollup
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    ensure!(private <= 256, "vsinit has {private} KiB of its own:\n{rollup}");
    Ok(())
}

fn its_control_is_for_root_only(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    ensure!(server.sh("stat -c %a /run/vsinit/control")?.ends_with("600"));
    site.run(["exec", "-u", "daemon", "web1", "--", "vsinit", "stop", "crond"])?.complains(&[])?;
    server.sh("pidof crond")?;
    Ok(())
}
