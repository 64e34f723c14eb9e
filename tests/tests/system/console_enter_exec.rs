//! Three ways in: a command, a login shell, the console.

use anyhow::{Result, ensure};
use system_tests::{promises, site::Site};

promises![
    standard_streams_are_kept_apart,
    input_arrives_whole,
    much_output_arrives_whole,
    user_environment_and_directory_are_as_asked,
    a_terminal_only_when_asked,
    a_command_that_is_not_there_is_127,
    a_stopped_server_runs_nothing,
    enter_is_a_login_shell_with_job_control,
    enter_follows_the_windows_size,
    enter_returns_the_shells_exit_status,
    the_console_shows_and_detaches,
    the_console_can_be_waited_for,
    each_tty_has_its_own_console,
    the_consoles_log_is_kept;
    each of ["busybox", "debian-13"]:
    exit_status_and_signals_come_back
];

fn exit_status_and_signals_come_back(site: &Site, template: &str) -> Result<()> {
    let server = site.template(template)?.server("web1").start()?;
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
    {
        let done = server.exec(&["sh", "-c", script])?;
        ensure!(done.code == code, "{done}");
    }
    Ok(())
}

fn standard_streams_are_kept_apart(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let done = server.exec(&["sh", "-c", "echo out; echo err >&2"])?;
    ensure!(done.stdout == b"out\n" && done.stderr == b"err\n", "{done}");
    // Nothing to read is an end of file, not a wait.
    ensure!(server.exec(&["cat"])?.success()?.stdout.is_empty());
    Ok(())
}

fn input_arrives_whole(site: &Site) -> Result<()> {
    let _server = site.template("busybox")?.server("web1").start()?;
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let done = site.keep(site.vsctl(["exec", "web1", "--", "wc", "-c"]).input(bytes.clone()))?.success()?;
    ensure!(done.text() == "3000000", "{}", done.text());
    let back = site.vsctl(["exec", "web1", "--", "cat"]).input(bytes.clone()).succeed()?;
    ensure!(back.stdout == bytes, "the bytes came back changed");
    Ok(())
}

fn much_output_arrives_whole(site: &Site) -> Result<()> {
    let _server = site.template("busybox")?.server("web1").start()?;
    let command = ["exec", "web1", "--", "sh", "-c", "head -c 20000000 /dev/zero; echo end >&2"];
    let done = site.vsctl(command).succeed()?;
    ensure!(done.stdout.len() == 20_000_000 && done.errors() == "end\n", "{} bytes", done.stdout.len());
    Ok(())
}

fn user_environment_and_directory_are_as_asked(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo 'anna:x:1234:1234:Anna:/home/anna:/bin/sh' >>/etc/passwd; echo 'anna:x:1234:' >>/etc/group")?;
    let run = |flags: &[&str], script: &str| -> Result<String> {
        let command = [&["exec"], flags, &["web1", "--", "sh", "-c", script]].concat();
        Ok(site.ok(command)?.text())
    };
    ensure!(run(&["-u", "anna"], "id -u; id -g")? == "1234\n1234");
    ensure!(run(&["-u", "anna"], "echo $USER $HOME")? == "anna /home/anna");
    ensure!(run(&["-e", "COLOUR=deep blue", "-e", "EMPTY="], "echo \"$COLOUR${EMPTY-unset}\"")? == "deep blue");
    ensure!(run(&["-w", "/tmp"], "pwd")? == "/tmp");
    ensure!(run(&[], "echo $PATH")?.contains("/bin"), "no PATH");
    site.run(["exec", "-u", "nobody-here", "web1", "--", "true"])?.complains(&["nobody-here"])?;
    site.run(["exec", "-w", "/nowhere", "web1", "--", "true"])?;
    ensure!(site.run(["exec", "-w", "/nowhere", "web1", "--", "true"])?.code != 0);
    Ok(())
}

fn a_terminal_only_when_asked(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh_fails("test -t 0")?;
    let with = site.ok(["exec", "-t", "web1", "--", "sh", "-c", "test -t 0 && test -t 1 && tty"])?.text();
    ensure!(with.starts_with("/dev/pts/"), "{with:?}");
    let mut terminal = server.terminal(&["exec", "-T", "web1", "--", "sh", "-c", "test -t 0 || echo none-inside"])?;
    terminal.expect("none-inside")?;
    Ok(())
}

fn a_command_that_is_not_there_is_127(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let done = server.exec(&["no-such-command"])?;
    ensure!(done.code == 127 && done.errors().contains("no-such-command"), "{done}");
    let done = server.exec(&["/etc/passwd"])?;
    ensure!(done.code == 126, "what cannot be executed is 126, as in a shell: {done}");
    Ok(())
}

fn a_stopped_server_runs_nothing(site: &Site) -> Result<()> {
    let _server = site.template("busybox")?.server("web1").create()?;
    site.run(["exec", "web1", "--", "true"])?.failure(31, &["web1"])?;
    site.run(["enter", "web1"])?.failure(31, &["web1"])?;
    site.run(["exec", "web9", "--", "true"])?.failure(44, &["web9"])?;
    Ok(())
}

