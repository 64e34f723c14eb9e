//! `/proc/pressure/{cpu,memory,io}`: the server's own `*.pressure`, which has the same form.

/// Renders a pressure file.
pub fn pressure(out: &mut String, cgroup: &str) {
    out.push_str(cgroup);
}
