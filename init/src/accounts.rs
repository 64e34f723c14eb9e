//! The guest's `/etc/passwd` and `/etc/group`, parsed by ourselves.
//!
//! The C library's look-ups would load the guest's NSS modules into PID 1; a static program must
//! not, and a guest's library has no business here. Pure; malformed lines are passed over.

/// One line of passwd(5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The login name.
    pub name: String,
    /// Its number.
    pub uid: u32,
    /// Its own group.
    pub gid: u32,
    /// The home directory.
    pub home: String,
    /// The login shell; empty means `/bin/sh`.
    pub shell: String,
}

/// The user with this name, or else with this number.
pub fn user(passwd: &str, wanted: &str) -> Option<User> {
    let users = || passwd.lines().filter_map(user_line);
    users().find(|user| user.name == wanted).or_else(|| {
        let uid: u32 = wanted.parse().ok()?;
        users().find(|user| user.uid == uid)
    })
}

/// The number of the group with this name; a number stands for itself.
pub fn group(group: &str, wanted: &str) -> Option<u32> {
    let named = group.lines().filter_map(group_line).find(|(name, ..)| *name == wanted);
    named.map(|(_, gid, _)| gid).or_else(|| wanted.parse().ok())
}

/// All groups that list `name` as a member, with `own` first.
pub fn groups_of(group: &str, name: &str, own: u32) -> Vec<u32> {
    let mut gids = vec![own];
    for (_, gid, members) in group.lines().filter_map(group_line) {
        if members.split(',').any(|member| member == name) && !gids.contains(&gid) {
            gids.push(gid);
        }
    }
    gids
}

fn user_line(line: &str) -> Option<User> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, shell] = fields[..] else {
        return None;
    };
    if name.is_empty() {
        return None;
    }
    let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
    Some(User { name: name.into(), uid, gid, home: home.into(), shell: shell.into() })
}

fn group_line(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?.parse().ok()?);
    Some((name, gid, fields.next().unwrap_or("")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        broken:x:zero\n\
        www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n\
        1000:x:7:7::/x:\n\
        anna:x:1000:1000:Anna,,,:/home/anna:/bin/bash\n\
        :x:5:5:::\n";
    const GROUP: &str = "root:x:0:\nadm:x:4:anna,syslog\nwww-data:x:33:\n\
        anna:x:1000:anna\nbad:x:y:anna\nshort:x:50\n";

    #[test]
    fn users_by_name_and_number() {
        assert_eq!(user(PASSWD, "www-data").unwrap().uid, 33);
        assert_eq!(user(PASSWD, "33").unwrap().name, "www-data");
        // A name that looks like a number is a name first, as everywhere.
        assert_eq!(user(PASSWD, "1000").unwrap().uid, 7);
        assert_eq!(user(PASSWD, "anna").unwrap().shell, "/bin/bash");
        assert_eq!(user(PASSWD, "broken"), None);
        assert_eq!(user(PASSWD, ""), None);
        assert_eq!(user("", "root"), None);
    }

    #[test]
    fn groups() {
        assert_eq!(group(GROUP, "adm"), Some(4));
        assert_eq!(group(GROUP, "short"), Some(50));
        assert_eq!(group(GROUP, "77"), Some(77));
        assert_eq!(group(GROUP, "nobody"), None);
        assert_eq!(groups_of(GROUP, "anna", 1000), [1000, 4]);
        assert_eq!(groups_of(GROUP, "syslog", 9), [9, 4]);
        assert_eq!(groups_of(GROUP, "root", 0), [0]);
    }
}
