//! What threads have chosen for themselves and CRIU (4.2 and older) does not dump: what a checkpoint has to remember of them.
//!
//! They are settings, not state: a program goes on without them, only slower, later or with another dump of its core. So what cannot be
//! read or set is said in the log, and keeps nobody from going on.
//!
//! Limits: what `prctl(PR_SET_TIMERSLACK, 0)` goes back to cannot be read; after a restore it is the kernel's 50 µs. A server whose
//! monitor was killed has the host's init as its parent, and what it had from that monitor counts as chosen.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;

use anyhow::{Error, Result};
use kernel::cgroup::{AllowedProcessors, CpuSet, Group, Hierarchies};
use kernel::process::{self, AFFINITY_WORDS};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::processes;
use crate::spec::as_text;

/// What the kernel begins with (init/init_task.c), in nanoseconds …
const USUAL_SLACK_NS: u64 = 50_000;

/// … and what real-time threads have (Linux ≥ 6.12), which nobody can choose.
const REAL_TIME_SLACK_NS: u64 = 0;

/// What the kernel begins with: memory without a file, shared or not, headers of programs, private huge pages (core(5)).
const USUAL_CORE_FILTER: u32 = 0x33;

/// What one thread has chosen; none is what all have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThreadSettings {
    /// Its number, as it knows it.
    pub thread: i32,
    /// The processors that it may run on.
    #[serde(default, with = "as_text", skip_serializing_if = "Option::is_none")]
    pub processors: Option<CpuSet>,
    /// By how much its timers may be late, in nanoseconds.
    pub timer_slack_ns: Option<u64>,
    /// Class and level of its input and output, packed (ioprio_set(2)).
    pub io_priority: Option<u16>,
    /// What a dump of its core holds: its process's, of which it is the first thread.
    pub core_filter: Option<u32>,
}

/// [`survey`] for the processes of the group of a server, whose init is `init`. What its monitor has it has inherited.
pub fn survey_in(group: &Group, init: i32) -> Vec<ThreadSettings> {
    // A parent in no namespace of ours has nothing that could be read.
    let starter = process::stat(init).map(|stat| Some(stat.parent).filter(|parent| *parent != 0));
    match starter.and_then(|starter| Ok((starter, group.processes()?))) {
        Ok((starter, pids)) => survey(&pids, starter),
        Err(error) => {
            log::warn!("affinities and the like are not kept: {:#}", Error::from(error));
            Vec::new()
        }
    }
}

/// What the threads of the processes `pids`, which stand still, have chosen.
///
/// What is as `starter` has it nobody has chosen: it was inherited, as it will be from whoever lets them go on. Without one, all that
/// is unusual was chosen.
pub fn survey(pids: &[i32], starter: Option<i32>) -> Vec<ThreadSettings> {
    let Some(first) = pids.first() else { return Vec::new() };
    let mut usual = match Usual::of(*first, starter) {
        Ok(usual) => usual,
        Err(error) => {
            log::warn!("affinities and the like are not kept: {error:#}");
            return Vec::new();
        }
    };
    let mut found = Vec::new();
    let mut losses = Losses::default();
    for pid in pids {
        match of_process(*pid, &mut usual, &mut losses) {
            Ok(settings) => found.extend(settings),
            Err(error) => losses.add("process", error, |error| {
                format!("affinities and the like of process {pid} are not kept: {error:#}")
            }),
        }
    }
    losses.tell();
    found
}

fn of_process(pid: i32, usual: &mut Usual, losses: &mut Losses) -> Result<Vec<ThreadSettings>> {
    let core_filter = process::core_filter(pid)?;
    let mut found = Vec::new();
    for thread in processes::threads(pid)? {
        match usual.chosen_by(thread, core_filter.filter(|_| thread == pid)) {
            // There may be thousands of threads, and mostly none has chosen anything: only else its number is asked for.
            Ok(settings) if settings == ThreadSettings::default() => {}
            Ok(settings) => {
                found.extend(processes::number_inside(thread).map(|thread| ThreadSettings { thread, ..settings }));
            }
            Err(error) => losses.add("thread", error, |error| {
                format!("affinity and the like of thread {thread} of process {pid} are not kept: {error:#}")
            }),
        }
    }
    Ok(found)
}

