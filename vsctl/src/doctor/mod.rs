//! What is wrong on this host: what it lacks for virtual servers (`host`), and what interrupted commands and dead
//! processes left behind (`remains`). Prints nothing; mends only what it is told to.

pub mod host;
pub mod remains;
mod trial;

use serde::Serialize;

/// How a finding is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Servers run, but something is less than it could be.
    Warning,
    /// Without it no server runs.
    Missing,
    /// Something was left behind, and is there still.
    Left,
    /// Something was left behind, and has been mended.
    Mended,
}

impl Verdict {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Missing => "missing",
            Self::Left => "left",
            Self::Mended => "mended",
        }
    }

    /// Whether it keeps the host from being healthy.
    pub fn is_bad(self) -> bool {
        matches!(self, Self::Missing | Self::Left)
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How it is.
    pub verdict: Verdict,
    /// What was looked at.
    pub subject: String,
    /// What was seen.
    pub detail: String,
    /// What would mend it.
    pub remedy: Option<String>,
}

impl Finding {
    fn new(verdict: Verdict, subject: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { verdict, subject: subject.into(), detail: detail.into(), remedy: None }
    }

    fn ok(subject: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(Verdict::Ok, subject, detail)
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}
