//! A guest that answers nothing, or nonsense, or a byte now and then: it harms itself and delays nobody for long.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use system_tests::{
    ability,
    command::{Background, eventually},
    promises,
    server::{GUEST_LIMIT, Running},
    site::Site,
};

promises![
    a_control_socket_that_dribbles_keeps_no_monitor_from_its_work,
    a_control_socket_that_takes_no_connection_keeps_no_monitor_from_its_work,
    a_control_socket_that_gives_strange_consoles_keeps_no_monitor_from_its_work,
    a_control_socket_that_dribbles_does_not_hold_up_service,
    files_that_never_answer_are_not_waited_for,
    accounts_that_never_come_hold_up_no_command,
    a_fuse_mount_that_answers_is_copied_like_any_other,
    who_waits_for_its_own_file_system_is_ended_all_the_same
];

/// More than any command may take because of a guest, and less than for ever.
const PATIENCE: Duration = Duration::from_secs(25);

/// More than a copy may stand still.
const COPY_PATIENCE: Duration = Duration::from_secs(60);

/// A listener in the place of vsinit's, with what it does with who connects.
const LISTENER: &str = r#"
use Socket; $| = 1; $SIG{PIPE} = 'IGNORE';
my $path = '/run/vsinit/control';
unlink $path;
socket(S, AF_UNIX, SOCK_STREAM, 0) && bind(S, sockaddr_un($path)) && listen(S, $queue) or die $!;
"#;

/// A byte every now and then, of a comment that never ends.
const DRIBBLE: &str = r#"
print "ready\n";
while (accept(C, S)) { next if fork; while (syswrite(C, '#')) { select(undef, undef, undef, 0.2) } exit }
"#;

/// Its queue is full, and nobody takes from it.
const DEAF: &str = r#"
use Fcntl;
for (1..3) { my $c; socket($c, AF_UNIX, SOCK_STREAM, 0); fcntl($c, F_SETFL, O_NONBLOCK); connect($c, sockaddr_un($path)); push @kept, $c }
print "ready\n"; sleep;
"#;

/// Files and pipes in the place of terminals (sendmsg(2) with SCM_RIGHTS).
const GIFTS: &str = r#"
pipe(R, W); open(F, '<', '/etc/passwd'); socket(D, AF_UNIX, SOCK_DGRAM, 0);
print "ready\n";
while (accept(C, S)) {
    1 while sysread(C, my $request, 4096);
    my $text = "reply = \"consoles\"\ncount = 3\n";
    my $control = pack('Q l l l3 x4', 16 + 12, 1, 1, fileno(R), fileno(F), fileno(D));
    my $vector = pack('P Q', $text, length $text);
    my $message = pack('Q L x4 P Q P Q l x4', 0, 0, $vector, 1, $control, length $control, 0);
    syscall(46, fileno(C), $message, 0);
    close C;
}
"#;

/// A FUSE mount at /fuse with one file of six bytes; requests with a number in `@mute` are taken and never answered, which
/// SIGKILL does not end (fuse_kernel.h; 1 is LOOKUP, 15 is READ, 25 is FLUSH). Ends by itself.
const FUSE: &str = r#"
use Fcntl; alarm 150; $| = 1;
mkdir '/fuse'; sysopen(F, '/dev/fuse', O_RDWR) or die $!;
my $options = 'fd=' . fileno(F) . ',rootmode=40000,user_id=0,group_id=0';
syscall(165, my $a = 'fuse', my $b = '/fuse', my $c = 'fuse', 0, $options) == 0 or die $!;
my $attr = sub { pack('Q6 L10', $_[0], 6, 1, 0, 0, 0, 0, 0, 0, $_[0] == 1 ? 040755 : 0100644, 1, 0, 0, 0, 4096, 0) };
print "ready\n";
while (sysread(F, my $in, 1 << 20)) {
    my ($length, $code, $id, $node) = unpack('L L Q Q', $in);
    next if $code == 2 || $code == 36 || grep { $_ == $code } @mute;
    my ($error, $out) = (0, '');
    if ($code == 26) { $out = pack('L4 S2 L2 S2 L8', 7, 31, 65536, 0, 16, 12, 65536, 1, 16, 0, (0) x 8) }
    elsif ($code == 1) {
        if (substr($in, 40) =~ /^file\0/) { $out = pack('Q4 L2', 2, 0, 0, 0, 0, 0) . $attr->(2) } else { $error = -2 }
    }
    elsif ($code == 3) { $out = pack('Q L2', 0, 0, 0) . $attr->($node) }
    elsif ($code == 14 || $code == 27) { $out = pack('Q L2', 7, 0, 0) }
    elsif ($code == 15) { $out = unpack('Q', substr($in, 48)) ? '' : "words\n" }
    elsif ($code == 28) { $out = unpack('Q', substr($in, 48)) ? '' : pack('Q Q L L a4 x4', 2, 1, 4, 8, 'file') }
    elsif ($code == 18 || $code == 25 || $code == 29) {}
    else { $error = -38 }
    syswrite(F, pack('L l Q', 16 + length $out, $error, $id) . $out);
}
"#;

