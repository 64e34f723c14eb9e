//! `/proc/uptime`: seconds since the server's start, and idle seconds summed over its CPUs.

use super::put;

/// Renders uptime.
pub fn uptime(out: &mut String, up_ns: u64, idle_ns: u64) {
    let hundredths = |ns: u64| ns / 10_000_000;
    let (up, idle) = (hundredths(up_ns), hundredths(idle_ns));
    put!(out, "{}.{:02} {}.{:02}\n", up / 100, up % 100, idle / 100, idle % 100);
}

#[cfg(test)]
mod tests {
    #[test]
    fn hundredths_have_two_digits() {
        let mut out = String::new();
        super::uptime(&mut out, 61_050_000_000, 9_999_999);
        assert_eq!(out, "61.05 0.00\n");
    }
}
