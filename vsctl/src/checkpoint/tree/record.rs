//! What is written down of a tree beside its images: who was in it, and what tells that all is whole.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use kernel::process;
use serde::{Deserialize, Serialize};

use super::members::Members;
use crate::checkpoint::beside::Begun;
use crate::checkpoint::image;
use crate::checksum::Sum;
use crate::lifecycle::thread_settings::{self, ThreadSettings};
use crate::name::Name;
use crate::processes;
use crate::store;

/// The layout that this build writes and reads.
const VERSION: u32 = 2;

/// The record's name; it is written last.
const FILE: &str = "tree.toml";

/// More of a command line is not kept.
const COMMAND_CHARACTERS: usize = 200;

/// What a checkpoint of a tree holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Of this file's layout.
    pub version: u32,
    /// Seconds since 1970.
    pub created_s: u64,
    /// The host's kernel (uname(2), release).
    pub kernel: String,
    /// The CRIU that wrote the images.
    pub criu: String,
    /// When the root had started, in clock ticks since the boot of then.
    pub start_ticks: u64,
    /// The processes, root first.
    pub processes: Vec<Member>,
    /// What its threads had chosen for themselves and CRIU does not dump.
    pub settings: Vec<ThreadSettings>,
    /// Each image.
    pub files: BTreeMap<String, Sum>,
}

/// A process of the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its number, which it gets again.
    pub pid: i32,
    /// Numbers of its threads, its own among them.
    pub threads: Vec<i32>,
    /// The beginning of its command line.
    pub command: String,
}

/// A number that is not free.
#[derive(Debug, PartialEq, Eq)]
pub struct Taken {
    /// The number.
    pub pid: i32,
    /// Who has it, in words.
    pub by: String,
}

impl Record {
    /// Of the tree `tree`, whose processes stand still and whose images are in `directory`; of them some are summed.
    ///
    /// # Errors
    /// When a process or an image cannot be read.
    pub fn of(tree: &Members, criu: &str, directory: &Path, begun: Begun) -> Result<Self> {
        let member = |process: &processes::Process| {
            let command = process.command.chars().take(COMMAND_CHARACTERS).collect();
            Ok(Member { pid: process.pid, threads: processes::threads(process.pid)?, command })
        };
        Ok(Self {
            version: VERSION,
            created_s: store::now_s(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            criu: criu.to_owned(),
            start_ticks: process::start_time(tree.inside.first().context("the tree has ended")?.pid)?,
            processes: tree.inside.iter().map(member).collect::<Result<_>>()?,
            // Whoever started it has chosen for it.
            settings: thread_settings::survey(&tree.inside.iter().map(|process| process.pid).collect::<Vec<_>>(), None),
            files: image::survey_rest(directory, begun)?,
        })
    }

    /// Reads the record in `directory`.
    ///
    /// # Errors
    /// When it is not there, or not one.
    pub fn read(directory: &Path) -> Result<Self> {
        let file = directory.join(FILE);
        let record: Self = image::read(&file, VERSION)?;
        if record.processes.is_empty() {
            return Err(image::bad(&file, "it names no process".into()).into());
        }
        // They are opened as root.
        if let Some(name) = record.files.keys().find(|name| name.contains('/') || *name == "..") {
            return Err(image::bad(&file, format!("'{}' is no image", name.escape_debug())).into());
        }
        Ok(record)
    }

    /// Puts all images in `directory`, and then the record, on the disk.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn seal(&self, directory: &Path) -> Result<()> {
        image::seal(directory, self.files.keys(), FILE, self)
    }

    /// Compares the images in `directory` with what is written down of them.
    ///
    /// # Errors
    /// The first that is missing, cut or changed.
    pub fn verify(&self, label: &Name, directory: &Path) -> Result<()> {
        for (name, expected) in &self.files {
            if let Some(damaged) = image::damage(&format!("the tree '{label}'"), Some(expected), &directory.join(name))?
            {
                return Err(damaged
                    .hint("nothing was started; `vsctl checkpoint list --tree` shows the others")
                    .into());
            }
        }
        Ok(())
    }

    /// The root's pid.
    pub fn root(&self) -> i32 {
        self.processes[0].pid
    }

    /// The pids, the root's first.
    pub fn pids(&self) -> Vec<i32> {
        self.processes.iter().map(|member| member.pid).collect()
    }

