//! Changes to a server's spec: another text is checked, compared, applied as far as that goes at once, and saved.
//!
//! Everything is checked before anything is changed. What the kernel refuses brings back what was before: a journal
//! below `<state>/changes` holds the steps, also over a power cut.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result};
use ipnet::IpNet;
use kernel::cgroup::CpuSet;
use kernel::lock::Flock;
use serde::Serialize;
use toml_edit::{Array, DocumentMut, Item, Value};

use crate::checkpoint::kept;
use crate::events::{self, Kind};
use crate::failure::{Exit, Failure};
use crate::lifecycle::change::{self, ChangeStep};
use crate::lifecycle::create;
use crate::lifecycle::execute;
use crate::lifecycle::files::FilesStep;
use crate::lifecycle::group::{self, Limits};
use crate::lifecycle::journal::{self, Journal, Lasting};
use crate::lifecycle::state::{self, State};
use crate::lifecycle::step::Step;
use crate::lifecycle::world::World;
use crate::name::Name;
use crate::network::{self, Networks};
use crate::site::Site;
use crate::spec::{self, Applies, Form, KEYS, NetworkMode, Spec};
use crate::store::{self, Record, Server};

/// One `KEY=VALUE`; an empty value takes the key away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    key: &'static str,
    form: Form,
    value: Option<String>,
}

impl FromStr for Change {
    type Err = Failure;
    fn from_str(text: &str) -> Result<Self, Failure> {
        let Some((key, value)) = text.split_once('=') else {
            let message = format!("'{}' is no change", text.escape_debug());
            return Err(Failure::new(Exit::BadParameter, message).hint("KEY=VALUE, or KEY= to take the key away"));
        };
        let Some((key, form, applies, _)) = KEYS.iter().find(|(known, ..)| *known == key) else {
            return Err(spec::unknown(key, Exit::BadParameter, ""));
        };
        if *applies == Applies::Never {
            return Err(fixed(key));
        }
        let value = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
        Ok(Self { key, form: *form, value })
    }
}

fn fixed(key: &str) -> Failure {
    Failure::new(Exit::BadParameter, format!("{key}: it is fixed when a server is created"))
        .hint("create another server")
}

impl Change {
    /// The value as TOML has it. What is no number stays a text: the spec says what is wrong with it.
    fn toml(&self, value: &str) -> Result<Value, Failure> {
        Ok(match self.form {
            Form::Text => value.into(),
            Form::Number => match (value.parse::<i64>(), value.parse::<f64>()) {
                (Ok(whole), _) => whole.into(),
                (_, Ok(number)) if number.is_finite() => number.into(),
                _ => value.into(),
            },
            Form::Switch => match value {
                "true" | "yes" | "on" | "1" => true.into(),
                "false" | "no" | "off" | "0" => false.into(),
                _ => {
                    let message = format!("{}: '{value}' is neither true nor false", self.key);
                    return Err(Failure::new(Exit::BadParameter, message));
                }
            },
            Form::List => Value::Array(value.split(',').map(str::trim).collect::<Array>()),
        })
    }

    /// Refuses a value that can be none of this key.
    fn check(&self) -> Result<(), Failure> {
        let mut document = DocumentMut::new();
        document.insert("template", toml_edit::value("any"));
        self.write(&mut document)?;
        Spec::parse(&document.to_string(), "").map(|_| ()).map_err(|failure| {
            let message = failure.to_string();
            // After the file and the line, which only this check has.
            let message = message.splitn(3, ':').nth(2).unwrap_or(&message).trim();
            let about = if message.starts_with(self.key) { String::new() } else { format!("{}: ", self.key) };
            Failure::new(Exit::BadParameter, format!("{about}{message}"))
        })
    }

    fn write(&self, document: &mut DocumentMut) -> Result<(), Failure> {
        let Some(value) = &self.value else {
            remove(document, self.key);
            return Ok(());
        };
        let mut value = self.toml(value)?;
        match document.get_mut(self.key).and_then(Item::as_value_mut) {
            // Blanks and comments around a value belong to it.
            Some(old) => {
                *value.decor_mut() = old.decor().clone();
                *old = value;
            }
            None => {
                document.insert(self.key, Item::Value(value));
            }
        }
        Ok(())
    }
}