/// What threads have without having chosen it.
struct Usual {
    processors: UsualProcessors,
    /// What they have from who started them.
    inherited: ThreadSettings,
}

impl Usual {
    fn of(first: i32, starter: Option<i32>) -> Result<Self> {
        let inherited = starter.map(inherited_from).transpose()?.unwrap_or_default();
        Ok(Self { processors: UsualProcessors::of(first, inherited.processors.clone())?, inherited })
    }

    /// What `thread` has chosen, whose process has `core_filter`.
    fn chosen_by(&mut self, thread: i32, core_filter: Option<u32>) -> Result<ThreadSettings> {
        let inherited = &self.inherited;
        Ok(ThreadSettings {
            thread: 0,
            processors: self.processors.chosen_by(thread)?,
            timer_slack_ns: unusual_slack(process::timer_slack(thread)?)
                .filter(|slack| Some(*slack) != inherited.timer_slack_ns),
            io_priority: process::io_priority(thread)?.filter(|priority| Some(*priority) != inherited.io_priority),
            core_filter: core_filter
                .filter(|filter| *filter != USUAL_CORE_FILTER && Some(*filter) != inherited.core_filter),
        })
    }
}

/// All that process `starter` hands on.
fn inherited_from(starter: i32) -> Result<ThreadSettings> {
    let mut mask = [0; AFFINITY_WORDS];
    process::affinity(starter, &mut mask)?;
    Ok(ThreadSettings {
        thread: starter,
        processors: Some(CpuSet::from_mask(&mask)),
        timer_slack_ns: unusual_slack(process::timer_slack(starter)?),
        io_priority: process::io_priority(starter)?,
        core_filter: process::core_filter(starter)?,
    })
}

/// What was chosen of a slack. TOML's numbers end at 292 years, which is as good as for ever.
fn unusual_slack(slack_ns: u64) -> Option<u64> {
    let is_usual = [USUAL_SLACK_NS, REAL_TIME_SLACK_NS].contains(&slack_ns);
    (!is_usual).then_some(slack_ns.min(i64::MAX as u64))
}

/// The processors of a thread that has not chosen any.
struct UsualProcessors {
    groups: AllowedProcessors,
    /// What the group of the first one allows, which is what nearly all have.
    first: CpuSet,
    isolated: CpuSet,
    /// Those of who started it: of them it has those that its group allows.
    inherited: Option<CpuSet>,
    /// The mask that was found to be usual last: one of thousands of threads is not taken apart each time.
    seen: [u64; AFFINITY_WORDS],
}

impl UsualProcessors {
    /// Of `first`, and of those whose groups allow the same.
    fn of(first: i32, inherited: Option<CpuSet>) -> kernel::Result<Self> {
        let mut groups = AllowedProcessors::new(&Hierarchies::detect()?);
        let first = groups.of(first)?;
        // A kernel without the file isolates none.
        let isolated = CpuSet::isolated().unwrap_or_default();
        Ok(Self { groups, first, isolated, inherited, seen: [0; AFFINITY_WORDS] })
    }

    /// Those that `thread` has chosen. The kernel does not tell who chose all, which is as good as not to choose.
    fn chosen_by(&mut self, thread: i32) -> kernel::Result<Option<CpuSet>> {
        let mut mask = [0; AFFINITY_WORDS];
        process::affinity(thread, &mut mask)?;
        if mask == self.seen {
            return Ok(None);
        }
        let set = CpuSet::from_mask(&mask);
        if self.is_usual(&set, &self.first) {
            self.seen = mask;
            return Ok(None);
        }
        let own = self.groups.of(thread)?;
        Ok((!self.is_usual(&set, &own)).then_some(set))
    }

    /// Whether who has not chosen has `set` in a group that allows `allowed`.
    fn is_usual(&self, set: &CpuSet, allowed: &CpuSet) -> bool {
        let of_starter = |inherited: &CpuSet| inherited.iter().filter(|number| allowed.contains(*number)).collect();
        is_all(set, allowed, &self.isolated) || self.inherited.as_ref().map(of_starter).as_ref() == Some(set)
    }
}

