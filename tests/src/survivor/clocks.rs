//! Time: clocks that do not go back nor leap, and timers that count down.

use std::{
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::{
        signal::{SigEvent, SigevNotify},
        timer::{Expiration, Timer, TimerSetTimeFlags},
    },
    time::{ClockId, clock_gettime},
    unistd::alarm,
};

use super::{Check, Kind};

pub const KINDS: &[Kind] = &[
    ("clock-monotonic", |_| clock(|| read(ClockId::CLOCK_MONOTONIC))),
    ("clock-boottime", |_| clock(|| read(ClockId::CLOCK_BOOTTIME))),
    ("uptime", |_| clock(uptime)),
    ("processor-time", processor_time),
    ("alarm", alarm_clock),
    ("posix-timer", posix_timer),
];

/// What a machine that has much to do may take between two looks.
const SLACK: Duration = Duration::from_secs(10);

fn read(clock: ClockId) -> Result<Duration> {
    Ok(clock_gettime(clock).context("read a clock")?.into())
}

fn uptime() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/uptime").context("read the uptime")?;
    let seconds = text.split(' ').next().context("no uptime")?;
    Ok(Duration::from_secs_f64(seconds.parse().with_context(|| format!("an uptime: {text:?}"))?))
}

/// It goes on, and not by more than the time outside; for as long as nothing was on the disk it stood still.
fn clock(read: impl Fn() -> Result<Duration> + 'static) -> Result<Check> {
    let mut last = (read()?, SystemTime::now());
    Ok(Box::new(move || {
        let now = (read()?, SystemTime::now());
        let real = now.1.duration_since(last.1).unwrap_or_default();
        ensure!(now.0 >= last.0, "it went back from {:?} to {:?}", last.0, now.0);
        ensure!(now.0 - last.0 <= real + SLACK, "it leapt from {:?} to {:?} within {real:?}", last.0, now.0);
        last = now;
        Ok(())
    }))
}

/// Time that processors were busy and idle, as `/proc/stat` has it, in its ticks.
fn busy_and_idle() -> Result<[u64; 2]> {
    let text = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let line = text.lines().next().and_then(|line| line.strip_prefix("cpu ")).context("no sum in /proc/stat")?;
    let ticks: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().context(line.to_owned())?;
    ensure!(ticks.len() > 4, "too little in {line:?}");
    Ok([ticks[0] + ticks[1] + ticks[2], ticks[3]])
}

/// It is counted on: at another host, too, where nobody has counted yet.
fn processor_time(_: &Path) -> Result<Check> {
    let mut last = busy_and_idle()?;
    Ok(Box::new(move || {
        let now = busy_and_idle()?;
        ensure!(now[0] >= last[0] && now[1] >= last[1], "[busy, idle] went back from {last:?} to {now:?}");
        last = now;
        Ok(())
    }))
}

/// `left` of `whole` is what may be left when the clock has gone on since `began`: a timer does not go off early, and stands still for as
/// long as a dump takes, which a clock does not.
pub fn counts_down(left: Duration, whole: Duration, began: Instant) -> Result<()> {
    let least = whole.saturating_sub(began.elapsed() + SLACK);
    ensure!(left >= least && left <= whole, "{left:?} are left of {whole:?}, and should be {least:?} or more");
    Ok(())
}

fn alarm_clock(_: &Path) -> Result<Check> {
    const WHOLE: u32 = 7200;
    alarm::set(WHOLE);
    let mut began = Instant::now();
    Ok(Box::new(move || {
        let left = alarm::set(WHOLE).context("no alarm is set")?;
        counts_down(Duration::from_secs(left.into()), Duration::from_secs(WHOLE.into()), began)?;
        began = Instant::now();
        Ok(())
    }))
}

fn posix_timer(_: &Path) -> Result<Check> {
    const WHOLE: Duration = Duration::from_secs(7200);
    let mut timer =
        Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(SigevNotify::SigevNone)).context("make a timer")?;
    let every = Expiration::IntervalDelayed(WHOLE.into(), Duration::from_secs(60).into());
    timer.set(every, TimerSetTimeFlags::empty()).context("set a timer")?;
    let began = Instant::now();
    Ok(Box::new(move || match timer.get().context("read a timer")? {
        Some(Expiration::IntervalDelayed(left, every)) if Duration::from(every) == Duration::from_secs(60) => {
            counts_down(left.into(), WHOLE, began)
        }
        other => anyhow::bail!("it is set to {other:?}"),
    }))
}