/// Takes a key away and leaves the comments above it to the next one.
fn remove(document: &mut DocumentMut, key: &str) {
    let Some(position) = document.iter().position(|(known, _)| known == key) else { return };
    let next = document.iter().nth(position + 1).map(|(known, _)| known.to_owned());
    let prefix =
        |decor: &toml_edit::Decor| decor.prefix().and_then(|text| text.as_str()).unwrap_or_default().to_owned();
    let above = document.key(key).map(|key| prefix(key.leaf_decor())).unwrap_or_default();
    document.remove(key);
    if !above.contains('#') {
        return;
    }
    match next {
        Some(next) => {
            if let Some(mut key) = document.key_mut(&next) {
                let both = format!("{above}{}", prefix(key.leaf_decor()));
                key.leaf_decor_mut().set_prefix(both);
            }
        }
        None => {
            let both = format!("{above}{}", document.trailing().as_str().unwrap_or_default());
            document.set_trailing(both);
        }
    }
}

/// The text of a `server.toml` after `changes`; comments and order stay.
///
/// # Errors
/// Exit 20 for a value that cannot be used.
pub fn with_changes(text: &str, changes: &[Change]) -> Result<String> {
    let mut document: DocumentMut = text.parse().context("read server.toml")?;
    for change in changes {
        change.check()?;
        change.write(&mut document)?;
    }
    Ok(document.to_string())
}

/// When a changed key takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// It has.
    Now,
    /// When the server, which is stopped, is started.
    NextStart,
    /// When the server, which runs, is restarted.
    Restart,
}

/// One key that has another value.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Effect {
    /// The key.
    pub key: &'static str,
    /// Its value until now.
    pub before: Option<toml::Value>,
    /// The new one.
    pub after: Option<toml::Value>,
    /// When it takes effect.
    pub when: When,
}

impl fmt::Display for Effect {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<toml::Value>| value.as_ref().map_or_else(|| "none".into(), ToString::to_string);
        write!(out, "{}: {} -> {}", self.key, shown(&self.before), shown(&self.after))
    }
}

/// What a changed spec means.
#[derive(Debug)]
pub struct Plan {
    /// The keys that have other values.
    pub effects: Vec<Effect>,
    /// What is done.
    pub steps: Vec<Step>,
}

/// The keys that have other values in `new` than in `old`.
///
/// # Errors
/// Exit 20 when one of them is fixed for the server's life.
pub fn compare(old: &Spec, new: &Spec, is_up: bool) -> Result<Vec<Effect>> {
    let table = |spec: &Spec| toml::from_str::<toml::Table>(&spec.to_toml()).context("compare the specs");
    let (old, new) = (table(old)?, table(new)?);
    let changed = KEYS.iter().filter(|(key, ..)| old.get(*key) != new.get(*key));
    let effect = |(key, _, applies, _): &(&'static str, Form, Applies, &str)| -> Result<Effect> {
        let when = match applies {
            Applies::Never => return Err(fixed(key).into()),
            _ if *key == "autostart" => When::Now,
            _ if !is_up => When::NextStart,
            Applies::Live => When::Now,
            Applies::Restart => When::Restart,
        };
        Ok(Effect { key, before: old.get(*key).cloned(), after: new.get(*key).cloned(), when })
    };
    changed.map(effect).collect()
}