/// A server that can run the host's perl, which is on every Debian.
fn server(site: &Site) -> Result<Running<'_>> {
    site.template("busybox")?.server("web1").with("--mount /:/host:ro").start()
}

/// Runs a perl script as the guest's root until it is dropped; back when it has said `ready`.
fn hostile(server: &Running, script: &str) -> Result<Background> {
    let libraries = "/host/lib/x86_64-linux-gnu:/host/usr/lib/x86_64-linux-gnu";
    let loader = "/host/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
    let modules = "-I/host/usr/lib/x86_64-linux-gnu/perl-base";
    server.sh("rm -f /said")?;
    let command =
        format!("exec {loader} --library-path {libraries} /host/usr/bin/perl {modules} -e \"$1\" >/said 2>&1");
    let running = server.spawn(&["exec", server.name(), "--", "sh", "-c", &command, "sh", script])?;
    let said = server.directory().join("volume/upper/said");
    eventually("a word of the hostile program", GUEST_LIMIT, || {
        fs::read_to_string(&said).is_ok_and(|text| !text.is_empty()).then_some(())
    })?;
    let said = fs::read_to_string(&said)?;
    ensure!(said.starts_with("ready"), "the hostile program failed: {said}");
    Ok(running)
}

/// Kills the server's monitor, and waits until another has taken its place.
fn another_monitor(server: &Running) -> Result<()> {
    let find = || -> Option<i32> {
        let mut found = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| {
            let arguments = fs::read(entry.path().join("cmdline")).ok()?;
            let environment = fs::read(entry.path().join("environ")).ok()?;
            let root = server.site().root().display().to_string();
            let ours = arguments.starts_with(format!("vsctl\0monitor\0{}\0", server.name()).as_bytes())
                && String::from_utf8_lossy(&environment).contains(&root);
            let state = fs::read_to_string(entry.path().join("stat")).ok()?;
            (ours && !state.contains(") Z ")).then(|| entry.file_name().to_string_lossy().parse().ok())?
        });
        found.next()
    };
    let old = find().context("no monitor")?;
    kill(Pid::from_raw(old), Signal::SIGKILL)?;
    eventually("the end of the monitor", GUEST_LIMIT, || (find() != Some(old)).then_some(()))?;
    server.site().ok(["list"])?;
    eventually("another monitor", GUEST_LIMIT, || find().filter(|pid| *pid != old)).map(drop)
}

/// With a listener like that: commands work, and the new monitor does what a monitor is for.
fn monitor_works(site: &Site, queue: u32, script: &str) -> Result<()> {
    let server = server(site)?;
    let listener = hostile(&server, &format!("my $queue = {queue};{LISTENER}{script}"))?;
    another_monitor(&server)?;
    for command in [&["list"][..], &["status", "web1"], &["set", "web1", "pids=150"], &["doctor", "--fix"]] {
        site.keep(site.vsctl(command).limit(PATIENCE))?.success()?;
    }
    // It hears callers, even one who asks for a console that it may not have.
    eventually("a monitor that listens", PATIENCE, || {
        let mut caller = UnixStream::connect(site.path("run/vsos/servers/web1/monitor.sock")).ok()?;
        caller.set_read_timeout(Some(PATIENCE)).ok()?;
        caller.write_all(b"console 0\n").ok()?;
        let mut answer = [0; 3];
        caller.read_exact(&mut answer).ok()?;
        (answer == *b"ok\n").then_some(())
    })?;
    // It sees init end, and starts the server again when the kernel says that this was a reboot: this init can tell it nothing.
    let init = server.init_pid()?;
    drop(listener);
    let _ = server.exec(&["reboot", "-f"])?;
    if ability::tells_how_the_reaped_ended()? {
        ensure!(server.next_init(init)? != init);
    } else {
        site.note("this kernel tells how init has ended only until it is reaped: by luck");
        eventually("the end of init", GUEST_LIMIT, || {
            (server.state().ok()? == "stopped" || server.init_pid().is_ok_and(|pid| pid != init)).then_some(())
        })?;
        if server.state()? == "stopped" {
            return Ok(());
        }
    }
    site.keep(site.vsctl(["stop", "web1"]).limit(PATIENCE))?.success().map(drop)
}

fn a_control_socket_that_dribbles_keeps_no_monitor_from_its_work(site: &Site) -> Result<()> {
    monitor_works(site, 8, DRIBBLE)
}

fn a_control_socket_that_takes_no_connection_keeps_no_monitor_from_its_work(site: &Site) -> Result<()> {
    monitor_works(site, 0, DEAF)
}

fn a_control_socket_that_gives_strange_consoles_keeps_no_monitor_from_its_work(site: &Site) -> Result<()> {
    monitor_works(site, 8, GIFTS)
}

