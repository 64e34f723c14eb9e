//! Where a copy goes: cp(1)'s rules.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::failure::{Exit, Failure};

/// The path of the copy of a source called `name`: into `target` where that is a directory, else `target` itself,
/// whose directory must be there.
///
/// # Errors
/// Exit 20 when the directory is missing, or one would replace the other kind.
pub fn resolve(target: &Path, is_directory: bool, name: Option<&OsStr>) -> Result<PathBuf> {
    let bad = |message: String| Err(Failure::new(Exit::BadParameter, message).into());
    let shown = target.display();
    match fs::metadata(target) {
        Ok(found) if found.is_dir() => match name {
            Some(name) => into(&target.join(name), is_directory),
            None if is_directory => Ok(target.into()),
            None => bad(format!("{shown} is a directory: say what the file shall be called")),
        },
        Ok(_) if is_directory => bad(format!("{shown} is no directory")),
        Ok(_) => Ok(target.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if target.as_os_str().as_bytes().ends_with(b"/") && !is_directory {
                return bad(format!("there is no directory {shown}"));
            }
            let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !parent.is_dir() {
                return bad(format!("there is no directory {}", parent.display()));
            }
            // Without a slash at its end, which a new directory may have.
            Ok(parent.join(target.file_name().unwrap_or_default()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => bad(format!("{shown}: no directory on the way")),
        Err(error) => Err(error).with_context(|| format!("look at {shown}")),
    }
}

/// A name in a directory may be taken by the same kind only.
fn into(path: &Path, is_directory: bool) -> Result<PathBuf> {
    let wrong = match fs::metadata(path) {
        Ok(found) if found.is_dir() && !is_directory => "is a directory",
        Ok(found) if !found.is_dir() && is_directory => "is no directory",
        _ => return Ok(path.into()),
    };
    Err(Failure::new(Exit::BadParameter, format!("{} {wrong}", path.display())).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_cp_has_it() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir(at("dir")).unwrap();
        fs::create_dir(at("dir/sub")).unwrap();
        fs::write(at("file"), "").unwrap();
        let file = |target: &str| resolve(&at(target), false, Some(OsStr::new("name"))).ok();
        let directory = |target: &str| resolve(&at(target), true, Some(OsStr::new("name"))).ok();
        assert_eq!(file("dir"), Some(at("dir/name")));
        assert_eq!(file("dir/"), Some(at("dir/name")));
        assert_eq!(file("file"), Some(at("file")));
        assert_eq!(file("new"), Some(at("new")));
        for impossible in ["new/", "no/new", "file/new", "file/"] {
            assert_eq!(file(impossible), None, "{impossible}");
        }
        assert_eq!(directory("dir"), Some(at("dir/name")));
        assert_eq!(directory("new"), Some(at("new")));
        assert_eq!(directory("new/"), Some(at("new")));
        assert_eq!((directory("file"), directory("no/new")), (None, None));
        assert_eq!(resolve(&at("dir"), true, None).unwrap(), at("dir"));
        assert!(resolve(&at("dir"), false, None).is_err());
        assert!(resolve(&at("dir"), false, Some(OsStr::new("sub"))).is_err());
    }
}
