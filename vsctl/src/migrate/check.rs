//! What at the target speaks against a server that is offered. Everything at once, and nothing is changed.

use std::path::Path;

use anyhow::{Context, Result};
use kernel::cgroup::{Controller, Hierarchies};

use super::processes;
use super::wire::{Offer, Problem, Size};
use crate::doctor;
use crate::edit;
use crate::failure::{Exit, Failure};
use crate::lifecycle::create;
use crate::lifecycle::group::Limits;
use crate::name::Name;
use crate::network::{self, Networks};
use crate::site::Site;
use crate::size::show_bytes;
use crate::spec::Spec;
use crate::store::{self, Server, Side};
use crate::template::Templates;

/// Free space and files that must be left beside what comes.
const SPARE: Size = Size { bytes: 64 << 20, entries: 1024 };

/// Looks at what is offered.
///
/// # Errors
/// When the host cannot be looked at.
pub fn problems(site: &Site, offer: &Offer, spec: &Spec) -> Result<Vec<Problem>> {
    let name = &offer.deal.name;
    let mut found: Vec<anyhow::Error> = Vec::new();
    let mut note = |outcome: Result<()>| found.extend(outcome.err());
    note(machine(offer));
    note(name_is_free(site, offer));
    note(template(site, spec, &offer.record.template_digest));
    note(create::free_id(site, create::FIRST_NUMBER).map(|_| ()));
    let server = Server { name: name.clone(), spec: spec.clone(), record: offer.record.clone() };
    for address in server.record.addresses.iter().chain(&server.spec.ip).collect::<std::collections::BTreeSet<_>>() {
        note(self::address(site, name, *address));
    }
    note(edit::check_host(spec, None));
    for problem in limits(&Limits::of(spec), &Hierarchies::detect()?) {
        note(Err(problem.into()));
    }
    for program in ["vsinit", "lxcfs-fuse"] {
        note(site.program(program).map(|_| ()));
    }
    note(room(site, offer.size));
    if let Some(theirs) = &offer.processes {
        match processes::here(site, name) {
            Ok(here) => processes::problems(&here, theirs).into_iter().for_each(|problem| note(Err(problem.into()))),
            Err(error) => note(Err(error)),
        }
    }
    Ok(found.iter().map(Problem::of).collect())
}

fn machine(offer: &Offer) -> Result<()> {
    let own = std::env::consts::ARCH;
    if offer.architecture == own {
        return Ok(());
    }
    let message = format!("the machine is {own}, and '{}' is made for {}", offer.deal.name, offer.architecture);
    Err(Failure::new(Exit::Unsupported, message).into())
}

/// What an earlier attempt left of the same server is no hindrance: its owner has kept it, and offers it again.
fn name_is_free(site: &Site, offer: &Offer) -> Result<()> {
    let name = &offer.deal.name;
    if !store::record_file(site, name).exists() {
        if site.server(name).exists() && !create::is_interrupted(site, name) {
            let message = format!("{} is left from something", site.server(name).display());
            return Err(Failure::new(Exit::Exists, message).into());
        }
        return Ok(());
    }
    let is_incoming = store::migration(site, name)?.is_some_and(|migration| migration.side == Side::Incoming);
    let uuid = store::load_record(site, name)?.uuid;
    if is_incoming && uuid == offer.deal.uuid {
        return Ok(());
    }
    Err(Failure::new(Exit::Exists, format!("there is a server '{name}' already")).hint("rename one of the two").into())
}

fn template(site: &Site, spec: &Spec, digest: &str) -> Result<()> {
    let template = Templates::below(&site.state()).open(&spec.template)?;
    if template.record.digest == digest {
        return Ok(());
    }
    let message =
        format!("the template '{}' is another there than the one that the server was made from", spec.template);
    let hint = "get it from the server's host, with owners and attributes: docs/migration.md has the line";
    Err(Failure::new(Exit::NoTemplate, message).hint(hint).into())
}

fn address(site: &Site, name: &Name, address: ipnet::IpNet) -> Result<()> {
    Networks::of(site)?.check(address)?;
    match network::owner(site, address) {
        Some(owner) if owner != *name => {
            Err(Failure::new(Exit::BadParameter, format!("ip: {address} is taken by '{owner}'")).into())
        }
        _ => Ok(()),
    }
}

