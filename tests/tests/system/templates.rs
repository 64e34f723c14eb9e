//! Templates: built, imported, listed, removed, and made into servers.

use std::{fs, os::unix::fs::PermissionsExt};

use anyhow::{Result, ensure};
use system_tests::{command::Invocation, promises, server::Server, site::Site};

promises![
    busybox_is_built_without_a_network,
    a_build_may_be_repeated,
    templates_are_listed_and_shown,
    a_template_in_use_is_not_removed,
    an_import_takes_every_compression,
    an_import_keeps_owners_modes_and_links,
    a_name_that_is_taken_is_not_overwritten,
    root_gets_its_password_and_keys,
    both_kinds_of_volume_work,
    personalised_again_at_each_start_it_stays_the_same,
    debian_12_boots_to_running
];

fn busybox_is_built_without_a_network(site: &Site) -> Result<()> {
    let vsctl = system_tests::site::programs()?.join("vsctl");
    let call = Invocation::new("unshare").args(["--net"]).args([vsctl]).args(["template", "build", "busybox"]);
    site.keep(call.env("VSOS_ROOT", site.root()))?.success()?;
    let list = site.ok(["template", "list"])?.text();
    ensure!(list.contains("busybox"), "{list}");
    let server = site.template("busybox")?.server("web1").start()?;
    ensure!(server.sh("echo alive")? == "alive");
    Ok(())
}

fn a_build_may_be_repeated(site: &Site) -> Result<()> {
    site.ok(["template", "build", "busybox"])?;
    let again = site.run(["template", "build", "busybox"])?;
    // Done again or refused as taken, never broken.
    ensure!(again.code == 0 || again.code == 43, "{again}");
    let _server = site.template("busybox")?.server("web1").start()?;
    Ok(())
}

fn templates_are_listed_and_shown(site: &Site) -> Result<()> {
    let _template = site.template("busybox")?;
    ensure!(site.ok(["template", "list"])?.text().contains("busybox"));
    ensure!(site.ok(["template", "show", "busybox"])?.text().contains("vsinit"));
    site.run(["template", "show", "nothing"])?.failure(91, &["nothing"])?;
    site.run(["template", "build", "nothing"])?.failure(91, &["nothing"])?;
    site.ok(["template", "remove", "busybox"])?;
    ensure!(!site.path("var/lib/vsos/templates/busybox").exists(), "its files are still there");
    Ok(())
}

fn a_template_in_use_is_not_removed(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    site.run(["template", "remove", "busybox"])?.complains(&["busybox", "web1"])?;
    let server = server.start()?;
    ensure!(server.sh("echo alive")? == "alive");
    Ok(())
}

/// A tarball of the busybox template's root, packed in `style` (a flag of tar).
fn packed(site: &Site, style: &str, name: &str) -> Result<String> {
    let _template = site.template("busybox")?;
    let root = site.path("var/lib/vsos/templates/busybox/root");
    let file = site.path(name).display().to_string();
    let call = Invocation::new("tar").args(["--numeric-owner", style, "-cf", &file, "-C"]).args([&root]).args(["."]);
    call.succeed()?;
    Ok(file)
}

fn an_import_takes_every_compression(site: &Site) -> Result<()> {
    for (style, name) in
        [("--no-recursion", "plain.tar"), ("--gzip", "a.tar.gz"), ("--xz", "b.tar.xz"), ("--zstd", "c.tar.zst")]
    {
        let style = if name == "plain.tar" { "--recursion" } else { style };
        let file = packed(site, style, name)?;
        let template = name.split('.').next().unwrap_or(name);
        site.ok(["template", "import", template, &file])?;
        site.ok(["create", "web1", "--template", template])?;
        let server = Server::adopt(site, "web1").start()?;
        ensure!(server.sh("echo alive")? == "alive", "{name}");
    }
    Ok(())
}

