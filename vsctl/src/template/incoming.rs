//! A template that comes from another host: packed there as it lies, and unpacked here as an import is, which is not trusted.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Child;

use anyhow::{Context, Result};
use kernel::lock::Flock;

use super::definition::{Definition, Source};
use super::progress::Progress;
use super::record::{self, Record, Survey};
use super::stage::Stage;
use super::unpack::{Content, InTheWay, Members, pack_stream, unpack_stream};
use super::{Held, Templates};
use crate::failure::{Exit, Failure};
use crate::name::Name;

/// What there is of a template.
const MEMBERS: [&str; 3] = ["template.toml", "record.toml", "root"];

/// A definition or a record that is longer is none.
const LONGEST: u64 = 1 << 20;

/// A template under way. Dropping it removes what has come.
pub struct Incoming<'a> {
    name: Name,
    stage: Stage<'a>,
    /// Where it is unpacked: not yet where its root would be taken for one.
    came: PathBuf,
    sandbox: PathBuf,
}

impl Held {
    /// Begins to pack it; `sandbox` is any directory.
    ///
    /// # Errors
    /// When tar cannot be run.
    pub fn pack(&self, sandbox: &Path) -> Result<Child> {
        pack_stream(&self.template.directory, sandbox, Content::Root, Members::Whole(&MEMBERS.map(Path::new)))
    }
}

impl Templates {
    /// Makes room for the template `name`, which another host will send; `lock` says how long another command that makes or removes
    /// templates is waited for.
    ///
    /// # Errors
    /// [`Exit::Exists`] when there is one of the name.
    pub fn expect<'a>(
        &self,
        name: &Name,
        lock: impl FnOnce(&Path) -> Result<Flock>,
        progress: &'a mut dyn Progress,
    ) -> Result<Incoming<'a>> {
        let stage = Stage::begin_soon(&self.directory, name, lock, progress)?;
        let (came, sandbox) = (stage.scratch("came")?, stage.scratch("sandbox")?);
        Ok(Incoming { name: name.clone(), stage, came, sandbox })
    }
}

impl Incoming<'_> {
    /// Unpacks what [`Held::pack`] has packed. Returns warnings.
    ///
    /// # Errors
    /// When it is damaged or cut, or the disk is full.
    pub fn unpack(&mut self, from: &mut (dyn Read + Send)) -> Result<Vec<String>> {
        let what = format!("the template '{}'", self.name);
        unpack_stream(from, Content::Root, &what, &self.came, &self.sandbox, InTheWay::Refused)
    }

    /// Makes what has come the template, if it is the one with this `digest`.
    ///
    /// # Errors
    /// [`Exit::BadParameter`] when it is another, or no template. Nothing is left of it then.
    pub fn finish(mut self, digest: &str) -> Result<()> {
        let bad = |what: &str| Failure::new(Exit::BadParameter, format!("the template '{}' {what}", self.name));
        let (came, root) = (&self.came, self.stage.root());
        let text = read(&came.join("template.toml"))?;
        let definition = Definition::parse(&text)?;
        let told: Record = toml::from_str(&read(&came.join("record.toml"))?)
            .map_err(|error| bad(&format!("came with a record that cannot be read: {}", error.message())))?;
        if shown(&definition, &told).any(|text| text.chars().any(char::is_control)) {
            return Err(bad("came with control characters in its description").into());
        }
        let tree = came.join("root");
        if !tree.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            return Err(bad("came without its root").into());
        }
        fs::remove_dir(&root).with_context(|| format!("remove {}", root.display()))?;
        fs::rename(&tree, &root).with_context(|| format!("rename {}", tree.display()))?;
        let survey = record::survey(&root)?;
        if let Some(device) = survey.devices.first() {
            let count = survey.devices.len();
            let first = device.display().to_string().escape_debug().to_string();
            return Err(bad(&format!("came with {count} device nodes or sockets: /{first}")).into());
        }
        if survey.digest != digest || told.digest != digest {
            return Err(bad("is not the one that the server was made from: what came has another digest").into());
        }
        // What it takes here is this disk's own matter.
        let Survey { entries, size_bytes, .. } = survey;
        self.stage.become_template(&text, &Record { entries, size_bytes, ..told })
    }
}

/// A file of a few lines that came, and nothing else of its name.
fn read(path: &Path) -> Result<String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match path.symlink_metadata() {
        Ok(meta) if meta.is_file() && meta.len() <= LONGEST => {
            fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
        }
        _ => Err(Failure::new(Exit::BadParameter, format!("the template came without its {name}")).into()),
    }
}