/// Plans what it takes to give `server`, whose spec's text is `from`, the text `to`.
///
/// # Errors
/// When the new spec cannot be used, or asks for what another has.
pub fn plan(site: &Site, server: &Server, from: &str, to: &str) -> Result<Plan> {
    let path = store::spec_file(site, &server.name);
    let new = Spec::parse(to, &path.display().to_string())?;
    let now = state::of(site, &server.name)?;
    let is_up = now.is_up();
    let effects = compare(&server.spec, &new, is_up)?;
    if let Some(other) = effects.iter().find(|effect| now == State::Suspended && effect.key != "autostart") {
        let message = format!("{}: '{}' is suspended, and goes on as it was", other.key, server.name);
        return Err(Failure::new(Exit::AlreadyRunning, message).hint(format!("vsctl resume {}", server.name)).into());
    }
    check_host(&new, Some(&server.spec))?;
    let mut steps = Vec::new();
    let addresses = addresses(site, server, &new, is_up)?;
    let reservation = |address: &IpNet| network::reservation(site, *address);
    let owner = || server.name.to_string();
    // Its own already when a start has claimed what was written by hand.
    for added in addresses.iter().filter(|address| network::owner(site, **address).is_none()) {
        steps.push(Step::Files(FilesStep::Reserve { path: reservation(added), owner: owner() }));
    }
    let (before, after) = (Limits::of(&server.spec), Limits::of(&new));
    if is_up && before != after {
        let group = site.server_cgroup(&server.name);
        steps.push(Step::Change(ChangeStep::Limit { group, from: before, to: after }));
    }
    if addresses != server.record.addresses {
        steps.push(rewrite_record(site, server, &addresses)?);
    }
    if from != to {
        steps.push(Step::Change(ChangeStep::Rewrite { path, from: from.into(), to: to.into() }));
    }
    steps.extend(plan_hostname(site, server, &new, is_up));
    for gone in server.record.addresses.iter().filter(|address| !addresses.contains(address)) {
        steps.push(Step::Change(ChangeStep::Release { path: reservation(gone), owner: owner() }));
    }
    Ok(Plan { effects, steps })
}

/// Refuses what a spec names and this host has not: CPUs, sources of mounts, devices. What is in `old` as well is not
/// looked at again.
///
/// # Errors
/// Exit 20 with the value.
pub fn check_host(new: &Spec, old: Option<&Spec>) -> Result<()> {
    if let Some(set) = new.cpuset.as_ref().filter(|set| old.is_none_or(|old| old.cpuset.as_ref() != Some(set))) {
        check_cpuset(set)?;
    }
    for bind in new.mount.iter().filter(|bind| old.is_none_or(|old| !old.mount.contains(bind))) {
        if let Err(error) = fs::metadata(&bind.source) {
            let message = format!("mount: '{bind}': {}: {error}", bind.source.display());
            return Err(Failure::new(Exit::BadParameter, message).into());
        }
    }
    for device in new.device.iter().filter(|device| old.is_none_or(|old| !old.device.contains(device))) {
        if let Err(error) = group::node(&device.path) {
            return Err(Failure::new(Exit::BadParameter, format!("device: '{device}': {error:#}")).into());
        }
    }
    Ok(())
}

fn check_cpuset(set: &CpuSet) -> Result<()> {
    let online = CpuSet::online()?;
    if set.is_empty() || set.iter().any(|cpu| !online.contains(cpu)) {
        let message = format!("cpuset: this host has not all CPUs of {set}");
        return Err(Failure::new(Exit::BadParameter, message).hint(format!("it has {online}")).into());
    }
    Ok(())
}

fn rewrite_record(site: &Site, server: &Server, addresses: &[IpNet]) -> Result<Step> {
    let text = |record: &Record| toml::to_string(record).context("write the record as TOML");
    let path = store::record_file(site, &server.name);
    let from = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let to = text(&Record { addresses: addresses.to_vec(), ..server.record.clone() })?;
    Ok(Step::Change(ChangeStep::Rewrite { path, from, to }))
}

/// The file that says that the root's files have an older host name than the spec.
fn pending_hostname(site: &Site, name: &Name) -> PathBuf {
    site.server(name).join("hostname.pending")
}

/// A running server's root is its own; its files are written before its next start.
fn plan_hostname(site: &Site, server: &Server, new: &Spec, is_up: bool) -> Option<Step> {
    let (from, to) = (server.spec.hostname_or(&server.name), new.hostname_or(&server.name));
    if from == to {
        None
    } else if is_up {
        Some(Step::Files(FilesStep::WriteFile { path: pending_hostname(site, &server.name), text: from }))
    } else {
        change::plan_hostname(site, server, &from, &to)
    }
}

