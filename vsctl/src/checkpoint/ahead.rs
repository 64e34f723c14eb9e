//! Memory that is written while a server runs on, so that little is left for when it stands still (criu(8): pre-dump).
//!
//! Each round holds what has changed since the one before, and the images of the suspend what has changed since the last. CRIU finds
//! from one to the other by links, which go through the volume: so the server's root may pass through that from then on. Nobody gets there but
//! by the server's directory, which is the host's root's alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::dump::{Subject, persistently};
use super::image::survey;
use super::{OPEN, clear, give, give_way};
use crate::checksum::Sum;
use crate::criu;
use crate::interrupt;
use crate::name::Name;
use crate::site::Site;
use crate::store::Server;
use crate::volume::{self, MEMORY};

/// The rounds of a server that are on the disk.
#[derive(Debug, Default)]
pub struct Ahead {
    rounds: Vec<BTreeMap<String, Sum>>,
}

impl Ahead {
    /// Writes one more round of a running server, which stands still only while it is looked at. Returns its directory, and how much
    /// memory is in it, in bytes. None: it could not be looked at just now, and with that all earlier rounds have become worthless and are gone.
    ///
    /// # Errors
    /// As [`super::suspend`]; what is on the disk then is of no use ([`super::clear`]).
    pub fn round(&mut self, site: &Site, server: &Server, subject: &Subject<'_>) -> Result<Option<(PathBuf, u64)>> {
        if self.rounds.is_empty() {
            clear(site, &server.name)?;
        }
        let number = self.rounds.len();
        let parent = (number > 0).then(|| Path::new("..").join(number.to_string()));
        let directory = directory(site, &server.name).join((number + 1).to_string());
        let write = || {
            interrupt::check()?;
            fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
            give_way(site, server)?;
            // No other: what was sent already, and is touched again, has changed.
            give(&directory, server.first_id(site), OPEN)?;
            if number == 0 {
                subject.keep_program(&directory)?;
            }
            subject.write_ahead(&directory, parent.clone())
        };
        match persistently(number == 0, &directory, write) {
            Err(error) if number > 0 && criu::may_pass(&error) => {
                log::info!("what was written ahead of '{}' is given up: {error:#}", server.name);
                self.rounds.clear();
                return clear(site, &server.name).map(|()| None);
            }
            written => written.map_err(criu::say_if_the_disk_is_full)?,
        }
        let files = survey(&directory)?;
        let bytes = files.values().map(|image| image.bytes).sum();
        self.rounds.push(files);
        Ok(Some((directory, bytes)))
    }

    /// Whether there is any.
    pub fn is_empty(&self) -> bool {
        self.rounds.is_empty()
    }

    /// The last round, as images in the volume name it.
    pub fn parent(&self) -> Option<PathBuf> {
        (!self.rounds.is_empty()).then(|| Path::new("..").join(MEMORY).join(self.rounds.len().to_string()))
    }

    /// All its files, by their names for images in the volume.
    pub fn files(&self) -> impl Iterator<Item = (String, Sum)> + '_ {
        self.rounds.iter().zip(1..).flat_map(|(files, number)| {
            files.iter().map(move |(name, image)| (format!("../{MEMORY}/{number}/{name}"), image.clone()))
        })
    }
}

/// The directory of all rounds.
pub fn directory(site: &Site, name: &Name) -> PathBuf {
    volume::directory(site, name).join(MEMORY)
}