/// What of it is shown on terminals.
fn shown<'t>(definition: &'t Definition, record: &'t Record) -> impl Iterator<Item = String> + 't {
    let file = match &definition.source {
        Source::Import { file } => file.as_str(),
        _ => "",
    };
    let distribution = &record.distribution;
    let texts = [&definition.description, &definition.family, &record.origin, &distribution.id];
    let more = [&distribution.version, &distribution.name];
    let own = texts.into_iter().chain(more).chain(&record.warnings).map(String::as_str);
    own.chain([file]).map(ToOwned::to_owned).chain([String::from(definition.init.clone())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::exit_of;
    use crate::template::family::Distribution;
    use crate::template::progress::Silent;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    const DIGEST_OF_NOTHING: &str = "0000";

    fn lock(path: &Path) -> Result<Flock> {
        Ok(Flock::exclusive(path)?)
    }

    /// A template as it comes, with one file; says its digest.
    fn come(to: &Path) -> String {
        fs::create_dir_all(to.join("root/etc")).unwrap();
        fs::write(to.join("root/etc/name"), "x").unwrap();
        fs::write(to.join("template.toml"), Definition::shipped("busybox").unwrap().1).unwrap();
        let survey = record::survey(&to.join("root")).unwrap();
        let digest = survey.digest.clone();
        let record = Record::of(survey, "there".into(), Distribution::parse("ID=busybox\n"), vec!["one".into()]);
        fs::write(to.join("record.toml"), toml::to_string(&record).unwrap()).unwrap();
        digest
    }

    fn left(state: &Path) -> Vec<String> {
        let entries = fs::read_dir(state.join("templates")).unwrap().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_comes_becomes_the_template_with_all_that_it_is() {
        let state = tempfile::tempdir().unwrap();
        let (templates, name, mut silent) = (Templates::below(state.path()), "mine".parse().unwrap(), Silent);
        let incoming = templates.expect(&name, lock, &mut silent).unwrap();
        let digest = come(&incoming.came);
        // What belongs to no template stays nowhere.
        fs::write(incoming.came.join("more"), "x").unwrap();
        assert!(templates.list().unwrap().is_empty());
        incoming.finish(&digest).unwrap();
        let template = templates.open(&name).unwrap();
        assert_eq!((template.record.digest, template.record.origin.as_str()), (digest, "there"));
        assert_eq!(template.record.warnings, ["one"]);
        assert_eq!(left(state.path()), [".lock", "mine"]);
        assert_eq!(fs::read_dir(state.path().join("templates/mine")).unwrap().count(), 3);
        let again = templates.expect(&name, lock, &mut Silent).err().unwrap();
        assert_eq!(exit_of(&again), Exit::Exists);
    }

    /// Something that is done to what came.
    type Damage = fn(&Path);

    #[test]
    fn what_is_not_the_template_that_was_wanted_is_refused_and_nothing_is_left() {
        let state = tempfile::tempdir().unwrap();
        let (templates, name) = (Templates::below(state.path()), "mine".parse().unwrap());
        let damages: [(&str, Damage); 9] = [
            ("another digest", |came| fs::write(came.join("root/etc/more"), "x").unwrap()),
            ("another digest", |came| {
                let record = fs::read_to_string(came.join("record.toml")).unwrap();
                fs::write(came.join("record.toml"), record.replace("digest = \"", "digest = \"0")).unwrap();
            }),
            ("without its record.toml", |came| fs::remove_file(came.join("record.toml")).unwrap()),
            ("without its template.toml", |came| {
                fs::rename(came.join("template.toml"), came.join("root/definition")).unwrap();
                symlink("root/definition", came.join("template.toml")).unwrap();
            }),
            ("without its template.toml", |came| fs::write(came.join("template.toml"), vec![b'#'; 2 << 20]).unwrap()),
            ("without its root", |came| {
                fs::rename(came.join("root"), came.join("other")).unwrap();
                symlink("other", came.join("root")).unwrap();
            }),
            ("1 device nodes or sockets: /etc/socket", |came| {
                UnixListener::bind(came.join("root/etc/socket")).unwrap();
            }),
            ("control characters", |came| {
                let record = fs::read_to_string(came.join("record.toml")).unwrap();
                fs::write(came.join("record.toml"), record.replace("\"there\"", "\"\\u001b[2J\"")).unwrap();
            }),
            ("a record that cannot be read", |came| fs::write(came.join("record.toml"), "version = ").unwrap()),
        ];
        for (word, damage) in damages {
            let mut silent = Silent;
            let incoming = templates.expect(&name, lock, &mut silent).unwrap();
            let digest = come(&incoming.came);
            damage(&incoming.came);
            let error = incoming.finish(&digest).unwrap_err();
            assert_eq!(exit_of(&error), Exit::BadParameter, "{word}");
            assert!(error.to_string().contains(word), "{word}: {error}");
            assert_eq!(left(state.path()), [".lock"], "{word}");
        }
        // Whole, and not what the server was made from.
        let mut silent = Silent;
        let incoming = templates.expect(&name, lock, &mut silent).unwrap();
        come(&incoming.came);
        assert!(incoming.finish(DIGEST_OF_NOTHING).unwrap_err().to_string().contains("another digest"));
        assert_eq!(left(state.path()), [".lock"]);
    }
}
