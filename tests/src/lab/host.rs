//! A host of the lab: a virtual machine with a disk of its own, reached by ssh.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{
    definition::Definition,
    image::{Image, Kernel},
    machine::{Machine, Parts, Segment, has_kvm},
    payload::Payload,
    serial,
    workshop::Workshop,
};
use crate::command::{Finished, Invocation, patient};

/// How long a host may take from power to the first command.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// How long one command in it may take unless the caller knows better.
const COMMAND_LIMIT: Duration = Duration::from_secs(300);
/// Memory of a host, in MiB, unless it is [made larger](Host::enlarge).
const MEMORY_MIB: u32 = 2048;
/// How many lines of its serial log an error shows.
const SERIAL_LINES: usize = 40;

/// A host. Dropped, its power is cut and its disk removed; its serial logs stay as long as the run.
pub struct Host {
    name: String,
    image: Image,
    kernel: Kernel,
    payload: Payload,
    directory: PathBuf,
    segment: Option<Segment>,
    memory_mib: u32,
    machine: Option<Machine>,
    boots: u32,
}

/// A host with more than others have.
#[derive(Clone, Copy, Debug)]
pub struct Larger {
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// The disk, in GiB: a sparse file.
    pub disk_gib: u32,
}

/// How often an emulated kernel may trip over its own patches in one boot.
const MOST_TRIPS: u32 = 2;

impl Host {
    /// Makes a host and switches it on. `name` names its directory within the run; two hosts of a run differ in it.
    ///
    /// # Errors
    /// When its disk cannot be made, or it does not answer within a limit; the error shows its serial log.
    pub fn boot(
        workshop: &Workshop,
        definition: &Definition,
        image: &Image,
        payload: &Payload,
        name: &str,
    ) -> Result<Self> {
        let mut host = Self::make(workshop, definition, image, payload, name)?;
        host.switch_on()?;
        Ok(host)
    }

    /// Makes a host without switching it on.
    pub(super) fn make(
        workshop: &Workshop,
        definition: &Definition,
        image: &Image,
        payload: &Payload,
        name: &str,
    ) -> Result<Self> {
        let directory = workshop.run().join(name);
        fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
        let host = Self {
            name: definition.name.clone(),
            kernel: image.kernel(None)?,
            image: image.clone(),
            payload: payload.clone(),
            directory,
            segment: None,
            memory_mib: MEMORY_MIB,
            machine: None,
            boots: 0,
        };
        let copy = ["--sparse=always", "--reflink=auto"];
        Invocation::new("cp").args(copy).args([image.disk(), host.disk()]).limit(BOOT_LIMIT).succeed()?;
        Ok(host)
    }

    /// Puts it onto a segment; before it is switched on.
    pub(super) fn join(&mut self, segment: Segment) {
        self.segment = Some(segment);
    }

    /// Makes it larger; before it is switched on.
    ///
    /// # Errors
    /// When the disk cannot be made longer.
    pub(super) fn enlarge(&mut self, to: Larger) -> Result<()> {
        self.memory_mib = to.memory_mib;
        let disk = fs::File::options().write(true).open(self.disk()).context("open a host's disk")?;
        disk.set_len(u64::from(to.disk_gib) << 30).context("make a host's disk longer")?;
        Invocation::new("resize2fs").args(["-f"]).args([self.disk()]).limit(BOOT_LIMIT).succeed().map(drop)
    }

    /// Its name in `hosts.toml`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The kernel that it runs.
    pub fn kernel(&self) -> &str {
        &self.kernel.release
    }

    fn disk(&self) -> PathBuf {
        self.directory.join("disk")
    }

    fn serial_file(&self) -> PathBuf {
        self.directory.join(format!("serial-{}", self.boots))
    }

    /// Switches it on, and waits until it takes commands.
    ///
    /// # Errors
    /// When it does not within a limit; it is off then.
    pub fn switch_on(&mut self) -> Result<()> {
        self.begin()?;
        self.wait_until_reached()
    }

