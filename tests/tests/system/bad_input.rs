//! Bad input: a clear error that names the object, and nothing left behind.

use std::{ffi::OsStr, fs, os::unix::ffi::OsStrExt, path::Path};

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::{Finished, Invocation},
    promise::skip,
    promises,
    server::Server,
    site::Site,
    tarball::Tarball,
};

promises![
    bad_names_are_refused,
    a_taken_name_is_refused,
    unknown_servers_are_named_by_every_command,
    an_unknown_template_is_named,
    addresses_outside_the_subnet_or_taken_are_refused,
    bad_limits_are_refused,
    bad_mounts_devices_and_capabilities_are_refused,
    a_mistyped_key_is_shown_with_its_line_and_the_nearest_key,
    a_spec_cut_in_half_is_named_and_hides_no_other_server,
    a_volume_that_is_gone_is_named,
    a_template_that_is_gone_is_named,
    a_full_disk_while_creating_leaves_nothing,
    a_host_without_dev_fuse_gets_a_clear_error,
    without_root_it_says_so,
    a_tarball_cut_in_half_is_refused,
    a_tarball_cannot_write_outside_its_root,
    a_tarball_cannot_bring_devices,
    what_is_no_tarball_is_refused,
    a_wrong_verb_or_flag_gets_a_hint
];

/// Runs a command that has to fail with `code`, name all of `words`, and leave no server.
fn refused<S: AsRef<OsStr>>(site: &Site, command: &[S], code: i32, words: &[&str]) -> Result<Finished> {
    let before = site.servers();
    let done = site.run(command)?.failure(code, words)?;
    ensure!(site.servers() == before, "it left {:?} behind", site.servers());
    Ok(done)
}

fn bad_names_are_refused(site: &Site) -> Result<()> {
    let _template = site.template("busybox")?;
    let long = "x".repeat(256);
    let create = |name: &OsStr| -> Result<()> {
        let command = ["create", "--template", "busybox", "--"].map(OsStr::new);
        let command: Vec<&OsStr> = command.into_iter().chain([name]).collect();
        let done = site.run(&command)?;
        ensure!([2, 20].contains(&done.code) && !done.errors().trim().is_empty(), "{name:?}: {done}");
        ensure!(site.servers().is_empty(), "{name:?} left {:?}", site.servers());
        Ok(())
    };
    for name in ["a/b", "..", ".", "", "../../etc", "/etc", "a b", "a\nb", "-x", "ä", "\u{1b}[31m", &long] {
        create(OsStr::new(name))?;
    }
    create(OsStr::from_bytes(b"\xff\xfe"))?;
    // NUL cannot be typed, but it can stand in a file.
    let server = site.template("busybox")?.server("web1").create()?;
    fs::write(server.directory().join("server.toml"), "template = \"busy\\u0000box\"\n")?;
    refused(site, &["start", "web1"], 14, &["server.toml"])?;
    Ok(())
}

fn a_taken_name_is_refused(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let server = template.server("web1").start()?;
    refused(site, &template.server("web1").command(), 43, &["web1"])?;
    ensure!(server.sh("echo alive")? == "alive");
    let _other = template.server("web2").create()?;
    refused(site, &["rename", "web2", "web1"], 43, &["web1"])?;
    refused(site, &["start", "web1"], 32, &["web1"])?;
    Ok(())
}

fn unknown_servers_are_named_by_every_command(site: &Site) -> Result<()> {
    for command in [
        &["start", "web9"][..],
        &["stop", "web9"],
        &["restart", "web9"],
        &["destroy", "web9"],
        &["destroy", "--force", "web9"],
        &["rename", "web9", "web8"],
        &["freeze", "web9"],
        &["thaw", "web9"],
        &["enter", "web9"],
        &["exec", "web9", "--", "true"],
        &["console", "web9"],
        &["status", "web9"],
        &["show", "web9"],
        &["set", "web9", "memory=64M"],
        &["edit", "web9"],
        &["ps", "web9"],
        &["wait", "web9", "running"],
        &["push", "web9", "/etc/passwd", "/x"],
        &["pull", "web9", "/x", "/nowhere/x"],
        &["service", "web9", "list"],
    ] {
        refused(site, command, 44, &["web9"]).with_context(|| command.join(" "))?;
    }
    Ok(())
}

