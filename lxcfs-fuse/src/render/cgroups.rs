//! `/proc/cgroups`: the kernel's controllers, as a machine with cgroup v2 alone has them.

use super::put;

/// Renders cgroups from the host's text. A server has the unified hierarchy only, whose number is 0, and `groups` in it.
pub fn cgroups(out: &mut String, host: &str, groups: u64) {
    out.push_str("#subsys_name\thierarchy\tnum_cgroups\tenabled\n");
    for line in host.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split_ascii_whitespace();
        if let (Some(name), Some(enabled @ ("0" | "1"))) = (words.next(), words.nth(2)) {
            put!(out, "{name}\t0\t{groups}\t{enabled}\n");
        }
    }
}
