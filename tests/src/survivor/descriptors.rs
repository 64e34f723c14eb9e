//! Descriptors that are no files: pipes, events, timers, signals, watches.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
        inotify::{AddWatchFlags, InitFlags, Inotify},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        timer::TimerSetTimeFlags,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags},
    },
    unistd::{mkfifo, pipe2},
};

use super::{Check, Kind, clocks::counts_down, limb::field, same};

pub const KINDS: &[Kind] = &[
    ("pipe", pipe),
    ("fifo", fifo),
    ("eventfd", eventfd),
    ("epoll", epoll),
    ("timerfd", timerfd),
    ("signalfd", signalfd),
    ("pending-signal", pending_signal),
    ("inotify", inotify),
    ("inotify-of-etc", |_| watch(Path::new("/etc"))),
    ("inotify-of-a-tmpfs", |_| watch(Path::new("/dev/shm"))),
];

const IN_FLIGHT: &[u8] = b"written and not yet read";

/// Takes out what is in flight, and puts it back.
fn in_flight(from: &mut File, to: &mut File) -> Result<()> {
    let mut bytes = vec![0; 1024];
    let length = from.read(&mut bytes).context("read what is in flight")?;
    to.write_all(IN_FLIGHT)?;
    same("what is in flight", &bytes[..length], IN_FLIGHT)
}

fn pipe(_: &Path) -> Result<Check> {
    let (from, to) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).context("make a pipe")?;
    fcntl(&to, FcntlArg::F_SETPIPE_SZ(256 << 10)).context("make the pipe larger")?;
    let (mut from, mut to) = (File::from(from), File::from(to));
    to.write_all(IN_FLIGHT)?;
    Ok(Box::new(move || {
        in_flight(&mut from, &mut to)?;
        same("the size of the pipe", fcntl(&to, FcntlArg::F_GETPIPE_SZ)?, 256 << 10)
    }))
}

fn fifo(place: &Path) -> Result<Check> {
    let path = place.join("fifo");
    mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).context("make a fifo")?;
    let mut both = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut to = OpenOptions::new().write(true).open(&path)?;
    to.write_all(IN_FLIGHT)?;
    Ok(Box::new(move || in_flight(&mut both, &mut to)))
}

fn eventfd(_: &Path) -> Result<Check> {
    let plain = EventFd::from_value_and_flags(41, EfdFlags::EFD_NONBLOCK)?;
    Ok(Box::new(move || {
        same("the count", plain.read()?, 41)?;
        plain.write(41)?;
        Ok(())
    }))
}

fn epoll(_: &Path) -> Result<Check> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let ready = EventFd::from_value(1)?;
    let (quiet, to) = pipe2(OFlag::O_CLOEXEC).context("make a pipe")?;
    epoll.add(&ready, EpollEvent::new(EpollFlags::EPOLLIN, 77))?;
    epoll.add(&quiet, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLPRI, 78))?;
    // What is ready in it makes another ready.
    let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    outer.add(&epoll.0, EpollEvent::new(EpollFlags::EPOLLIN, 79))?;
    let (mut quiet, mut to) = (File::from(quiet), File::from(to));
    Ok(Box::new(move || {
        let _ = &ready;
        let wait = |epoll: &Epoll| -> Result<Vec<u64>> {
            let mut events = [EpollEvent::empty(); 4];
            let count = epoll.wait(&mut events, EpollTimeout::ZERO)?;
            let mut found: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
            found.sort_unstable();
            Ok(found)
        };
        same("what is ready", wait(&epoll)?, vec![77])?;
        same("what is ready outside", wait(&outer)?, vec![79])?;
        to.write_all(b"x")?;
        same("what is ready after a write", wait(&epoll)?, vec![77, 78])?;
        quiet.read_exact(&mut [0])?;
        Ok(())
    }))
}

fn timerfd(_: &Path) -> Result<Check> {
    const LONG: Duration = Duration::from_secs(7200);
    let made = |clock| -> Result<TimerFd> {
        let timer = TimerFd::new(clock, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        let every = Expiration::IntervalDelayed(LONG.into(), Duration::from_secs(60).into());
        timer.set(every, TimerSetTimeFlags::empty())?;
        Ok(timer)
    };
    let timers = [made(ClockId::CLOCK_MONOTONIC)?, made(ClockId::CLOCK_BOOTTIME)?];
    let real = made(ClockId::CLOCK_REALTIME)?;
    let fired = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    fired.set(Expiration::OneShot(Duration::from_millis(1).into()), TimerSetTimeFlags::empty())?;
    let began = Instant::now();
    Ok(Box::new(move || {
        for timer in &timers {
            let left = match timer.get()? {
                Some(Expiration::IntervalDelayed(left, every)) if Duration::from(every) == Duration::from_secs(60) => {
                    left
                }
                other => anyhow::bail!("it is set to {other:?}"),
            };
            counts_down(left.into(), LONG, began)?;
        }
        ensure!(real.get()?.is_some(), "the timer of the real clock is not set");
        // It has fired and not been read.
        let mut ready = [nix::poll::PollFd::new(fired.as_fd(), nix::poll::PollFlags::POLLIN)];
        let patience = nix::poll::PollTimeout::try_from(Duration::from_secs(60))?;
        same("timers that have fired", nix::poll::poll(&mut ready, patience)?, 1)
    }))
}

fn signalfd(_: &Path) -> Result<Check> {
    let set = SigSet::from(Signal::SIGUSR2);
    set.thread_block().context("block a signal")?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let send = || nix::sys::pthread::pthread_kill(nix::sys::pthread::pthread_self(), Signal::SIGUSR2);
    send().context("send a signal")?;
    Ok(Box::new(move || {
        let signal = signals.read_signal()?.map(|signal| signal.ssi_signo);
        send().context("send a signal")?;
        same("the signal", signal, Some(Signal::SIGUSR2 as u32))
    }))
}

fn pending_signal(_: &Path) -> Result<Check> {
    SigSet::from(Signal::SIGUSR1).thread_block().context("block a signal")?;
    let thread = nix::sys::pthread::pthread_self();
    nix::sys::pthread::pthread_kill(thread, Signal::SIGUSR1).context("send a signal")?;
    let pending = || field("/proc/thread-self/status", "SigPnd");
    let usr1 = 1_u64 << (Signal::SIGUSR1 as u32 - 1);
    Ok(Box::new(move || {
        let found = u64::from_str_radix(&pending()?, 16)?;
        same("whether it is pending", found & usr1, usr1)
    }))
}

fn inotify(place: &Path) -> Result<Check> {
    watch(place)
}

fn watch(place: &Path) -> Result<Check> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE;
    let watch = inotify.add_watch(place, flags).context("watch")?;
    let file = place.join("survivor-watched");
    Ok(Box::new(move || {
        fs::write(&file, "").context("make a file")?;
        fs::remove_file(&file).context("remove a file")?;
        let events = inotify.read_events().context("read events")?;
        let ours = events.iter().filter(|event| event.name.as_deref() == file.file_name());
        let seen: Vec<(bool, AddWatchFlags)> = ours.map(|event| (event.wd == watch, event.mask)).collect();
        same("what was seen", seen, vec![(true, AddWatchFlags::IN_CREATE), (true, AddWatchFlags::IN_DELETE)])
    }))
}
