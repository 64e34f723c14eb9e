//! What sender and receiver tell each other: one packet a piece, and with a file a pipe for its bytes.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use super::telling;

/// One piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Packet {
    /// The sender's first: what the source is, and what it is called; not called anything when its content is meant.
    Source {
        is_directory: bool,
        name: Option<OsString>,
    },
    /// The receiver's answer: where it goes.
    At(PathBuf),
    /// A directory; paths are relative to the source, the empty one is the source itself.
    Directory {
        path: PathBuf,
        mode: u32,
    },
    /// A file; its bytes come through a pipe that comes with it. Without a mode the receiver's usual one.
    File {
        path: PathBuf,
        mode: Option<u32>,
    },
    Link {
        path: PathBuf,
        target: PathBuf,
    },
    Fifo {
        path: PathBuf,
        mode: u32,
    },
    /// The file's bytes were all.
    Whole,
    /// A word to the user.
    Note(String),
    /// The sender's last.
    End,
    /// The receiver's last.
    Done,
    /// Either's last: exit code and words.
    Failed {
        code: u8,
        why: String,
    },
}

impl Packet {
    pub fn failure(error: &anyhow::Error) -> Self {
        let (code, why) = telling(error);
        Self::Failed { code, why }
    }

    /// A letter, a number, a path, and after NUL another; none of them can hold a NUL.
    pub fn to_bytes(&self) -> Vec<u8> {
        let text = |letter: char, number: String, path: &[u8]| [format!("{letter}{number} ").as_bytes(), path].concat();
        let path = |path: &Path| path.as_os_str().as_bytes().to_vec();
        match self {
            Self::Source { is_directory, name } => {
                let name = name.as_ref().map_or(b"".as_slice(), |name| name.as_bytes());
                text('s', u8::from(*is_directory).to_string(), name)
            }
            Self::At(at) => text('a', String::new(), &path(at)),
            Self::Directory { path: at, mode } => text('d', mode.to_string(), &path(at)),
            Self::File { path: at, mode } => {
                text('f', mode.map_or_else(String::new, |mode| mode.to_string()), &path(at))
            }
            Self::Link { path: at, target } => text('l', String::new(), &[path(at), path(target)].join(&0)),
            Self::Fifo { path: at, mode } => text('p', mode.to_string(), &path(at)),
            Self::Whole => text('w', String::new(), b""),
            Self::Note(note) => text('n', String::new(), note.as_bytes()),
            Self::End => text('e', String::new(), b""),
            Self::Done => text('o', String::new(), b""),
            Self::Failed { code, why } => text('x', code.to_string(), why.as_bytes()),
        }
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (letter, rest) = bytes.split_first()?;
        let blank = rest.iter().position(|byte| *byte == b' ')?;
        let number = std::str::from_utf8(&rest[..blank]).ok()?;
        let text = &rest[blank + 1..];
        let path = |text: &[u8]| PathBuf::from(OsString::from_vec(text.to_vec()));
        let below = |text: &[u8]| Some(path(text)).filter(|path| stays_below(path));
        Some(match letter {
            b's' => {
                let name = below(text)?;
                let name = if name.as_os_str().is_empty() { None } else { Some(name.file_name()?.to_owned()) };
                Self::Source { is_directory: number == "1", name }
            }
            b'a' => Self::At(path(text)),
            b'd' => Self::Directory { path: below(text)?, mode: number.parse().ok()? },
            b'f' => Self::File { path: below(text)?, mode: number.parse().ok() },
            b'l' => {
                let nul = text.iter().position(|byte| *byte == 0)?;
                Self::Link { path: below(&text[..nul])?, target: path(&text[nul + 1..]) }
            }
            b'p' => Self::Fifo { path: below(text)?, mode: number.parse().ok()? },
            b'w' => Self::Whole,
            // Names in it are a guest's; a terminal shall not obey them.
            b'n' => Self::Note(
                String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { '?' } else { c }).collect(),
            ),
            b'e' => Self::End,
            b'o' => Self::Done,
            b'x' => Self::Failed { code: number.parse().ok()?, why: String::from_utf8_lossy(text).into_owned() },
            _ => return None,
        })
    }
}

/// Whether a path has names only: no root, no `..`.
fn stays_below(path: &Path) -> bool {
    path.components().all(|component| matches!(component, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_survive_the_wire() {
        let odd = || PathBuf::from(OsString::from_vec(b"a b/\xff\n".to_vec()));
        let packets = [
            Packet::Source { is_directory: true, name: Some("x y".into()) },
            Packet::Source { is_directory: false, name: None },
            Packet::At("/etc/x y".into()),
            Packet::Directory { path: PathBuf::new(), mode: 0o755 },
            Packet::File { path: odd(), mode: Some(0o4711) },
            Packet::File { path: PathBuf::new(), mode: None },
            Packet::Link { path: odd(), target: "../../etc/passwd".into() },
            Packet::Fifo { path: "p".into(), mode: 0o600 },
            Packet::Whole,
            Packet::Note("a/b is left out".into()),
            Packet::End,
            Packet::Done,
            Packet::Failed { code: 46, why: "the disk is full".into() },
        ];
        for packet in packets {
            assert_eq!(Packet::from_bytes(&packet.to_bytes()), Some(packet));
        }
    }

    #[test]
    fn what_leads_out_is_not_understood() {
        for bytes in ["d493 ..", "d493 /etc", "f a/../../b", "l x/../..\0y", "p1 ../p", "", "d", "dx a", "q 1"] {
            assert_eq!(Packet::from_bytes(bytes.as_bytes()), None, "{bytes}");
        }
    }
}
