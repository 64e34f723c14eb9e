//! `/proc/interrupts` and `/proc/softirqs`: a column for each visible CPU. Interrupts are the host's, so there are none.

use super::{put, put_number};

/// The kernel's names (`softirq_to_name` in kernel/softirq.c), the same since Linux 4.2.
const SOFTIRQS: [&str; 10] =
    ["HI", "TIMER", "NET_TX", "NET_RX", "BLOCK", "IRQ_POLL", "TASKLET", "SCHED", "HRTIMER", "RCU"];

/// Renders interrupts: its head only. Which devices interrupt the host, and how often, tells of others.
pub fn interrupts(out: &mut String, visible: usize) {
    put_head(out, 11, visible);
}

/// Renders softirqs: each kind, which all kernels have, and never one of them.
pub fn softirqs(out: &mut String, visible: usize) {
    put_head(out, 20, visible);
    for name in SOFTIRQS {
        put!(out, "{name:>12}:");
        for _ in 0..visible {
            out.push(' ');
            put_number(out, 0, 10);
        }
        out.push('\n');
    }
}

fn put_head(out: &mut String, indent: usize, visible: usize) {
    put!(out, "{:indent$}", "");
    for cpu in 0..visible {
        put!(out, "CPU{cpu:<8}");
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_stand_as_the_kernel_puts_them() {
        let mut out = String::new();
        super::interrupts(&mut out, 2);
        assert_eq!(out, "           CPU0       CPU1       \n");
        out.clear();
        super::softirqs(&mut out, 2);
        assert!(
            out.starts_with("                    CPU0       CPU1       \n          HI:          0          0\n"),
            "{out}"
        );
    }
}