    /// The length of all images, in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|image| image.bytes).sum()
    }

    /// The numbers that somebody has whom `look` finds.
    pub fn taken(&self, look: impl Fn(i32) -> Option<String>) -> Vec<Taken> {
        let numbers = self.processes.iter().flat_map(|member| &member.threads);
        numbers.filter_map(|pid| Some(Taken { pid: *pid, by: look(*pid)? })).collect()
    }
}

/// Who has the number `pid`, be it a process's or a thread's.
pub fn holder(pid: i32) -> Option<String> {
    let status = processes::text(pid, "status").ok()?;
    let field = |name: &str| processes::field(&status, name);
    let name = field("Name:")?.escape_debug().to_string();
    match (field("Tgid:")?, field("State:")?.chars().next()?) {
        (_, 'Z') => {
            Some(format!("{name}, which has ended; its parent, process {}, has not waited for it", field("PPid:")?))
        }
        (process, _) if process != pid.to_string() => Some(format!("a thread of {name} ({process})")),
        _ => Some(name),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn sealed() -> (tempfile::TempDir, Record, Name) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("pages-1.img"), [7_u8; 5000]).unwrap();
        fs::write(directory.path().join("core-7.img"), "core").unwrap();
        let member = |pid, threads: &[i32]| Member { pid, threads: threads.into(), command: "sort".into() };
        let record = Record {
            version: VERSION,
            created_s: 1,
            kernel: "6.12".into(),
            criu: "4.1.1".into(),
            start_ticks: 5,
            processes: vec![member(7, &[7, 9]), member(8, &[8])],
            settings: vec![ThreadSettings { thread: 9, timer_slack_ns: Some(1), ..ThreadSettings::default() }],
            files: image::survey(directory.path()).unwrap(),
        };
        record.seal(directory.path()).unwrap();
        (directory, record, "job".parse().unwrap())
    }

    #[test]
    fn what_was_sealed_is_whole() {
        let (directory, record, label) = sealed();
        assert_eq!(Record::read(directory.path()).unwrap(), record);
        assert_eq!((record.root(), record.pids(), record.bytes()), (7, vec![7, 8], 5004));
        record.verify(&label, directory.path()).unwrap();
    }

    #[test]
    fn damage_says_whose_image_and_what_to_do() {
        let (directory, record, label) = sealed();
        fs::write(directory.path().join("pages-1.img"), [8_u8; 5000]).unwrap();
        let error = record.verify(&label, directory.path()).unwrap_err();
        assert!(error.to_string().starts_with("the checkpoint of the tree 'job' is damaged: "), "{error}");
        assert!(crate::failure::hint_of(&error).unwrap().contains("nothing was started"));
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let (directory, record, _) = sealed();
        let refused = |record: Record| {
            fs::write(directory.path().join(FILE), toml::to_string(&record).unwrap()).unwrap();
            Record::read(directory.path()).unwrap_err().to_string()
        };
        let sum = record.files["core-7.img"].clone();
        let files = BTreeMap::from([("../core-7.img".to_owned(), sum)]);
        assert!(refused(Record { files, ..record.clone() }).contains("is no image"));
        assert!(refused(Record { version: 9, ..record.clone() }).contains("version 9"));
        assert!(refused(Record { processes: Vec::new(), ..record }).contains("no process"));
    }

    #[test]
    fn numbers_of_processes_and_threads_are_looked_for() {
        let (_directory, record, _) = sealed();
        let taken = record.taken(|pid| (pid > 7).then(|| format!("who has {pid}")));
        assert_eq!(taken, [9, 8].map(|pid| Taken { pid, by: format!("who has {pid}") }));
    }

    #[test]
    fn who_has_a_number_is_said() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        let zombie = loop {
            match holder(pid) {
                Some(said) if said.contains("has ended") => break said,
                said => assert!(said.is_some()),
            }
        };
        let own = std::process::id();
        assert_eq!(zombie, format!("true, which has ended; its parent, process {own}, has not waited for it"));
        child.wait().unwrap();
        assert_eq!(holder(pid), None);
        let thread = std::thread::spawn(|| holder(rustix::thread::gettid().as_raw_nonzero().get()));
        assert!(thread.join().unwrap().unwrap().ends_with(&format!("({own})")));
    }
}
