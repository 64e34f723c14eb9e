//! What interrupted commands and dead processes left behind, and how it is mended.
//!
//! Only what carries this site's exact names is touched, and only under the lock of the server whose name it bears: a
//! command that is at work is not disturbed. The order matters: first what has a journal, then what has only a name.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ipnet::IpNet;
use kernel::cgroup::{Controller, Hierarchies};
use kernel::lock::Flock;

use super::{Finding, Verdict, trial};
use crate::checkpoint::{self, tree};
use crate::criu::pages;
use crate::edit;
use crate::lifecycle::change::ChangeStep;
use crate::lifecycle::facilities::{self, Facilities};
use crate::lifecycle::files::FilesStep;
use crate::lifecycle::state::{self, State};
use crate::lifecycle::step::Step;
use crate::lifecycle::world::World;
use crate::lifecycle::{create, freeze, journal, network, start, stop, view};
use crate::monitor;
use crate::name::Name;
use crate::site::Site;
use crate::store::{self, Pausing, Side};
use crate::template::remove_tree;

/// One look, with what is found so far.
struct Round<'a> {
    site: &'a Site,
    world: World<'a>,
    fix: bool,
    findings: Vec<Finding>,
}

/// Looks for what was left behind, and mends it if `fix` is set.
///
/// # Errors
/// When the site's directories cannot be read. What cannot be mended is a finding.
pub fn examine(site: &Site, fix: bool) -> Result<Vec<Finding>> {
    let mut round = Round { site, world: World::new(site), fix, findings: Vec::new() };
    round.interrupted_changes()?;
    let created = round.interrupted_creations()?;
    round.interrupted_migrations()?;
    round.interrupted_starts()?;
    round.interrupted_dumps()?;
    round.interrupted_departures()?;
    round.interrupted_trees()?;
    round.interrupted_set_up()?;
    round.running_servers()?;
    round.view()?;
    round.views_of_servers()?;
    round.runtime_directories()?;
    round.groups()?;
    round.links()?;
    round.bindings()?;
    round.unreserved()?;
    round.reservations()?;
    round.templates()?;
    if created {
        round.last_light()?;
    }
    Ok(round.findings)
}