/// Whether `set` is all of those that are `allowed`, with or without those that are `isolated`: the kernel keeps them from who has not
/// chosen, until a group gives them.
fn is_all(set: &CpuSet, allowed: &CpuSet, isolated: &CpuSet) -> bool {
    set == allowed || *set == allowed.iter().filter(|number| !isolated.contains(*number)).collect()
}

/// [`apply`] for the processes of a group.
pub fn apply_in(group: &Group, settings: &[ThreadSettings]) {
    if settings.is_empty() {
        return;
    }
    match group.processes() {
        Ok(pids) => apply(settings, &pids),
        Err(error) => log::warn!("affinities and the like are lost: {:#}", Error::from(error)),
    }
}

/// Gives threads of the processes `pids`, none of which has run yet, what they had chosen.
pub fn apply(settings: &[ThreadSettings], pids: &[i32]) {
    let mut left: BTreeMap<i32, &ThreadSettings> = settings.iter().map(|one| (one.thread, one)).collect();
    let mut losses = Losses::default();
    for pid in pids {
        if left.is_empty() {
            break;
        }
        let threads = processes::threads(*pid).unwrap_or_else(|error| {
            losses
                .add("threads", error, |error| format!("affinities and the like of process {pid} are lost: {error:#}"));
            Vec::new()
        });
        for thread in threads {
            if let Some(one) = processes::number_inside(thread).and_then(|number| left.remove(&number)) {
                one.give(thread, &mut losses);
            }
        }
    }
    losses.tell();
}

impl ThreadSettings {
    /// Gives `thread`, which has that number here, what it had chosen.
    fn give(&self, thread: i32, losses: &mut Losses) {
        if let Some(set) = &self.processors {
            self.give_processors(thread, set, losses);
        }
        let mut tell = |what: &'static str, given: kernel::Result<()>| {
            if let Err(error) = given {
                losses.add(what, error.into(), |error| format!("{} has lost its {what}: {error:#}", self.who(thread)));
            }
        };
        if let Some(slack_ns) = self.timer_slack_ns {
            tell("timer slack", process::set_timer_slack(thread, slack_ns));
        }
        if let Some(priority) = self.io_priority {
            tell("I/O priority", process::set_io_priority(thread, priority));
        }
        if let Some(filter) = self.core_filter {
            tell("core dump filter", process::set_core_filter(thread, filter));
        }
    }

    fn give_processors(&self, thread: i32, set: &CpuSet, losses: &mut Losses) {
        let Err(error) = process::set_processors(thread, set) else { return };
        // Another host, or another set for the server.
        let has_none = error.raw_os_error() == Some(Errno::EINVAL as i32);
        losses.add("affinity", error.into(), |error| match has_none {
            true => format!(
                "{} had chosen to run on the processors {set}, none of which it has here: it runs on all",
                self.who(thread)
            ),
            false => format!("{} has lost its affinity: {error:#}", self.who(thread)),
        });
    }

    fn who(&self, thread: i32) -> String {
        let name = processes::text(thread, "comm").unwrap_or_default();
        format!("thread {} ({}, {thread} on the host)", self.thread, name.trim_end().escape_debug())
    }
}

