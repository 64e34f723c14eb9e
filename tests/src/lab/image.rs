//! A host's disk and kernels, built once and cached by what is in them.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use super::{
    definition::{Definition, Init},
    initrd,
    workshop::Workshop,
};
use crate::command::{Finished, Invocation};

/// A distribution is fetched and unpacked: minutes on a slow mirror.
const BUILD_LIMIT: Duration = Duration::from_secs(1800);
/// The kernel that clouds use: no drivers for hardware that no virtual machine has.
const KERNEL: &str = "linux-image-cloud-amd64";
/// Size of a host's disk; a sparse file.
const DISK: &str = "5G";
/// Templates that every host has ready: on an emulated processor they take long to build.
pub const TEMPLATES: [&str; 2] = ["debian-12", "debian-13"];
/// Where a host has them.
pub const TEMPLATES_IN_HOST: &str = "/var/lib/vsos-lab/templates";

/// A disk to copy, and the kernels that boot it.
#[derive(Clone, Debug)]
pub struct Image {
    directory: PathBuf,
    /// Releases, newest first.
    kernels: Vec<String>,
}

/// A kernel with its initrd.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// The compressed kernel.
    pub vmlinuz: PathBuf,
    /// Its initrd.
    pub initrd: PathBuf,
}

impl Image {
    /// The image of a host, from the cache or made now. `vsctl` builds the templates in it.
    ///
    /// # Errors
    /// When a part cannot be built; nothing half made stays in the cache.
    pub fn of(workshop: &Workshop, definition: &Definition, vsctl: &Path) -> Result<Self> {
        let templates = templates(workshop, vsctl)?;
        let tree = host_tree(workshop, definition)?;
        let files = workshop.digest_of(&["tests/lab/files", "tests/src/lab/image.rs", "tests/src/lab/initrd.rs"])?;
        let named = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let ingredients = [named(&tree), named(&templates), files, definition.name.clone()];
        let ingredients: Vec<&str> = ingredients.iter().map(String::as_str).collect();
        let kind = format!("image-{}", definition.name);
        let make = |place: &Path| assemble(workshop, definition, &tree, &templates, place);
        let directory = workshop.piece(&kind, &ingredients, make)?;
        Ok(Self { kernels: releases(&directory.join("kernels"))?, directory })
    }

    /// The disk; to be copied, never written.
    pub fn disk(&self) -> PathBuf {
        self.directory.join("disk")
    }

    /// Its kernels, newest first.
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> + '_ {
        self.kernels.iter().map(|release| {
            let file = |kind: &str| self.directory.join("kernels").join(format!("{kind}-{release}"));
            Kernel { release: release.clone(), vmlinuz: file("vmlinuz"), initrd: file("initrd") }
        })
    }

    /// The kernel whose release begins with `release`, or the newest.
    ///
    /// # Errors
    /// When there is none; the error names those that there are.
    pub fn kernel(&self, release: Option<&str>) -> Result<Kernel> {
        let mut kernels = self.kernels();
        let found = kernels.find(|kernel| release.is_none_or(|wanted| kernel.release.starts_with(wanted)));
        found.with_context(|| format!("no kernel {}; there are {:?}", release.unwrap_or_default(), self.kernels))
    }
}

/// The first mirror of Debian's own archive that this machine's apt uses. No mirror is named in the tree.
fn mirror() -> Result<String> {
    let targets =
        ["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian", "Label: Debian"];
    let listed = Invocation::new("apt-get").args(targets).succeed().context("ask apt for its mirrors")?.text();
    let first = listed.lines().next().map(str::to_owned);
    first.context("this machine's apt has no index of Debian's archive: run `apt-get update` on a Debian machine")
}

