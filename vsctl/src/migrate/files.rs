//! A server's files as a stream: GNU tar(1) packs and unpacks them.
//!
//! Owners on the disk are the guest's own, 0 to 65535, whatever ids it has on a host, so nothing is translated. What an overlay
//! holds of the template is not in its upper layer; what the guest has removed of it is there as whiteouts (device 0:0), which go
//! as they are. Sockets stay behind: nobody listens at them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};

use super::wire::Size;
use crate::failure::{Exit, Failure};
use crate::lifecycle::state;
use crate::name::Name;
use crate::site::Site;
use crate::spec::{Spec, VolumeKind};
use crate::template::{Content, listen, pack_stream, unpack_stream};
use crate::volume;

/// What goes along beside the volume, where it is.
const BESIDE: [&str; 3] = ["console.log", "console.log.1", "hostname.pending"];

/// tar at work.
#[derive(Debug)]
pub struct Packing {
    tar: Child,
    said: Option<JoinHandle<String>>,
}

/// What an archive of the server's files holds.
fn content(spec: &Spec) -> Content {
    match spec.volume {
        VolumeKind::Overlay if spec.privileged => Content::TrustedLayer,
        _ => Content::Layer,
    }
}

/// Begins to pack the files of a server that does not run.
///
/// # Errors
/// When tar cannot be run.
pub fn pack(site: &Site, name: &Name, spec: &Spec) -> Result<Packing> {
    let directory = site.server(name);
    let volume = volume::writable(site, name, spec.volume);
    let volume = volume.strip_prefix(&directory).context("the volume is not among the server's files")?;
    let images = state::suspended_directory(site, name);
    let images = images.strip_prefix(&directory).context("the images are not among the server's files")?;
    let beside = BESIDE.iter().map(Path::new).chain([images]).filter(|file| directory.join(file).exists());
    let members: Vec<&Path> = std::iter::once(volume).chain(beside).collect();
    let mut tar = pack_stream(&directory, &sandbox(site), content(spec), &members)?;
    let said = Some(listen(&mut tar));
    Ok(Packing { tar, said })
}

/// What tar's place is mounted on, in a namespace of its own: any directory does that is there, and nothing has to be made. This one
/// has the lock that the caller holds.
fn sandbox(site: &Site) -> PathBuf {
    site.run()
}

impl Packing {
    /// Where the archive comes out.
    ///
    /// # Errors
    /// When it has been taken already.
    pub fn output(&mut self) -> Result<ChildStdout> {
        self.tar.stdout.take().context("tar has no output")
    }

    /// Waits for the end, and says whether all is packed.
    ///
    /// # Errors
    /// What tar said.
    pub fn finish(mut self) -> Result<()> {
        let status = self.tar.wait().context("wait for tar")?;
        let said = self.said.take().and_then(|said| said.join().ok()).unwrap_or_default();
        if status.success() {
            return Ok(());
        }
        let first: String =
            said.lines().next().unwrap_or("it gave no reason").chars().filter(|c| !c.is_control()).collect();
        bail!("tar cannot pack the server's files: {first}")
    }
}

impl Drop for Packing {
    fn drop(&mut self) {
        // Finished already, or nobody wants its archive any more.
        let _ = self.tar.kill();
        let _ = self.tar.wait();
        let _ = self.said.take().map(JoinHandle::join);
    }
}

/// Unpacks what [`pack`] has packed, and brings it to the disk.
///
/// # Errors
/// When it is damaged or cut, or the disk refuses. What is left then is the caller's to remove.
pub fn unpack(site: &Site, name: &Name, spec: &Spec, from: &mut (dyn Read + Send)) -> Result<()> {
    let directory = site.server(name);
    let said = unpack_stream(from, content(spec), &format!("the files of '{name}'"), &directory, &sandbox(site))?;
    said.iter().for_each(|line| log::warn!("'{name}': {line}"));
    let volume = volume::writable(site, name, spec.volume);
    if !volume.is_dir() {
        bail!("the files that came of '{name}' are no volume: {} is missing", volume.display());
    }
    let opened = File::open(&volume).with_context(|| format!("open {}", volume.display()))?;
    rustix::fs::syncfs(&opened).with_context(|| format!("bring {} to the disk", volume.display()))
}

/// What the server's files take on the disk. Of a running one they come and go meanwhile.
///
/// # Errors
/// When they cannot be read.
pub fn measure(site: &Site, name: &Name, spec: &Spec) -> Result<Size> {
    let volume = volume::writable(site, name, spec.volume);
    if !volume.is_dir() {
        let message = format!("the volume of '{name}' is gone: {} is missing", volume.display());
        return Err(Failure::new(Exit::NoServer, message).into());
    }
    let mut size = Size::default();
    add(&volume, &mut size, &mut BTreeSet::new())?;
    add(&state::suspended_directory(site, name), &mut size, &mut BTreeSet::new())?;
    Ok(size)
}

/// Hard links take space once.
fn add(directory: &Path, size: &mut Size, seen: &mut BTreeSet<u64>) -> Result<()> {
    let read = || format!("read {}", directory.display());
    let entries = match fs::read_dir(directory) {
        // Gone, or something else by now.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
        entries => entries.with_context(read)?,
    };
    for entry in entries {
        let entry = entry.with_context(read)?;
        let meta = match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            meta => meta.with_context(|| format!("stat {}", entry.path().display()))?,
        };
        size.entries += 1;
        if meta.is_dir() || meta.nlink() == 1 || seen.insert(meta.ino()) {
            size.bytes += meta.blocks() * 512;
        }
        if meta.is_dir() {
            add(&entry.path(), size, seen)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_are_measured_once() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("d")).unwrap();
        fs::write(root.path().join("d/a"), vec![1; 1 << 16]).unwrap();
        let measured = || {
            let mut size = Size::default();
            add(root.path(), &mut size, &mut BTreeSet::new()).unwrap();
            size
        };
        let before = measured();
        assert!(before.bytes >= 1 << 16 && before.entries == 2, "{before:?}");
        fs::hard_link(root.path().join("d/a"), root.path().join("b")).unwrap();
        assert_eq!(measured(), Size { entries: 3, ..before });
    }
}
