//! What sched_getaffinity(2) says in a server: as many CPUs as its files show, by their real numbers.
//!
//! The files number CPUs from 0. A mask cannot: a program reads it in order to choose from it for sched_setaffinity(2), which
//! the kernel carries out with real numbers. Without a `cpuset`, or with one that begins at 0, both are the same.

use std::sync::OnceLock;

use crate::snapshot::Cpus;

/// The most CPUs that Linux can be built for on x86_64 (`NR_CPUS`).
const CPUS_MAX: usize = 8192;

/// A mask as the kernel lays it out: CPU 64·I+B is bit B of word I.
pub type Mask = Vec<u64>;

/// The mask of a thread whose real one is `real`: its CPUs that are the server's, and no more than the server sees.
pub fn shown(real: &[u64], cpus: &Cpus) -> Mask {
    let mut set: Mask = vec![0; real.len()];
    for number in &cpus.set {
        if let Some(word) = set.get_mut(*number as usize / 64) {
            *word |= 1 << (number % 64);
        }
    }
    let own: Mask = real.iter().zip(&set).map(|(real, set)| real & set).collect();
    // The set may just have changed, and the thread not have moved yet: it must be able to run somewhere.
    let own = if own.iter().all(|word| *word == 0) { real.to_vec() } else { own };
    first(own, cpus.visible.max(1))
}

/// Leaves the lowest `count` bits that are set.
fn first(mut mask: Mask, count: usize) -> Mask {
    let mut left = count;
    for word in &mut mask {
        let mut kept = 0;
        while left > 0 && *word != 0 {
            let lowest = *word & word.wrapping_neg();
            kept |= lowest;
            *word ^= lowest;
            left -= 1;
        }
        *word = kept;
    }
    mask
}

/// Whether the kernel takes a mask of `length` bytes: it must hold all `cpu_ids` CPUs and be made of whole words.
pub fn takes_length(length: u32, cpu_ids: u32, word_bytes: u32) -> bool {
    // In 32 bits, as the kernel reckons.
    length.wrapping_mul(8) >= cpu_ids && length % word_bytes == 0
}

/// The real mask of `thread`, as long as the kernel's masks are.
pub fn real(thread: i32) -> Result<Mask, kernel::Error> {
    static WORDS: OnceLock<usize> = OnceLock::new();
    let mut mask = vec![0; WORDS.get().copied().unwrap_or(CPUS_MAX / 64)];
    let filled = kernel::process::affinity(thread, &mut mask)?;
    mask.truncate(*WORDS.get_or_init(|| filled / 8));
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(set: &[u32], visible: usize) -> Cpus {
        Cpus { set: set.to_vec(), visible }
    }

    #[test]
    fn a_quota_leaves_the_first_of_the_real_ones() {
        assert_eq!(shown(&[0b1111], &cpus(&[0, 1, 2, 3], 2)), [0b0011]);
        assert_eq!(shown(&[0b1111], &cpus(&[0, 1, 2, 3], 4)), [0b1111]);
        // Bound to the last one by itself, it stays there.
        assert_eq!(shown(&[0b1000], &cpus(&[0, 1, 2, 3], 2)), [0b1000]);
        assert_eq!(shown(&[0b1100, 0b11], &cpus(&[2, 3, 64, 65], 3)), [0b1100, 0b01]);
    }

    #[test]
    fn a_thread_can_always_run_somewhere() {
        assert_eq!(shown(&[0b0001], &cpus(&[2, 3], 2)), [0b0001]);
        assert_eq!(shown(&[0b0110], &cpus(&[200], 0)), [0b0010]);
    }

    #[test]
    fn lengths_are_judged_as_by_the_kernel() {
        assert!(takes_length(8, 2, 8) && takes_length(8, 64, 8) && takes_length(128, 2, 8));
        assert!(!takes_length(8, 65, 8) && !takes_length(0, 1, 8) && !takes_length(12, 2, 8) && !takes_length(4, 2, 8));
        assert!(takes_length(4, 2, 4) && !takes_length(6, 2, 4));
        // 8 times this is 0 in 32 bits.
        assert!(!takes_length(0x2000_0000, 2, 8));
    }

    #[test]
    fn the_own_mask_is_the_kernels() {
        // Twice: the length is learned from the first answer.
        for _ in 0..2 {
            let count: u32 = real(0).unwrap().iter().map(|word| word.count_ones()).sum();
            let set = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
            let theirs = (0..nix::sched::CpuSet::count()).filter(|number| set.is_set(*number).unwrap()).count();
            assert_eq!(count as usize, theirs);
        }
    }
}
