//! Reading the service files, at boot and on SIGHUP.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use kernel::process;

use super::Supervisor;
use super::service::Service;
use crate::failure::{During, Failure, Result, chain};
use crate::order;
use crate::service::{ServiceFile, is_name};
use crate::state::{Event, State};

/// A longer file is no service file.
const MAX_FILE_BYTES: u64 = 64 * 1024;

impl Supervisor {
    /// Takes the files as they are now: new services start, changed ones are as their file says
    /// from their next start or stop on, and those whose file is gone stop.
    pub(super) fn reload(&mut self) {
        let Some(directory) = self.directory.clone() else {
            return;
        };
        let found = match read_directory(&directory) {
            Ok(found) => found,
            Err(error) => return log::error!("{}", chain(&error)),
        };
        for (_, service) in self.services.iter_mut().filter(|(name, _)| !found.contains_key(*name)) {
            service.removed = true;
            service.down = true;
        }
        self.broken.clear();
        let mut fresh = Vec::new();
        for (name, file) in found {
            match file {
                Ok(file) => fresh.extend(self.take(name, file)),
                // A service that was read before goes on as it was.
                Err(error) => {
                    let message = chain(&error);
                    log::error!("{message}");
                    self.broken.insert(name, message);
                }
            }
        }
        fresh.extend(self.find_cycles());
        for name in fresh {
            self.want_up(&name, Event::Start);
        }
        // What parsing took: less to copy for each process that is made, and to keep while there is nothing to do.
        process::give_memory_back();
    }

    /// Takes one definition; the name comes back when the service is new, or was on its way out.
    fn take(&mut self, name: String, file: ServiceFile) -> Option<String> {
        if let Some(service) = self.services.get_mut(&name) {
            service.file = file;
            return std::mem::take(&mut service.removed).then_some(name);
        }
        self.services.insert(name.clone(), Service::new(&name, file));
        Some(name)
    }

    /// Marks the services that wait for each other; they fail, and the message names the cycle.
    /// Those that were marked before and are free now come back: they are to start.
    fn find_cycles(&mut self) -> Vec<String> {
        let mut graph = order::Graph::new();
        for (name, service) in &self.services {
            let before: BTreeSet<String> = service.file.dependencies().map(String::from).collect();
            graph.insert(name.clone(), before);
        }
        let mut freed = Vec::new();
        for (name, service) in &mut self.services {
            if service.cycle.take().is_some() {
                freed.push(name.clone());
            }
        }
        for cycle in order::cycles(&graph) {
            let text = order::display(&cycle);
            log::error!("not started, because they come after each other: {text}");
            for name in cycle {
                let Some(service) = self.services.get_mut(&name) else {
                    continue;
                };
                service.cycle = Some(text.clone());
                // One that runs since before the files changed goes on.
                if !service.state.has_process() {
                    service.last = Some(format!("cycle: {text}"));
                    service.enter(State::Failed);
                }
            }
        }
        freed.retain(|name| self.services.get(name).is_some_and(|service| service.cycle.is_none()));
        freed
    }
}

/// All `*.toml` of the directory by service name. No directory is the same as an empty one.
fn read_directory(directory: &Path) -> Result<BTreeMap<String, Result<ServiceFile>>> {
    let mut found = BTreeMap::new();
    let failed = || format!("read {}", directory.display());
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        entries => entries.during(failed)?,
    };
    for entry in entries {
        let path = entry.during(failed)?.path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        // Editors' and package managers' left-overs.
        if name.starts_with('.') {
            continue;
        }
        let file = match is_name(&name) {
            true => read_file(&path),
            false => Err(Failure::new(format!("{}: not a service's name", path.display()))),
        };
        found.insert(name, file);
    }
    Ok(found)
}

fn read_file(path: &Path) -> Result<ServiceFile> {
    let shown = path.display().to_string();
    let size = std::fs::metadata(path).during(|| shown.clone())?.len();
    if size > MAX_FILE_BYTES {
        return Err(Failure::new(format!("{shown}: longer than {MAX_FILE_BYTES} bytes")));
    }
    let text = std::fs::read_to_string(path).during(|| shown.clone())?;
    ServiceFile::parse(&shown, &text).map_err(|error| Failure::new(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_good_and_bad_files() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text);
        write("good.toml", "exec = 'true'").unwrap();
        write("bad.toml", "exce = 'true'").unwrap();
        write("has space.toml", "exec = 'true'").unwrap();
        write("huge.toml", &"#".repeat(70_000)).unwrap();
        write(".swp.toml", "").unwrap();
        write("README", "").unwrap();
        std::fs::create_dir(directory.path().join("dir.toml")).unwrap();
        let found = read_directory(directory.path()).unwrap();
        let names: Vec<(&str, bool)> = found.iter().map(|(n, f)| (n.as_str(), f.is_ok())).collect();
        let bad = |name| (name, false);
        assert_eq!(names, [bad("bad"), bad("dir"), ("good", true), bad("has space"), bad("huge")]);
        let message = found["bad"].as_ref().unwrap_err().to_string();
        assert!(message.contains("bad.toml:1:1: unknown key 'exce', did you mean 'exec'?"), "{message}");
        assert!(read_directory(Path::new("/nonexistent")).unwrap().is_empty());
    }
}