impl Round<'_> {
    /// Notes a thing that was left, and mends it when that is wanted.
    fn left(&mut self, subject: String, detail: &str, mend: impl FnOnce(&mut Self) -> Result<()>) {
        let finding = if !self.fix {
            Finding::new(Verdict::Left, subject, detail).remedy("vsctl doctor --fix")
        } else {
            match mend(self) {
                Ok(()) => Finding::new(Verdict::Mended, subject, detail),
                Err(error) => Finding::new(Verdict::Left, subject, format!("{detail}; {error:#}")),
            }
        };
        self.findings.push(finding);
    }

    /// The lock of a server, or none when a command works on it just now: then it is none of our business.
    fn lock(&self, name: &Name) -> Result<Option<Flock>> {
        let directory = self.site.run().join("lock");
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        Ok(Flock::try_exclusive(&directory.join(name.as_str()))?)
    }

    fn interrupted_changes(&mut self) -> Result<()> {
        for (name, steps) in edit::interrupted(self.site)? {
            let Some(_lock) = self.lock(&name)? else { continue };
            let detail = format!("a change was interrupted ({} steps)", steps.len());
            self.left(format!("server {name}"), &detail, |round| edit::recover(round.site, &name));
        }
        Ok(())
    }

    /// Whether there were any.
    fn interrupted_creations(&mut self) -> Result<bool> {
        let mut found = Vec::new();
        for name in create::recover_all(self.site, false)? {
            // Held by a command that is creating or destroying it.
            if self.lock(&name)?.is_some() {
                found.push(name);
            }
        }
        if found.is_empty() {
            return Ok(false);
        }
        let outcome = if self.fix { create::recover_all(self.site, true).map(|_| ()) } else { Ok(()) };
        let mut outcome = Some(outcome);
        for name in found {
            let outcome = outcome.take().unwrap_or(Ok(()));
            self.left(format!("server {name}"), "its creation or removal was interrupted", |_| outcome);
        }
        Ok(true)
    }

    /// Servers between two hosts. Which of them is to go on is not ours to say: the source decides, and it may be the other host.
    fn interrupted_migrations(&mut self) -> Result<()> {
        for name in store::names(self.site)? {
            let subject = format!("server {name}");
            let finding = match store::migration(self.site, &name) {
                Ok(None) => continue,
                Ok(Some(migration)) => {
                    // Held by the command that moves it.
                    let Some(_lock) = self.lock(&name)? else { continue };
                    if store::migration(self.site, &name)?.is_none() {
                        continue;
                    }
                    let peer = &migration.peer;
                    match migration.side {
                        Side::Moved => {
                            let detail = format!("it has moved to {peer}, and a copy is here");
                            let remedy = format!("vsctl migrate {name} {peer} --continue");
                            Finding::new(Verdict::Left, subject, detail).remedy(remedy)
                        }
                        Side::Incoming => {
                            let detail = format!("it came from {peer}, which has not handed it over");
                            let remedy = format!("on {peer}: vsctl migrate {name} HOST --continue, or --abort");
                            Finding::new(Verdict::Left, subject, detail).remedy(remedy)
                        }
                    }
                }
                Err(error) => Finding::new(Verdict::Left, subject, format!("{error:#}")),
            };
            self.findings.push(finding);
        }
        Ok(())
    }

    fn interrupted_starts(&mut self) -> Result<()> {
        for name in store::entries(&self.site.run().join("journal"))? {
            if state::is_running(self.site, &name)? {
                continue;
            }
            let Some(_lock) = self.lock(&name)? else { continue };
            // It may have come up, or have been taken back, before we had the lock.
            let journal = state::journal_file(self.site, &name);
            if state::is_running(self.site, &name)? || !state::has_journal(self.site, &name)? {
                continue;
            }
            let count = journal::standing(&journal).map_or(0, |steps| steps.len());
            let detail = format!("it does not run, and {count} steps of its start stand");
            self.left(format!("server {name}"), &detail, |round| stop::recover(round.site, &name));
        }
        Ok(())
    }

    /// Images that were not finished, or are of no use any more; and servers that were cut off for the time of their dump.
    fn interrupted_dumps(&mut self) -> Result<()> {
        for name in store::names(self.site)? {
            let Some(_lock) = self.lock(&name)? else { continue };
            for directory in checkpoint::leftovers(self.site, &name)? {
                self.left(directory.display().to_string(), "images or a disk of no use", |_| remove_tree(&directory));
            }
            if !state::is_running(self.site, &name)? {
                let logs = self.site.server(&name);
                if pages::is_left(&logs) {
                    let detail = "criu waits there, or has waited, to bring memory of processes that do not come";
                    self.left(format!("server {name}"), detail, |_| pages::clear(&logs));
                }
                continue;
            }
            // One whose spec cannot be read is another's finding.
            let Ok(server) = store::load(self.site, &name) else { continue };
            if network::is_cut_off(&self.world, &server)? {
                let detail = "its link is off the bridge, as for a suspend that was interrupted";
                self.left(format!("server {name}"), detail, |round| {
                    network::put_on_bridge(&round.world, &server, true)
                });
            }
        }
        Ok(())
    }

    /// Servers that were about to leave, stood still for that, and are this host's: nobody else lets them go on.
    fn interrupted_departures(&mut self) -> Result<()> {
        for name in store::names(self.site)? {
            let subject = format!("server {name}");
            let leaving = match store::leaving(self.site, &name) {
                Ok(Some(leaving)) => leaving,
                Ok(None) => continue,
                Err(error) => {
                    self.findings.push(Finding::new(Verdict::Left, subject, format!("{error:#}")));
                    continue;
                }
            };
            let Some(lock) = self.lock(&name)? else { continue };
            // It may have gone on before we had the lock.
            if store::leaving(self.site, &name)?.is_none() {
                continue;
            }
            let state = state::of(self.site, &name)?;
            let detail = format!(
                "it ran, and is {state} since its migration to {} was interrupted: it is to go on",
                leaving.peer
            );
            match state {
                // It has ended by itself, or somebody has stopped it, before the command did.
                State::Stopped | State::Suspended if leaving.pausing.is_none() => {}
                State::Stopped => {
                    self.left(subject, &detail, |round| start::begin_held(round.site, &name, lock)?.finish(round.site))
                }
                State::Suspended => {
                    self.left(subject, &detail, |round| checkpoint::resume_held(round.site, &name, lock))
                }
                State::Frozen => self.left(subject, &detail, |round| {
                    freeze::let_go_on(round.site, &name)?;
                    store::forget_leaving(round.site, &name)
                }),
                // One that is being stopped is not forgotten before it has.
                State::Running if self.fix && leaving.pausing != Some(Pausing::Stops) => {
                    store::forget_leaving(self.site, &name)?
                }
                // Another finding is about these.
                _ => {}
            }
        }
        Ok(())
    }

    /// Checkpoints of trees that were not finished, or not removed to the end.
    fn interrupted_trees(&mut self) -> Result<()> {
        for (label, left) in tree::leftovers(self.site)? {
            let Some(_lock) = tree::try_lock(self.site, &label)? else { continue };
            // Named, or removed, before we had the lock.
            if left.exists() {
                self.left(left.display().to_string(), "images of no use", |_| remove_tree(&left));
            }
        }
        Ok(())
    }

    fn interrupted_set_up(&mut self) -> Result<()> {
        let host = self.site.run().join("host");
        if !host.join("journal").exists() || Facilities(self.site).are_up()? {
            return Ok(());
        }
        let Some(lock) = Flock::try_exclusive(&host.join("lock"))? else { return Ok(()) };
        drop(lock);
        let detail = "setting up what servers share was interrupted";
        self.left("host".into(), detail, |round| Facilities(round.site).remove());
        Ok(())
    }

    fn running_servers(&mut self) -> Result<()> {
        for name in store::names(self.site)? {
            let now = state::of(self.site, &name)?;
            if !matches!(now, State::Running | State::Frozen) {
                continue;
            }
            if !monitor::is_alive(self.site, &name)? {
                self.left(format!("server {name}"), "it runs without a monitor", |round| adopt(round.site, &name));
            }
            let Some(_lock) = self.lock(&name)? else { continue };
            let frozen = self.world.group(&self.site.server_cgroup(&name))?.is_frozen().unwrap_or(now == State::Frozen);
            if frozen == (now == State::Frozen) {
                continue;
            }
            let mark = self.site.server_run(&name).join("frozen");
            let detail = if frozen { "it is frozen without a mark" } else { "it is marked as frozen and runs" };
            self.left(format!("server {name}"), detail, |_| {
                let marked = if frozen { fs::write(&mark, "") } else { fs::remove_file(&mark) };
                marked.with_context(|| format!("mark {}", mark.display()))
            });
        }
        Ok(())
    }

    fn view(&mut self) -> Result<()> {
        if !Facilities(self.site).are_up()? {
            return Ok(());
        }
        let directory = self.site.lxcfs();
        let mount = directory.join("mount");
        let outcome = match kernel::mount::is_mount_point(&mount) {
            Ok(true) => trial::fuse(&mount),
            Ok(false) => Err(anyhow::anyhow!("it is not mounted")),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = outcome {
            let detail = format!("{}: {error:#}", mount.display());
            self.left("FUSE overlay".into(), &detail, |round| {
                facilities::serve(round.site, &directory)?;
                trial::fuse(&mount).context("it does not answer yet")
            });
        } else if self.is_of_another_program()? {
            let detail = "it is not the installed lxcfs-fuse that serves (vsctl host reload)";
            self.left("FUSE overlay".into(), detail, |round| facilities::reload(round.site));
        }
        Ok(())
    }

    /// Whether the overlay is served by another program than the installed one, as after an upgrade.
    fn is_of_another_program(&self) -> Result<bool> {
        let Ok(installed) = self.site.program("lxcfs-fuse") else { return Ok(false) };
        let file = self.site.lxcfs().join("pid");
        let pid = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let program = |path: &Path| -> Result<(u64, u64)> {
            let found = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
            Ok((found.dev(), found.ino()))
        };
        Ok(program(Path::new(&format!("/proc/{}/exe", pid.trim())))? != program(&installed)?)
    }

    /// Servers whose files of /proc are of an overlay that died: the new one's are put in their place.
    fn views_of_servers(&mut self) -> Result<()> {
        for name in store::names(self.site)? {
            let Some(status) = state::status(self.site, &name)? else { continue };
            let file = Path::new("/proc/meminfo");
            if let Err(error) = trial::read_inside(status.pid, file) {
                let detail = format!("its /proc is served no more: {error:#}");
                let id = store::load_record(self.site, &name)?.id;
                self.left(format!("server {name}"), &detail, |round| {
                    // What served when it was looked at above may have been on its way out.
                    Facilities(round.site).ensure_view()?;
                    view::reattach(round.site, &name, id, &status)?;
                    trial::read_inside(status.pid, file).context("it is still not served")
                });
            }
        }
        Ok(())
    }

    /// Runtime directories of servers that do not run and have no journal.
    fn runtime_directories(&mut self) -> Result<()> {
        for name in store::entries(&self.site.run().join("servers"))? {
            let Some(_lock) = self.lock(&name)? else { continue };
            let directory = self.site.server_run(&name);
            let stands = state::has_journal(self.site, &name)?;
            if stands || state::status(self.site, &name)?.is_some() || !directory.exists() {
                continue;
            }
            self.left(directory.display().to_string(), "nothing runs in it", |_| {
                kernel::mount::detach(&directory.join("root"))?;
                fs::remove_dir_all(&directory).with_context(|| format!("remove {}", directory.display()))
            });
        }
        Ok(())
    }

    /// Names of servers that are up, or that a command works on.
    fn is_busy(&self, name: &Name) -> Result<bool> {
        Ok(state::of(self.site, name)?.is_up() || state::has_journal(self.site, name)? || self.lock(name)?.is_none())
    }

    fn groups(&mut self) -> Result<()> {
        let hierarchies = Hierarchies::detect()?;
        let parent = self.site.cgroup();
        let roots =
            Controller::ALL.iter().filter_map(|controller| hierarchies.v1(*controller)).chain(hierarchies.unified());
        let mut names = BTreeSet::new();
        for root in roots {
            let entries = fs::read_dir(root.join(&parent)).into_iter().flatten().flatten();
            let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            names.extend(directories.filter_map(|entry| entry.file_name().to_str()?.parse::<Name>().ok()));
        }
        for name in names {
            if self.is_busy(&name)? {
                continue;
            }
            let Some(_lock) = self.lock(&name)? else { continue };
            let path = self.site.server_cgroup(&name);
            self.left(format!("cgroup {path}"), "it belongs to no server that runs", |round| {
                let group = round.world.group(&path)?;
                group.kill()?;
                Ok(group.remove()?)
            });
        }
        Ok(())
    }

    /// Host ends of links whose server is up. An unreadable server keeps its link: nobody knows which one it is.
    fn live_links(&self) -> Result<BTreeSet<String>> {
        let mut live = BTreeSet::new();
        for name in store::names(self.site)? {
            if self.is_busy(&name)? {
                let record = fs::read_to_string(store::record_file(self.site, &name)).unwrap_or_default();
                let record: store::Record =
                    toml::from_str(&record).with_context(|| format!("read the record of '{name}'"))?;
                live.insert(self.site.link(record.id));
            }
        }
        Ok(live)
    }

    fn links(&mut self) -> Result<()> {
        let prefix = self.site.link_prefix();
        let is_ours = |name: &str| name.strip_prefix(&prefix).is_some_and(|id| id.parse::<u32>().is_ok());
        let names: Vec<String> =
            self.world.netlink()?.links()?.into_iter().map(|link| link.name).filter(|name| is_ours(name)).collect();
        // Listed before the servers are: one that starts meanwhile has its link only after that.
        let live = self.live_links()?;
        for name in names.into_iter().filter(|name| !live.contains(name)) {
            self.left(format!("link {name}"), "it belongs to no server that runs", |round| {
                Ok(round.world.netlink()?.delete_link(&name)?)
            });
        }
        Ok(())
    }

    fn bindings(&mut self) -> Result<()> {
        if !Facilities(self.site).are_up()? {
            return Ok(());
        }
        if !self.world.firewall()?.exists()? {
            self.left(format!("nft tables {}", self.site.table()), "they are gone", |round| {
                round.world.ruleset()?.install()?;
                log::warn!("running servers have no network until they are restarted");
                Ok(())
            });
            return Ok(());
        }
        let bindings = self.world.firewall()?.bindings()?;
        let live = self.live_links()?;
        for binding in bindings.into_iter().filter(|binding| !live.contains(&binding.port)) {
            self.left(format!("nft binding of {}", binding.port), "it belongs to no server that runs", |round| {
                Ok(round.world.firewall()?.unbind(&binding)?)
            });
        }
        Ok(())
    }

    /// Numbers and addresses of servers that are reserved for nobody: lost with the disk's last seconds, or by hand. The next server
    /// would get them too. Those of two servers are told; which of them is to go is not ours to say.
    fn unreserved(&mut self) -> Result<()> {
        let changing = self.changing()?;
        for name in store::names(self.site)? {
            let Some(_lock) = self.lock(&name)? else { continue };
            // A record that cannot be read says so elsewhere, and its owner's reservations are kept.
            let Ok(record) = store::load_record(self.site, &name) else { continue };
            if changing.contains(&name) {
                continue;
            }
            for path in create::reservations(self.site, &record) {
                let said = fs::read_to_string(&path).unwrap_or_default();
                let thing = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                match said.parse::<Name>() {
                    Ok(owner) if owner == name => {}
                    Ok(owner) if self.has(&owner, &thing)? => {
                        let detail = format!("{thing}: '{name}' and '{owner}' both have it");
                        let remedy = format!("destroy one of {name} and {owner}, and create it anew");
                        let both = Finding::new(Verdict::Left, format!("server {name}"), detail).remedy(remedy);
                        self.findings.push(both);
                    }
                    _ => self.left(format!("server {name}"), &format!("{thing} is not reserved for it"), |_| {
                        Ok(kernel::file::write_atomic(&path, name.as_str().as_bytes())?)
                    }),
                }
            }
        }
        Ok(())
    }

    /// Numbers and addresses that nobody has. What is being created holds its lock, or has a journal.
    fn reservations(&mut self) -> Result<()> {
        let state = self.site.state();
        let changing = self.changing()?;
        for (directory, what) in [("ids", "number"), ("addresses", "address")] {
            for path in files(&state.join(directory))? {
                let owner = fs::read_to_string(&path).unwrap_or_default();
                let thing = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let subject = format!("{what} {thing}");
                match owner.parse::<Name>() {
                    Ok(name) => {
                        let Some(_lock) = self.lock(&name)? else { continue };
                        let pending = state.join("journal").join(name.as_str()).exists() || changing.contains(&name);
                        if !pending && !self.has(&name, &thing)? && !self.claimed(&name, &path) {
                            self.left(subject, &format!("'{name}' has not got it"), |_| release(&path, &owner));
                        }
                    }
                    // Made and not yet written to, or cut short: the allocation lock says which.
                    Err(_) => {
                        let Some(_lock) = Flock::try_exclusive(&state.join("ids/.lock"))? else { continue };
                        self.left(subject, "it names no server", |_| release(&path, &owner));
                    }
                }
            }
        }
        Ok(())
    }

    /// Names in changes that were interrupted: what they hold is between two servers.
    fn changing(&self) -> Result<BTreeSet<Name>> {
        let mut names = BTreeSet::new();
        for (name, steps) in edit::interrupted(self.site)? {
            names.insert(name);
            names.extend(steps.into_iter().filter_map(|step| match step {
                Step::Change(ChangeStep::Move { to, .. }) => Some(to),
                _ => None,
            }));
        }
        Ok(names)
    }

    /// Whether the server's record names the number or address.
    fn has(&self, name: &Name, thing: &str) -> Result<bool> {
        let path = store::record_file(self.site, name);
        let Ok(text) = fs::read_to_string(&path) else { return Ok(false) };
        // A damaged record keeps everything: nobody knows what was in it.
        let Ok(record) = toml::from_str::<store::Record>(&text) else { return Ok(true) };
        let has_address = record.addresses.iter().map(IpNet::addr).any(|address| address.to_string() == thing);
        Ok(has_address || record.id.to_string() == thing)
    }

    /// Whether a start of the server has reserved it, and will give it back.
    fn claimed(&self, name: &Name, file: &Path) -> bool {
        let standing = journal::standing(&state::journal_file(self.site, name)).unwrap_or_default();
        standing.iter().any(|step| matches!(step, Step::Files(FilesStep::Reserve { path, .. }) if path == file))
    }

    fn templates(&mut self) -> Result<()> {
        let directory = self.site.state().join("templates");
        let unfinished: Vec<PathBuf> = fs::read_dir(&directory)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| {
                [".new-", ".gone-"].iter().any(|start| entry.file_name().to_string_lossy().starts_with(start))
            })
            .map(|entry| entry.path())
            .collect();
        if unfinished.is_empty() {
            return Ok(());
        }
        // Held by a build that is under way.
        let Some(_lock) = Flock::try_exclusive(&directory.join(".lock"))? else { return Ok(()) };
        for path in unfinished {
            self.left(path.display().to_string(), "a build or removal was interrupted", |_| {
                fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))
            });
        }
        Ok(())
    }

    /// After the removal of the last server what all share goes, too; an interrupted removal had not come to that.
    fn last_light(&mut self) -> Result<()> {
        if self.fix && Facilities(self.site).are_up()? && store::names(self.site)?.is_empty() {
            let detail = "there is no server any more";
            self.left("host".into(), detail, |round| Facilities(round.site).remove_unused());
        }
        Ok(())
    }
}