fn a_control_socket_that_dribbles_does_not_hold_up_service(site: &Site) -> Result<()> {
    let server = server(site)?;
    let _listener = hostile(&server, &format!("my $queue = 8;{LISTENER}{DRIBBLE}"))?;
    site.keep(site.vsctl(["service", "web1"]).limit(PATIENCE))?.complains(&["vsinit", "10 s"]).map(drop)
}

fn files_that_never_answer_are_not_waited_for(site: &Site) -> Result<()> {
    let server = server(site)?;
    server.sh("mkfifo /pipe; mkdir /tree; mkfifo /tree/pipe; echo words >/tree/file")?;
    let out = site.path("out").display().to_string();
    // A FIFO that nobody writes to, and a device that never ends: said at once.
    for source in ["/pipe", "/dev/zero", "/dev/console"] {
        site.run(["pull", "web1", source, &out])?.failure(20, &[source, "neither a file nor a directory"])?;
    }
    for target in ["/pipe", "/dev/full"] {
        site.run(["push", "web1", "/etc/hostname", target])?.complains(&[target])?;
    }
    // In a tree a FIFO is made anew, as cp -r does.
    site.ok(["pull", "web1", "/tree", &out])?;
    ensure!(fs::read_to_string(site.path("out/file"))? == "words\n");
    // All at once, for each waits as long as it may.
    for (mute, commands) in [
        ("15, 25", &[&["pull", "web1", "/fuse/file", "OUT"][..], &["pull", "web1", "/fuse", "OUT"]][..]),
        ("1", &[&["pull", "web1", "/fuse/file", "OUT"], &["push", "web1", "/etc/hostname", "/fuse/new"]]),
    ] {
        let fuse = hostile(&server, &format!("my @mute = ({mute}); {FUSE}"))?;
        let mut running = Vec::new();
        for (number, command) in commands.iter().enumerate() {
            let out = site.path(&format!("out-{number}")).display().to_string();
            let words = command.iter().map(|word| if *word == "OUT" { &*out } else { *word });
            running.push(site.vsctl(words.collect::<Vec<_>>()).limit(COPY_PATIENCE).spawn()?);
        }
        for mut command in running {
            let done = command.wait()?;
            site.note(done.to_string());
            done.complains(&["web1", "nothing moved"])?;
        }
        ensure!(!site.path("out-0").exists(), "half a file is left");
        drop(fuse);
        server.until("umount -l /fuse")?;
    }
    ensure!(server.sh("echo alive")? == "alive");
    Ok(())
}

fn accounts_that_never_come_hold_up_no_command(site: &Site) -> Result<()> {
    // Privileged: who is not in the guest's user namespace gets no answer of its file systems anyway (fs/fuse/dir.c).
    let server = site.template("busybox")?.server("web1").with("--mount /:/host:ro --privileged").start()?;
    let _fuse = hostile(&server, &format!("my @mute = (1); {FUSE}"))?;
    server.sh("mount --bind /fuse /etc")?;
    let limited = |command: &[&str]| site.keep(site.vsctl(command).limit(PATIENCE));
    limited(&["exec", "web1", "--", "true"])?.failure(1, &["etc/passwd", "no answer within"])?;
    ensure!(limited(&["ps", "web1"])?.success()?.text().contains("vsinit"));
    limited(&["stop", "--kill", "web1"])?.success().map(drop)
}

fn a_fuse_mount_that_answers_is_copied_like_any_other(site: &Site) -> Result<()> {
    let server = server(site)?;
    let _fuse = hostile(&server, &format!("my @mute = (); {FUSE}"))?;
    let out = site.path("out");
    site.ok(["pull", "web1", "/fuse", &out.display().to_string()])?;
    ensure!(fs::read_to_string(out.join("file"))? == "words\n");
    ensure!(site.ok(["pull", "web1", "/fuse/file", "-"])?.text() == "words");
    Ok(())
}

fn who_waits_for_its_own_file_system_is_ended_all_the_same(site: &Site) -> Result<()> {
    let server = server(site)?;
    // A reader that is never answered, and holds the connection open itself: nothing in the server can end that.
    let reads = r#"if (!fork) { open(G, '<', '/fuse/file'); sysread(G, my $word, 6); exit }"#;
    let script = FUSE.replacen("print \"ready\\n\";", reads, 1).replacen(
        "next if $code == 2",
        "print \"ready\\n\" if $code == 15; next if $code == 2",
        1,
    );
    let mut waiting = hostile(&server, &format!("my @mute = (15); {script}"))?;
    let stopped = site.keep(site.vsctl(["stop", "--kill", "web1"]).limit(PATIENCE))?.success()?;
    ensure!(stopped.errors().contains("FUSE"), "nothing was in the way: this tests nothing");
    ensure!(waiting.wait()?.code != 0);
    site.ok(["start", "web1"]).map(drop)
}
