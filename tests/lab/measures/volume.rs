//! What a migration sends of a volume, beside what the server has changed in it.

use anyhow::{Context, Result};
use system_tests::lab::{Host, pair::Pair};

use super::ground::LOAD;

/// Of one migration.
pub struct Sent {
    /// In words.
    pub what: &'static str,
    /// The bytes that `vsctl` gave to the connection: all that it said included.
    pub sent: u64,
    /// The lengths of all files that the server has written.
    pub changed: u64,
}

/// 20 MB in files of different lengths, one of which is mostly a hole.
const WRITE: &str =
    "cd /root && for n in $(seq 100); do head -c $((n * 4000)) /dev/urandom >file-$n; done; truncate -s 100M hole";

const LENGTHS: &str = "cd /var/lib/vsos/servers/web1/volume/upper && find . -type f ! -name hole -printf '%s\\n' | awk '{ n += $1 } END { print n }'";

/// Moves a server to the second host when it is stopped, and back when it runs.
///
/// # Errors
/// What a command says.
pub fn measure(pair: &Pair) -> Result<Vec<Sent>> {
    let [a, b] = &pair.hosts;
    for host in [a, b] {
        host.sh(&format!(
            "printf '[migrate]\\nshell = [\"{LOAD}\", \"count\", \"/run/sent\", \"ssh\"]\\n' >>/etc/vsos/vsos.toml"
        ))?;
    }
    a.sh("vsctl create web1 --template busybox --ip 10.77.0.9/24 --start")?;
    a.sh(&format!("vsctl exec web1 -- sh -c '{WRITE}' && vsctl stop web1"))?;
    let stopped = sent(a, "b", "stopped")?;
    b.sh("vsctl start web1")?;
    let running = sent(b, "a", "running, `--offline`")?;
    a.sh("vsctl destroy --force web1")?;
    Ok(vec![stopped, running])
}

fn sent(host: &Host, other: &str, what: &'static str) -> Result<Sent> {
    let number = |text: String| text.parse::<u64>().with_context(|| format!("a number: {text:?}"));
    let changed = number(host.sh(LENGTHS)?)?;
    host.sh(&format!("vsctl migrate web1 {other} --offline"))?;
    Ok(Sent { what, sent: number(host.sh("cat /run/sent")?)?, changed })
}