fn an_unknown_template_is_named(site: &Site) -> Result<()> {
    refused(site, &["create", "web1", "--template", "solaris"], 91, &["solaris"])?;
    refused(site, &["create", "web1", "--template", "../../etc"], 20, &["etc"])?;
    ensure!(!site.path("var/lib/vsos/servers/web1").exists());
    Ok(())
}

fn addresses_outside_the_subnet_or_taken_are_refused(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let one = template.server("web1").start()?;
    let length = one.ipv4_length()?;
    let taken = format!("{}/{length}", one.ipv4()?);
    let gateway = format!("{}/{length}", one.gateway("-4")?);
    let create = |address: &str| -> Result<Finished> {
        let plain = address.split('/').next().unwrap_or(address);
        refused(site, &["create", "web2", "--template", "busybox", "--ip", address, "--start"], 20, &[plain])
    };
    for address in
        [&*taken, &gateway, "192.0.2.7/24", "2001:db8::7/64", "10.0.0.300/24", "1.2.3.4/33", "0.0.0.0/0", "words"]
    {
        create(address).with_context(|| address.to_owned())?;
    }
    let server = template.server("web3").create()?;
    site.run(["set", "web3", &format!("ip={taken}")])?.complains(&[&one.ipv4()?])?;
    ensure!(server.state()? == "stopped");
    Ok(())
}

fn bad_limits_are_refused(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    for (key, values) in [
        ("memory", &["0", "-1", "1", "99EiB", "x", "", "1.2.3M", "18446744073709551616"][..]),
        ("swap", &["-1", "x"]),
        ("cpus", &["x", "0", "-1", "nan", "inf", "1e400"]),
        ("cpuset", &["x", "-1", "5-2", "4096", "0,,1"]),
        ("pids", &["0", "-1", "x"]),
        ("hostname", &["a b", "", "-x", "a/b"]),
        ("net", &["moon"]),
    ] {
        for value in values {
            let flag = format!("--{key}={value}");
            refused(site, &["create", "web2", "--template", "busybox", &flag], 20, &[key]).with_context(|| flag)?;
            if value.is_empty() {
                // Which is how `set` takes a key away.
                continue;
            }
            let set = format!("{key}={value}");
            site.run(["set", "web1", &set])?.failure(20, &[key]).with_context(|| set)?;
        }
    }
    // By hand, in the file.
    let file = server.directory().join("server.toml");
    let spec = fs::read_to_string(&file)?;
    for (line, key) in
        [("memory = \"1\"", "memory"), ("cpus = \"x\"", "cpus"), ("memory = -1", "memory"), ("pids = 0", "pids")]
    {
        fs::write(&file, format!("{line}\n{spec}"))?;
        refused(site, &["start", "web1"], 14, &["server.toml", key]).with_context(|| line)?;
    }
    Ok(())
}

fn bad_mounts_devices_and_capabilities_are_refused(site: &Site) -> Result<()> {
    let _template = site.template("busybox")?;
    for flag in [
        "--mount=/no/such/directory:/mnt",
        "--mount=relative:/mnt",
        "--mount=/tmp:relative",
        "--mount=/tmp:/mnt/../../etc",
        "--mount=/tmp",
        "--mount=/tmp:/mnt:rx",
        "--device=/dev/no-such-device",
        "--device=/etc/passwd",
        "--device=/dev/null:xyz",
        "--cap=+no_such_thing",
        "--cap=chown",
    ] {
        let done = site.run(["create", "web1", "--template", "busybox", "--start", flag])?;
        done.complains(&[]).with_context(|| flag)?;
        if !site.servers().is_empty() {
            // Seen only at the start: then there is a server, stopped, that can be mended or destroyed.
            ensure!(Server::adopt(site, "web1").state()? == "stopped", "{flag}");
        }
    }
    Ok(())
}

