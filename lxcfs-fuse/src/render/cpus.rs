//! `/sys/devices/system/cpu/{online,possible,present}`: the numbers of the visible CPUs.

use super::put;

/// Renders the list `0-N` of `visible` CPUs, or `0` for one.
pub fn cpus(out: &mut String, visible: usize) {
    match visible.saturating_sub(1) {
        0 => out.push_str("0\n"),
        last => put!(out, "0-{last}\n"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn one_and_more() {
        let mut out = String::new();
        super::cpus(&mut out, 1);
        super::cpus(&mut out, 4);
        assert_eq!(out, "0\n0-3\n");
    }
}
