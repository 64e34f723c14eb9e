//! To the disk and back: `vsctl suspend` and `vsctl resume` beside CRIU alone, on the same running server.

use std::time::Duration;

use anyhow::{Context, Result};
use system_tests::{lab::Host, sample::Sample};

use super::timed::{at_work, timed};

/// What came of one server.
#[derive(Default)]
pub struct Disk {
    /// `criu dump --leave-running`, as a command.
    pub bare_dump: Sample,
    /// Then its images brought to the disk.
    pub bare_sync: Sample,
    /// `vsctl suspend`.
    pub suspend: Sample,
    /// What CRIU was at work for in it.
    pub criu_in_suspend: Sample,
    /// `vsctl resume`.
    pub resume: Sample,
    /// What CRIU was at work for in it.
    pub criu_in_resume: Sample,
    /// The images, in bytes.
    pub bytes: u64,
}

/// CRIU by itself, told what vsctl tells it (`lifecycle/restore.rs`, `checkpoint/dump.rs`). Which mounts come from outside is taken from the log
/// of a dump that vsctl has made on this host. Terminals whose other side is outside it can be told of over its RPC only: not a guest's whose
/// init is systemd.
const BARE: &str = r#"set -e
pid=$(vsctl status web1 --json | sed -n 's/.*"pid": *\([0-9]*\).*/\1/p')
log=/var/lib/vsos/servers/web1/criu-dump.log
external=$(sed -n 's/.*Found \(.*\) mapping for .* mountpoint.*/--external mnt[\1]:\1/p' $log | sort -u)
test -n "$pid" && test -n "$external"
cat >/root/bare <<END
criu dump -t $pid -D /var/lib/vsos/bare -o dump.log -v4 --leave-running --root /run/vsos/servers/web1/root $(echo $external) \
--tcp-established --file-locks --link-remap --force-irmap --irmap-scan-path /etc --irmap-scan-path /run \
--irmap-scan-path /usr/lib/systemd --irmap-scan-path /usr/share/dbus-1 --irmap-scan-path /usr/local/share \
--irmap-scan-path /var/spool/cron --manage-cgroups=soft --enable-external-sharing --enable-external-masters \
--enable-fs hugetlbfs --enable-fs tracefs --ghost-limit 64M --timeout 120 --network-lock skip \
--freeze-cgroup /sys/fs/cgroup/vsos/web1
END
rm -rf /var/lib/vsos/bare; mkdir -m 700 /var/lib/vsos/bare; sync
"#;

/// Measures the server `web1`, `rounds` times each, in turns; CRIU by itself only if it `can_be_bare`.
///
/// # Errors
/// What a command says.
pub fn measure(host: &Host, rounds: usize, can_be_bare: bool) -> Result<Disk> {
    let mut disk = Disk::default();
    // For its log; and one that came from elsewhere has its memory in other places than one that was restored here.
    timed(host, "vsctl suspend web1 && vsctl resume web1")?;
    for _ in 0..rounds {
        if can_be_bare {
            disk.bare_dump.add(bare_dump(host)?);
            disk.bare_sync.add(timed(host, "sync -f /var/lib/vsos/bare")?);
            host.sh("rm -r /var/lib/vsos/bare; sync")?;
        }
        disk.suspend.add(timed(host, "vsctl suspend web1")?);
        disk.criu_in_suspend.add(at_work(&host.sh("cat /var/lib/vsos/servers/web1/criu-dump.log")?)?);
        let bytes = host.sh("du -sb /var/lib/vsos/servers/web1/volume/suspended | cut -f1")?;
        disk.bytes = bytes.parse().context("a length")?;
        disk.resume.add(timed(host, "vsctl resume web1")?);
        eprintln!("lab: to the disk and back, {} bytes of images", disk.bytes);
        disk.criu_in_resume.add(at_work(&host.sh("cat /var/lib/vsos/servers/web1/criu-restore.log")?)?);
    }
    Ok(disk)
}

fn bare_dump(host: &Host) -> Result<Duration> {
    host.sh(BARE)?;
    let errors = || host.sh("grep Error /var/lib/vsos/bare/dump.log | tail -n 5").unwrap_or_default();
    timed(host, "sh /root/bare").with_context(errors)
}
