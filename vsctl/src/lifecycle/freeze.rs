//! Freeze and thaw: a server's processes are held in memory and let go on.

use anyhow::Result;

use super::change::ChangeStep;
use super::state::{self, Action, State};
use super::step::Step;
use super::world::World;
use crate::events::{self, Kind};
use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// The one step of a freeze; a thaw takes it back.
pub fn plan(site: &Site, name: &Name) -> Vec<Step> {
    let step = ChangeStep::Freeze { group: site.server_cgroup(name), mark: site.server_run(name).join("frozen") };
    vec![Step::Change(step)]
}

/// Checks that `action` makes sense for the server now.
///
/// # Errors
/// Exit 44 when there is none, 31 when it does not run, 32 when it is frozen or running already.
pub fn check(site: &Site, name: &Name, action: Action) -> Result<()> {
    store::load(site, name)?;
    let now = state::of(site, name)?;
    if now.after(action).is_some() {
        return Ok(());
    }
    let failure = match now {
        State::Running if action == Action::Thaw => {
            Failure::new(Exit::AlreadyRunning, format!("'{name}' is not frozen"))
        }
        State::Running | State::Frozen => Failure::new(Exit::AlreadyRunning, format!("'{name}' is {now} already")),
        _ => Failure::new(Exit::NotRunning, format!("'{name}' is not running")),
    };
    Err(failure.into())
}

/// Holds all processes of a running server.
///
/// # Errors
/// When it does not run, or some process does not stand still in time; then none does.
pub fn freeze(site: &Site, name: &Name) -> Result<()> {
    let _lock = store::lock(site, name)?;
    store::try_forget_leaving(site, name);
    check(site, name, Action::Freeze)?;
    hold(site, name)?;
    events::note(site, name, Kind::Frozen);
    Ok(())
}

/// Holds the processes of a server whose lock the caller has, as [`freeze`] does.
///
/// # Errors
/// When some process does not stand still in time; then none does.
pub fn hold(site: &Site, name: &Name) -> Result<()> {
    let mut world = World::new(site);
    plan(site, name).iter().try_for_each(|step| step.apply(&mut world))
}

/// Lets the processes of a server whose lock the caller has go on, as [`thaw`] does.
///
/// # Errors
/// When the kernel refuses.
pub fn let_go_on(site: &Site, name: &Name) -> Result<()> {
    let mut world = World::new(site);
    plan(site, name).iter().try_for_each(|step| step.undo(&mut world))
}

/// Lets the processes of a frozen server go on.
///
/// # Errors
/// When it is not frozen, or the kernel refuses.
pub fn thaw(site: &Site, name: &Name) -> Result<()> {
    let _lock = store::lock(site, name)?;
    check(site, name, Action::Thaw)?;
    let_go_on(site, name)?;
    store::try_forget_leaving(site, name);
    events::note(site, name, Kind::Thawed);
    Ok(())
}
