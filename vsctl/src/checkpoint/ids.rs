//! A server's ids of the host in its images: another host gives it others.
//!
//! CRIU writes owners as the server sees them, and the ids of the host in one place: the maps of the user namespace
//! (criu: `images/userns.proto`, `criu/include/magic.h`), which a restore gives to the new one.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use prost::Message;

use super::image::Manifest;
use crate::site::IDS_PER_SERVER;

/// How the image begins: what all images have, and that it is this one.
const MAGIC: [u32; 2] = [0x5456_4319, 0x5547_4906];

/// How its name begins; CRIU's number of the namespace follows.
const NAME: &str = "userns-";

/// `uid_gid_extent`
#[derive(Clone, PartialEq, Eq, Message)]
struct Extent {
    #[prost(uint32, required, tag = "1")]
    first: u32,
    #[prost(uint32, required, tag = "2")]
    lower_first: u32,
    #[prost(uint32, required, tag = "3")]
    count: u32,
}

/// `userns_entry`
#[derive(Clone, PartialEq, Eq, Message)]
struct Maps {
    #[prost(message, repeated, tag = "1")]
    users: Vec<Extent>,
    #[prost(message, repeated, tag = "2")]
    groups: Vec<Extent>,
}

/// Gives the images in `directory`, and what `manifest` says of them, the host's ids from `first` up.
///
/// # Errors
/// When they are damaged, or of a server whose ids are not one range.
pub fn give(directory: &Path, manifest: &mut Manifest, first: u32) -> Result<()> {
    let names: Vec<String> = manifest.files.keys().filter(|name| name.starts_with(NAME)).cloned().collect();
    let [name] = &names[..] else { bail!("the images have {} maps of ids, and one was expected", names.len()) };
    let file = directory.join(name);
    // What is damaged is not to be sealed as if it were right.
    if let Some(damaged) = manifest.damage(directory, name)? {
        return Err(damaged.into());
    }
    let bytes = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    let (now, was) = translated(&bytes, first).with_context(|| format!("{} is no map of ids", file.display()))?;
    kernel::file::replace(&file, &now, 0o644)?;
    manifest.note(directory, name)?;
    let own = was..was + IDS_PER_SERVER;
    let shift = |id: &mut u32| {
        if own.contains(id) {
            *id = *id - was + first;
        }
    };
    for group in &mut manifest.groups {
        shift(&mut group.uid);
        shift(&mut group.gid);
    }
    Ok(())
}

/// The image with ids from `first` up, and which the first was.
fn translated(image: &[u8], first: u32) -> Result<(Vec<u8>, u32)> {
    let word = |at: usize| image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
    ensure!([word(0), word(4)] == MAGIC.map(Some), "it begins otherwise");
    let length = word(8).context("it is cut")? as usize;
    ensure!(image.len() == 12 + length, "it has {} bytes, and {} were expected", image.len(), 12 + length);
    let maps = Maps::decode(&image[12..])?;
    let (users, groups) = (&maps.users[..], &maps.groups[..]);
    let ([user], true) = (users, users == groups) else { bail!("users and groups are not one range alike: {maps:?}") };
    ensure!(user.first == 0 && user.count == IDS_PER_SERVER, "the range is not a server's: {user:?}");
    let extent = Extent { lower_first: first, ..user.clone() };
    let body = Maps { users: vec![extent.clone()], groups: vec![extent] }.encode_to_vec();
    let mut now: Vec<u8> = MAGIC.iter().flat_map(|word| word.to_le_bytes()).collect();
    now.extend((body.len() as u32).to_le_bytes());
    now.extend(body);
    Ok((now, user.lower_first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::survey;
    use crate::lifecycle::guest_groups::GuestGroup;

    /// As CRIU 4.1 writes it for a server whose first id is 100000: two maps of 0, 100000, 65536.
    const OF_CRIU: &[u8] = b"\x19\x43\x56\x54\x06\x49\x47\x55\x18\0\0\0\
        \x0a\x0a\x08\0\x10\xa0\x8d\x06\x18\x80\x80\x04\x12\x0a\x08\0\x10\xa0\x8d\x06\x18\x80\x80\x04";

    #[test]
    fn another_range_and_back_is_the_same_image() {
        let (there, was) = translated(OF_CRIU, 1_000_000).unwrap();
        assert_eq!(was, 100_000);
        assert_eq!(translated(&there, 100_000).unwrap(), (OF_CRIU.to_vec(), 1_000_000));
    }

    #[test]
    fn what_is_no_map_of_a_server_is_refused() {
        for (at, byte) in [(0, 0), (8, 0x17), (12, 0xff), (15, 1), (21, 0x81)] {
            let mut image = OF_CRIU.to_vec();
            image[at] = byte;
            assert!(translated(&image, 1).is_err(), "byte {at}");
        }
        assert!(translated(&OF_CRIU[..20], 1).is_err());
        assert!(translated(b"", 1).is_err());
    }

    #[test]
    fn images_keep_their_sums_and_groups_their_owners() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("userns-9.img"), OF_CRIU).unwrap();
        fs::write(directory.path().join("core-1.img"), "core").unwrap();
        let group = |uid, gid| GuestGroup {
            path: "a".into(),
            controllers: String::new(),
            uid,
            gid,
            values: std::collections::BTreeMap::new(),
        };
        let mut manifest = Manifest { groups: vec![group(100_007, 0)], ..Manifest::example() };
        manifest.files = survey(directory.path()).unwrap();
        give(directory.path(), &mut manifest, 1_000_000).unwrap();
        manifest.verify(directory.path(), "").unwrap();
        assert_eq!(manifest.groups, [group(1_000_007, 0)]);
        let file = directory.path().join("userns-9.img");
        let mut bytes = fs::read(&file).unwrap();
        bytes[17] ^= 1;
        fs::write(&file, bytes).unwrap();
        assert!(give(directory.path(), &mut manifest, 5).unwrap_err().to_string().contains("damaged"));
    }
}
