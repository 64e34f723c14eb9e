//! What a caller hands down to `vsctl` without a word, and how little of it matters: limits, signals, descriptors.

use std::fs;

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::{Finished, Invocation},
    promises,
    server::Running,
    site::Site,
};

promises![
    a_caller_that_ignores_or_blocks_signals_is_served,
    a_caller_without_standard_descriptors_is_served,
    a_caller_whose_directory_is_gone_is_served,
    a_caller_with_an_odd_umask_gets_the_same_server,
    a_caller_with_few_descriptors_harms_no_running_server,
    a_caller_whose_calls_are_answered_already_is_told_so,
    a_status_that_cannot_be_read_stops_the_command
];

/// As a container manager around `vsctl` may: a listener on a filter that allows everything, held while it runs.
const ANSWERED: &str = "exec perl -e '$f = pack(q(SCCL), 6, 0, 0, 0x7fff0000); $p = pack(q(S x6 P), 1, $f); \
                        syscall(317, 1, 8, $p) >= 0 or die; exit(system(@ARGV) >> 8)'";

/// A whole life by way of a caller that does `before` first: everything that waits for children, forks or makes files.
fn lives(site: &Site, before: &str) -> Result<()> {
    let _template = site.template("busybox")?;
    let said = site.path("said");
    let step = |arguments: &[&str]| -> Result<()> {
        let done = after(site, before, arguments)?;
        ensure!(done.code == 0, "{done}");
        Ok(())
    };
    // Two: what servers share is made by the first start and used by the second.
    step(&["create", "web1", "web2", "--template", "busybox"])?;
    step(&["start", "web1", "web2"])?;
    for code in [0, 7] {
        let done = after(site, before, &["exec", "web1", "--", "sh", "-c", &format!("exit {code}")])?;
        ensure!(done.code == code, "wanted exit status {code}: {done}");
    }
    step(&["push", "web1", "/etc/hostname", "/root/said"])?;
    step(&["pull", "web1", "/root/said", &said.display().to_string()])?;
    ensure!(fs::read(&said)? == fs::read("/etc/hostname")?);
    step(&["set", "web1", "pids=100"])?;
    step(&["restart", "web1"])?;
    step(&["doctor"])?;
    step(&["stop", "web1", "web2"])?;
    step(&["destroy", "web1", "web2"])
}

fn a_caller_that_ignores_or_blocks_signals_is_served(site: &Site) -> Result<()> {
    // Not by a trap of the shell, which looks after SIGCHLD itself.
    lives(site, "exec env --ignore-signal=CHLD,HUP,TERM,USR1 --block-signal=CHLD,ALRM,TERM")?;
    let vsctl = system_tests::site::programs()?.join("vsctl");
    let server = site.template("busybox")?.server("web3").start()?;
    // env(1) blocks them; a command that nothing can end is none of a person's.
    let call = Invocation::new("env").args(["--block-signal=TERM,INT,CHLD"]).args([&vsctl]);
    let mut waits = call.args(["wait", "web3", "stopped"]).env("VSOS_ROOT", site.root()).spawn()?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(waits.pid()), nix::sys::signal::Signal::SIGTERM)?;
    let ended = waits.wait()?;
    ensure!(ended.code == 143, "SIGTERM was blocked: {ended}");
    server.stop().map(drop)
}

fn a_caller_without_standard_descriptors_is_served(site: &Site) -> Result<()> {
    lives(site, "exec <&- >&- 2>&-; exec")
}

fn a_caller_whose_directory_is_gone_is_served(site: &Site) -> Result<()> {
    lives(site, "d=$(mktemp -d) && cd $d && rmdir $d && exec")
}

fn a_caller_with_an_odd_umask_gets_the_same_server(site: &Site) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for mask in ["0", "777"] {
        lives(site, &format!("umask {mask}; exec"))?;
    }
    for directory in ["var/lib/vsos", "var/lib/vsos/servers", "run/vsos", "run/vsos/lock"] {
        let mode = fs::metadata(site.path(directory))?.permissions().mode() & 0o777;
        ensure!(mode & 0o022 == 0 && mode & 0o700 == 0o700, "{directory} has mode {mode:o}");
    }
    Ok(())
}