fn enter_is_a_login_shell_with_job_control(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let mut terminal = server.terminal(&["enter", "web1"])?;
    terminal.send("tty; echo at-$PWD; echo uid-$(id -u)\r")?;
    let seen = terminal.expect("uid-0")?;
    ensure!(seen.contains("/dev/pts/") && seen.contains("at-/root"), "{seen:?}");
    // ^C ends the command and not the shell; ^Z stops it and gives the prompt back.
    terminal.send("sleep 1000\r")?;
    terminal.expect("sleep 1000")?;
    server.until("pidof sleep")?;
    terminal.send("\u{3}")?;
    // What is typed before the prompt is back may be flushed with the interrupt (termios(3), NOFLSH).
    terminal.expect("# ")?;
    terminal.send("echo after-$((1+1))\r")?;
    terminal.expect("after-2")?;
    terminal.send("sleep 2000\r")?;
    terminal.expect("sleep 2000")?;
    server.until("pidof sleep")?;
    terminal.send("\u{1a}")?;
    terminal.expect("# ")?;
    terminal.send("jobs; echo jobs-$((1+1))\r")?;
    let seen = terminal.expect("jobs-2")?;
    ensure!(seen.contains("Stopped") || seen.contains("stopped"), "no job control: {seen:?}");
    terminal.send("kill -9 %1; wait; echo gone-$((1+1))\r")?;
    terminal.expect("gone-2")?;
    // Twice: ash may not have noticed yet that its stopped job is gone, and then warns first.
    terminal.send("exit\rexit\r")?;
    terminal.finish()?;
    Ok(())
}

fn enter_follows_the_windows_size(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let mut terminal = server.terminal(&["enter", "web1"])?;
    terminal.send("stty size; echo first-$((1+1))\r")?;
    ensure!(terminal.expect("first-2")?.contains("24 80"));
    terminal.resize(50, 132)?;
    terminal.send("sleep 1; stty size; echo second-$((1+1))\r")?;
    let seen = terminal.expect("second-2")?;
    ensure!(seen.contains("50 132"), "{seen:?}");
    terminal.send("exit\r")?;
    terminal.finish()?;
    Ok(())
}

fn enter_returns_the_shells_exit_status(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let mut terminal = server.terminal(&["enter", "web1"])?;
    terminal.send("exit 5\r")?;
    let code = terminal.finish()?;
    ensure!(code == 5, "{code}");
    Ok(())
}

fn the_console_shows_and_detaches(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    let mut console = server.terminal(&["console", "web1"])?;
    console.expect("^a q").or_else(|_| console.expect("Ctrl"))?;
    server.sh("echo written-to-the-console >/dev/console")?;
    console.expect("written-to-the-console")?;
    console.send("\u{1}q")?;
    let code = console.finish()?;
    ensure!(code == 0, "detaching is no failure: {code}");
    ensure!(server.state()? == "running");
    // And again: one who left may come back.
    let mut console = server.terminal(&["console", "web1"])?;
    console.send("\r")?;
    server.sh("echo second-visit >/dev/console")?;
    console.expect("second-visit")?;
    console.send("\u{1}q")?;
    console.finish()?;
    Ok(())
}

fn the_console_can_be_waited_for(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").create()?;
    let mut console = system_tests::terminal::Terminal::open(site, &["console", "--wait", "web1"])?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    let server = server.start()?;
    server.sh("echo the-first-words >/dev/console")?;
    console.expect("the-first-words")?;
    console.send("\u{1}q")?;
    ensure!(console.finish()? == 0);
    let _server = server.stop()?;
    site.run(["console", "web1"])?.failure(31, &["web1"])?;
    Ok(())
}

fn each_tty_has_its_own_console(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    for number in ["1", "2", "3", "4"] {
        let mut console = server.terminal(&["console", "-t", number, "web1"])?;
        // Until the console is attached, what is written has nobody to read it but the log.
        std::thread::sleep(std::time::Duration::from_millis(200));
        server.sh(&format!("echo on-tty-{number} >/dev/tty{number}"))?;
        console.expect(&format!("on-tty-{number}"))?;
        console.send("\u{1}q")?;
        console.finish()?;
    }
    site.run(["console", "-t", "9", "web1"])?.complains(&["9"])?;
    Ok(())
}

fn the_consoles_log_is_kept(site: &Site) -> Result<()> {
    let server = site.template("busybox")?.server("web1").start()?;
    server.sh("echo for-the-log >/dev/console")?;
    let logged = || site.run(["console", "web1", "--log"]).is_ok_and(|done| done.text().contains("for-the-log"));
    system_tests::command::eventually("the console's log", system_tests::server::GUEST_LIMIT, || {
        logged().then_some(())
    })?;
    // Bounded on disk, and still there after the end.
    server.sh("i=0; while [ $i -lt 20000 ]; do echo 'a line of some length to fill the log of the console'; i=$((i+1)); done >/dev/console")?;
    let _server = server.stop()?;
    let log = site.ok(["console", "web1", "--log"])?;
    ensure!(!log.stdout.is_empty(), "the log is gone with the server");
    ensure!(log.stdout.len() <= 8 << 20, "the log has {} bytes", log.stdout.len());
    Ok(())
}
