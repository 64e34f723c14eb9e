//! What a newcomer does first: the demo, and an installation.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use system_tests::{command::Invocation, promise::skip, promises, site::Site};

promises![
    the_demo_runs_twice_and_cleans_up,
    the_demo_leaves_others_servers_alone,
    an_installation_is_complete_and_works,
    completions_are_there_for_three_shells,
    every_command_has_help_and_the_manual_names_it
];

/// The tree this test was built from, where it still is.
fn tree() -> Result<PathBuf> {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    tree.join("Makefile").exists().then_some(tree).ok_or_else(|| skip("the tree is not on this machine"))
}

fn demo(site: &Site, what: &str) -> Result<Invocation> {
    let programs = system_tests::site::programs()?;
    let call = Invocation::new(tree()?.join("tests/demo.sh")).args([what]);
    Ok(call.env("VSOS_PROGRAMS", programs).env("VSOS_ROOT", site.root()))
}

fn the_demo_runs_twice_and_cleans_up(site: &Site) -> Result<()> {
    for _ in 0..2 {
        let shown = site.keep(demo(site, "show")?)?.success()?.text();
        for word in
            ["demo1", "demo2", "running", "Mem:            128 ", "up ", "inet ", "1 packets received", "enter demo1"]
        {
            ensure!(shown.contains(word), "the demo does not show {word:?}:\n{shown}");
        }
    }
    ensure!(site.servers().len() == 2, "{:?}", site.servers());
    for _ in 0..2 {
        site.keep(demo(site, "clean")?)?.success()?;
    }
    ensure!(site.servers().is_empty(), "{:?}", site.servers());
    for directory in ["var/lib/vsos", "run/vsos"] {
        ensure!(!site.path(directory).exists(), "the demo's {directory} is still there");
    }
    Ok(())
}

fn the_demo_leaves_others_servers_alone(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("demo1").start()?;
    site.keep(demo(site, "show")?)?.complains(&["demo1"])?;
    site.keep(demo(site, "clean")?)?.success()?;
    ensure!(server.state()? == "running" && server.sh("echo alive")? == "alive");
    Ok(())
}

fn an_installation_is_complete_and_works(site: &Site) -> Result<()> {
    let place = site.path("installed");
    let call =
        Invocation::new("make").args(["--no-print-directory", "-C"]).args([tree()?]).args(["install", "PREFIX=/usr"]);
    let programs = system_tests::site::programs()?;
    let call = call.args([format!("DESTDIR={}", place.display()), format!("PROGRAMS={}", programs.display())]);
    site.keep(call)?.success()?;
    for file in [
        "usr/bin/vsctl",
        "usr/libexec/vsos/vsinit",
        "usr/libexec/vsos/lxcfs-fuse",
        "usr/share/man/man8/vsctl.8",
        "usr/share/man/man8/vsinit.8",
        "usr/share/man/man5/server.toml.5",
        "usr/share/bash-completion/completions/vsctl",
        "usr/share/zsh/site-functions/_vsctl",
        "usr/share/fish/vendor_completions.d/vsctl.fish",
        "usr/lib/systemd/system/vsos.service",
    ] {
        let size = fs::metadata(place.join(file)).with_context(|| format!("no {file}"))?.len();
        ensure!(size > 0, "{file} is empty");
    }
    let unit = fs::read_to_string(place.join("usr/lib/systemd/system/vsos.service"))?;
    ensure!(unit.contains("/usr/bin/vsctl autostart") && unit.contains("/usr/bin/vsctl autostop"), "{unit}");
    ensure!(!unit.contains('@') && unit.contains("Delegate=yes"), "{unit}");
    // The installed program finds its parts in ../libexec/vsos.
    let vsctl = place.join("usr/bin/vsctl");
    let run = |words: &[&str]| site.keep(Invocation::new(&vsctl).args(words).env("VSOS_ROOT", site.root()));
    run(&["template", "build", "busybox"])?.success()?;
    run(&["create", "web1", "--template", "busybox", "--start"])?.success()?;
    ensure!(run(&["exec", "web1", "--", "echo", "alive"])?.success()?.text() == "alive");
    run(&["destroy", "--force", "web1"])?.success()?;
    Ok(())
}

fn completions_are_there_for_three_shells(site: &Site) -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let script = site.ok(["completions", shell])?.text();
        for verb in ["create", "start", "console", "doctor"] {
            ensure!(script.contains(verb), "{verb} is not completed in {shell}");
        }
    }
    site.run(["completions", "cmd"])?.complains(&["cmd"])?;
    Ok(())
}

fn every_command_has_help_and_the_manual_names_it(site: &Site) -> Result<()> {
    let pages = site.path("man");
    fs::create_dir(&pages)?;
    site.ok(["man", &pages.display().to_string()])?;
    let manual: String =
        fs::read_dir(&pages)?.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok()).collect();
    for verb in [
        "create",
        "start",
        "stop",
        "restart",
        "destroy",
        "rename",
        "freeze",
        "thaw",
        "enter",
        "exec",
        "console",
        "list",
        "status",
        "show",
        "set",
        "edit",
        "top",
        "ps",
        "pid",
        "wait",
        "events",
        "doctor",
        "template",
        "push",
        "pull",
        "service",
        "autostart",
        "completions",
    ] {
        let help = site.ok([verb, "--help"])?.text();
        ensure!(help.len() > 40, "help of {verb}: {help}");
        ensure!(manual.contains(verb), "the manual does not name {verb}");
    }
    // One table of exit codes, in the manual.
    for code in ["9", "20", "31", "32", "44", "46", "91"] {
        ensure!(manual.contains(code), "exit code {code} is not in the manual");
    }
    Ok(())
}