/// What could not be kept or given again, by setting and reason: what one of thousands of threads has lost, mostly all have.
#[derive(Debug, Default)]
struct Losses(BTreeMap<(&'static str, String), (String, usize)>);

impl Losses {
    /// Takes note that somebody has lost `what`, in the words of `say` when it is the first one; nothing when who had it has ended.
    fn add(&mut self, what: &'static str, error: Error, say: impl FnOnce(&Error) -> String) {
        if is_gone(&error) {
            return;
        }
        match self.0.entry((what, error.root_cause().to_string())) {
            Entry::Vacant(place) => drop(place.insert((say(&error), 0))),
            Entry::Occupied(mut place) => place.get_mut().1 += 1,
        }
    }

    /// The first of each, and how many more.
    fn said(&self) -> impl Iterator<Item = String> {
        self.0.values().map(|(first, more)| match more {
            0 => first.clone(),
            more => format!("{first}; and {more} more"),
        })
    }

    fn tell(&self) {
        self.said().for_each(|said| log::warn!("{said}"));
    }
}

/// Whether an error only says that the thread has ended.
fn is_gone(error: &Error) -> bool {
    let number = error.root_cause().downcast_ref().and_then(io::Error::raw_os_error);
    number.is_some_and(|number| [Errno::ENOENT, Errno::ESRCH].contains(&Errno::from_raw(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> CpuSet {
        text.parse().unwrap()
    }

    fn mask(thread: i32) -> CpuSet {
        let mut mask = [0; AFFINITY_WORDS];
        process::affinity(thread, &mut mask).unwrap();
        CpuSet::from_mask(&mask)
    }

    /// Does `work` in a thread of its own, of which nothing is left.
    fn aside(work: impl FnOnce(i32) + Send + 'static) {
        std::thread::spawn(|| work(rustix::thread::gettid().as_raw_nonzero().get())).join().unwrap();
    }

    #[test]
    fn what_all_have_is_not_remembered() {
        assert_eq!((unusual_slack(50_000), unusual_slack(0)), (None, None));
        assert_eq!((unusual_slack(1), unusual_slack(u64::MAX)), (Some(1), Some(i64::MAX as u64)));
        let is_all = |chosen: &str, isolated: &str| is_all(&set(chosen), &set("0-3"), &set(isolated));
        assert!(is_all("0-3", "") && is_all("0-3", "3") && is_all("0-2", "3,7"));
        assert!(!is_all("0-2", "") && !is_all("3", "3") && !is_all("0-4", ""));
    }

    #[test]
    fn a_thread_that_has_chosen_nothing_is_not_remembered() {
        let own = std::process::id() as i32;
        let mut usual = UsualProcessors::of(own, None).unwrap();
        aside(move |thread| {
            usual.first = mask(thread);
            assert_eq!(usual.chosen_by(thread).unwrap(), None);
            assert_ne!(usual.seen, [0; AFFINITY_WORDS]);
            let all = mask(thread);
            if all.len() < 2 {
                return;
            }
            let one: CpuSet = all.iter().take(1).collect();
            process::set_processors(thread, &one).unwrap();
            assert_eq!(usual.chosen_by(thread).unwrap(), Some(one));
            process::set_processors(thread, &all).unwrap();
            assert_eq!(usual.chosen_by(thread).unwrap(), None);
        });
    }

    #[test]
    fn what_was_inherited_is_not_remembered_and_what_was_chosen_is() {
        aside(|thread| {
            let all = mask(thread);
            let one: CpuSet = all.iter().take(1).collect();
            process::set_processors(thread, &one).unwrap();
            process::set_timer_slack(thread, 70_001).unwrap();
            process::set_io_priority(thread, 3 << 13).unwrap();
            let chosen = |starter| {
                let mut usual = Usual::of(thread, starter).unwrap();
                usual.processors.first = all.clone();
                let mut found = usual.chosen_by(thread, Some(0x7f)).unwrap();
                // A machine with one processor has no choice.
                found.processors = found.processors.filter(|_| all.len() > 1);
                found
            };
            let listed = chosen(None);
            assert_eq!(listed.processors, (all.len() > 1).then(|| one.clone()));
            assert_eq!((listed.timer_slack_ns, listed.io_priority), (Some(70_001), Some(3 << 13)));
            assert_eq!(listed.core_filter, Some(0x7f));
            let inherited = chosen(Some(thread));
            assert_eq!(inherited, ThreadSettings { core_filter: Some(0x7f), ..ThreadSettings::default() });
            let mut usual = Usual::of(thread, None).unwrap();
            usual.inherited.core_filter = Some(0x7f);
            assert_eq!(usual.chosen_by(thread, Some(0x7f)).unwrap().core_filter, None);
            // Who has started it is another.
            let other = std::thread::spawn(move || inherited_from(rustix::thread::gettid().as_raw_nonzero().get()));
            assert_eq!(other.join().unwrap().unwrap().timer_slack_ns, Some(70_001));
        });
    }

    #[test]
    fn of_inherited_processors_it_has_those_that_its_group_allows() {
        let mut usual = UsualProcessors::of(std::process::id() as i32, Some(set("0-1"))).unwrap();
        usual.isolated = CpuSet::default();
        assert!(usual.is_usual(&set("1"), &set("1-2")) && usual.is_usual(&set("1-2"), &set("1-2")));
        assert!(!usual.is_usual(&set("2"), &set("1-2")) && usual.is_usual(&set("2-3"), &set("2-3")));
    }

    #[test]
    fn what_was_chosen_is_given_again_and_only_to_that_thread() {
        aside(|thread| {
            let all = mask(thread);
            let chosen = ThreadSettings {
                thread,
                // Of which some are not here.
                processors: Some(all.iter().take(1).chain([999]).collect()),
                timer_slack_ns: Some(70_001),
                io_priority: Some(3 << 13),
                core_filter: None,
            };
            let other = ThreadSettings { thread: i32::MAX, timer_slack_ns: Some(1), ..ThreadSettings::default() };
            apply(&[other, chosen], &[std::process::id() as i32]);
            assert_eq!(mask(thread), all.iter().take(1).collect());
            assert_eq!(process::timer_slack(thread).unwrap(), 70_001);
            assert_eq!(process::io_priority(thread).unwrap(), Some(3 << 13));
        });
    }

    #[test]
    fn what_many_have_lost_is_said_once() {
        aside(|thread| {
            let mut losses = Losses::default();
            let refused = ThreadSettings { thread, io_priority: Some(u16::MAX), ..ThreadSettings::default() };
            let absent = ThreadSettings { processors: Some(set("999")), ..refused.clone() };
            let unnamed = ThreadSettings { processors: Some(set("1024")), ..refused.clone() };
            for settings in [&absent, &absent, &unnamed, &refused] {
                settings.give(thread, &mut losses);
            }
            // They are in no order.
            let said: Vec<_> = losses.said().collect();
            let is_said = |what: &str, end: &str| said.iter().any(|said| said.contains(what) && said.ends_with(end));
            assert_eq!(said.len(), 3, "{said:?}");
            assert!(
                is_said("on the processors 999, none of which it has here", "it runs on all; and 1 more"),
                "{said:?}"
            );
            assert!(is_said("has lost its affinity: set affinity of thread", "cannot be named"), "{said:?}");
            assert!(is_said("has lost its I/O priority: set I/O priority of thread", "; and 3 more"), "{said:?}");
        });
    }

    #[test]
    fn who_has_ended_has_nothing_and_is_no_trouble() {
        let mut losses = Losses::default();
        let one = ThreadSettings { thread: 1, timer_slack_ns: Some(1), ..ThreadSettings::default() };
        one.give(i32::MAX, &mut losses);
        losses.add("threads", processes::threads(i32::MAX).unwrap_err(), |_| unreachable!());
        assert!(losses.0.is_empty() && !is_gone(&process::set_io_priority(0, u16::MAX).unwrap_err().into()));
        apply(&[one], &[i32::MAX]);
        assert_eq!(survey(&[], None), []);
    }

    #[test]
    fn who_cannot_be_looked_at_for_want_of_descriptors_is_not_taken_for_gone() {
        let error = Error::from(io::Error::from(Errno::EMFILE)).context("read /proc/1/task");
        assert!(!is_gone(&error));
        let mut losses = Losses::default();
        losses.add("threads", error, |error| format!("{error:#}"));
        assert!(losses.said().all(|said| said.starts_with("read /proc/1/task: Too many open files")));
        assert_eq!(losses.said().count(), 1);
    }

    #[test]
    fn they_are_read_as_they_were_written() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct List {
            settings: Vec<ThreadSettings>,
        }
        let some = ThreadSettings { thread: 7, processors: Some(set("0-1,5")), ..ThreadSettings::default() };
        let others = ThreadSettings {
            thread: 9,
            processors: None,
            timer_slack_ns: unusual_slack(u64::MAX),
            io_priority: Some(u16::MAX),
            core_filter: Some(u32::MAX),
        };
        for settings in [vec![], vec![some, others]] {
            let list = List { settings };
            let text = toml::to_string(&list).unwrap();
            assert_eq!(toml::from_str::<List>(&text).unwrap(), list, "{text}");
        }
        assert!(toml::from_str::<ThreadSettings>("thread = 1\nprocessors = \"a\"").is_err());
    }
}