/// Limits that the host cannot keep.
fn limits(limits: &Limits, hierarchies: &Hierarchies) -> Vec<Failure> {
    let is_asked = |controller| match controller {
        Controller::Memory => limits.memory_bytes.is_some() || limits.swap_bytes.is_some(),
        Controller::Cpu => limits.cpus.is_some(),
        Controller::Cpuset => limits.cpuset.is_some(),
        Controller::Pids => limits.pids.is_some(),
        _ => false,
    };
    let lacking = doctor::host::unlimited(hierarchies).into_iter().filter(|(controller, _)| is_asked(*controller));
    lacking
        .map(|(controller, keys)| {
            Failure::new(Exit::Unsupported, format!("{keys} cannot be limited"))
                .hint(format!("boot with cgroup_enable={}", controller.as_str()))
        })
        .collect()
}

/// Whether there is room on this host's disk.
///
/// # Errors
/// Exit 46 when there is not.
pub fn room(site: &Site, size: Size) -> Result<()> {
    let state = site.state();
    // Not made yet on a host that has had no server.
    let place = state.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let disk = rustix::fs::statvfs(place).with_context(|| format!("look at the disk of {}", place.display()))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let needed = size.bytes.saturating_add(SPARE.bytes);
    if free < needed {
        let message =
            format!("{} has {} free, and {} are needed", place.display(), show_bytes(free), show_bytes(needed));
        return Err(Failure::new(Exit::NoSpace, message).into());
    }
    // A file system without a table of files has 0 of them, and room for any number.
    if disk.f_files > 0 && disk.f_favail < size.entries.saturating_add(SPARE.entries) {
        let message =
            format!("{} has room for {} more files, and {} come", place.display(), disk.f_favail, size.entries);
        return Err(Failure::new(Exit::NoSpace, message).into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::exit_of;
    use crate::migrate::wire::Deal;
    use crate::store::{Migration, Record, migration_file, record_file};
    use std::fs;

    fn offer() -> Offer {
        let record = Record {
            version: 1,
            id: 1,
            uuid: "mine".into(),
            created_s: 0,
            template_digest: String::new(),
            addresses: Vec::new(),
        };
        Offer {
            deal: Deal { name: "web1".parse().unwrap(), uuid: "mine".into(), transaction: "t".into() },
            spec: "template = \"busybox\"\n".into(),
            record,
            architecture: std::env::consts::ARCH.into(),
            size: Size::default(),
            processes: None,
        }
    }

    #[test]
    fn a_name_is_free_unless_another_server_has_it() {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        let offer = offer();
        let name = &offer.deal.name;
        name_is_free(&site, &offer).unwrap();
        fs::create_dir_all(site.server(name)).unwrap();
        assert!(name_is_free(&site, &offer).unwrap_err().to_string().contains("left from something"));
        // Its own, from an attempt that was interrupted; then the same after it was handed over, and another's.
        fs::write(record_file(&site, name), toml::to_string(&offer.record).unwrap()).unwrap();
        let mark = Migration { side: Side::Incoming, transaction: "old".into(), peer: "a".into(), start: false };
        fs::write(migration_file(&site, name), toml::to_string(&mark).unwrap()).unwrap();
        name_is_free(&site, &offer).unwrap();
        let other = Offer { deal: Deal { uuid: "other".into(), ..offer.deal.clone() }, ..offer.clone() };
        assert_eq!(exit_of(&name_is_free(&site, &other).unwrap_err()), Exit::Exists);
        fs::remove_file(migration_file(&site, name)).unwrap();
        assert_eq!(exit_of(&name_is_free(&site, &offer).unwrap_err()), Exit::Exists);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        room(&site, Size::default()).unwrap();
        let error = room(&site, Size { bytes: u64::MAX, entries: 1 }).unwrap_err();
        assert_eq!(exit_of(&error), Exit::NoSpace);
        let other = Offer { architecture: "riscv64".into(), ..offer() };
        assert!(machine(&other).unwrap_err().to_string().contains("riscv64"));
        machine(&offer()).unwrap();
    }
}