fn a_mistyped_key_is_shown_with_its_line_and_the_nearest_key(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    let file = server.directory().join("server.toml");
    fs::write(&file, "template = \"busybox\"\n\nmemroy = \"64M\"\n")?;
    let done = refused(site, &["start", "web1"], 14, &["server.toml", "memroy", "memory"])?;
    let errors = done.errors();
    ensure!(errors.contains(":3") || errors.contains("line 3"), "no line:\n{errors}");
    Ok(())
}

fn a_spec_cut_in_half_is_named_and_hides_no_other_server(site: &Site) -> Result<()> {
    let template = site.template("busybox")?;
    let broken = template.server("broken").with("--memory 64M --pids 100").create()?;
    let _sound = template.server("sound").start()?;
    let file = broken.directory().join("server.toml");
    let spec = fs::read(&file)?;
    let cut = spec.len() - 4;
    fs::write(&file, &spec[..cut])?;
    refused(site, &["start", "broken"], 14, &["broken", "server.toml"])?;
    let list = site.run(["list", "-a"])?;
    ensure!(list.text().contains("sound") && list.text().contains("broken"), "{list}");
    // Its owner can still get rid of it.
    site.ok(["destroy", "broken"])?;
    Ok(())
}

fn a_volume_that_is_gone_is_named(site: &Site) -> Result<()> {
    for (name, kind) in [("one", "overlay"), ("two", "dir")] {
        let server = site.template("busybox")?.server(name).with(&format!("--volume {kind}")).create()?;
        fs::remove_dir_all(server.directory().join("volume"))?;
        refused(site, &["start", name], 44, &[name])?;
        ensure!(server.state()? == "stopped");
        site.ok(["destroy", name])?;
    }
    Ok(())
}

fn a_template_that_is_gone_is_named(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    fs::remove_dir_all(site.path("var/lib/vsos/templates/busybox"))?;
    refused(site, &["start", "web1"], 91, &["busybox"])?;
    ensure!(server.state()? == "stopped");
    Ok(())
}

/// A file system of `size_bytes`, mounted until dropped.
pub struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    /// At the directory `place` of a site.
    pub fn at(site: &Site, place: &str, size_bytes: u64) -> Result<Self> {
        let place = site.path(place);
        fs::create_dir_all(&place)?;
        let options = format!("size={size_bytes},mode=755");
        Invocation::new("mount").args(["-t", "tmpfs", "-o", &options, "small"]).args([&place]).succeed()?;
        Ok(Self(place))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Invocation::new("umount").args(["-l"]).args([&self.0]).run();
    }
}

fn a_full_disk_while_creating_leaves_nothing(site: &Site) -> Result<()> {
    let disk = SmallDisk::at(site, "disk", 24 << 20)?;
    let small = Site::below(&disk.0)?;
    let _template = small.template("busybox")?;
    let fill = |left: u64| -> Result<()> {
        let ballast = disk.0.join("ballast");
        let _ = fs::remove_file(&ballast);
        let stat = nix::sys::statvfs::statvfs(&disk.0)?;
        let free = stat.blocks_available() * stat.fragment_size();
        fs::write(ballast, vec![0; usize::try_from(free.saturating_sub(left))?])?;
        Ok(())
    };
    for left in [0, 4096, 16384, 65536, 500_000] {
        fill(left)?;
        let done = small.run(["create", "web1", "--template", "busybox", "--volume", "dir"])?;
        site.note(done.to_string());
        done.failure(46, &[]).with_context(|| format!("{left} bytes free"))?;
        ensure!(small.servers().is_empty(), "{left} bytes free: it left {:?}", small.servers());
        for place in ["servers", "ids", "journal", ""] {
            let directory = small.path("var/lib/vsos").join(place);
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let expected = name == ".lock" || place.is_empty() && !name.ends_with(".new");
                ensure!(expected, "{left} bytes free: {name} in {place:?}");
            }
        }
    }
    fs::remove_file(disk.0.join("ballast"))?;
    let server = small.template("busybox")?.server("web1").with("--volume dir").create()?;
    drop(server);
    small.scrub();
    drop(small);
    Ok(())
}

