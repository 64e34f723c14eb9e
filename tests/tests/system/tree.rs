//! Checkpoints of processes outside any server: what goes on with its pid, and what is refused before anything is frozen.

use std::{
    fs,
    io::Write,
    net::{TcpListener, TcpStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kernel::{cgroup::CpuSet, lock::Flock, process};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use system_tests::{
    ability,
    command::{Background, Finished, Invocation, eventually, kill_hard},
    promise::skip,
    promises,
    server::GUEST_LIMIT,
    site::Site,
    terminal::Terminal,
};

promises![
    what_runs_as_a_tree_ends_with_its_own_status,
    what_cannot_be_a_tree_is_not_started,
    what_ties_a_tree_is_named_and_it_goes_on,
    a_tree_goes_on_where_it_was_with_its_pids,
    threads_come_back_with_their_numbers,
    a_tree_that_was_left_running_is_set_back_more_than_once,
    a_tree_whose_images_or_files_have_changed_does_not_start,
    killed_at_any_moment_of_create_a_tree_goes_on_or_is_whole_on_the_disk,
    killed_at_any_moment_of_restore_a_tree_runs_whole_or_not_at_all
];

/// Counts in its memory, and says what it has come to: one process does, another passes it on.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done | while read n; do echo $n; done";

/// The variable that makes the tests' own program one with threads ([`work_in_threads`]).
const THREADED: &str = "VSOS_TEST_THREADED";

/// Works in three threads for ever, when the environment asks for that.
pub fn work_in_threads() {
    if std::env::var_os(THREADED).is_some() {
        let work = || loop {
            thread::sleep(Duration::from_millis(20));
        };
        thread::spawn(work);
        thread::spawn(work);
        work();
    }
}

/// Skips where CRIU cannot work.
fn needs_criu() -> Result<()> {
    ability::lacks_for_checkpoints()?.map_or(Ok(()), |why| Err(skip(why)))
}

/// A tree that `run` has started, with its files in a directory of its own. Dropped, all of its session is killed.
struct Tree<'s> {
    site: &'s Site,
    run: Background,
    pid: i32,
}

fn file(site: &Site, name: &str) -> PathBuf {
    site.path("job").join(name)
}

/// `vsctl` where the trees' files are.
fn there(site: &Site, arguments: &[&str]) -> Result<Invocation> {
    fs::create_dir_all(site.path("job"))?;
    Ok(site.vsctl(arguments.iter().copied()).directory(site.path("job")))
}

impl<'s> Tree<'s> {
    fn start(site: &'s Site, script: &str) -> Result<Self> {
        let pid_file = file(site, "pid");
        let _ = fs::remove_file(&pid_file);
        let options = ["checkpoint", "run", "--name", "job", "--output", "log", "--pid-file", "pid"];
        let run =
            there(site, &[&options[..], &["--", "sh", "-c", script]].concat())?.limit(GUEST_LIMIT * 20).spawn()?;
        let pid = eventually("its pid", GUEST_LIMIT, || fs::read_to_string(&pid_file).ok()?.trim().parse().ok())?;
        Ok(Self { site, run, pid })
    }

    fn counting(site: &'s Site) -> Result<Self> {
        let tree = Self::start(site, COUNTER)?;
        tree.counts_beyond(3)?;
        Ok(tree)
    }

    /// What it has said last.
    fn counted(&self) -> Option<u64> {
        let log = fs::read_to_string(file(self.site, "log")).ok()?;
        log.lines().rfind(|line| !line.is_empty())?.parse().ok()
    }

    fn counts_beyond(&self, number: u64) -> Result<u64> {
        let beyond = || self.counted().filter(|now| *now > number);
        eventually(&format!("a count beyond {number}"), GUEST_LIMIT, beyond)
    }

    /// Its processes, by their numbers.
    fn pids(&self) -> Vec<i32> {
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        numbers
            .filter(|pid| process::stat(*pid).is_ok_and(|stat| stat.session == self.pid && !stat.has_ended))
            .collect()
    }

    fn create(&self, more: &[&str]) -> Result<Finished> {
        let pid = self.pid.to_string();
        self.site.run([&["checkpoint", "create", "--pid", &pid], more].concat())
    }

    /// Ends all of it, and waits until its numbers are free.
    fn end(&self) -> Result<()> {
        // A process may have begun another.
        eventually("the end of the tree", GUEST_LIMIT, || {
            self.pids().into_iter().for_each(|pid| drop(kill_hard(pid)));
            (self.pids().is_empty() && process::find(self.pid).is_ok_and(|found| found.is_none())).then_some(())
        })
    }
}

impl Drop for Tree<'_> {
    fn drop(&mut self) {
        self.run.kill();
        if let Err(error) = self.end() {
            self.site.note(format!("{error:#}"));
        }
    }
}

