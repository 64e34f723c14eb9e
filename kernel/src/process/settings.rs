//! What a thread may ask of the kernel for itself, and who has the right for another: on which processors it runs, how late its timers
//! may be, in which order it is served with input and output, what a dump of its core holds.
//!
//! All of it is read and set from outside, by the thread's number. ENOENT or ESRCH: there is no such thread.

use std::fs;
use std::io;
use std::path::Path;

use crate::cgroup::CpuSet;
use crate::error::{During, Error};
use crate::{Result, sys};

/// Words of a mask for more processors than any kernel is built for (`NR_CPUS` ends at 8192).
pub const AFFINITY_WORDS: usize = 8192 / 64;

/// How far the class of an I/O priority is from its level (linux/ioprio.h).
const IOPRIO_CLASS_SHIFT: u32 = 13;

/// Lets a thread run on the processors of `set` only, of those that it may (sched_setaffinity(2)). EINVAL: that is none.
///
/// Limit: numbers from 1024 up are refused; the C library's set ends there, and rustix's with it.
pub fn set_processors(thread: i32, set: &CpuSet) -> Result<()> {
    const OPERATION: &str = "set affinity of";
    let mut chosen = rustix::thread::CpuSet::new();
    for number in set.iter().map(|number| number as usize) {
        if number >= rustix::thread::CpuSet::MAX_CPU {
            let why = "processors from number 1024 up cannot be named";
            return Err(Error::refused(OPERATION, format_args!("thread {thread}"), io::ErrorKind::Unsupported, why));
        }
        chosen.set(number);
    }
    let id = super::to_pid(thread, OPERATION)?;
    rustix::thread::sched_setaffinity(Some(id), &chosen).during(OPERATION, format_args!("thread {thread}"))
}

/// By how many nanoseconds timers of a thread may be late, so that several end at once; 0 for a real-time one (Linux ≥ 6.12).
///
/// EPERM: it is another's, and the caller has no `CAP_SYS_NICE`.
pub fn timer_slack(thread: i32) -> Result<u64> {
    let path = slack_file(thread);
    let text = fs::read_to_string(&path).during("read", &path)?;
    text.trim().parse().map_err(|_| Error::refused("read", &path, io::ErrorKind::InvalidData, "it is no number"))
}

/// Sets what [`timer_slack`] reads. 0 stands for what the thread began with.
pub fn set_timer_slack(thread: i32, slack_ns: u64) -> Result<()> {
    let path = slack_file(thread);
    fs::write(&path, slack_ns.to_string()).during("write", &path)
}

/// Threads are not listed in /proc, and are there all the same; below `task` the file is missing.
fn slack_file(thread: i32) -> String {
    format!("/proc/{thread}/timerslack_ns")
}

/// The I/O priority that a thread has chosen: class and level, packed as in ioprio_set(2). `None`: it has not, and is served by its
/// niceness.
pub fn io_priority(thread: i32) -> Result<Option<u16>> {
    let value = sys::ioprio_get(thread).during("read I/O priority of", format_args!("thread {thread}"))?;
    // Some kernels give a level even to who has no class.
    Ok(u16::try_from(value).ok().filter(|value| value >> IOPRIO_CLASS_SHIFT != 0))
}

/// Sets what [`io_priority`] reads.
pub fn set_io_priority(thread: i32, priority: u16) -> Result<()> {
    sys::ioprio_set(thread, priority.into()).during("set I/O priority of", format_args!("thread {thread}"))
}

/// Which memory of a process is in a dump of its core: a bit for each kind (core(5)). `None`: it has ended, and has none, or
/// the kernel dumps no cores (without `CONFIG_ELF_CORE`).
pub fn core_filter(pid: i32) -> Result<Option<u32>> {
    read_filter(Path::new(&filter_file(pid)))
}

