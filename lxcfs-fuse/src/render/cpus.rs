//! Sets of CPUs as sysfs writes them: lists (`0-3,8`) and masks (`1,0000000f`).

use super::put;

/// Renders the list of `cpus`, which are ascending; an empty line for none.
pub fn cpu_list(out: &mut String, cpus: &[u32]) {
    let mut rest = cpus;
    while let Some(&first) = rest.first() {
        let mut run = rest.iter().zip(first..).take_while(|(cpu, expected)| **cpu == *expected);
        let length = run.by_ref().count();
        put!(out, "{}{first}", if rest.len() < cpus.len() { "," } else { "" });
        if length > 1 {
            put!(out, "-{}", rest[length - 1]);
        }
        rest = &rest[length..];
    }
    out.push('\n');
}

/// Renders the mask of `cpus` of a machine with `count` CPUs: groups of 32 bits, the highest first (`%*pb` in lib/vsprintf.c).
pub fn cpu_mask(out: &mut String, cpus: &[u32], count: usize) {
    let mut groups = vec![0_u32; count.max(1).div_ceil(32)];
    for &cpu in cpus.iter().filter(|&&cpu| (cpu as usize) < count) {
        if let Some(group) = groups.get_mut(cpu as usize / 32) {
            *group |= 1 << (cpu % 32);
        }
    }
    let mut digits = ((count.max(1) - 1) % 32 + 1).div_ceil(4);
    for (number, group) in groups.iter().enumerate().rev() {
        put!(out, "{group:0digits$x}{}", if number == 0 { "\n" } else { "," });
        digits = 8;
    }
}

#[cfg(test)]
mod tests {
    fn list(cpus: &[u32]) -> String {
        let mut out = String::new();
        super::cpu_list(&mut out, cpus);
        out
    }

    fn mask(cpus: &[u32], count: usize) -> String {
        let mut out = String::new();
        super::cpu_mask(&mut out, cpus, count);
        out
    }

    #[test]
    fn lists_are_the_shortest() {
        assert_eq!(list(&[0]), "0\n");
        assert_eq!(list(&[0, 1, 2, 3]), "0-3\n");
        assert_eq!(list(&[0, 2, 3, 5]), "0,2-3,5\n");
        assert_eq!(list(&[]), "\n");
    }

    #[test]
    fn masks_are_as_wide_as_the_machine() {
        assert_eq!(mask(&[0, 1], 2), "3\n");
        assert_eq!(mask(&[4], 5), "10\n");
        assert_eq!(mask(&[0], 5), "01\n");
        assert_eq!(mask(&[0, 31], 32), "80000001\n");
        assert_eq!(mask(&[0, 32], 33), "1,00000001\n");
        assert_eq!(mask(&[7], 2), "0\n");
        assert_eq!(mask(&[], 0), "0\n");
    }
}
