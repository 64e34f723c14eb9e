//! Things of the host and of others with a name of their own, planted for a server to find.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};

use crate::{command::Invocation, promise::skip};

/// A control group, a link and a loop device; removed when dropped.
pub struct Stranger {
    /// What their names have in common.
    pub name: String,
    /// The loop device's name.
    pub device: String,
    group: PathBuf,
    link: String,
    image: PathBuf,
}

impl Stranger {
    /// Plants them, with names that carry `mark` (at most eight characters), and the device's file in `directory`.
    ///
    /// # Errors
    /// Skips the promise on a host without loop devices.
    pub fn new(mark: &str, directory: PathBuf) -> Result<Self> {
        let name = format!("alien{mark}");
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let unified = mounts.lines().find(|line| line.contains(" - cgroup2 ")).context("no cgroup2 is mounted")?;
        let group = PathBuf::from(unified.split(' ').nth(4).context("no mount point")?).join(&name);
        let image = directory.join(&name);
        fs::write(&image, vec![0; 1 << 20])?;
        // A module on most hosts, which nobody may have needed yet; built in, or absent, on the others.
        let _ = Invocation::new("modprobe").args(["loop"]).run();
        let Ok(device) = Invocation::new("losetup").args(["--find", "--show"]).args([&image]).succeed() else {
            return Err(skip("this host has no loop devices"));
        };
        let device = device.text().trim().trim_start_matches("/dev/").to_owned();
        let stranger = Self { link: name.clone(), name, device, group, image };
        fs::create_dir(&stranger.group).context("make a control group")?;
        Invocation::new("ip").args(["link", "add", &stranger.link, "type", "veth"]).succeed()?;
        Ok(stranger)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        // What is left is seen by the comparison of the host, or by the next `losetup`.
        let _ = Invocation::new("losetup").args(["--detach", &format!("/dev/{}", self.device)]).run();
        let _ = Invocation::new("ip").args(["link", "delete", &self.link]).run();
        let _ = fs::remove_dir(&self.group);
        let _ = fs::remove_file(&self.image);
    }
}