fn restore(site: &Site, label: &str) -> Result<Finished> {
    site.run(["checkpoint", "restore", "--tree", label, "--detach"])
}

fn labels(site: &Site) -> Result<Vec<String>> {
    let all = site.json(["checkpoint", "list", "--tree", "--json"])?;
    let label = |kept: &serde_json::Value| Some(kept["label"].as_str()?.to_owned());
    all.as_array().into_iter().flatten().map(label).collect::<Option<_>>().with_context(|| format!("labels: {all}"))
}

/// Nothing is left of what was interrupted.
fn nothing_is_left(site: &Site) -> Result<()> {
    let all = fs::read_dir(site.path("var/lib/vsos/trees")).into_iter().flatten().flatten();
    let left: Vec<_> =
        all.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().starts_with('.')).collect();
    ensure!(left.is_empty(), "{left:?} was left");
    Ok(())
}

fn what_runs_as_a_tree_ends_with_its_own_status(site: &Site) -> Result<()> {
    let run = |script: &str| {
        there(site, &["checkpoint", "run", "--output", "log", "--", "sh", "-c", script])?.run().context("run a tree")
    };
    let done = run("echo said; echo complained >&2; exit 7")?;
    ensure!(done.code == 7 && done.text().is_empty() && done.errors().is_empty(), "{done}");
    ensure!(fs::read_to_string(file(site, "log"))? == "said\ncomplained\n");
    ensure!(run("kill -TERM $$")?.code == 143);
    // To the end of the file; and it reads nothing, or what it is given.
    ensure!(run("cat; echo $0 >mine; readlink /proc/self/fd/0")?.code == 0);
    ensure!(fs::read_to_string(file(site, "log"))? == "said\ncomplained\n/dev/null\n");
    let given = ["checkpoint", "run", "-i", "mine", "-o", "copy", "--", "cat"];
    there(site, &given)?.succeed()?;
    ensure!(fs::read_to_string(file(site, "copy"))? == "sh\n");
    let none = ["checkpoint", "run", "-o", "log", "--", "/nowhere/program"];
    there(site, &none)?.run()?.failure_of_program(127, "cannot execute '/nowhere/program'")?;
    let denied = ["checkpoint", "run", "-o", "log", "--", "./mine"];
    there(site, &denied)?.run()?.failure_of_program(126, "cannot execute './mine'")?;
    // In a session of its own; and the signal that ends the command reaches it.
    let mut tree = Tree::start(site, "trap 'echo got it; exit 5' TERM; echo $VSOS_TREE; while :; do sleep 0.1; done")?;
    ensure!(process::stat(tree.pid)?.session == tree.pid);
    let log = || fs::read_to_string(file(site, "log")).unwrap_or_default();
    eventually("its name", GUEST_LIMIT, || log().ends_with("job\n").then_some(()))?;
    kill(Pid::from_raw(tree.run.pid()), Signal::SIGTERM)?;
    let done = tree.run.wait()?;
    ensure!(done.code == 5 && log().ends_with("got it\n"), "{done}\n{}", log());
    Ok(())
}

/// What `vsctl` says of a program that cannot be executed.
trait OfProgram: Sized {
    fn failure_of_program(self, code: i32, words: &str) -> Result<()>;
}

impl OfProgram for Finished {
    fn failure_of_program(self, code: i32, words: &str) -> Result<()> {
        ensure!(self.code == code && self.errors().contains(words), "wanted {code}, {words}\n{self}");
        Ok(())
    }
}

