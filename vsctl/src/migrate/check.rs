//! What at the target speaks against a server that is offered. Everything at once, and nothing is changed.

use std::path::Path;

use anyhow::{Context, Result};
use kernel::cgroup::{Controller, Hierarchies};

use super::ladder::Hindrance;
use super::processes;
use super::wire::{Checked, Offer, Problem, Size};
use crate::checkpoint;
use crate::doctor;
use crate::edit;
use crate::failure::{Exit, Failure, exit_of};
use crate::lifecycle::create;
use crate::lifecycle::group::Limits;
use crate::name::Name;
use crate::network::{self, Networks};
use crate::site::Site;
use crate::size::show_bytes;
use crate::spec::Spec;
use crate::store::{self, Server, Side};
use crate::template::{Template, Templates};

/// Free space and files that must be left beside what comes.
const SPARE: Size = Size { bytes: 64 << 20, entries: 1024 };

/// Looks at what is offered.
///
/// # Errors
/// When the host cannot be looked at.
pub fn look(site: &Site, offer: &Offer, spec: &Spec) -> Result<Checked> {
    let name = &offer.deal.name;
    let mut found: Vec<anyhow::Error> = Vec::new();
    let mut note = |outcome: Result<()>| found.extend(outcome.err());
    note(machine(offer));
    note(name_is_free(site, offer));
    let coming = template(site, offer, &spec.template).unwrap_or_else(|error| {
        note(Err(error));
        None
    });
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
    let size = coming.map_or(offer.size, |template| offer.size.with(template));
    note(room_with_memory(site, size, offer.memory_bytes));
    if let Some(theirs) = &offer.processes {
        match processes::here(site, name) {
            Ok(here) => {
                let problems = processes::problems(&here, theirs, offer.is_postcopy).into_iter();
                problems.for_each(|problem| note(Err(problem).context(Hindrance::Unfit)));
                note(criu_is_ready(site, offer).context(Hindrance::Unfit));
            }
            Err(error) => note(Err(error.context(Hindrance::Unfit))),
        }
    }
    if offer.is_postcopy && !spec.privileged {
        note(faults_are_told().context(Hindrance::Unfit));
    }
    Ok(Checked { problems: found.iter().map(Problem::of).collect(), wants_template: coming.is_some() })
}

/// Whether CRIU can do here what is asked for. It is asked in any case: what it has to know of the kernel it knows when a server stands still.
fn criu_is_ready(site: &Site, offer: &Offer) -> Result<()> {
    let features = checkpoint::features(site)?;
    if features.brings_pages == Some(true) || !offer.is_postcopy {
        return Ok(());
    }
    let message = "the kernel's userfaultfd(2) cannot do what CRIU needs for post-copy";
    Err(Failure::new(Exit::Unsupported, message).into())
}

fn machine(offer: &Offer) -> Result<()> {
    let own = std::env::consts::ARCH;
    if offer.architecture == own {
        return Ok(());
    }
    let message = format!("the machine is {own}, and '{}' is made for {}", offer.deal.name, offer.architecture);
    Err(Failure::new(Exit::Unsupported, message).into())
}

/// Whether a program without rights on the host may have its missing pages brought by another: a restored one asks for that itself
/// (userfaultfd(2), `Documentation/admin-guide/sysctl/vm.rst`).
///
/// # Errors
/// When it may not.
pub fn faults_are_told() -> Result<()> {
    let file = "/proc/sys/vm/unprivileged_userfaultfd";
    match std::fs::read_to_string(file) {
        Ok(allowed) if allowed.trim() != "0" => Ok(()),
        Ok(_) => Err(Failure::new(Exit::Unsupported, "vm.unprivileged_userfaultfd is 0, and post-copy needs 1")
            .hint("`sysctl vm.unprivileged_userfaultfd=1` there, if its programs may use userfaultfd(2); or go without --postcopy")
            .into()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Failure::new(Exit::Unsupported, "the kernel has no userfaultfd(2), which post-copy needs").into())
        }
        Err(error) => Err(error).with_context(|| format!("read {file}")),
    }
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