fn an_import_keeps_owners_modes_and_links(site: &Site) -> Result<()> {
    let file = packed(site, "--recursion", "root.tar")?;
    let extra = site.path("extra");
    fs::create_dir_all(extra.join("opt/sub"))?;
    fs::write(extra.join("opt/sub/one"), "one")?;
    fs::hard_link(extra.join("opt/sub/one"), extra.join("opt/sub/two"))?;
    std::os::unix::fs::symlink("/opt/sub/one", extra.join("opt/sub/link"))?;
    fs::set_permissions(extra.join("opt/sub/one"), fs::Permissions::from_mode(0o4750))?;
    std::os::unix::fs::chown(extra.join("opt/sub/one"), Some(1234), Some(4321))?;
    fs::set_permissions(extra.join("opt/sub/one"), fs::Permissions::from_mode(0o4750))?;
    let call = Invocation::new("tar").args(["--numeric-owner", "-rf", &file, "-C"]).args([&extra]).args(["./opt"]);
    call.succeed()?;
    site.ok(["template", "import", "mine", &file])?;
    site.ok(["create", "web1", "--template", "mine"])?;
    let server = Server::adopt(site, "web1").start()?;
    let seen = server.sh("stat -c '%a %u %g %h' /opt/sub/one; readlink /opt/sub/link")?;
    ensure!(seen == "4750 1234 4321 2\n/opt/sub/one", "{seen}");
    Ok(())
}

fn a_name_that_is_taken_is_not_overwritten(site: &Site) -> Result<()> {
    let file = packed(site, "--recursion", "root.tar")?;
    site.run(["template", "import", "busybox", &file])?.failure(43, &["busybox"])?;
    site.run(["template", "import", "../evil", &file])?.failure(20, &["evil"])?;
    site.run(["template", "import", "mine", "/no/such.tar"])?.complains(&["/no/such.tar"])?;
    Ok(())
}

fn root_gets_its_password_and_keys(site: &Site) -> Result<()> {
    let key = site.path("key.pub");
    let text = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1n4bfgSQ8l0PPlR0XWwCQX0pYkXv3dYkE2RkX0Vv9k someone@somewhere";
    fs::write(&key, format!("{text}\n"))?;
    let draft = site.template("busybox")?.server("web1").with("--password-stdin");
    let call = site.vsctl(draft.command()).args(["--ssh-key"]).args([&key]).input("open sesame\n");
    site.keep(call)?.success()?;
    let server = Server::adopt(site, "web1").start()?;
    ensure!(server.file("/root/.ssh/authorized_keys")?.contains(text));
    ensure!(server.sh("stat -c '%a %u' /root/.ssh /root/.ssh/authorized_keys")? == "700 0\n600 0");
    let shadow = server.sh("grep ^root: /etc/shadow")?;
    ensure!(shadow.starts_with("root:$") && !shadow.contains("sesame"), "{shadow}");
    let spec = fs::read_to_string(server.directory().join("server.toml"))?;
    ensure!(!spec.contains("sesame"), "the password is in the spec");
    // It opens the console.
    let mut console = server.terminal(&["console", "web1"])?;
    console.send("\r")?;
    console.expect("login:")?;
    console.send("root\r")?;
    console.expect("assword:")?;
    console.send("open sesame\r")?;
    console.send("echo inside-$((40+2))\r")?;
    console.expect("inside-42")?;
    console.send("\u{1}q")?;
    console.finish()?;
    Ok(())
}

fn both_kinds_of_volume_work(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    for (name, kind) in [("one", "overlay"), ("two", "dir")] {
        let server = template.server(name).with(&format!("--volume {kind}")).start()?;
        server.sh("echo kept >/root/data; rm /etc/issue")?;
        let server = server.stop()?.start()?;
        ensure!(server.file("/root/data")? == "kept", "{kind}");
        server.sh_fails("test -e /etc/issue")?;
    }
    site.run(["create", "three", "--template", "busybox", "--volume", "tape"])?.complains(&["tape"])?;
    Ok(())
}

fn personalised_again_at_each_start_it_stays_the_same(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let files = "cat /etc/hostname /etc/hosts /etc/resolv.conf";
    let before = server.sh(files)?;
    let server = server.stop()?.start()?;
    let after = server.sh(files)?;
    ensure!(before == after, "first:\n{before}\nthen:\n{after}");
    Ok(())
}

fn debian_12_boots_to_running(site: &Site) -> Result<()> {
    let server = site.template("debian-12")?.server("web1").start()?;
    let state = server.booted()?;
    let failed = server.exec(&["systemctl", "--failed", "--no-legend", "--plain"])?;
    ensure!(state == "running", "it is {state}:\n{failed}");
    ensure!(server.file("/etc/debian_version")?.starts_with("12"));
    Ok(())
}
