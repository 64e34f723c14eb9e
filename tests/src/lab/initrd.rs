//! The first programs of a host: busybox, the modules that a disk needs, and a script. Made here, and not by the
//! distribution, because unpacking a general one takes an emulated processor longer than the rest of the boot.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::command::Invocation;

/// What has to be in the kernel, or loaded, before the disk can be read.
const NEEDED: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];

/// Writes the initrd for the kernel `release` of the host tree `tree` to `target`. `work` is an empty directory.
///
/// # Errors
/// When the tree lacks a module, busybox or the script.
pub fn write(tree: &Path, release: &str, work: &Path, target: &Path) -> Result<()> {
    let modules = tree.join("lib/modules").join(release);
    let read = |name: &str| {
        let path = modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let order = load_order(&NEEDED, &read("modules.dep")?, &read("modules.builtin")?)?;
    fs::create_dir_all(work.join("bin"))?;
    fs::create_dir_all(work.join("modules"))?;
    fs::copy(tree.join("bin/busybox"), work.join("bin/busybox")).context("copy busybox")?;
    fs::copy(tree.join("usr/lib/vsos-lab/initrd"), work.join("init")).context("copy the first script")?;
    let mut names = String::new();
    for path in &order {
        let name = plain_name(path);
        unpack(&modules.join(path), &work.join("modules").join(&name))?;
        names.push_str(&name);
        names.push('\n');
    }
    fs::write(work.join("modules/order"), names)?;
    let pack = "cd \"$1\" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1 >\"$2\"";
    Invocation::new("sh").args(["-c", pack, "sh"]).args([work, target]).succeed().map(drop)
}

/// A module's file without the directory and the compression, with the underscores that insmod wants nothing of.
fn plain_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.split(".ko").next().map_or(name.clone(), |stem| format!("{stem}.ko"))
}

fn unpack(from: &Path, to: &Path) -> Result<()> {
    let program = match from.extension().and_then(|ending| ending.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::copy(from, to).map(drop).with_context(|| format!("copy {}", from.display())),
    };
    let bytes = Invocation::new(program).args(["-dc"]).args([from]).succeed()?.stdout;
    fs::write(to, bytes).with_context(|| format!("write {}", to.display()))
}

/// The files of `names` and of what they depend on, each after its dependencies; what is built in is left out.
fn load_order(names: &[&str], dependencies: &str, builtin: &str) -> Result<Vec<PathBuf>> {
    let built_in: BTreeSet<String> = builtin.lines().map(|line| module_name(Path::new(line))).collect();
    let mut order = Vec::new();
    for name in names.iter().filter(|name| !built_in.contains(**name)) {
        let line = dependencies
            .lines()
            .find(|line| line.split(':').next().is_some_and(|path| module_name(Path::new(path)) == *name));
        let line = line.with_context(|| format!("the kernel has no module {name}"))?;
        let (file, needs) = line.split_once(':').with_context(|| format!("modules.dep: {line}"))?;
        // modules.dep(5): what is needed first stands last.
        let needs = needs.split_whitespace().rev();
        for path in needs.chain([file]).map(PathBuf::from) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    ensure!(order.len() < 32, "{} modules for a disk: something is wrong", order.len());
    Ok(order)
}

fn module_name(path: &Path) -> String {
    plain_name(path).trim_end_matches(".ko").replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let dependencies = "\
kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/mbcache.ko.xz kernel/fs/jbd2/jbd2.ko.xz
kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio-ring.ko.xz
kernel/drivers/virtio/virtio-ring.ko.xz:
";
        let order = load_order(&NEEDED, dependencies, "kernel/drivers/virtio/virtio_pci.ko\n").unwrap();
        let names: Vec<String> = order.iter().map(|path| plain_name(path)).collect();
        assert_eq!(names, ["virtio-ring.ko", "virtio_blk.ko", "jbd2.ko", "mbcache.ko", "crc16.ko", "ext4.ko"]);
        let error = load_order(&["virtio_scsi"], dependencies, "").unwrap_err().to_string();
        assert!(error.contains("virtio_scsi"), "{error}");
    }
}
