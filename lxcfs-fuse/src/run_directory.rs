//! The directory that the manager gives us (`/run/vsos/lxcfs`), and what is where in it.
//!
//! ```text
//! DIR/servers/<id>.toml   registrations, written by the manager
//! DIR/mount/              the file system; DIR/mount/<id>/proc/meminfo and so on
//! DIR/pid                 of the supervisor, while it is live
//! DIR/files               the served paths, one a line, relative to DIR/mount/<id>; while it is live
//! DIR/listeners           the door for listeners (`parking`), while it is live
//! DIR/lock                held by the supervisor as long as it lives, however it dies
//! DIR/log                 what supervisor and workers have to say
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use kernel::lock::Flock;

use crate::inode;

/// A log longer than this is begun anew when a supervisor starts, the old one kept as `log.old`.
const LOG_MAX_BYTES: u64 = 1 << 20;

/// The run directory, by its canonical path.
#[derive(Clone, Debug)]
pub struct RunDirectory {
    path: PathBuf,
}

impl RunDirectory {
    /// The existing directory `path`.
    pub fn open(path: &Path) -> Result<RunDirectory, kernel::Error> {
        let canonical = path.canonicalize();
        let path = canonical.map_err(|error| kernel::Error::new("find run directory", path.display(), error))?;
        Ok(RunDirectory { path })
    }

    /// The directory `path`, made with what belongs in it if it is missing.
    pub fn create(path: &Path) -> Result<RunDirectory, kernel::Error> {
        for directory in [path, &path.join("servers")] {
            std::fs::create_dir_all(directory)
                .map_err(|error| kernel::Error::new("create", directory.display(), error))?;
        }
        let run = RunDirectory::open(path)?;
        match std::fs::create_dir(run.mount()) {
            // A dead mount answers ENOTCONN, but mkdir does not ask it: the name exists.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(kernel::Error::new("create", run.mount().display(), error))
            }
            _ => Ok(run),
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the registrations are.
    pub fn servers(&self) -> PathBuf {
        self.path.join("servers")
    }

    /// Where the file system is mounted.
    pub fn mount(&self) -> PathBuf {
        self.path.join("mount")
    }

    /// The file that holds the supervisor's pid.
    pub fn pid_file(&self) -> PathBuf {
        self.path.join("pid")
    }

    /// The door of the supervisor's parking.
    pub fn listeners(&self) -> PathBuf {
        self.path.join("listeners")
    }

    /// The pid of the supervisor that says it is live.
    pub fn pid(&self) -> Option<i32> {
        std::fs::read_to_string(self.pid_file()).ok()?.trim().parse().ok()
    }

    /// Takes the lock that says who is the supervisor; `None` if there is one.
    pub fn try_lock(&self) -> Result<Option<Flock>, kernel::Error> {
        Flock::try_exclusive(&self.path.join("lock"))
    }

    /// Says that this process serves here.
    pub fn announce(&self) -> Result<(), kernel::Error> {
        let files: String = inode::binds().map(|path| path + "\n").collect();
        kernel::file::replace(&self.path.join("files"), files.as_bytes(), 0o644)?;
        // Last: who sees a pid finds all the rest.
        kernel::file::replace(&self.pid_file(), format!("{}\n", std::process::id()).as_bytes(), 0o644)
    }

    /// Takes back [`RunDirectory::announce`]. What cannot be removed is not there, or will be written over.
    pub fn withdraw(&self) {
        for name in ["pid", "files", "listeners"] {
            let _ = std::fs::remove_file(self.path.join(name));
        }
    }

    /// Opens the log for appending.
    pub fn log(&self) -> Result<File, kernel::Error> {
        let path = self.path.join("log");
        if std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() > LOG_MAX_BYTES) {
            let _ = std::fs::rename(&path, self.path.join("log.old"));
        }
        let opened = OpenOptions::new().append(true).create(true).open(&path);
        opened.map_err(|error| kernel::Error::new("open log", path.display(), error))
    }
}