fn what_cannot_be_a_tree_is_not_started(site: &Site) -> Result<()> {
    let started = file(site, "started");
    // The harness reads a pipe.
    let touch = ["checkpoint", "run", "--", "touch", "started"];
    there(site, &touch)?.run()?.failure(20, &["standard output is pipe:", "--output FILE"])?;
    let mut terminal = Terminal::open(site, &["checkpoint", "run", "--", "touch", &started.display().to_string()])?;
    terminal.expect("standard output is /dev/pts/")?;
    ensure!(terminal.finish()? == 20 && !started.exists());
    let nowhere = ["checkpoint", "run", "--output", "no/where/log", "--", "touch", "started"];
    there(site, &nowhere)?.run()?.complains(&["open no/where/log"])?;
    let nowhere = ["checkpoint", "run", "--output", "log", "--pid-file", "no/where/pid", "--", "touch", "started"];
    there(site, &nowhere)?.run()?.complains(&["write no/where/pid"])?;
    ensure!(!started.exists());
    for (words, code, says) in [
        (&["checkpoint", "create"][..], 20, "--pid"),
        (&["checkpoint", "create", "--pid", "0"], 20, "--pid"),
        (&["checkpoint", "create", "--pid", "2147483647"], 20, "no process 2147483647"),
        (&["checkpoint", "create", "--pid", "1", "label", "more"], 20, "'more' is one word too many"),
        (&["checkpoint", "restore", "--tree", "nine"], 44, "no checkpoint of a tree 'nine'"),
        (&["checkpoint", "delete", "--tree", "nine"], 44, "no checkpoint of a tree 'nine'"),
        (&["checkpoint", "restore", "web1", "nine", "--detach"], 20, "--tree"),
        (&["checkpoint", "run", "--output", "log"], 20, "CMD"),
    ] {
        site.run(words.iter().copied())?.failure(code, &[says])?;
    }
    ensure!(site.ok(["checkpoint", "list", "--tree", "-H"])?.text().is_empty() && labels(site)?.is_empty());
    Ok(())
}

fn what_ties_a_tree_is_named_and_it_goes_on(site: &Site) -> Result<()> {
    // What asks for CRIU first would say that there is none.
    needs_criu()?;
    let tree = Tree::counting(site)?;
    let free = tree.create(&["--plan"])?.success()?.text();
    ensure!(free.contains(&format!("dump process {}", tree.pid)) && free.ends_with("end them"), "{free}");
    ensure!(labels(site)?.is_empty(), "a plan has made a checkpoint");
    // Of the session of the tests, and with their pipes.
    let mut tied = Invocation::new("sh").args(["-c", "echo here; sleep 1000; true"]).spawn()?;
    let refused = |pid: i32, words: &[&str]| {
        site.run(["checkpoint", "create", "--pid", &pid.to_string()])?.failure(5, words).map(drop)
    };
    let outside = format!("has a pipe to process {}, outside the tree", std::process::id());
    refused(tied.pid(), &["is of the session of process", &outside, "vsctl checkpoint run"])?;
    ensure!(tied.is_running());
    tied.kill();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let nc = format!("nc 127.0.0.1 {port} </dev/zero >/dev/null");
    let connected = Tree::start(site, &format!("busybox {nc}; sleep 1000"))?;
    let (mut stream, peer): (TcpStream, _) = listener.accept()?;
    refused(connected.pid, &[&format!("has a TCP connection: {peer} to 127.0.0.1:{port}")])?;
    stream.write_all(b"x").context("its connection lives")?;
    drop((stream, connected));
    // A process of its session that is no more below it.
    let strayed = Tree::start(site, "(sleep 1000 & ) ; sleep 1000; true")?;
    eventually("three processes", GUEST_LIMIT, || (strayed.pids().len() == 3).then_some(()))?;
    refused(strayed.pid, &["(sleep 1000) is of the tree's session, and has left the tree"])?;
    drop(strayed);
    let typing = Tree::start(site, "exec script -q -c 'sleep 1000' typescript >/dev/null")?;
    let terminal = || fs::read_to_string(format!("/proc/{}/comm", typing.pid)).is_ok_and(|name| name == "script\n");
    eventually("script", GUEST_LIMIT, || terminal().then_some(()))?;
    eventually("its child", GUEST_LIMIT, || process_below(typing.pid))?;
    refused(
        typing.pid,
        &["(script -q -c sleep 1000 typescript) has a terminal open: /dev/", "let it read and write files"],
    )?;
    // It has a session of its own.
    kill_hard(process_below(typing.pid).context("the child of script")?)?;
    drop(typing);
    let elsewhere = Tree::start(site, "exec unshare --net --uts sleep 1000")?;
    let away = || fs::read_to_string(format!("/proc/{}/comm", elsewhere.pid)).is_ok_and(|name| name == "sleep\n");
    eventually("sleep in its namespaces", GUEST_LIMIT, || away().then_some(()))?;
    refused(elsewhere.pid, &["is in another net namespace", "is in another uts namespace"])?;
    drop(elsewhere);
    refused(1, &["is this command"])?;
    ensure!(labels(site)?.is_empty());
    nothing_is_left(site)?;
    tree.counts_beyond(tree.counted().context("a count")?).map(drop)
}

