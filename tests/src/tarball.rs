//! Writes tar archives entry by entry, so that they can be wrong in ways that tar(1) refuses to write.
//!
//! The ustar format of POSIX.1-1988, pax(1).

/// An archive under construction.
#[derive(Default)]
pub struct Tarball(Vec<u8>);

const BLOCK: usize = 512;

impl Tarball {
    /// A plain file.
    pub fn file(self, path: &str, mode: u32, bytes: &[u8]) -> Self {
        self.entry(path, b'0', mode, "", bytes, (0, 0))
    }

    /// A directory.
    pub fn directory(self, path: &str) -> Self {
        self.entry(path, b'5', 0o755, "", &[], (0, 0))
    }

    /// A symbolic link.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, b'2', 0o777, target, &[], (0, 0))
    }

    /// A hard link to an earlier entry, or to what should not be reachable.
    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(path, b'1', 0o644, target, &[], (0, 0))
    }

    /// A block device.
    pub fn block_device(self, path: &str, major: u32, minor: u32) -> Self {
        self.entry(path, b'4', 0o666, "", &[], (major, minor))
    }

    /// The archive's bytes, with the two empty blocks that end it.
    pub fn finish(mut self) -> Vec<u8> {
        self.0.extend([0; 2 * BLOCK]);
        self.0
    }

    fn entry(mut self, path: &str, kind: u8, mode: u32, link: &str, bytes: &[u8], device: (u32, u32)) -> Self {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, path.as_bytes());
        put(100, format!("{mode:07o}").as_bytes());
        put(108, b"0000000");
        put(116, b"0000000");
        put(124, format!("{:011o}", bytes.len()).as_bytes());
        put(136, b"00000000000");
        // The sum is taken with blanks in its own place.
        put(148, b"        ");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", device.0).as_bytes());
        put(337, format!("{:07o}", device.1).as_bytes());
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(header);
        self.0.extend(bytes);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Invocation;

    #[test]
    fn tar_reads_it() {
        let archive =
            Tarball::default().directory("etc/").file("etc/motd", 0o644, b"hello").symlink("etc/link", "motd");
        let listed = Invocation::new("tar").args(["-tvf", "-"]).input(archive.finish()).succeed().unwrap().text();
        assert!(listed.contains("etc/motd") && listed.contains("etc/link -> motd"), "{listed}");
    }
}
