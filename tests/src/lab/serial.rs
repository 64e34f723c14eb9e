//! What a kernel says on its serial line when it will do nothing more. Pure.

/// For how long a processor may be stuck, in seconds, before its kernel is given up. An emulated one on a busy machine is stuck for tens of
/// seconds and goes on.
const STUCK_SECONDS: u64 = 120;
/// How many lines are told: the kernel says so again every twenty seconds.
const LINES: usize = 4;

/// How the line begins that the lab itself adds when qemu has ended without being told to.
const OFF: &str = "lab: it went off by itself: ";

/// That line, for a host whose qemu ended as `words` say.
pub fn off(words: &str) -> String {
    format!("\n{OFF}{}\n", words.trim().replace('\n', " "))
}

/// The first lines of a serial log that say that the kernel hangs or has ended: one of its processors has been stuck for two
/// minutes, it has panicked, or its machine went off.
pub fn hang(log: &str) -> Option<String> {
    let ends = |line: &&str| {
        line.contains("Kernel panic - not syncing") || line.starts_with(OFF) || stuck(line) >= Some(STUCK_SECONDS)
    };
    let lines: Vec<&str> = log.lines().filter(ends).take(LINES).collect();
    (!lines.is_empty()).then(|| shown(&lines))
}

/// The seconds in `watchdog: BUG: soft lockup - CPU#N stuck for Ns! [program:pid]`, as kernel/watchdog.c prints it.
fn stuck(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("soft lockup - CPU#")?;
    let (cpu, rest) = rest.split_once(" stuck for ")?;
    cpu.parse::<u32>().ok()?;
    // A line that is being written may end in the middle of the number.
    rest.split_once('s')?.0.parse().ok()
}

/// The last lines of a serial log, as errors show them.
pub fn end(log: &str, most: usize) -> String {
    let lines: Vec<&str> = log.lines().collect();
    shown(&lines[lines.len().saturating_sub(most)..])
}

/// Lines of a serial log as errors show them.
fn shown(lines: &[&str]) -> String {
    lines.iter().map(|line| format!("  serial| {}\n", line.trim_end_matches('\r'))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lockup(seconds: &str) -> String {
        format!("[ 4711.000001] watchdog: BUG: soft lockup - CPU#0 stuck for {seconds}! [nft:2718]\r\n")
    }

    #[test]
    fn a_processor_that_is_stuck_for_two_minutes_is_a_hang() {
        assert_eq!(hang(&lockup("119s")), None);
        let line = lockup("120s");
        assert_eq!(hang(&line), Some(format!("  serial| {}\n", line.trim_end())));
        let told =
            hang(&(22..=700).step_by(22).map(|seconds| lockup(&format!("{seconds}s"))).collect::<String>()).unwrap();
        assert!(told.contains("for 132s") && !told.contains("for 110s") && told.lines().count() == LINES, "{told}");
    }

    #[test]
    fn a_panic_is_one_and_what_is_not_whole_or_said_otherwise_is_none() {
        let panic = "booting\n[    9.1] Kernel panic - not syncing: Fatal exception in interrupt\nmore";
        assert_eq!(hang(panic).unwrap().lines().count(), 1);
        let went = format!("booting{}", off("exit status 139 \nwhy"));
        assert_eq!(hang(&went).unwrap(), "  serial| lab: it went off by itself: exit status 139  why\n");
        for other in [
            "",
            "[ 1.0] watchdog: BUG: soft lockup - CPU#1 stuck for 700",
            "BUG: soft lockup - CPU#1 stuck for ever!",
            "BUG: soft lockup - CPU#one stuck for 700s!",
            "Attempted to kill init! 700s",
        ] {
            assert_eq!(hang(other), None, "{other:?}");
        }
    }
}