/// Does before a start what a change on the running server had to put off. The caller holds the server's lock.
///
/// # Errors
/// When the root's files cannot be written.
pub fn settle(site: &Site, server: &Server) -> Result<()> {
    let pending = pending_hostname(site, &server.name);
    let Ok(from) = fs::read_to_string(&pending) else { return Ok(()) };
    let to = server.spec.hostname_or(&server.name);
    if let Some(step) = change::plan_hostname(site, server, &from, &to) {
        step.apply(&mut World::new(site)).with_context(|| step.to_string())?;
    }
    fs::remove_file(&pending).with_context(|| format!("remove {}", pending.display()))
}

/// The addresses that the server has reserved from now on.
///
/// A running server goes on with those of its start, so they stay its own until a change on the stopped one.
fn addresses(site: &Site, server: &Server, new: &Spec, is_up: bool) -> Result<Vec<IpNet>> {
    let held = &server.record.addresses;
    if new.net == NetworkMode::None {
        return Ok(held.clone());
    }
    let is_free = |address: IpNet| network::owner(site, address).is_none_or(|owner| owner == server.name);
    if new.ip.is_empty() {
        if server.spec.ip.is_empty() && !held.is_empty() {
            return Ok(held.clone());
        }
        if is_up && !held.is_empty() {
            return Err(Failure::new(Exit::AlreadyRunning, format!("ip: '{}' runs with its addresses", server.name))
                .hint("stop it first")
                .into());
        }
        let networks = Networks::of(site)?;
        let id = server.record.id;
        let mut numbers = id..id + site.settings.max_servers;
        let number = numbers.find(|number| networks.defaults_of(*number).into_iter().all(is_free));
        return Ok(networks.defaults_of(number.unwrap_or(id)));
    }
    let networks = Networks::of(site)?;
    for (index, address) in new.ip.iter().enumerate() {
        networks.check(*address)?;
        if new.ip[..index].iter().any(|other| other.addr() == address.addr()) {
            return Err(Failure::new(Exit::BadParameter, format!("ip: {address} is there twice")).into());
        }
        if let Some(owner) = network::owner(site, *address).filter(|owner| *owner != server.name) {
            return Err(Failure::new(Exit::BadParameter, format!("ip: {address} is taken by '{owner}'")).into());
        }
    }
    let mut all = new.ip.clone();
    if is_up {
        all.extend(held.iter().filter(|address| !new.ip.contains(address)));
    }
    Ok(all)
}

