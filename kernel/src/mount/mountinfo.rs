//! /proc/PID/mountinfo as values (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// Mount id, unique in the host as long as the mount lives.
    pub id: u64,
    /// Id of the mount this one is attached to.
    pub parent_id: u64,
    /// Device major number of the file system.
    pub major: u32,
    /// Device minor number of the file system.
    pub minor: u32,
    /// The directory of the file system that is shown.
    pub root: PathBuf,
    /// Where it is shown, from the reader's root.
    pub mount_point: PathBuf,
    /// Options of the mount: `rw,nosuid`.
    pub options: String,
    /// Propagation: `shared:7`, `master:3`, …; empty for a private mount.
    pub propagation: Vec<String>,
    /// Kind of file system.
    pub kind: String,
    /// Its source: a device, or any word.
    pub source: String,
    /// Options of the file system.
    pub super_options: String,
}

impl MountInfo {
    /// Whether a process serves the file system, with or without a subtype (`fuse.sshfs`) and not from a block device (`fuseblk`).
    pub fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind.starts_with("fuse.")
    }
}

/// All lines that can be read; a line of a form we do not know is left out.
pub fn parse_mountinfo(text: &str) -> Vec<MountInfo> {
    text.lines().filter_map(parse_line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &str) -> Option<MountInfo> {
    // The separator is the first lone dash; optional fields before it never are one.
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ');
    let id = fields.next()?.parse().ok()?;
    let parent_id = fields.next()?.parse().ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let root = unescape(fields.next()?);
    let mount_point = unescape(fields.next()?);
    let options = fields.next()?.to_owned();
    let propagation = fields.map(str::to_owned).collect();
    let mut rest = file_system.splitn(3, ' ');
    Some(MountInfo {
        id,
        parent_id,
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        root: PathBuf::from(root),
        mount_point: PathBuf::from(mount_point),
        options,
        propagation,
        kind: rest.next()?.to_owned(),
        source: unescape(rest.next()?).to_string_lossy().into_owned(),
        super_options: rest.next().unwrap_or("").to_owned(),
    })
}

/// Undoes the octal escapes of space, tab, newline, backslash and `#`.
fn unescape(text: &str) -> OsString {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match (bytes[at], octal) {
            (b'\\', Some(digits)) => {
                let value = digits.iter().fold(0_u32, |value, digit| value * 8 + u32::from(digit - b'0'));
                plain.push(value as u8);
                at += 4;
            }
            (byte, _) => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_line_with_everything() {
        let text = "36 35 98:0 /mnt\\0401 /mnt/two\\011tabs rw,noatime shared:7 master:1 - ext3 /dev/root rw,errors=continue\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 1);
        let mount = &mounts[0];
        assert_eq!((mount.id, mount.parent_id, mount.major, mount.minor), (36, 35, 98, 0));
        assert_eq!(
            (mount.root.as_path(), mount.mount_point.as_path()),
            (Path::new("/mnt 1"), Path::new("/mnt/two\ttabs"))
        );
        assert_eq!(mount.propagation, ["shared:7", "master:1"]);
        assert_eq!(
            (mount.kind.as_str(), mount.source.as_str(), mount.super_options.as_str()),
            ("ext3", "/dev/root", "rw,errors=continue")
        );
    }

    #[test]
    fn a_private_mount_has_no_propagation_and_broken_lines_are_left_out() {
        let text =
            "22 1 0:21 / /proc rw,relatime - proc proc rw\nnot a mount line\n\n23 1 0:22 / /x\\y rw - tmpfs  rw\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 2);
        assert!(mounts[0].propagation.is_empty());
        assert_eq!(mounts[1].mount_point, Path::new("/x\\y"));
        assert_eq!(mounts[1].source, "");
    }
}
