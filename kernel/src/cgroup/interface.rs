//! Reading and writing the small files of a cgroup.

use std::io::{self, Write};
use std::path::Path;

use crate::Result;
use crate::error::{During, Error};

/// The content of an interface file, without the newline at its end.
pub(super) fn read(path: &Path) -> Result<String> {
    let mut text = std::fs::read_to_string(path).during("read", path.display())?;
    text.truncate(text.trim_end().len());
    Ok(text)
}

/// Like [`read`]; `None` when the file or its group is not there (the controller is not enabled, or the kernel lacks it).
pub(super) fn read_optional(path: &Path) -> Result<Option<String>> {
    match read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a value; the file must be there.
pub(super) fn write(path: &Path, value: impl AsRef<[u8]>) -> Result<()> {
    let value = value.as_ref();
    let open = std::fs::OpenOptions::new().write(true).open(path);
    let mut file = open.during("open", path.display())?;
    file.write_all(value).map_err(|source| {
        Error::new("write", format_args!("'{}' to {}", String::from_utf8_lossy(value), path.display()), source)
    })
}

/// Like [`write`]; `false` when the file is not there.
pub(super) fn write_optional(path: &Path, value: impl AsRef<[u8]>) -> Result<bool> {
    match write(path, value) {
        Ok(()) => Ok(true),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Not there: ENOENT, and ENODEV for a file whose group was removed while it was open.
pub(super) fn is_missing(error: &Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The number in an interface file; `max` is `None`, and so is a missing file.
pub(super) fn read_number(path: &Path) -> Result<Option<u64>> {
    Ok(read_optional(path)?.and_then(|text| text.trim().parse().ok()))
}

/// The value behind `key` in a file of `key value` lines.
pub(super) fn value_of(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_whole_word() {
        let text = "user_usec 7\nusage_usec 12\nusage_usec_x 3\n";
        assert_eq!(value_of(text, "usage_usec"), Some(12));
        assert_eq!(value_of(text, "usage"), None);
    }
}