fn read_filter(file: &Path) -> Result<Option<u32>> {
    let text = match fs::read_to_string(file) {
        // The process is there, and has no such file.
        Err(error) if error.kind() == io::ErrorKind::NotFound && file.parent().is_some_and(Path::exists) => {
            return Ok(None);
        }
        text => text.during("read", file.display())?,
    };
    let invalid = |_| Error::refused("read", file.display(), io::ErrorKind::InvalidData, "it is no hexadecimal number");
    match text.trim() {
        "" => Ok(None),
        digits => u32::from_str_radix(digits, 16).map(Some).map_err(invalid),
    }
}

/// Sets what [`core_filter`] reads.
pub fn set_core_filter(pid: i32, filter: u32) -> Result<()> {
    let path = filter_file(pid);
    fs::write(&path, format!("{filter:#x}")).during("write", &path)
}

fn filter_file(pid: i32) -> String {
    format!("/proc/{pid}/coredump_filter")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Does `work` in a thread of its own, of which nothing is left.
    fn aside(work: impl FnOnce(i32) + Send + 'static) {
        std::thread::spawn(|| work(rustix::thread::gettid().as_raw_nonzero().get())).join().unwrap();
    }

    fn processors(thread: i32) -> CpuSet {
        let mut mask = [0; AFFINITY_WORDS];
        crate::process::affinity(thread, &mut mask).unwrap();
        CpuSet::from_mask(&mask)
    }

    #[test]
    fn processors_that_are_not_there_are_left_out() {
        aside(|own| {
            let all = processors(own);
            let absent = (all.iter().last().unwrap() + 1..1024).collect::<CpuSet>();
            set_processors(own, &all.iter().take(1).chain(absent.iter()).collect()).unwrap();
            assert_eq!(processors(own), all.iter().take(1).collect());
            assert_eq!(set_processors(own, &absent).unwrap_err().raw_os_error(), Some(libc::EINVAL));
            set_processors(own, &all).unwrap();
            assert_eq!(processors(own), all);
            assert_eq!(set_processors(own, &"1024".parse().unwrap()).unwrap_err().kind(), io::ErrorKind::Unsupported);
        });
    }

    #[test]
    fn slack_and_priority_are_a_thread_s_own() {
        let other = rustix::thread::gettid().as_raw_nonzero().get();
        aside(move |own| {
            set_timer_slack(own, 70_001).unwrap();
            assert_eq!(timer_slack(own).unwrap(), 70_001);
            assert_eq!(rustix::thread::current_timer_slack().unwrap(), 70_001);
            let idle = 3 << IOPRIO_CLASS_SHIFT;
            set_io_priority(own, idle).unwrap();
            assert_eq!(io_priority(own).unwrap(), Some(idle));
            assert_ne!(io_priority(other).unwrap(), Some(idle));
        });
        assert_ne!(rustix::thread::current_timer_slack().unwrap(), 70_001);
    }

    #[test]
    fn a_filter_is_read_as_it_was_written() {
        let own = std::process::id() as i32;
        let before = core_filter(own).unwrap().unwrap();
        set_core_filter(own, before ^ 0x4).unwrap();
        assert_eq!(core_filter(own).unwrap(), Some(before ^ 0x4));
        set_core_filter(own, before).unwrap();
    }

    #[test]
    fn without_the_file_there_is_no_filter_but_a_process() {
        let process = tempfile::tempdir().unwrap();
        let file = process.path().join("coredump_filter");
        assert_eq!(read_filter(&file).unwrap(), None);
        for (text, filter) in [("", None), ("00000033\n", Some(0x33))] {
            fs::write(&file, text).unwrap();
            assert_eq!(read_filter(&file).unwrap(), filter);
        }
        fs::write(&file, "x").unwrap();
        assert_eq!(read_filter(&file).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn nobody_has_none_of_it() {
        let gone = |error: Error| matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH));
        assert!(gone(timer_slack(i32::MAX).unwrap_err()) && gone(io_priority(i32::MAX).unwrap_err()));
        assert!(gone(core_filter(i32::MAX).unwrap_err()) && gone(set_io_priority(i32::MAX, 0).unwrap_err()));
        assert!(gone(set_processors(i32::MAX, &"0".parse().unwrap()).unwrap_err()));
    }
}