    /// Switches it on without waiting.
    ///
    /// # Errors
    /// When qemu cannot be run.
    pub fn begin(&mut self) -> Result<()> {
        self.close_connection();
        self.boots += 1;
        let (disk, serial) = (self.disk(), self.serial_file());
        let parts = Parts {
            name: &self.name,
            kernel: &self.kernel,
            disk: &disk,
            payload: self.payload.archive(),
            serial: &serial,
            memory_mib: self.memory_mib,
            segment: self.segment.clone(),
        };
        self.machine = Some(Machine::start(&parts)?);
        Ok(())
    }

    /// Waits until it takes commands.
    ///
    /// # Errors
    /// When it does not within a limit; it is off then.
    pub fn wait_until_reached(&mut self) -> Result<()> {
        let limit = patient(BOOT_LIMIT);
        let mut end = Instant::now() + limit;
        let mut tripped = 0;
        loop {
            // A host that is not up yet keeps the first connection waiting, and answers it when its sshd begins.
            let tried = self.ssh("true").limit(BOOT_LIMIT).run().context("run ssh")?;
            if tried.code == 0 {
                return Ok(());
            }
            let machine = self.machine.as_mut().context("the host is off")?;
            if !machine.is_on() {
                let words = machine.last_words();
                if tripped < MOST_TRIPS && self.has_tripped() {
                    tripped += 1;
                    eprintln!(
                        "lab: the kernel of {} tripped over an emulated patch of its own code; once more",
                        self.name
                    );
                    // It has come to nothing, and says nothing of what is done with the next boot.
                    let aside = self.directory.join(format!("tripped-{}", self.boots));
                    fs::rename(self.serial_file(), aside).context("put a serial log aside")?;
                    self.begin()?;
                    end = Instant::now() + limit;
                    continue;
                }
                bail!("{} went off while it booted\n{words}{}", self.name, self.serial());
            }
            if Instant::now() >= end {
                let serial = self.serial();
                self.machine = None;
                bail!("{} took no command for {} s and was switched off\n{tried}{serial}", self.name, limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// A shell command in the host, as root; to be changed or run by the caller.
    ///
    /// All commands share one connection: setting one up takes an emulated processor a second.
    pub fn ssh(&self, command: &str) -> Invocation {
        let mut call = Invocation::new("ssh").args(self.options());
        call = call.args(["-T", "root@127.0.0.1", "--", command]);
        // A socket's path may have 107 bytes, and a checkout may lie deep: named from inside its directory.
        call.directory(&self.directory).limit(COMMAND_LIMIT)
    }

    /// What ssh needs to know, from inside the host's directory.
    fn options(&self) -> Vec<String> {
        let port = self.machine.as_ref().map_or(0, |machine| machine.port);
        let mut all: Vec<String> = ["-F", "none", "-p"].map(str::to_owned).to_vec();
        all.extend([port.to_string(), "-i".into(), self.payload.key().display().to_string()]);
        // A list of files, for ssh.
        all.extend(["-o".into(), format!("UserKnownHostsFile=\"{}\"", self.payload.known_hosts().display())]);
        for option in [
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            "GlobalKnownHostsFile=/dev/null",
            "IdentitiesOnly=yes",
            "ControlMaster=auto",
            "ControlPath=ssh",
            "ControlPersist=600",
            "LogLevel=ERROR",
            "ConnectTimeout=120",
            "ServerAliveInterval=30",
            "ServerAliveCountMax=20",
        ] {
            all.extend(["-o".into(), option.into()]);
        }
        all
    }

    /// The command line of a login shell in the host, and the directory to run it from.
    pub fn shell(&self) -> (Vec<String>, &Path) {
        let mut all = self.options();
        all.extend(["-t".into(), "root@127.0.0.1".into()]);
        (all, &self.directory)
    }

    /// Runs a shell command and asks for success.
    ///
    /// # Errors
    /// When it fails or hangs.
    pub fn sh(&self, command: &str) -> Result<String> {
        Ok(self.ssh(command).succeed().with_context(|| format!("on {}", self.name))?.text())
    }

    /// Runs a shell command, whatever its exit status. 255 is also ssh's own: the host may be gone.
    ///
    /// # Errors
    /// When it hangs.
    pub fn run(&self, command: &str) -> Result<Finished> {
        self.ssh(command).run().with_context(|| format!("on {}", self.name))
    }

    /// Puts a file into the host.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&self, path: &str, bytes: &[u8]) -> Result<()> {
        self.ssh(&format!("cat >{path}")).input(bytes).succeed().map(drop)
    }

    /// The end of the current, as a plug pulled: what the kernel has not written to the disk is lost.
    pub fn cut_power(&mut self) {
        if let Some(mut machine) = self.machine.take() {
            self.note_end(&mut machine);
            machine.cut_power();
        }
        self.close_connection();
    }

    /// Shuts it down in order, and waits until it is off.
    ///
    /// # Errors
    /// When it stays on for minutes; the error shows its serial log.
    pub fn power_off(&mut self) -> Result<()> {
        // The connection ends with the host, or before.
        let _ = self.ssh("poweroff").limit(Duration::from_secs(60)).run();
        let end = Instant::now() + patient(BOOT_LIMIT);
        while self.machine.as_mut().is_some_and(Machine::is_on) {
            if Instant::now() >= end {
                let serial = self.serial();
                self.cut_power();
                bail!("{} did not shut down\n{serial}", self.name);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        self.machine = None;
        self.close_connection();
        Ok(())
    }

    /// Shuts it down and boots it with another of its kernels, named by how its release begins.
    ///
    /// # Errors
    /// When the image has no such kernel, or it does not come up.
    pub fn reboot_into(&mut self, release: &str) -> Result<()> {
        let kernel = self.image.kernel(Some(release))?;
        self.power_off()?;
        self.kernel = kernel;
        self.switch_on()
    }

    /// The kernels that it can be booted with, newest first.
    pub fn kernels(&self) -> Vec<String> {
        self.image.kernels().map(|kernel| kernel.release).collect()
    }

    /// Whether its kernel ended by the breakpoint that it puts into its own code while it changes it: before Linux has looked at the
    /// root. On a processor that is real, or has one thread, this does not happen; qemu may run the one processor's old translation.
    fn has_tripped(&self) -> bool {
        !has_kvm() && self.serial_log().contains("Oops: int3")
    }

    /// What its serial log says, when it says that its kernel hangs or has panicked: nothing more is to be expected of it.
    pub fn hang(&self) -> Option<String> {
        serial::hang(&self.serial_log())
    }

    /// All that it wrote to its serial line since it was switched on.
    fn serial_log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.serial_file()).unwrap_or_default()).into_owned()
    }

    /// The end of what it wrote to its serial line since it was switched on.
    pub fn serial(&self) -> String {
        serial::end(&self.serial_log(), SERIAL_LINES)
    }

    /// Writes below its serial log that it has gone off by itself, for whoever looks there for why something failed.
    fn note_end(&self, machine: &mut Machine) {
        if machine.is_on() {
            return;
        }
        let words = serial::off(&machine.last_words());
        let note = || fs::File::options().append(true).open(self.serial_file())?.write_all(words.as_bytes());
        note().unwrap_or_else(|error: std::io::Error| eprintln!("lab: note the end of {}: {error}", self.name));
    }

    /// Ends the connection that commands share.
    fn close_connection(&self) {
        if self.directory.join("ssh").exists() {
            let call =
                Invocation::new("ssh").args(["-F", "none", "-o", "ControlPath=ssh", "-O", "exit", "root@127.0.0.1"]);
            let _ = call.directory(&self.directory).run();
            let _ = fs::remove_file(self.directory.join("ssh"));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.cut_power();
        if std::env::var_os("VSOS_LAB_KEEP").is_none() {
            let _ = fs::remove_file(self.disk());
        }
    }
}
