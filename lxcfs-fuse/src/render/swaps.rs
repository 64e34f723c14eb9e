//! `/proc/swaps`: one line for the server's share of swap, whatever it is made of on the host.

use super::put;
use crate::snapshot::Memory;

/// Renders swaps: the header, and a line if the server may use any swap.
pub fn swaps(out: &mut String, memory: &Memory) {
    out.push_str("Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n");
    if memory.swap_total == 0 {
        return;
    }
    let total = memory.swap_total / 1024;
    let used = (memory.swap_used / 1024).min(total);
    // The kernel's columns: the name padded to 40, and a second tab after numbers of less than 8 digits.
    let tab = |number: u64| if number < 10_000_000 { "\t" } else { "" };
    put!(out, "{:<40}virtual\t\t{total}\t{}{used}\t{}0\n", "none", tab(total), tab(used));
}
