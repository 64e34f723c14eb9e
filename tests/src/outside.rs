//! A network namespace that plays the world outside: linked to the host, and without a route back to any server.
//!
//! A packet that comes back from there has been translated by the host.

use std::{fs, time::Duration};

use anyhow::{Context, Result};

use crate::command::{Background, Invocation, eventually};

/// The host's end and the far end of the link, from the ranges that RFC 5737 and RFC 3849 keep for documents.
pub const HOST_V4: &str = "198.51.100.1";
/// The far end.
pub const OUTSIDE_V4: &str = "198.51.100.2";
/// The host's end.
pub const HOST_V6: &str = "2001:db8:6f75::1";
/// The far end.
pub const OUTSIDE_V6: &str = "2001:db8:6f75::2";

/// The namespace and the link to it; removed when dropped.
///
/// A process holds the namespace: a named one would leave a mount of its directory on the host.
pub struct Outside {
    holder: Background,
    link: String,
}

impl Outside {
    /// Makes it, with names that carry `mark` (at most eight characters).
    pub fn new(mark: &str) -> Result<Self> {
        let forever = Duration::from_secs(3600);
        let holder = Invocation::new("unshare").args(["--net", "sleep", "3600"]).limit(forever).spawn()?;
        let outside = Self { link: format!("out-{mark}"), holder };
        let pid = outside.holder.pid();
        let own = fs::read_link("/proc/self/ns/net")?;
        eventually("a network namespace", Duration::from_secs(10), || {
            (fs::read_link(format!("/proc/{pid}/ns/net")).ok()? != own).then_some(())
        })?;
        ip(&format!("link add {} type veth peer name up0 netns {pid}", outside.link))?;
        ip(&format!("address add {HOST_V4}/24 dev {}", outside.link))?;
        ip(&format!("address add {HOST_V6}/64 dev {} nodad", outside.link))?;
        ip(&format!("link set {} up", outside.link))?;
        for words in [
            "link set lo up".to_owned(),
            format!("address add {OUTSIDE_V4}/24 dev up0"),
            format!("address add {OUTSIDE_V6}/64 dev up0 nodad"),
            "link set up0 up".to_owned(),
        ] {
            outside.command(&["ip"]).args(words.split(' ')).succeed()?;
        }
        Ok(outside)
    }

    /// A command that runs out there.
    pub fn command(&self, words: &[&str]) -> Invocation {
        Invocation::new("nsenter").args(["--net", "--target", &self.holder.pid().to_string()]).args(words)
    }

    /// A command that runs out there in the background.
    pub fn spawn(&self, words: &[&str]) -> Result<Background> {
        self.command(words).spawn()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = ip(&format!("link delete {}", self.link));
        self.holder.kill();
    }
}

fn ip(words: &str) -> Result<()> {
    let call = Invocation::new("ip").args(words.split(' '));
    call.succeed().map(drop).with_context(|| format!("ip {words}"))
}