/// Runs `vsctl` by a shell, with `before` before the command: it ends with `exec`.
fn after(site: &Site, before: &str, arguments: &[&str]) -> Result<Finished> {
    let vsctl = system_tests::site::programs()?.join("vsctl");
    let call = Invocation::new("sh").args(["-c", &format!("{before} \"$@\""), "sh"]).args([&vsctl]);
    site.keep(call.args(arguments).env("VSOS_ROOT", site.root()))
}

/// The server is what it was: the same init, and it answers.
fn unharmed(server: &Running, init: i32) -> Result<()> {
    ensure!(server.state()? == "running", "it is {}", server.state()?);
    ensure!(server.init_pid()? == init, "its init is another one");
    ensure!(server.sh("echo alive")? == "alive");
    Ok(())
}

fn a_caller_with_few_descriptors_harms_no_running_server(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let init = server.init_pid()?;
    let mut refused = 0;
    // From too few for anything to enough for all: somewhere in between each open(2) is the first that fails.
    for limit in 3..=24 {
        for command in [&["start", "web1"][..], &["destroy", "web1"], &["rename", "web1", "web2"]] {
            let done = after(site, &format!("ulimit -n {limit}; exec"), command)?;
            ensure!(done.code != 0, "{limit} descriptors: {done}");
            refused += usize::from(done.code != 32);
        }
        unharmed(&server, init).with_context(|| format!("with {limit} descriptors"))?;
    }
    ensure!(refused > 0, "no limit was low enough to be met");
    orderly_or_not_at_all(site, &server, init)
}

/// A stop that cannot see its server's init must not take the server for one that is down and may be killed.
fn orderly_or_not_at_all(site: &Site, server: &Running, init: i32) -> Result<()> {
    server.sh("(trap 'echo bye >/said; exit' TERM; while :; do sleep 0.1; done) >/dev/null 2>&1 </dev/null &")?;
    let said = site.path("var/lib/vsos/servers/web1/volume/upper/said");
    for limit in 3..=64 {
        after(site, &format!("ulimit -n {limit}; exec"), &["stop", "web1"])?;
        if said.exists() {
            return Ok(());
        }
        unharmed(server, init).with_context(|| format!("stopped with {limit} descriptors"))?;
    }
    anyhow::bail!("it was never stopped")
}

fn a_caller_whose_calls_are_answered_already_is_told_so(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    after(site, ANSWERED, &["start", "web1"])?.complains(&["web1", "sysinfo = \"own\"", "busy"])?;
    ensure!(server.state()? == "stopped");
    site.ok(["set", "web1", "sysinfo=host"])?;
    for arguments in [&["start", "web1"][..], &["exec", "web1", "--", "true"]] {
        let done = after(site, ANSWERED, arguments)?;
        ensure!(done.code == 0, "{done}");
    }
    Ok(())
}

fn a_status_that_cannot_be_read_stops_the_command(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let init = server.init_pid()?;
    let status = site.path("run/vsos/servers/web1/status.toml");
    let kept = status.with_extension("kept");
    fs::rename(&status, &kept)?;
    // Reading it is an error that is not "no such file".
    fs::create_dir(&status)?;
    for command in [
        &["start", "web1"][..],
        &["stop", "web1", "--kill"],
        &["restart", "web1"],
        &["destroy", "web1", "--force"],
        &["exec", "web1", "--", "true"],
        &["rename", "web1", "web2"],
        &["doctor", "--fix"],
        &["list"],
        &["status", "web1"],
        &["start", "--all"],
        &["stop", "--all"],
    ] {
        site.run(command.iter().copied())?.complains(&["web1", "status.toml"]).with_context(|| command.join(" "))?;
    }
    fs::remove_dir(&status)?;
    fs::rename(&kept, &status)?;
    unharmed(&server, init)
}