/// What has to come of the server's template: its size, or nothing when it is here.
fn template(site: &Site, offer: &Offer, name: &Name) -> Result<Option<Size>> {
    let templates = Templates::below(&site.state());
    match templates.open(name) {
        Ok(template) => is_the_same(&template, &offer.record.template_digest).map(|()| None),
        Err(error) if exit_of(&error) != Exit::NoTemplate => Err(error),
        Err(_) => match (templates.stray(name), offer.template) {
            (Some(stray), _) => {
                Err(Failure::new(Exit::Exists, format!("{} is left from something", stray.display())).into())
            }
            (None, Some(size)) => Ok(Some(size)),
            (None, None) => Err(Failure::new(Exit::NoTemplate, format!("there is no template '{name}'"))
                .hint("`--send-template` sends it along")
                .into()),
        },
    }
}

/// Whether `template` is what the server was made from.
///
/// # Errors
/// Exit 91 when it is another of the same name.
pub fn is_the_same(template: &Template, digest: &str) -> Result<()> {
    if template.record.digest == digest {
        return Ok(());
    }
    let name = &template.name;
    let message = format!("the template '{name}' is another there than the one that the server was made from");
    let hint = format!(
        "when no server there is made of it, `vsctl template remove {name}` there makes room, and `--send-template` sends the right one"
    );
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

/// [`room`] for what has memory in it: that there is none for only this much of it hinders only who would take it along so.
///
/// # Errors
/// As [`room`].
pub fn room_with_memory(site: &Site, size: Size, memory_bytes: u64) -> Result<()> {
    let files = Size { bytes: size.bytes.saturating_sub(memory_bytes), ..size };
    room(site, size).map_err(|error| match room(site, files) {
        Ok(()) => error.context(Hindrance::Room),
        Err(_) => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::hint_of;
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
            memory_bytes: 0,
            processes: None,
            is_postcopy: false,
            template: None,
        }
    }

    #[test]
    fn a_template_that_is_missing_is_a_problem_unless_it_comes() {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        let (name, size) = ("busybox".parse().unwrap(), Size { bytes: 5, entries: 1 });
        let alone = template(&site, &offer(), &name).unwrap_err();
        assert_eq!((exit_of(&alone), hint_of(&alone)), (Exit::NoTemplate, Some("`--send-template` sends it along")));
        let sent = Offer { template: Some(size), ..offer() };
        assert_eq!(template(&site, &sent, &name).unwrap(), Some(size));
        // What is no template, and stands in its place.
        let place = site.state().join("templates/busybox");
        fs::create_dir_all(&place).unwrap();
        assert_eq!(exit_of(&template(&site, &sent, &name).unwrap_err()), Exit::Exists);
        let definition = "description = \"x\"\nfamily = \"generic\"\ninit = \"vsinit\"\nstop_signal = \"SIGPWR\"\nsource = { kind = \"busybox\" }\n";
        let record = "version = 1\norigin = \"x\"\nbuilt_s = 0\nentries = 1\nsize_bytes = 0\ndigest = \"there\"\ndistribution = { id = \"\", version = \"\", name = \"\" }\n";
        fs::write(place.join("template.toml"), definition).unwrap();
        fs::write(place.join("record.toml"), record).unwrap();
        let other = template(&site, &sent, &name).unwrap_err();
        assert_eq!(exit_of(&other), Exit::NoTemplate);
        assert!(hint_of(&other).unwrap().contains("template remove busybox"), "{other}");
        let same = Offer { record: Record { template_digest: "there".into(), ..offer().record }, ..sent };
        assert_eq!(template(&site, &same, &name).unwrap(), None);
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
        let mark = Migration {
            side: Side::Incoming,
            transaction: "old".into(),
            peer: "a".into(),
            start: false,
            is_postcopy: false,
        };
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
        // Without its memory it would.
        const MUCH: u64 = 1 << 60;
        let hindrance = |bytes, memory_bytes| {
            let error = room_with_memory(&site, Size { bytes, entries: 1 }, memory_bytes).unwrap_err();
            assert_eq!(exit_of(&error), Exit::NoSpace);
            Hindrance::of(&error)
        };
        assert_eq!((hindrance(MUCH, MUCH), hindrance(2 * MUCH, MUCH)), (Some(Hindrance::Room), None));
        room_with_memory(&site, Size::default(), 0).unwrap();
        let other = Offer { architecture: "riscv64".into(), ..offer() };
        assert!(machine(&other).unwrap_err().to_string().contains("riscv64"));
        machine(&offer()).unwrap();
    }
}
