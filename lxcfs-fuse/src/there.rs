//! What is at a place of the tree: whether it is there for this server, and the texts of `/sys/devices/system`.
//!
//! Limit: nothing is known of the host's sysfs before somebody looks; each file is then one stat(2) or one reading.

use crate::inode::{At, Kind};
use crate::render;
use crate::snapshot::{Cpus, Snapshot, Unreadable, parse};

/// Whether the place is there; what a CPU that is not visible has is not.
pub fn is_there(snapshot: &Snapshot<'_>, at: At) -> Result<bool, Unreadable> {
    let cpu = match at.has_cpu() || at.is_numbered() {
        true => snapshot.cpus()?.visible().get(usize::from(at.cpu)).copied(),
        false => Some(0),
    };
    Ok(match cpu {
        None => false,
        // To a node, which kernels without NUMA do not have.
        Some(_) if at.is_link() && at.has_cpu() => snapshot.host_has("sys/devices/system/node")?,
        Some(_) if !at.is_of_the_host() => true,
        Some(cpu) => snapshot.host_has(&at.path(cpu as u16))?,
    })
}

/// All that is in the directory `at`.
pub fn children(snapshot: &Snapshot<'_>, at: At) -> Result<Vec<At>, Unreadable> {
    let mut found = Vec::new();
    for child in at.children() {
        if child.is_cache() {
            let numbered = (0..u16::from(u8::MAX)).map_while(|number| child.numbered(number));
            for cache in numbered {
                if !is_there(snapshot, cache)? {
                    break;
                }
                found.push(cache);
            }
        } else if child.is_numbered() {
            let visible = u16::try_from(snapshot.cpus()?.visible).unwrap_or(u16::MAX);
            found.extend((0..visible).filter_map(|number| child.numbered(number)));
        } else if !child.may_be_missing() || is_there(snapshot, child)? {
            found.push(child);
        }
    }
    Ok(found)
}

/// Renders a file that tells of CPUs, or is the host's.
pub fn text(out: &mut String, snapshot: &Snapshot<'_>, at: At, kind: Kind) -> Result<(), Unreadable> {
    let cpus = snapshot.cpus()?;
    let all: Vec<u32> = (0..cpus.visible as u32).collect();
    let itself = u32::from(at.cpu);
    // One that is gone has no files, also for who has them open.
    let real = real(&cpus, at)?;
    match kind {
        Kind::Cpus => render::cpu_list(out, &all),
        Kind::CpusMask => render::cpu_mask(out, &all, cpus.visible),
        Kind::Itself | Kind::Number => render::cpu_list(out, &[itself]),
        Kind::ItselfMask => render::cpu_mask(out, &[itself], cpus.visible),
        Kind::NodeCpu => {
            out.push_str("../../cpu/");
            out.push_str(&at.name());
        }
        Kind::SharedCpus => render::cpu_list(out, &shared(snapshot, at, &cpus)?),
        Kind::SharedCpusMask => render::cpu_mask(out, &shared(snapshot, at, &cpus)?, cpus.visible),
        Kind::Host => out.push_str(&snapshot.host_text(&at.path(real))?),
        _ => return Err(Unreadable::Io(rustix::io::Errno::NOTSUP.into())),
    }
    Ok(())
}

/// The visible CPUs, by the server's numbers, that share the cache `at` is about.
fn shared(snapshot: &Snapshot<'_>, at: At, cpus: &Cpus) -> Result<Vec<u32>, Unreadable> {
    let list = format!("{}/shared_cpu_list", at.parent().path(real(cpus, at)?));
    let sharing = parse::cpu_list(&snapshot.host_text(&list)?);
    let visible = (0..).zip(cpus.visible());
    Ok(visible.filter(|(_, cpu)| sharing.contains(cpu)).map(|(number, _)| number).collect())
}

/// The host's number of the CPU that the server calls `at.cpu`.
fn real(cpus: &Cpus, at: At) -> Result<u16, Unreadable> {
    match cpus.visible().get(usize::from(at.cpu)) {
        Some(&cpu) => Ok(cpu as u16),
        // It was, when the file was opened.
        None => Err(Unreadable::Io(rustix::io::Errno::NODEV.into())),
    }
}
