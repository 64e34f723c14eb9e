//! Resource limits of a service, in the words of setrlimit(2).

use serde::Deserialize;

/// A resource, named as in setrlimit(2) without `RLIMIT_`, in small letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Resource {
    As,
    Core,
    Cpu,
    Data,
    Fsize,
    Locks,
    Memlock,
    Msgqueue,
    Nice,
    Nofile,
    Nproc,
    Rss,
    Rtprio,
    Rttime,
    Sigpending,
    Stack,
}

/// Soft and hard limit in the resource's unit; `None` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct Limit {
    /// The one that counts.
    pub soft: Option<u64>,
    /// The one to which the soft limit may be raised.
    pub hard: Option<u64>,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let text = |limit: Option<u64>| limit.map_or("unlimited".into(), |n| n.to_string());
        write!(f, "{}:{}", text(self.soft), text(self.hard))
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number, \"unlimited\" or \"SOFT:HARD\"")]
enum Written {
    Number(u64),
    Text(String),
}

impl TryFrom<Written> for Limit {
    type Error = &'static str;

    fn try_from(written: Written) -> Result<Self, Self::Error> {
        let text = match written {
            Written::Number(n) => {
                return Ok(Limit { soft: Some(n), hard: Some(n) });
            }
            Written::Text(text) => text,
        };
        let (soft, hard) = text.split_once(':').unwrap_or((&text, &text));
        let limit = Limit { soft: value(soft)?, hard: value(hard)? };
        match (limit.soft, limit.hard) {
            (None, Some(_)) => Err("the soft limit is above the hard one"),
            (Some(soft), Some(hard)) if soft > hard => Err("the soft limit is above the hard one"),
            _ => Ok(limit),
        }
    }
}

fn value(text: &str) -> Result<Option<u64>, &'static str> {
    match text {
        "unlimited" => Ok(None),
        _ => text.parse().map(Some).map_err(|_| "expected a number or \"unlimited\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits() {
        let limit = |text: &str| Limit::try_from(Written::Text(text.into()));
        assert_eq!(limit("1024:4096"), Ok(Limit { soft: Some(1024), hard: Some(4096) }));
        assert_eq!(limit("0:unlimited"), Ok(Limit { soft: Some(0), hard: None }));
        assert_eq!(limit("unlimited"), Ok(Limit { soft: None, hard: None }));
        for bad in ["", "x", "1:", "5:4", "unlimited:1", "-1", "1:2:3"] {
            assert!(limit(bad).is_err(), "{bad}");
        }
    }
}