fn a_host_without_dev_fuse_gets_a_clear_error(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    let vsctl = system_tests::site::programs()?.join("vsctl");
    // A /dev of its own with everything but fuse.
    let script = "mkdir -p $1/dev && mount -t tmpfs dev $1/dev && for n in null zero full random urandom tty ptmx kmsg; do \
        touch $1/dev/$n && mount --bind /dev/$n $1/dev/$n || exit 9; done; mkdir -p $1/dev/pts $1/dev/shm $1/dev/mqueue && \
        mount --bind /dev/pts $1/dev/pts && mount --move $1/dev /dev && exec $2 start web1";
    let call = Invocation::new("unshare").args(["--mount", "sh", "-c", script, "sh"]).args([site.root(), &vsctl]);
    let done = site.keep(call.env("VSOS_ROOT", site.root()))?;
    ensure!(done.code != 9, "the test's own /dev failed: {done}");
    done.complains(&["fuse"])?;
    ensure!(server.state()? == "stopped");
    Ok(())
}

fn without_root_it_says_so(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    // The build directory may be closed to others, the site is not.
    let own = site.path("vsctl");
    fs::copy(system_tests::site::programs()?.join("vsctl"), &own)?;
    for command in [
        &["create", "web2", "--template", "busybox"][..],
        &["start", "web1"],
        &["destroy", "web1"],
        &["doctor", "--fix"],
    ] {
        let call = Invocation::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        let call = call.args([&own]).args(command).env("VSOS_ROOT", site.root());
        site.keep(call)?.complains(&["root"]).with_context(|| command.join(" "))?;
    }
    ensure!(server.state()? == "stopped");
    Ok(())
}

/// Imports bytes as the template `bad`, which has to be refused without a trace.
fn import_refused(site: &Site, bytes: &[u8], words: &[&str]) -> Result<()> {
    let file = site.path("bad.tar");
    fs::write(&file, bytes)?;
    site.run(["template", "import", "bad", &file.display().to_string()])?.complains(words)?;
    ensure!(!site.path("var/lib/vsos/templates/bad").exists(), "the template is there all the same");
    no_temporary_files(&site.path("var/lib/vsos/templates"))
}

fn no_temporary_files(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        ensure!(["busybox", ".lock"].contains(&&*name), "{name} is left in {}", directory.display());
    }
    Ok(())
}

fn root_of(extra: impl FnOnce(Tarball) -> Tarball) -> Vec<u8> {
    let base = Tarball::default().directory("etc/").directory("bin/").directory("sbin/").file(
        "sbin/init",
        0o755,
        b"#!/bin/sh\n",
    );
    extra(base).file("etc/last", 0o644, b"last").finish()
}

fn a_tarball_cut_in_half_is_refused(site: &Site) -> Result<()> {
    let whole = root_of(|tar| tar.file("etc/big", 0o644, &[7; 100_000]));
    import_refused(site, &whole[..whole.len() / 2], &["bad"])?;
    let file = site.path("whole.tar");
    fs::write(&file, &whole)?;
    for (style, ending) in [("-z", "gz"), ("-J", "xz"), ("--zstd", "zst")] {
        let packed = site.path(&format!("packed.tar.{ending}"));
        Invocation::new("tar")
            .args([style, "-cf"])
            .args([&packed])
            .args(["-C"])
            .args([site.root()])
            .args(["whole.tar"])
            .succeed()?;
        let bytes = fs::read(&packed)?;
        let cut = site.path(&format!("cut.tar.{ending}"));
        fs::write(&cut, &bytes[..bytes.len() / 2])?;
        site.run(["template", "import", "bad", &cut.display().to_string()])?.complains(&[])?;
        ensure!(!site.path("var/lib/vsos/templates/bad").exists());
    }
    Ok(())
}