/// A child of process `parent`.
fn process_below(parent: i32) -> Option<i32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    numbers.find(|pid| process::stat(*pid).is_ok_and(|stat| stat.parent == parent))
}

fn a_tree_goes_on_where_it_was_with_its_pids(site: &Site) -> Result<()> {
    needs_criu()?;
    // One open file of it has no name any more.
    let script = format!("exec 7<>gone; echo kept >&7; rm gone; {COUNTER}");
    let mut tree = Tree::start(site, &script)?;
    let before = tree.counts_beyond(3)?;
    let (pid, shells) = (tree.pid, tree.pids());
    let label = tree.create(&[])?.success()?.text();
    ensure!(label.starts_with("job-2"), "{label}");
    let done = tree.run.wait()?;
    ensure!(done.code == 137 && done.errors().contains(&format!("restore --tree {label}")), "{done}");
    ensure!(tree.pids().is_empty() && labels(site)? == [label.clone()]);
    let listed = site.json(["checkpoint", "list", "--tree", "--json"])?;
    ensure!(
        listed[0]["pid"] == pid && listed[0]["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 4096),
        "{listed}"
    );
    ensure!(site.ok(["checkpoint", "list", "--tree"])?.text().contains("while :"));
    let last = tree.counted().context("a count")?;
    ensure!(last >= before);
    let plan = site.ok(["checkpoint", "restore", "--tree", &label, "--plan"])?.text();
    ensure!(plan.contains(&format!("restore process {pid}: sh -c")) && tree.pids().is_empty(), "{plan}");
    // In the foreground it ends as the tree does.
    let mut command = site.vsctl(["checkpoint", "restore", "--tree", &label]).limit(GUEST_LIMIT * 20).spawn()?;
    tree.counts_beyond(last)?;
    let now = tree.pids();
    ensure!(shells.iter().filter(|pid| now.contains(pid)).count() >= 3, "{shells:?} are {now:?}");
    let log = fs::read_to_string(file(site, "log"))?;
    let numbers: Vec<u64> = log.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(numbers.iter().zip(1..).all(|(number, wanted)| *number == wanted), "{log}");
    let gone = fs::read_to_string(format!("/proc/{pid}/fd/7")).context("read the file without a name")?;
    ensure!(gone == "kept\n" && !file(site, "gone").exists(), "{gone}");
    // Once more, and out again.
    site.ok(["checkpoint", "create", "--pid", &pid.to_string(), "again"])?;
    let done = command.wait()?;
    ensure!(done.code == 137 && done.errors().contains("restore --tree again"), "{done}");
    let last = tree.counted().context("a count")?;
    let mut command = site.vsctl(["checkpoint", "restore", "--tree", "again"]).limit(GUEST_LIMIT * 20).spawn()?;
    tree.counts_beyond(last)?;
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    let done = command.wait()?;
    ensure!(done.code == 143, "{done}");
    site.ok(["checkpoint", "delete", "--tree", &label, "again"])?;
    ensure!(labels(site)?.is_empty());
    nothing_is_left(site)
}

fn threads_come_back_with_their_numbers(site: &Site) -> Result<()> {
    needs_criu()?;
    let own = std::env::current_exe()?;
    let tree = Tree::start(site, &format!("{THREADED}=yes exec {}", own.display()))?;
    let threads = || {
        let all = fs::read_dir(format!("/proc/{}/task", tree.pid)).into_iter().flatten().flatten();
        let mut numbers: Vec<i32> = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        numbers.sort_unstable();
        numbers
    };
    eventually("three threads", GUEST_LIMIT, || (threads().len() == 3).then_some(()))?;
    let before = threads();
    // One of them is to run elsewhere, later and behind others than the rest; and their cores are dumped otherwise.
    let (chooses, other) = (before[1], before[2]);
    let cpus: CpuSet = processors(other)?.iter().take(1).collect();
    process::set_processors(chooses, &cpus)?;
    process::set_timer_slack(chooses, 70_001)?;
    process::set_io_priority(chooses, 3 << 13)?;
    process::set_core_filter(tree.pid, 0x13)?;
    let settings = || -> Result<String> {
        let of = |thread: i32| -> Result<String> {
            let (set, slack_ns) = (processors(thread)?, process::timer_slack(thread)?);
            Ok(format!("{thread}: {set}, {slack_ns} ns, {:?}", process::io_priority(thread)?))
        };
        Ok(format!("{}, {}, {:?}", of(chooses)?, of(other)?, process::core_filter(tree.pid)?))
    };
    let chosen = settings()?;
    tree.create(&["threads"])?.success()?;
    ensure!(threads().is_empty());
    restore(site, "threads")?.success()?;
    ensure!(threads() == before, "{before:?} are {:?}", threads());
    ensure!(settings()? == chosen, "{chosen} is {}", settings()?);
    // All of them work: each has used time again.
    let used = |thread: &i32| -> Option<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/task/{thread}/schedstat", tree.pid)).ok()?;
        stat.split(' ').next()?.parse().ok()
    };
    let start: Vec<_> = before.iter().map(used).collect();
    eventually("work of all threads", GUEST_LIMIT, || {
        before.iter().zip(&start).all(|(thread, start)| used(thread) > *start).then_some(())
    })
}

