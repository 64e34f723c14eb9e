//! One qemu process: a virtual machine that runs, and the log of its serial line.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::image::Kernel;
use crate::command::{Background, FOREVER, Invocation};

/// What a machine is made of.
pub struct Parts<'a> {
    /// For messages and files.
    pub name: &'a str,
    /// The kernel that boots it.
    pub kernel: &'a Kernel,
    /// Its disk; written.
    pub disk: &'a Path,
    /// The second disk; read.
    pub payload: &'a Path,
    /// Where its serial line is written to.
    pub serial: &'a Path,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Its place on the segment that the hosts share.
    pub segment: Option<Segment>,
}

/// One end of the segment between two hosts: datagrams from one unix socket to another. Either may be away, as with a cable.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Where the two sockets are. Their names are looked up from there: a socket's path may have 107 bytes only.
    pub directory: PathBuf,
    /// The host's number on it, which its address ends with.
    pub number: u8,
    /// The other host's.
    pub other: u8,
}

/// A machine that was switched on. Dropped, its power is cut.
pub struct Machine {
    process: Background,
    /// The port on this machine's loopback that leads to its sshd.
    pub port: u16,
}

/// Whether the processor can run virtual machines itself.
///
/// /dev/kvm may be there without: then it opens, and stock kernels do not boot.
pub fn has_kvm() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let capable = flags
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    capable && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

impl Machine {
    /// Switches it on.
    ///
    /// # Errors
    /// When qemu cannot be run.
    pub fn start(parts: &Parts<'_>) -> Result<Self> {
        // Freed at once, and then given to qemu: another may take it in between, which qemu says on its errors.
        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).context("find a port")?.port();
        let directory = parts.segment.as_ref().map_or(Path::new("/"), |segment| &segment.directory);
        let process = Invocation::new("setpriv")
            // However this process ends, the machine does not outlive it.
            .args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
            .args(arguments(parts, port, has_kvm()))
            .directory(directory)
            .limit(FOREVER)
            .spawn()
            .with_context(|| format!("switch on {}", parts.name))?;
        Ok(Self { process, port })
    }

    /// Whether it is on.
    pub fn is_on(&mut self) -> bool {
        self.process.is_running()
    }

    /// The end of the current: what the guest has not written to its disk is lost.
    pub fn cut_power(mut self) {
        self.process.kill();
    }

    /// How qemu ended and what it said, when it is off.
    pub fn last_words(&mut self) -> String {
        match self.process.is_running() {
            true => String::new(),
            false => self
                .process
                .wait()
                .map_or_else(|error| error.to_string(), |done| format!("exit status {} {}", done.code, done.errors())),
        }
    }
}

fn arguments(parts: &Parts<'_>, port: u16, kvm: bool) -> Vec<String> {
    let words = |line: &str| -> Vec<String> { line.split_whitespace().map(str::to_owned).collect() };
    let cpus = std::thread::available_parallelism().map_or(2, |count| count.get().clamp(2, 4));
    let mut all = words("-nodefaults -no-user-config -display none -no-reboot -machine q35");
    all.extend(words(match kvm {
        true => "-accel kvm -cpu host",
        // Without `rep stosb`, which is emulated byte by byte; -la57: one level less to walk for each address.
        false => "-accel tcg,thread=multi,tb-size=512 -cpu max,-erms,-la57,-pcid",
    }));
    all.extend(words(&format!("-smp {cpus} -m {}", parts.memory_mib)));
    all.extend(["-kernel".into(), path(&parts.kernel.vmlinuz), "-initrd".into(), path(&parts.kernel.initrd)]);
    // The same addresses in every process: translated code is found again, and an exec takes a fifth of the time.
    let command_line = "console=ttyS0 quiet loglevel=4 mitigations=off norandmaps panic=-1 oops=panic rw";
    all.extend(["-append".into(), command_line.into()]);
    all.extend(["-serial".into(), format!("file:{}", path(parts.serial))]);
    let drive = |id: &str, file: &Path, more: &str| {
        let options = format!("file={},id={id},if=none,format=raw,{more}", path(file).replace(',', ",,"));
        ["-drive".to_owned(), options, "-device".to_owned(), format!("virtio-blk-pci,drive={id}")]
    };
    all.extend(drive("disk", parts.disk, "cache=writeback,discard=unmap"));
    all.extend(drive("payload", parts.payload, "readonly=on"));
    all.extend(words("-device virtio-rng-pci"));
    // restrict: the guest reaches nothing; only its sshd is reached.
    all.extend(words(&format!("-netdev user,id=door,restrict=on,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:22")));
    all.extend(words("-device virtio-net-pci,netdev=door,mac=52:54:00:00:00:0f,romfile="));
    if let Some(segment) = &parts.segment {
        let (own, other) = (segment.number, segment.other);
        let ends = format!("local.type=unix,local.path=segment-{own},remote.type=unix,remote.path=segment-{other}");
        all.extend(["-netdev".into(), format!("dgram,id=segment,{ends}")]);
        let mac = format!("52:54:00:00:01:{:02x}", segment.number);
        all.extend(words(&format!("-device virtio-net-pci,netdev=segment,mac={mac},romfile=")));
    }
    all
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(segment: Option<Segment>, kvm: bool) -> String {
        let kernel = Kernel { release: "6.1".into(), vmlinuz: "/k/vmlinuz".into(), initrd: "/k/initrd".into() };
        let (disk, payload, serial) = (Path::new("/r/a,b/disk"), Path::new("/r/payload"), Path::new("/r/serial"));
        let parts = Parts { name: "a", kernel: &kernel, disk, payload, serial, memory_mib: 1024, segment };
        arguments(&parts, 2222, kvm).join(" ")
    }

    #[test]
    fn a_machine_reaches_nothing_but_the_segment() {
        let alone = line(None, false);
        assert!(alone.contains("restrict=on") && !alone.contains("segment"), "{alone}");
        assert!(alone.contains("hostfwd=tcp:127.0.0.1:2222-"), "{alone}");
        let segment = Segment { directory: "/r".into(), number: 10, other: 1 };
        let joined = line(Some(segment), false);
        assert!(joined.contains("local.path=segment-10,") && joined.contains("remote.path=segment-1 "), "{joined}");
        assert!(joined.contains("52:54:00:00:01:0a"), "{joined}");
    }

    #[test]
    fn a_comma_in_a_path_is_no_option_and_kvm_is_taken_where_it_is() {
        assert!(line(None, true).contains("file=/r/a,,b/disk") && line(None, true).contains("-accel kvm"));
        assert!(line(None, false).contains("-accel tcg"));
    }
}