/// mmdebstrap's tree of a host, with its kernels, without the lab's own files.
fn host_tree(workshop: &Workshop, definition: &Definition) -> Result<PathBuf> {
    let second = definition.second_kernel.as_deref().unwrap_or_default();
    let packages = definition.packages.join(",");
    let ingredients = [definition.suite.as_str(), &packages, KERNEL, second];
    workshop.piece(&format!("tree-{}", definition.name), &ingredients, |place| {
        let suite = &definition.suite;
        let mirror = mirror()?;
        let mut sources = format!("deb {mirror} {suite} main\n");
        // Documents and translations are of no use in a host that is thrown away.
        let exclude = |path: &str| format!("--dpkgopt=path-exclude={path}");
        let mut call = Invocation::new("unshare")
            // What mmdebstrap mounts must be gone with it, also when it is killed.
            .args(["--mount", "--propagation", "private", "mmdebstrap", "--mode=root", "--variant=minbase"])
            .args(["--format=directory", "--quiet"])
            .args([exclude("/usr/share/doc/*"), exclude("/usr/share/man/*"), exclude("/usr/share/locale/*")])
            .args([format!("--include={packages},{KERNEL}")]);
        if let Some(second) = &definition.second_kernel {
            sources.push_str(&format!("deb {mirror} {second} main\n"));
            // The package without a version goes to the other one's, up or down; the kernel that it brought first stays.
            let install = "apt-get install -y -q --no-install-recommends --allow-downgrades";
            call = call.args([format!("--customize-hook=chroot \"$1\" {install} -t {second} {KERNEL}")]);
        }
        let tree = place.join("root");
        // The kernel's own initrd is not used.
        call.args([suite.as_str()])
            .args([&tree])
            .args(["-"])
            .env("INITRD", "No")
            .env("LC_ALL", "C")
            .input(sources)
            .limit(BUILD_LIMIT)
            .succeed()
            .map(drop)
    })
}

/// What runs in the guest of [`workload`]: see tests/lab/promises/workload.rs.
const WORKLOAD: &str =
    "systemd,systemd-sysv,dbus,login,iproute2,netbase,procps,postgresql,postgresql-contrib,nginx-light,python3,caddy";

/// The root of a guest with programs as providers have them, as a tar archive.
///
/// # Errors
/// When it cannot be made.
pub fn workload(workshop: &Workshop) -> Result<PathBuf> {
    let piece = workshop.piece("workload", &[WORKLOAD], |place| {
        let sources = format!("deb {} trixie main\n", mirror()?);
        let call = Invocation::new("unshare")
            .args(["--mount", "--propagation", "private", "mmdebstrap", "--mode=root", "--variant=minbase", "--quiet"])
            .args(["--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*"])
            .args([format!("--include={WORKLOAD}")])
            // It would want nginx's port.
            .args(["--customize-hook=chroot \"$1\" systemctl disable --quiet caddy"]);
        let made = call.args(["trixie"]).args([place.join("root.tar")]).args(["-"]);
        made.env("LC_ALL", "C").input(sources).limit(BUILD_LIMIT).succeed().map(drop)
    })?;
    Ok(piece.join("root.tar"))
}

/// A template store with the distributions' templates, built on this machine by the product itself.
fn templates(workshop: &Workshop, vsctl: &Path) -> Result<PathBuf> {
    let sources = workshop.digest_of(&["templates", "vsctl/src/template"])?;
    workshop.piece("templates", &[&sources], |place| {
        let site = place.join("site");
        fs::create_dir(&site)?;
        for name in TEMPLATES {
            let call = Invocation::new(vsctl).args(["template", "build", name]).env("VSOS_ROOT", &site);
            call.limit(BUILD_LIMIT).succeed()?;
        }
        fs::rename(site.join("var/lib/vsos/templates"), place.join("store")).context("take the templates")?;
        fs::remove_dir_all(&site).context("remove the site that built them")
    })
}

fn assemble(workshop: &Workshop, definition: &Definition, tree: &Path, templates: &Path, place: &Path) -> Result<()> {
    let root = place.join("root");
    // Links, so that the tree stays what it is and nothing is copied twice.
    run("cp", &["-al"], &[&tree.join("root"), &root])?;
    let store = root.join(TEMPLATES_IN_HOST.trim_start_matches('/'));
    fs::create_dir_all(store.parent().context("templates lie in a directory")?)?;
    run("cp", &["-al"], &[&templates.join("store"), &store])?;
    let files = workshop.tree().join("tests/lab/files");
    let own = match definition.init {
        Init::Minimal => "minimal",
        Init::Systemd => "systemd",
    };
    for part in ["common", own] {
        // Over links: the old name is removed first, so the cached tree is not written through.
        run("cp", &["-r", "--remove-destination", "--no-target-directory"], &[&files.join(part), &root])?;
    }
    settle(definition, &root)?;
    kernels(&root, place)?;
    let disk = place.join("disk");
    let format = ["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1", "-d"];
    Invocation::new("mke2fs").args(format).args([&root, &disk]).args([DISK]).limit(BUILD_LIMIT).succeed()?;
    run("rm", &["-rf", "--one-file-system"], &[&root])
}