/// The processors that `thread` may run on.
fn processors(thread: i32) -> Result<CpuSet> {
    let mut mask = [0; process::AFFINITY_WORDS];
    process::affinity(thread, &mut mask)?;
    Ok(CpuSet::from_mask(&mask))
}

fn a_tree_that_was_left_running_is_set_back_more_than_once(site: &Site) -> Result<()> {
    needs_criu()?;
    let mut tree = Tree::counting(site)?;
    let pids = tree.pids().len();
    tree.create(&["then", "--leave-running"])?.success()?;
    let at = tree.counted().context("a count")?;
    tree.create(&["then"])?.failure(43, &["'then' already"])?;
    ensure!(tree.run.is_running());
    let far = tree.counts_beyond(at + 10)?;
    let taken = restore(site, "then")?.failure(43, &[&format!("{} is sh", tree.pid), "with their numbers"])?;
    ensure!(tree.counts_beyond(far).is_ok() && tree.pids().len() <= pids + 1, "{taken}");
    kill_hard(tree.pid)?;
    ensure!(tree.run.wait()?.code == 137);
    for _ in 1..=2 {
        tree.end()?;
        let last = tree.counted().context("a count")?;
        restore(site, "then")?.success()?;
        // It counts from then on again.
        let again = eventually("a count of then", GUEST_LIMIT, || tree.counted().filter(|now| *now < last))?;
        ensure!(again > 3 && again < far, "{again}, and it was at {at}");
        tree.counts_beyond(again + 20)?;
    }
    Ok(())
}

fn a_tree_whose_images_or_files_have_changed_does_not_start(site: &Site) -> Result<()> {
    needs_criu()?;
    let tree = Tree::start(site, &format!("exec 7<>data; echo 12345 >&7; {COUNTER}"))?;
    let at = tree.counts_beyond(3)?;
    tree.create(&["one"])?.success()?;
    let images = site.path("var/lib/vsos/trees/one");
    let pages = fs::read_dir(&images)?.flatten().map(|entry| entry.path());
    let pages = pages.filter(|path| path.to_string_lossy().contains("pages-"));
    let image = pages.max_by_key(|path| path.metadata().map_or(0, |found| found.len())).context("no pages")?;
    let whole = fs::read(&image)?;
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for broken in [&flipped, &whole[..whole.len() / 2]] {
        fs::write(&image, broken)?;
        restore(site, "one")?.complains(&[
            "the tree 'one' is damaged",
            &image.display().to_string(),
            "nothing was started",
        ])?;
    }
    fs::remove_file(&image)?;
    restore(site, "one")?.complains(&["is missing"])?;
    fs::write(&image, &whole)?;
    ensure!(tree.pids().is_empty());
    let data = file(site, "data");
    fs::write(&data, "123456789\n")?;
    restore(site, "one")?.complains(&["job/data", "as long as they were"])?;
    ensure!(tree.pids().is_empty(), "{:?} run", tree.pids());
    fs::write(&data, "12345\n")?;
    restore(site, "one")?.success()?;
    tree.counts_beyond(at).map(drop)
}

/// Waits until a CRIU whose command was killed has put back what it had begun: it holds the lock until then.
fn criu_is_done(site: &Site, label: &str) -> Result<()> {
    let lock = site.path("run/vsos/trees").join(label).join("lock");
    eventually("the end of CRIU", GUEST_LIMIT, || Flock::try_exclusive(&lock).ok().flatten()).map(drop)
}