/// The text of a server's spec.
///
/// # Errors
/// When it cannot be read.
pub fn text(site: &Site, name: &Name) -> Result<String> {
    let path = store::spec_file(site, name);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// Changes keys of a server's spec.
///
/// # Errors
/// Exit 20 for a bad value; what the kernel refused. Then nothing has changed.
pub fn set(site: &Site, name: &Name, changes: &[Change]) -> Result<Plan> {
    let _lock = store::lock(site, name)?;
    recover(site, name)?;
    store::check_own(site, name)?;
    let server = store::load(site, name)?;
    let from = text(site, name)?;
    save(site, &server, &from, &with_changes(&from, changes)?)
}

/// Gives a server the spec with the text `to`, if its text is still `from`.
///
/// # Errors
/// When it has been changed meanwhile; otherwise as [`set`].
pub fn replace(site: &Site, name: &Name, from: &str, to: &str) -> Result<Plan> {
    let _lock = store::lock(site, name)?;
    recover(site, name)?;
    store::check_own(site, name)?;
    if text(site, name)? != from {
        return Err(Failure::new(Exit::Locked, format!("another command changed '{name}' meanwhile")).into());
    }
    // One that could not be used is being repaired: it is compared with what it becomes.
    let server = store::load(site, name).or_else(|error| repaired(site, name, to).map_err(|_| error))?;
    save(site, &server, from, to)
}

fn repaired(site: &Site, name: &Name, to: &str) -> Result<Server> {
    let record = store::load_record(site, name)?;
    Ok(Server {
        name: name.clone(),
        spec: Spec::parse(to, &store::spec_file(site, name).display().to_string())?,
        record,
    })
}

fn save(site: &Site, server: &Server, from: &str, to: &str) -> Result<Plan> {
    // Addresses are chosen and reserved under the lock that creations take.
    let _allocation = Flock::exclusive(&site.state().join("ids/.lock"))?;
    let plan = plan(site, server, from, to)?;
    run(site, &server.name, "set", &plan.steps).with_context(|| format!("cannot change '{}'", server.name))?;
    if !plan.effects.is_empty() {
        let keys: Vec<&str> = plan.effects.iter().map(|effect| effect.key).collect();
        events::note_with(site, &server.name, Kind::Changed, Some(keys.join(",")));
    }
    Ok(plan)
}

fn journal_file(site: &Site, name: &Name) -> PathBuf {
    site.state().join("changes").join(name.as_str())
}

fn run(site: &Site, name: &Name, word: &str, steps: &[Step]) -> Result<()> {
    if steps.is_empty() {
        return Ok(());
    }
    let mut journal = Journal::open(&journal_file(site, name), Lasting::Disk)?;
    let outcome = execute::run(word, 1, steps, &mut World::new(site), &mut journal);
    if outcome.is_ok() || journal.standing().is_empty() {
        journal.remove()?;
    }
    outcome
}

/// Takes back a change of the server that was interrupted. The caller holds its lock.
///
/// # Errors
/// What could not be taken back.
pub fn recover(site: &Site, name: &Name) -> Result<()> {
    let path = journal_file(site, name);
    if !path.exists() {
        return Ok(());
    }
    let mut journal = Journal::open(&path, Lasting::Disk)?;
    execute::take_back("recover", &mut World::new(site), &mut journal)
        .with_context(|| format!("cannot take back an interrupted change of '{name}'"))?;
    journal.remove()
}

/// The servers that an interrupted change left half changed, and the sentences of its steps.
///
/// # Errors
/// When a journal cannot be read.
pub fn interrupted(site: &Site) -> Result<Vec<(Name, Vec<Step>)>> {
    let names = store::entries(&site.state().join("changes"))?;
    names.into_iter().map(|name| Ok((name.clone(), journal::standing(&journal_file(site, &name))?))).collect()
}

/// Plans to give a stopped server another name.
///
/// # Errors
/// Exit 43 when the new name is taken, 32 when the server runs.
pub fn plan_rename(site: &Site, server: &Server, to: &Name) -> Result<Vec<Step>> {
    let from = &server.name;
    if site.server(to).exists() {
        return Err(Failure::new(Exit::Exists, format!("there is a server '{to}' already"))
            .hint("choose another name")
            .into());
    }
    let now = state::of(site, from)?;
    if now.is_up() || now == State::Suspended {
        let message = format!("'{from}' is {now}, and only a stopped server can be renamed");
        let hint =
            if now == State::Suspended { "its images have its name in them: vsctl resume" } else { "vsctl stop" };
        return Err(Failure::new(Exit::AlreadyRunning, message).hint(format!("{hint} {from}")).into());
    }
    if let Some(label) = kept::with_memory(site, from)?.first() {
        let message = format!("'{from}' has checkpoints with its name in their images: '{label}' is one");
        let hint = format!("`vsctl checkpoint delete {from} LABEL...` first");
        return Err(Failure::new(Exit::Failed, message).hint(hint).into());
    }
    let reown = |path| Step::Change(ChangeStep::Reown { path, from: from.to_string(), to: to.to_string() });
    let mut steps: Vec<Step> = create::reservations(site, &server.record).map(reown).collect();
    if server.spec.hostname.is_none() {
        steps.extend(change::plan_hostname(site, server, from.as_str(), to.as_str()));
    }
    // Last: until then it has its old name, under which the journal is found.
    steps.push(Step::Change(ChangeStep::Move { from: from.clone(), to: to.clone() }));
    Ok(steps)
}

/// Gives a stopped server another name.
///
/// # Errors
/// As [`plan_rename`]; what refused. Then it has its old name.
pub fn rename(site: &Site, from: &Name, to: &Name) -> Result<()> {
    let steps = || plan_rename(site, &store::load(site, from)?, to);
    // Both names, and always in the same order: two commands that swap names must not wait for each other.
    let _first = store::lock(site, from.min(to))?;
    let _second = if from == to { None } else { Some(store::lock(site, from.max(to))?) };
    recover(site, from)?;
    store::check_own(site, from)?;
    run(site, from, "rename", &steps()?).with_context(|| format!("cannot rename '{from}'"))?;
    events::note_with(site, from, Kind::Renamed, Some(format!("to {to}")));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "# my server\ntemplate = \"busybox\" # small\n\n# as paid for\nmemory = \"64M\"   # half\npids = 100\n";

    fn changes(words: &[&str]) -> Vec<Change> {
        words.iter().map(|word| word.parse().unwrap()).collect()
    }

    #[test]
    fn comments_survive_a_change() {
        let text = with_changes(TEXT, &changes(&["memory=96M", "cpus=1.5", "ip=10.0.0.5/24, fd00::5/64"])).unwrap();
        let expected = TEXT.replace("64M", "96M") + "cpus = 1.5\nip = [\"10.0.0.5/24\", \"fd00::5/64\"]\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_key_goes_and_the_comments_above_it_stay() {
        let text = with_changes(TEXT, &changes(&["memory="])).unwrap();
        assert_eq!(text, "# my server\ntemplate = \"busybox\" # small\n\n# as paid for\npids = 100\n");
        let text = with_changes(&text, &changes(&["pids="])).unwrap();
        assert_eq!(text, "# my server\ntemplate = \"busybox\" # small\n\n# as paid for\n");
        assert_eq!(with_changes(&text, &changes(&["cpuset="])).unwrap(), text);
    }

    #[test]
    fn bad_values_name_their_key() {
        for (word, expected) in [
            ("memory=0", "memory: 0 is too little"),
            ("pids=x", "pids: 'x' is no limit"),
            ("cpus=nan", "cpus: 'nan' is no amount"),
            ("cpus=1e400", "cpus: '1e400' is no amount"),
            ("cpuset=a", "cpuset: 'a' is no list"),
            ("ip=1.2.3.4.5", "ip: "),
            ("autostart=maybe", "autostart: 'maybe' is neither"),
            ("mount=/a", "mount: '/a': a target is missing"),
            ("cap=+everything,-net_raw", "cap: '+everything'"),
        ] {
            let error = with_changes(TEXT, &changes(&[word])).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{word}: {error}");
            assert_eq!(crate::failure::exit_of(&error), Exit::BadParameter, "{word}");
        }
    }

    #[test]
    fn what_is_no_change_is_refused_while_it_is_read() {
        assert!("memory".parse::<Change>().unwrap_err().to_string().contains("memory"));
        assert!("template=x".parse::<Change>().unwrap_err().to_string().contains("fixed"));
        let unknown = anyhow::Error::new("memroy=1G".parse::<Change>().unwrap_err());
        assert_eq!(crate::failure::hint_of(&unknown), Some("did you mean 'memory'?"));
    }

    #[test]
    fn keys_say_when_they_apply() {
        let old = Spec::parse(TEXT, "old").unwrap();
        let text = with_changes(TEXT, &changes(&["memory=1G", "migratable=true", "autostart=yes"])).unwrap();
        let new = Spec::parse(&text, "new").unwrap();
        let when = |is_up| compare(&old, &new, is_up).unwrap().iter().map(|e| (e.key, e.when)).collect::<Vec<_>>();
        use When::*;
        assert_eq!(when(true), [("memory", Now), ("autostart", Now), ("migratable", Restart)]);
        assert_eq!(when(false), [("memory", NextStart), ("autostart", Now), ("migratable", NextStart)]);
        let other = Spec::parse("template = \"debian-13\"\n", "other").unwrap();
        assert!(compare(&old, &other, false).is_err());
    }
}
