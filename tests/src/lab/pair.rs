//! Two hosts on one segment that reach each other by name.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

use super::{
    definition::Definition,
    host::{Host, Larger},
    image::Image,
    machine::Segment,
    payload::Payload,
    workshop::Workshop,
};

/// How many pairs there have been. Held by the one that is: two hosts fill two processors.
static PAIRS: Mutex<u32> = Mutex::new(0);

/// Two hosts, and nobody else's two as long as they are there.
pub struct Pair {
    /// They.
    pub hosts: [Host; 2],
    _alone: MutexGuard<'static, u32>,
}

/// Boots two hosts of one image, called `a` and `b`. Each reaches the other by that name, as root by ssh without being
/// asked. Their addresses are 192.0.2.1 and 192.0.2.2, which RFC 5737 keeps for documents.
///
/// # Errors
/// When one does not come up.
pub fn pair(workshop: &Workshop, definition: &Definition, image: &Image, payload: &Payload) -> Result<Pair> {
    pair_with(workshop, definition, image, payload, None)
}

/// The same, each larger if that is wanted.
///
/// # Errors
/// As [`pair`].
pub fn pair_with(
    workshop: &Workshop,
    definition: &Definition,
    image: &Image,
    payload: &Payload,
    larger: Option<Larger>,
) -> Result<Pair> {
    let mut number = PAIRS.lock().unwrap_or_else(PoisonError::into_inner);
    *number += 1;
    let place = format!("pair-{number}");
    let directory = workshop.run().join(&place);
    fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
    payload.add("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n192.0.2.1 a\n192.0.2.2 b\n")?;
    let make = |name: &str, number: u8| -> Result<Host> {
        let mut host = Host::make(workshop, definition, image, payload, &format!("{place}-{name}"))?;
        larger.map_or(Ok(()), |larger| host.enlarge(larger))?;
        host.join(Segment { directory: directory.clone(), number, other: 3 - number });
        host.begin()?;
        Ok(host)
    };
    // Both boot at once.
    let mut hosts = [make("a", 1)?, make("b", 2)?];
    for (host, name) in hosts.iter_mut().zip(["a", "b"]) {
        host.wait_until_reached()?;
        host.sh(&format!(
            "echo {name} >/etc/hostname; hostname {name} 2>/dev/null || echo {name} >/proc/sys/kernel/hostname"
        ))?;
    }
    Ok(Pair { hosts, _alone: number })
}
