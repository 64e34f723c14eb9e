//! Sets of processors in the kernel's list form: `0-3,7` (cpuset(7), "List format").

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::str::FromStr;

use crate::Result;
use crate::error::{During, Error};

/// More processors than any kernel is built for (`NR_CPUS` ends at 8192); a wild range must not fill the memory.
const NUMBER_MAX: u32 = 65_535;

/// A set of processor numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuSet(BTreeSet<u32>);

impl CpuSet {
    /// How many processors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The numbers, rising.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// Whether `cpu` is in the set.
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.contains(&cpu)
    }

    /// The numbers of the bits that are set in `mask`: processor 64·I+B is bit B of word I (sched_getaffinity(2)).
    pub fn from_mask(mask: &[u64]) -> CpuSet {
        let words = (0_u32..).zip(mask).filter(|(_, word)| **word != 0);
        words
            .flat_map(|(index, word)| (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 64 + bit))
            .collect()
    }

    /// The processors of the host that are online.
    pub fn online() -> Result<CpuSet> {
        let path = "/sys/devices/system/cpu/online";
        std::fs::read_to_string(path).during("read", path)?.trim().parse()
    }

    /// The processors of the host that a thread runs on only where it asks for them (`isolcpus=` at boot).
    pub fn isolated() -> Result<CpuSet> {
        let path = "/sys/devices/system/cpu/isolated";
        std::fs::read_to_string(path).during("read", path)?.trim().parse()
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<Numbers: IntoIterator<Item = u32>>(numbers: Numbers) -> Self {
        CpuSet(numbers.into_iter().collect())
    }
}

impl FromStr for CpuSet {
    type Err = Error;

    fn from_str(text: &str) -> Result<CpuSet> {
        let invalid = |why| Error::refused("parse processor list", text, io::ErrorKind::InvalidInput, why);
        let number = |digits: &str| match digits.trim().parse::<u32>() {
            Ok(number) if number <= NUMBER_MAX => Ok(number),
            _ => Err(invalid("expected numbers and ranges such as 0-3,7")),
        };
        let mut set = BTreeSet::new();
        for part in text.trim().split(',').filter(|_| !text.trim().is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(invalid("a range runs from low to high"));
            }
            set.extend(first..=last);
        }
        Ok(CpuSet(set))
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut numbers = self.iter().peekable();
        let mut separator = "";
        while let Some(first) = numbers.next() {
            let mut last = first;
            while numbers.next_if_eq(&(last + 1)).is_some() {
                last += 1;
            }
            if first == last {
                write!(f, "{separator}{first}")?
            } else {
                write!(f, "{separator}{first}-{last}")?
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for (text, written, length) in
            [("0-1,4", "0-1,4", 3), ("", "", 0), ("3,2,1", "1-3", 3), (" 5 \n", "5", 1), ("0,2", "0,2", 2)]
        {
            let set: CpuSet = text.parse().unwrap();
            assert_eq!((set.to_string().as_str(), set.len()), (written, length), "{text:?}");
        }
    }

    #[test]
    fn a_mask_has_its_lowest_number_first() {
        assert_eq!(CpuSet::from_mask(&[0b1011, 0, 1 << 63]).to_string(), "0-1,3,191");
        assert!(CpuSet::from_mask(&[0; 4]).is_empty());
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["a", "1-", "-1", "3-1", "1,,2", "0-4000000000", "1;2"] {
            assert!(text.parse::<CpuSet>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(numbers in proptest::collection::btree_set(0_u32..300, 0..40)) {
            let set = CpuSet(numbers);
            prop_assert_eq!(set.to_string().parse::<CpuSet>().unwrap(), set);
        }
    }
}