/// What no file can say: links, names, units.
fn settle(definition: &Definition, root: &Path) -> Result<()> {
    // Links of the cached tree: written anew, never through.
    let write = |path: &str, text: &str| {
        let path = root.join(path);
        let _ = fs::remove_file(&path);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    write("etc/hostname", &format!("{}\n", definition.name))?;
    write("etc/fstab", "/dev/vda / ext4 rw,relatime 0 1\n")?;
    // Made in each host at its first boot, as in an installed machine.
    write("etc/machine-id", "")?;
    let link = |target: &str, path: &str| {
        let path = root.join(path);
        let _ = fs::remove_file(&path);
        std::os::unix::fs::symlink(target, &path).with_context(|| format!("link {}", path.display()))
    };
    match definition.init {
        Init::Minimal => {
            link("/bin/busybox", "sbin/init")?;
            for command in ["poweroff", "reboot"] {
                link("/bin/busybox", &format!("sbin/{command}"))?;
            }
            Ok(())
        }
        Init::Systemd => {
            let wants = root.join("etc/systemd/system/multi-user.target.wants");
            fs::create_dir_all(&wants)?;
            link("../vsos-lab-network.service", "etc/systemd/system/multi-user.target.wants/vsos-lab-network.service")?;
            // Timers of a machine that lives for years only take time from one that lives for minutes.
            for timer in [
                "apt-daily.timer",
                "apt-daily-upgrade.timer",
                "dpkg-db-backup.timer",
                "e2scrub_all.timer",
                "fstrim.timer",
            ] {
                link("/dev/null", &format!("etc/systemd/system/{timer}"))?;
            }
            fs::set_permissions(root.join("etc/systemd/system"), fs::Permissions::from_mode(0o755)).map_err(Into::into)
        }
    }
}

/// Takes the kernels out of the tree, and makes an initrd for each.
fn kernels(root: &Path, place: &Path) -> Result<()> {
    let kernels = place.join("kernels");
    fs::create_dir(&kernels)?;
    for release in releases(&root.join("boot"))? {
        fs::copy(root.join(format!("boot/vmlinuz-{release}")), kernels.join(format!("vmlinuz-{release}")))?;
        let work = place.join("initrd");
        initrd::write(root, &release, &work, &kernels.join(format!("initrd-{release}")))?;
        fs::remove_dir_all(&work)?;
    }
    Ok(())
}

/// The releases of the kernels in a directory, newest first.
fn releases(directory: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut releases: Vec<String> = names.filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned())).collect();
    ensure!(!releases.is_empty(), "no kernel in {}", directory.display());
    releases.sort_by_key(|release| std::cmp::Reverse(numbers(release)));
    Ok(releases)
}

/// The numbers of a release, so that 6.12 comes after 6.1.
fn numbers(release: &str) -> Vec<u32> {
    release.split(|letter: char| !letter.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

fn run(program: &str, words: &[&str], paths: &[&Path]) -> Result<()> {
    let call = Invocation::new(program).args(words).args(paths);
    call.limit(BUILD_LIMIT).succeed().map(|_: Finished| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_comes_first() {
        let directory = tempfile::tempdir().unwrap();
        for release in ["6.1.0-41-cloud-amd64", "7.3.4+deb13-cloud-amd64", "6.12.95+deb13-cloud-amd64"] {
            fs::write(directory.path().join(format!("vmlinuz-{release}")), "").unwrap();
        }
        fs::write(directory.path().join("config-9.9"), "").unwrap();
        let found = releases(directory.path()).unwrap();
        assert_eq!(found, ["7.3.4+deb13-cloud-amd64", "6.12.95+deb13-cloud-amd64", "6.1.0-41-cloud-amd64"]);
    }
}