fn a_tarball_cannot_write_outside_its_root(site: &Site) -> Result<()> {
    let outside = site.path("outside");
    fs::create_dir(&outside)?;
    fs::write(outside.join("secret"), "secret")?;
    let place = outside.display().to_string();
    if place.len() > 80 {
        return Err(skip("the temporary directory's name is too long for a tar header"));
    }
    let up = format!("{}{}", "../".repeat(12), &place[1..]);
    for (what, bytes) in [
        ("an absolute path", root_of(|tar| tar.file(&format!("{place}/written"), 0o644, b"x"))),
        ("a path up", root_of(|tar| tar.file(&format!("{up}/written"), 0o644, b"x"))),
        ("a path up from inside", root_of(|tar| tar.file(&format!("etc/{up}/written"), 0o644, b"x"))),
        ("a hard link out", root_of(|tar| tar.hard_link("etc/stolen", &format!("{place}/secret")))),
        ("a hard link up", root_of(|tar| tar.hard_link("etc/stolen", &format!("{up}/secret")))),
        // Symbolic links may point anywhere, as in any root; nothing may be written through them.
        ("an absolute link", root_of(|tar| tar.symlink("way", &place).file("way/written", 0o644, b"x"))),
        ("a link up", root_of(|tar| tar.symlink("way", &up).file("way/written", 0o644, b"x"))),
    ] {
        harmless(site, &bytes).with_context(|| what)?;
        ensure!(fs::read_dir(&outside)?.count() == 1, "{what}: something was written outside");
        let links = std::os::unix::fs::MetadataExt::nlink(&fs::metadata(outside.join("secret"))?);
        ensure!(links == 1, "{what}: the template has a link to a file of the host");
    }
    Ok(())
}

/// Imports a strange tarball: refused without a trace, or taken with a word about what was changed.
fn harmless(site: &Site, bytes: &[u8]) -> Result<()> {
    let file = site.path("bad.tar");
    fs::write(&file, bytes)?;
    let done = site.run(["template", "import", "bad", &file.display().to_string()])?;
    if done.code != 0 {
        done.complains(&[])?;
        ensure!(!site.path("var/lib/vsos/templates/bad").exists(), "refused, and there all the same");
        return no_temporary_files(&site.path("var/lib/vsos/templates"));
    }
    ensure!(done.errors().contains("warning"), "taken without a word: {done}");
    site.ok(["template", "remove", "bad"]).map(drop)
}

fn a_tarball_cannot_bring_devices(site: &Site) -> Result<()> {
    let bytes = root_of(|tar| tar.directory("dev/").block_device("dev/disk", 254, 0));
    let file = site.path("bad.tar");
    fs::write(&file, bytes)?;
    let done = site.run(["template", "import", "bad", &file.display().to_string()])?;
    let kept = site.path("var/lib/vsos/templates/bad/root/dev/disk");
    ensure!(fs::symlink_metadata(&kept).is_err(), "a disk's node is in the template");
    // Left out with a word, or refused with a word: never in silence.
    ensure!(done.errors().contains("dev/disk"), "{done}");
    Ok(())
}

fn what_is_no_tarball_is_refused(site: &Site) -> Result<()> {
    import_refused(site, b"", &[])?;
    import_refused(site, b"this is no archive at all, only words", &[])?;
    import_refused(site, &[0; 10_240], &[])
}

fn a_wrong_verb_or_flag_gets_a_hint(site: &Site) -> Result<()> {
    site.run(["strat", "web1"])?.complains(&["start"])?;
    site.run(["create", "web1", "--tempalte", "busybox"])?.complains(&["--template"])?;
    site.run(["create", "web1"])?.complains(&["--template"])?;
    site.run(["wait"])?.complains(&[])?;
    Ok(())
}
