//! Two hosts on one segment that reach each other by name.

use anyhow::Result;

use super::{definition::Definition, host::Host, image::Image, machine::Segment, payload::Payload, workshop::Workshop};

/// Boots two hosts of one image, called `a` and `b`. Each reaches the other by that name, as root by ssh without being
/// asked. Their addresses are 192.0.2.1 and 192.0.2.2, which RFC 5737 keeps for documents.
///
/// # Errors
/// When one does not come up.
pub fn pair(workshop: &Workshop, definition: &Definition, image: &Image, payload: &Payload) -> Result<[Host; 2]> {
    payload.add("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n192.0.2.1 a\n192.0.2.2 b\n")?;
    let make = |name: &str, number: u8| -> Result<Host> {
        let mut host = Host::make(workshop, definition, image, payload, name)?;
        host.join(Segment { directory: workshop.run().to_owned(), number, other: 3 - number });
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
    Ok(hosts)
}
