//! The user inside: from the guest's own /etc/passwd and /etc/group, read as a stranger's files.

use std::os::fd::BorrowedFd;

use anyhow::Result;
use init::accounts;

use crate::failure::{Exit, Failure};
use crate::guest_file;
use crate::name::Name;

/// A user of the guest, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// The login name.
    pub name: String,
    /// Its number inside.
    pub uid: u32,
    /// Its own group.
    pub gid: u32,
    /// All its groups, its own first.
    pub groups: Vec<u32>,
    /// The home directory.
    pub home: String,
    /// The login shell.
    pub shell: String,
}

/// The user `wanted` (a name or a number) of the guest with this root.
///
/// # Errors
/// When the guest has no such user, or keeps us waiting.
pub fn find(root: BorrowedFd<'_>, server: &Name, wanted: &str) -> Result<Account> {
    // A guest without these files still has a root.
    let [passwd, group] = guest_file::read(root, ["etc/passwd", "etc/group"])?;
    choose(&passwd, &group, wanted).ok_or_else(|| {
        Failure::new(Exit::BadParameter, format!("'{server}' has no user '{wanted}'"))
            .hint(format!("`vsctl exec {server} -- cat /etc/passwd` shows them"))
            .into()
    })
}

fn choose(passwd: &str, group: &str, wanted: &str) -> Option<Account> {
    let user = accounts::user(passwd, wanted).or_else(|| without_entry(wanted))?;
    let shell = if user.shell.is_empty() { "/bin/sh".into() } else { user.shell };
    let home = if user.home.starts_with('/') { user.home } else { "/".into() };
    let groups = accounts::groups_of(group, &user.name, user.gid);
    Some(Account { name: user.name, uid: user.uid, gid: user.gid, groups, home, shell })
}

/// Root, and numbers, need no entry.
fn without_entry(wanted: &str) -> Option<accounts::User> {
    let (uid, home) = match wanted {
        "root" | "0" => (0, "/root"),
        number => (number.parse().ok()?, "/"),
    };
    let name = if uid == 0 { "root" } else { wanted };
    Some(accounts::User { name: name.into(), uid, gid: uid, home: home.into(), shell: String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/ash\nanna:x:1000:1000::/home/anna:\nweb:x:33:33::relative:/bin/no\n";
    const GROUP: &str = "root:x:0:\nadm:x:4:anna\nanna:x:1000:\n";

    #[test]
    fn a_user_by_name_and_number_with_groups() {
        let anna = choose(PASSWD, GROUP, "anna").unwrap();
        assert_eq!((anna.uid, anna.groups.as_slice(), anna.shell.as_str()), (1000, [1000, 4].as_slice(), "/bin/sh"));
        assert_eq!(choose(PASSWD, GROUP, "1000").unwrap(), anna);
        assert_eq!(choose(PASSWD, GROUP, "web").unwrap().home, "/");
        assert_eq!(choose(PASSWD, GROUP, "nobody"), None);
        assert_eq!(choose(PASSWD, GROUP, ""), None);
        assert_eq!(choose(PASSWD, GROUP, "-1"), None);
    }

    #[test]
    fn a_guest_without_accounts_has_a_root_and_numbers() {
        let root = choose("", "", "root").unwrap();
        assert_eq!((root.uid, root.home.as_str(), root.shell.as_str()), (0, "/root", "/bin/sh"));
        assert_eq!(choose("", "", "0").unwrap(), root);
        let number = choose("", "", "7").unwrap();
        assert_eq!((number.name.as_str(), number.uid, number.gid), ("7", 7, 7));
    }
}
