//! Signal names, including the real-time ones that no enum has.

use serde::Deserialize;

/// A signal's number, written as `SIGTERM`, `TERM`, `SIGRTMIN+3` or `15`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct SignalName(i32);

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a signal's name or number")]
enum Written {
    Number(i32),
    Text(String),
}

/// The first real-time signal that programs may use: the C libraries keep two (glibc) or three
/// (musl) for themselves, and everybody counts from glibc's.
pub const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

const NAMES: [(&str, i32); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

impl SignalName {
    /// The number for kill(2).
    pub fn number(self) -> i32 {
        self.0
    }

    fn parse(text: &str) -> Option<i32> {
        let name = text.strip_prefix("SIG").unwrap_or(text);
        if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
            return Some(*number);
        }
        let number = if let Some(offset) = name.strip_prefix("RTMIN") {
            RTMIN + if offset.is_empty() { 0 } else { offset.strip_prefix('+')?.parse().ok()? }
        } else if let Some(offset) = name.strip_prefix("RTMAX") {
            RTMAX - if offset.is_empty() { 0 } else { offset.strip_prefix('-')?.parse().ok()? }
        } else {
            return None;
        };
        (RTMIN..=RTMAX).contains(&number).then_some(number)
    }
}

impl Default for SignalName {
    fn default() -> Self {
        SignalName(15)
    }
}

impl TryFrom<Written> for SignalName {
    type Error = &'static str;

    fn try_from(written: Written) -> Result<Self, Self::Error> {
        let number = match written {
            Written::Number(number) => Some(number).filter(|n| (1..=RTMAX).contains(n)),
            Written::Text(text) => Self::parse(&text),
        };
        number.map(SignalName).ok_or("unknown signal")
    }
}

/// The name of a signal's number, for messages.
pub fn name_of(number: i32) -> String {
    match NAMES.iter().find(|(_, known)| *known == number) {
        Some((name, _)) => format!("SIG{name}"),
        None if (RTMIN..=RTMAX).contains(&number) => format!("SIGRTMIN+{}", number - RTMIN),
        None => format!("signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        let cases = [
            ("SIGTERM", Some(15)),
            ("TERM", Some(15)),
            ("SIGRTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("SIGRTMIN+31", None),
            ("RTMIN3", None),
            ("term", None),
            ("", None),
        ];
        for (text, number) in cases {
            assert_eq!(SignalName::parse(text), number, "{text}");
        }
        assert_eq!(name_of(30), "SIGPWR");
        assert_eq!(name_of(38), "SIGRTMIN+4");
        assert_eq!(name_of(32), "signal 32");
    }

    #[test]
    fn the_table_is_the_kernels() {
        for (index, (_, number)) in NAMES.iter().enumerate() {
            assert_eq!(*number, index as i32 + 1);
        }
        assert_eq!(NAMES[29], ("PWR", libc::SIGPWR));
        assert_eq!(RTMIN, libc::SIGRTMIN());
    }
}
