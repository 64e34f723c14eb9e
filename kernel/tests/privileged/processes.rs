//! Processes and their state.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsFd;

use kernel::capability::{self, Set};
use kernel::channel;
use kernel::process::{self, CloneOptions, Fork, PidFd, fork};

use crate::Outcome;
use crate::child::{ensure, ensure_equal};

fn words(words: &[&str]) -> Vec<CString> {
    words.iter().map(|word| CString::new(*word).expect("no word has a zero byte")).collect()
}

pub fn exec_by_descriptor() -> Outcome {
    let shell = File::open("/bin/sh")?;
    let mut output = tempfile::tempfile()?;
    let secret = tempfile::tempfile()?;
    process::keep_across_exec(&secret)?;
    match fork(&CloneOptions::default())? {
        Fork::Child => {
            process::place_descriptor(&output, 7).expect("placed");
            process::close_from(3, &[7, std::os::fd::AsRawFd::as_raw_fd(&shell)]).expect("closed");
            // The shell lists what it has: 7, and a descriptor of the listing itself.
            let script = "echo $NAME >&7; for fd in 3 4 5 6 8 9 10 11 12 13; do [ -e /proc/$$/fd/$fd ] && echo $fd >&7; done; exit 9";
            let error = process::exec_descriptor(shell.as_fd(), &words(&["sh", "-c", script]), &words(&["NAME=value"]));
            eprintln!("{error}");
            std::process::exit(99)
        }
        Fork::Parent { pidfd, .. } => {
            ensure_equal("exit", pidfd.reap()?.code(), Some(9))?;
            let mut text = String::new();
            output.rewind()?;
            output.read_to_string(&mut text)?;
            ensure_equal("environment and descriptors", text.as_str(), "value\n")
        }
    }
}

pub fn status_is_known() -> Outcome {
    let (ours, theirs) = channel::pair()?;
    let Fork::Parent { pid, pidfd } = fork(&CloneOptions::default())? else {
        drop(ours);
        // Ends when the parent says so.
        let _ = theirs.receive();
        std::process::exit(3)
    };
    let other = PidFd::open(pid)?;
    ensure(pidfd.is_alive() && !other.wait_exit(Some(1))?, "it waits for us")?;
    ensure(process::start_time(pid)? > 0, "start time")?;
    ensure_equal("status before the end", other.exit_status()?, None)?;
    ours.send(b"end", &[])?;
    ensure(other.wait_exit(None)?, "the end is seen by everybody")?;
    ensure_equal("code", pidfd.reap()?.code(), Some(3))?;
    // Kernels before 6.15 forget; those that do not must tell the truth.
    if let Some(status) = other.exit_status()? {
        ensure_equal("code for others", status.code(), Some(3))?;
    }
    ensure_equal(
        "signal to the dead",
        other.signal(libc::SIGTERM).err().and_then(|error| error.raw_os_error()),
        Some(libc::ESRCH),
    )?;

    let Fork::Parent { pid, pidfd } = fork(&CloneOptions::default())? else {
        loop {
            std::thread::park();
        }
    };
    // A real-time signal, which systemd takes for orders.
    pidfd.signal(libc::SIGRTMIN() + 3)?;
    let status = process::status_of(pid)?;
    ensure_equal("signal", std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGRTMIN() + 3))?;
    ensure_equal("no child left", process::reap_any()?.is_none(), true)
}

pub fn bounding_set_only_shrinks() -> Outcome {
    let keep: Set = "chown,kill,net_bind_service".parse()?;
    capability::limit_bounding(keep)?;
    ensure_equal("bounding", capability::bounding()?, keep)?;
    capability::set_all(keep)?;
    ensure_equal("effective", capability::effective()?, keep)?;
    capability::set_all(Set::all_supported())?;
    ensure_equal("effective cannot grow", capability::effective()?, keep)
}

pub fn becomes_a_user() -> Outcome {
    process::set_user(12345, 23456, &[7, 8])?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("").trim().to_owned();
    ensure_equal("uid", line("Uid:"), "12345\t12345\t12345\t12345".to_owned())?;
    ensure_equal("gid", line("Gid:"), "23456\t23456\t23456\t23456".to_owned())?;
    ensure_equal("groups", line("Groups:"), "7 8".to_owned())?;
    ensure(process::set_user(0, 0, &[]).is_err(), "there is no way back")?;
    process::no_new_privileges()?;
    process::set_dumpable(false)?;
    process::become_subreaper()?;
    Ok(())
}

pub fn keyring_is_new() -> Outcome {
    // The serial number is the first word of a line.
    let keyrings = || -> std::io::Result<BTreeSet<String>> {
        let keys = std::fs::read_to_string("/proc/keys")?;
        let sessions = keys.lines().filter(|line| line.contains("keyring   _ses"));
        Ok(sessions.filter_map(|line| line.split(' ').next().map(str::to_owned)).collect())
    };
    let before = keyrings()?;
    kernel::keyring::join_new_session()?;
    ensure(!keyrings()?.is_subset(&before), "there is a session keyring that was not there before")
}

pub fn in_vfork_is_seen() -> Outcome {
    use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
    use nix::{fcntl::OFlag, sys::stat::Mode};

    let own = std::process::id() as i32;
    ensure_equal("who does not wait", kernel::process::in_vfork(own), None)?;
    let directory = tempfile::tempdir()?;
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU)?;
    let (parent, pidfd) = match fork(&CloneOptions::default())? {
        Fork::Parent { pid, pidfd } => (pid, pidfd),
        Fork::Child => {
            // Done by its child before it executes anything, and somebody opens the other end later.
            let spawned = PosixSpawnFileActions::init().and_then(|mut actions| {
                actions.add_open(0, &fifo, OFlag::O_RDONLY, Mode::empty())?;
                posix_spawn(c"/bin/true", &actions, &PosixSpawnAttr::init()?, &[c"true"], &[] as &[&std::ffi::CStr])
            });
            std::process::exit(i32::from(spawned.is_err()))
        }
    };
    let seen = (0..500).find_map(|_| {
        let _ = pidfd.wait_exit(Some(10));
        kernel::process::in_vfork(parent)
    });
    ensure_equal("who waits", seen, Some(parent))?;
    drop(std::fs::OpenOptions::new().write(true).open(&fifo)?);
    ensure(pidfd.wait_exit(Some(10_000))?, "it does not go on")?;
    ensure_equal("who has ended", kernel::process::in_vfork(parent), None)?;
    ensure(pidfd.reap()?.success(), "it found no program")
}