/// Puts a monitor beside a server and waits until it is there.
fn adopt(site: &Site, name: &Name) -> Result<()> {
    monitor::adopt(site, name)?;
    for _ in 0..200 {
        if monitor::is_alive(site, name)? || state::status(site, name)?.is_none() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err(anyhow::anyhow!("the new monitor did not come up"))
}

/// The files of a directory that are no lock, by name.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    match fs::read_dir(directory) {
        Ok(entries) => {
            for entry in entries {
                let entry = entry.with_context(|| format!("read {}", directory.display()))?;
                if !entry.file_name().to_string_lossy().starts_with('.') {
                    paths.push(entry.path());
                }
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("read {}", directory.display())),
    }
    paths.sort();
    Ok(paths)
}

/// Gives a reservation back if it still says what it said.
fn release(path: &Path, owner: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|text| text == owner) {
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site() -> (tempfile::TempDir, Site) {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        for directory in ["ids", "addresses", "servers/web1"] {
            fs::create_dir_all(site.state().join(directory)).unwrap();
        }
        let record = "version = 1\nid = 1\nuuid = \"u\"\ncreated_s = 0\ntemplate_digest = \"d\"\naddresses = [\"10.1.2.2/24\"]\n";
        fs::write(site.state().join("servers/web1/record.toml"), record).unwrap();
        (root, site)
    }

    #[test]
    fn reservations_that_nobody_has_are_found_and_the_others_kept() {
        let (_root, site) = site();
        let state = site.state();
        for (file, owner) in [
            ("ids/1", "web1"),
            ("ids/2", "gone"),
            ("ids/3", "web1"),
            ("addresses/10.1.2.2", "web1"),
            ("addresses/10.1.2.9", "web1"),
            ("addresses/10.1.2.10", ""),
        ] {
            fs::write(state.join(file), owner).unwrap();
        }
        let look = |fix| {
            let mut round = Round { site: &site, world: World::new(&site), fix, findings: Vec::new() };
            round.reservations().unwrap();
            round.findings.into_iter().map(|finding| (finding.subject, finding.verdict)).collect::<Vec<_>>()
        };
        let stale = ["number 2", "number 3", "address 10.1.2.10", "address 10.1.2.9"];
        let all = |verdict| stale.map(|subject| (subject.to_owned(), verdict));
        assert_eq!(look(false), all(Verdict::Left));
        assert_eq!(look(true), all(Verdict::Mended));
        assert_eq!(look(false), []);
        assert!(state.join("ids/1").exists() && state.join("addresses/10.1.2.2").exists());
    }

    #[test]
    fn what_servers_have_is_reserved_again_and_never_for_two() {
        let (_root, site) = site();
        let state = site.state();
        // Cut short by a power cut; and the number given to another meanwhile.
        fs::write(state.join("addresses/10.1.2.2"), "").unwrap();
        let look = |fix| {
            let mut round = Round { site: &site, world: World::new(&site), fix, findings: Vec::new() };
            round.unreserved().unwrap();
            round.findings.into_iter().map(|finding| (finding.detail, finding.verdict)).collect::<Vec<_>>()
        };
        let lost = |verdict| ["1", "10.1.2.2"].map(|thing| (format!("{thing} is not reserved for it"), verdict));
        assert_eq!(look(false), lost(Verdict::Left));
        assert_eq!(look(true), lost(Verdict::Mended));
        assert_eq!(look(false), []);
        assert_eq!(fs::read_to_string(state.join("ids/1")).unwrap(), "web1");
        fs::create_dir(state.join("servers/web2")).unwrap();
        fs::copy(state.join("servers/web1/record.toml"), state.join("servers/web2/record.toml")).unwrap();
        let both = |thing: &str| (format!("{thing}: 'web2' and 'web1' both have it"), Verdict::Left);
        assert_eq!(look(true), [both("1"), both("10.1.2.2")]);
    }

    #[test]
    fn images_of_trees_that_were_not_finished_go() {
        let (_root, site) = site();
        for entry in ["kept", ".new-kept", ".new-held"] {
            fs::create_dir_all(site.trees().join(entry)).unwrap();
        }
        let _held = tree::try_lock(&site, &"held".parse().unwrap()).unwrap().unwrap();
        let mut round = Round { site: &site, world: World::new(&site), fix: true, findings: Vec::new() };
        round.interrupted_trees().unwrap();
        let found: Vec<_> = round.findings.iter().map(|finding| (finding.verdict, finding.subject.as_str())).collect();
        assert_eq!(found, [(Verdict::Mended, site.trees().join(".new-kept").to_str().unwrap())]);
        assert!(site.trees().join("kept").exists() && site.trees().join(".new-held").exists());
    }

    #[test]
    fn what_a_command_is_at_work_on_is_left_alone() {
        let (_root, site) = site();
        fs::write(site.state().join("ids/2"), "gone").unwrap();
        let mut round = Round { site: &site, world: World::new(&site), fix: true, findings: Vec::new() };
        let _held = round.lock(&"gone".parse().unwrap()).unwrap().unwrap();
        round.reservations().unwrap();
        assert_eq!(round.findings, []);
    }
}