/// After a kill: what is left is removed; the tree counts, if it was left running, and a checkpoint is whole.
fn created(site: &Site, tree: &mut Tree, at: u64) -> Result<&'static str> {
    criu_is_done(site, "one")?;
    let listed = !labels(site)?.is_empty();
    let runs = !tree.pids().is_empty();
    if runs {
        tree.counts_beyond(at)?;
    }
    site.ok(["doctor", "--fix"])?;
    nothing_is_left(site)?;
    ensure!(listed || runs, "neither the tree nor a checkpoint is there");
    if listed {
        tree.end()?;
        restore(site, "one")?.success()?;
        eventually("the tree", GUEST_LIMIT, || (tree.pids().len() >= 3).then_some(()))?;
        site.ok(["checkpoint", "delete", "--tree", "one"])?;
    }
    Ok(if listed { "on the disk" } else { "running" })
}

fn killed_at_any_moment_of_create_a_tree_goes_on_or_is_whole_on_the_disk(site: &Site) -> Result<()> {
    needs_criu()?;
    let mut tree = Tree::counting(site)?;
    let pid = tree.pid.to_string();
    let create = || site.vsctl(["checkpoint", "create", "--pid", &pid, "one"]);
    for moment in 1..=4 {
        let at = tree.counted().context("a count")?;
        let killed = site.keep(create().env("VSOS_FAULT", format!("tree-create:{moment}:kill")))?;
        ensure!(killed.code == 137, "{killed}");
        let state = created(site, &mut tree, at).with_context(|| format!("killed at moment {moment}"))?;
        ensure!(state == if moment == 4 { "on the disk" } else { "running" }, "{state} after moment {moment}");
        let failed = site.keep(create().env("VSOS_FAULT", format!("tree-create:{moment}:fail")))?;
        failed.complains(&[if moment == 4 { "'one' is whole" } else { "on the disk, and it goes on" }])?;
        // Also without the doctor.
        if moment < 4 {
            nothing_is_left(site)?;
            ensure!(labels(site)?.is_empty());
        }
        created(site, &mut tree, at).with_context(|| format!("failed at moment {moment}"))?;
    }
    let began = std::time::Instant::now();
    create().succeed()?;
    let whole = began.elapsed();
    tree.end()?;
    restore(site, "one")?.success()?;
    site.ok(["checkpoint", "delete", "--tree", "one"])?;
    let mut seen = Vec::new();
    for part in 1..=6_u32 {
        let at = tree.counted().context("a count")?;
        let mut command = create().spawn()?;
        thread::sleep(whole * part / 6);
        command.kill();
        seen.push(created(site, &mut tree, at).with_context(|| format!("killed after {part}/6 of {whole:?}"))?);
    }
    site.note(format!("afterwards it was {seen:?}"));
    Ok(())
}

fn killed_at_any_moment_of_restore_a_tree_runs_whole_or_not_at_all(site: &Site) -> Result<()> {
    needs_criu()?;
    let tree = Tree::counting(site)?;
    tree.create(&["one"])?.success()?;
    let at = tree.counted().context("a count")?;
    let whole_or_none = || -> Result<bool> {
        criu_is_done(site, "one")?;
        let runs = !tree.pids().is_empty();
        if runs {
            let said = tree.counted().context("a count")?;
            tree.counts_beyond(said)?;
            ensure!(tree.pids().len() >= 3, "of it only {:?} are there", tree.pids());
        }
        tree.end()?;
        Ok(runs)
    };
    let command = || site.vsctl(["checkpoint", "restore", "--tree", "one", "--detach"]);
    for moment in 1..=5 {
        let killed = site.keep(command().env("VSOS_FAULT", format!("tree-restore:{moment}:kill")))?;
        ensure!(killed.code == 137, "{killed}");
        let runs = whole_or_none().with_context(|| format!("killed at moment {moment}"))?;
        ensure!(runs == (moment >= 4), "after a kill at moment {moment} it runs: {runs}");
    }
    let began = std::time::Instant::now();
    command().succeed()?;
    let whole = began.elapsed();
    ensure!(whole_or_none()?);
    let mut seen = Vec::new();
    for part in 1..=6_u32 {
        let mut command = command().spawn()?;
        thread::sleep(whole * part / 6);
        command.kill();
        seen.push(whole_or_none().with_context(|| format!("killed after {part}/6 of {whole:?}"))?);
    }
    site.note(format!("afterwards it ran: {seen:?}"));
    restore(site, "one")?.success()?;
    tree.counts_beyond(0)?;
    ensure!(at > 0 && labels(site)? == ["one"]);
    site.ok(["doctor", "--fix"])?;
    nothing_is_left(site)
}
