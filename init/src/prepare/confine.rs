//! The last doors to close before the role begins: keyring, limits, capabilities, system calls.

use init::handover::{Handover, SeccompProfile};
use kernel::capability::{self, Set};
use kernel::keyring;
use kernel::seccomp::{Filter, Listener, Profile};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::failure::{During, Result};

/// What a booted machine gives its init (include/asm-generic/resource.h), except that programs of
/// today find the old limits on files and locked memory too small. Soft, hard; `None` = no limit.
const LIMITS: [(Resource, Option<u64>, Option<u64>); 8] = [
    (Resource::Core, Some(0), None),
    (Resource::Cpu, None, None),
    (Resource::Fsize, None, None),
    (Resource::Data, None, None),
    (Resource::As, None, None),
    (Resource::Stack, Some(8 << 20), None),
    (Resource::Memlock, Some(8 << 20), Some(8 << 20)),
    // select(2) breaks above 1024, so the soft limit stays.
    (Resource::Nofile, Some(1024), Some(524_288)),
];

/// Gives up what the server is not to have. Nothing that is needed to prepare works after it.
///
/// Returns the filter's listener, when it has one: from then on some calls wait until the monitor has it.
pub fn confine(handover: &Handover) -> Result<Option<Listener>> {
    match keyring::join_new_session() {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {}
        joined => joined.during(|| "leave the host's session keyring".into())?,
    }
    LIMITS.iter().for_each(|(resource, soft, hard)| limit(*resource, *soft, *hard));
    // The bounding set before the filter: the filter may refuse prctl's more exotic uses.
    let keep = Set::from_bits(handover.capabilities);
    capability::limit_bounding(keep).during(|| "limit the capabilities".into())?;
    let mut listener = None;
    if let Some(SeccompProfile { migratable, privileged, listened }) = handover.seccomp {
        let profile = Profile { migratable, privileged, listened };
        listener = Filter::compile(&profile).install().during(|| "install the system-call filter".into())?;
    }
    // After the filter, which takes CAP_SYS_ADMIN to install.
    limit_own(keep).during(|| "limit the capabilities".into())?;
    Ok(listener)
}

/// This process too keeps no more. Nothing is inheritable: a root program gets its capabilities
/// from the bounding set, and others are to get none.
fn limit_own(keep: Set) -> rustix::io::Result<()> {
    let permitted = rustix::thread::capabilities(None)?.permitted;
    let kept = CapabilitySet::from_bits_retain(keep.bits() & permitted.bits());
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)
}

/// Sets a limit as far as this process may: raising a hard one takes a right that a user
/// namespace never has.
fn limit(resource: Resource, soft: Option<u64>, hard: Option<u64>) {
    let wanted = Rlimit { current: soft, maximum: hard };
    if setrlimit(resource, wanted).is_ok() {
        return;
    }
    let ceiling = getrlimit(resource).maximum;
    let lower = |limit: Option<u64>| match (limit, ceiling) {
        (Some(limit), Some(ceiling)) => Some(limit.min(ceiling)),
        (limit, None) => limit,
        (None, ceiling) => ceiling,
    };
    let clamped = Rlimit { current: lower(soft), maximum: lower(hard) };
    if let Err(error) = setrlimit(resource, clamped) {
        log::debug!("limit of {resource:?}: {error}");
    }
}
