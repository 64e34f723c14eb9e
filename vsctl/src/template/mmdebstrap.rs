//! A Debian root by mmdebstrap(1), from the mirrors that this host's apt already trusts.
//!
//! No mirror is named in the program: the host's sources are read, and the suite in them is replaced.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use kernel::namespace::Kinds;
use rustix::io::FdFlags;
use rustix::mount::MountPropagationFlags;

use super::During;
use super::family::Distribution;
use super::progress::Progress;
use crate::failure::{Exit, Failure};

/// Names that a Debian suite has, in any year; what else a sources file names is another distribution's.
const SUITES: [&str; 11] = [
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "sid",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
];

/// One entry of apt's sources (sources.list(5)), in either of its forms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Origin {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: String,
    trusted: bool,
}

/// What is to be built.
pub struct Recipe<'a> {
    /// Code name of the release.
    pub suite: &'a str,
    /// Parts of the archive.
    pub components: &'a [String],
    /// Packages beside the essential ones and apt.
    pub packages: &'a [String],
    /// A mirror instead of the host's.
    pub mirror: Option<&'a str>,
}

/// Builds `recipe` into the empty directory `root`. The child keeps `lock` open: should this process be killed, no
/// other build begins while it still writes.
pub fn fill(root: &Path, recipe: &Recipe<'_>, lock: &File, progress: &mut dyn Progress) -> Result<String> {
    let sources = sources_for(recipe)?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--mode=root", "--variant=minbase", "--format=directory"]);
    command.arg(format!("--components={}", recipe.components.join(",")));
    command.arg(format!("--include={}", recipe.packages.join(",")));
    command.arg(recipe.suite).arg(root).arg("-").env("LC_ALL", "C");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    rustix::io::fcntl_setfd(lock, FdFlags::empty()).during("pass the build lock on")?;
    let spawned = spawn_apart(&mut command);
    rustix::io::fcntl_setfd(lock, FdFlags::CLOEXEC).during("keep the build lock")?;
    let mut child = match spawned {
        Err(error) if is_missing(&error) => {
            return Err(Failure::new(Exit::Unsupported, "the program mmdebstrap is not installed")
                .hint("install the package mmdebstrap")
                .into());
        }
        other => other?,
    };
    let mut input = child.stdin.take().context("mmdebstrap has no input")?;
    let errors = child.stderr.take().context("mmdebstrap has no messages")?;
    // A child that died already says why on its stderr, so a broken pipe here is not the news.
    let _ = input.write_all(sources.as_bytes());
    drop(input);
    let last = follow(BufReader::new(errors), progress);
    let status = child.wait().context("wait for mmdebstrap")?;
    if !status.success() {
        return Err(failed(recipe.suite, &last));
    }
    Ok(format!("mmdebstrap {}", recipe.suite))
}

/// Starts `command` with a view of the mounts of its own. mmdebstrap mounts the host's /proc and /sys into the new
/// root; when it is killed they must not stay there, in the way of whoever removes the tree.
fn spawn_apart(command: &mut Command) -> Result<Child> {
    let apart = || {
        kernel::namespace::unshare(Kinds::MOUNT)?;
        let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", flags).during("keep mounts apart")?;
        command.spawn().context("run mmdebstrap")
    };
    // The namespace is the thread's own; what it starts keeps it.
    let spawned = std::thread::scope(|scope| scope.spawn(apart).join());
    spawned.unwrap_or_else(|_| bail!("the thread that starts mmdebstrap panicked"))
}

fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Reads the messages to their end: `I: …` is a phase, `W: …` a warning; the last lines are kept for an error.
fn follow(messages: impl BufRead, progress: &mut dyn Progress) -> Vec<String> {
    const KEPT: usize = 40;
    let mut last = Vec::new();
    for line in messages.split(b'\n').map_while(|line| line.ok()) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if let Some(phase) = line.strip_prefix("I: ") {
            progress.phase(phase.trim_end_matches("..."), None);
        } else if let Some(warning) = line.strip_prefix("W: ") {
            // apt's own user cannot reach the closed directory; the packages' signatures are checked all the same.
            if !warning.contains("unsandboxed") {
                progress.warn(warning);
            }
        }
        if last.len() == KEPT {
            last.remove(0);
        }
        last.push(line);
    }
    last
}

fn failed(suite: &str, last: &[String]) -> anyhow::Error {
    let text = last.join("\n");
    if text.contains("No space left on device") || text.contains("not enough free space") {
        return Failure::new(Exit::NoSpace, format!("the disk is full while building {suite}")).into();
    }
    let errors: Vec<&str> =
        last.iter().map(String::as_str).filter(|line| line.starts_with("E:") || line.starts_with("Err:")).collect();
    let said = if errors.is_empty() { text.clone() } else { errors.join("\n") };
    let failure = Failure::new(Exit::Failed, format!("mmdebstrap failed for {suite}:\n{said}"));
    let hint = if text.contains("NO_PUBKEY") {
        "the host does not know the release's key: update the package debian-archive-keyring"
    } else if text.contains("Could not resolve")
        || text.contains("Could not connect")
        || text.contains("Failed to fetch")
    {
        "the mirror cannot be reached: try `apt-get update`, or name another one"
    } else {
        return failure.into();
    };
    failure.hint(hint).into()
}

/// The sources.list(5) of the new root.
fn sources_for(recipe: &Recipe<'_>) -> Result<String> {
    if let Some(mirror) = recipe.mirror {
        if !mirror.contains("://") || mirror.contains(char::is_whitespace) {
            return Err(Failure::new(Exit::BadParameter, format!("mirror '{mirror}' is no URI")).into());
        }
        let suites = vec![recipe.suite.to_owned(), format!("{}-updates", recipe.suite)];
        let origin =
            Origin { uris: vec![mirror.into()], suites, components: recipe.components.to_vec(), ..Origin::default() };
        return Ok(render(&[origin]));
    }
    let origins = read_host(Path::new("/etc/apt"))?;
    let host = Distribution::parse(&std::fs::read_to_string("/etc/os-release").unwrap_or_default());
    let chosen = if host.id == "debian" { translate(&origins, recipe.suite, recipe.components) } else { Vec::new() };
    if chosen.is_empty() {
        return Err(Failure::new(Exit::Unsupported, "this host's apt names no Debian mirror")
            .hint("name one, or build on a Debian host and import the root")
            .into());
    }
    Ok(render(&chosen))
}

/// Every entry of the host's sources, in the order that apt reads them.
fn read_host(directory: &Path) -> Result<Vec<Origin>> {
    let mut files = vec![directory.join("sources.list")];
    if let Ok(entries) = std::fs::read_dir(directory.join("sources.list.d")) {
        let mut parts: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        parts.sort();
        files.extend(parts);
    }
    let mut origins = Vec::new();
    for file in files {
        let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let parse = match extension {
            "list" => parse_lines,
            "sources" => parse_deb822,
            _ => continue,
        };
        match std::fs::read_to_string(&file) {
            Ok(text) => origins.extend(parse(&text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        }
    }
    Ok(origins)
}

/// The one-line form: `deb [option=value …] uri suite component …`.
fn parse_lines(text: &str) -> Vec<Origin> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Origin> {
    let line = line.split('#').next()?.trim().strip_prefix("deb")?;
    let rest = line.strip_prefix([' ', '\t'])?.trim();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let option = |key: &str| options.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Origin {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by: option("signed-by").unwrap_or_default().to_owned(),
        trusted: option("trusted") == Some("yes"),
    })
}

/// The form of paragraphs (deb822(5)).
fn parse_deb822(text: &str) -> Vec<Origin> {
    let text: String =
        text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{}\n", line.trim_end())).collect();
    text.split("\n\n").filter_map(parse_paragraph).collect()
}

fn parse_paragraph(text: &str) -> Option<Origin> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if line.starts_with([' ', '\t']) {
            fields.last_mut()?.1.push_str(&format!("\n{line}"));
        } else {
            let (key, value) = line.split_once(':')?;
            fields.push((key.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    let value =
        |key: &str| fields.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str()).unwrap_or_default();
    let words = |key: &str| value(key).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    if !words("types").iter().any(|kind| kind == "deb") || value("enabled").eq_ignore_ascii_case("no") {
        return None;
    }
    Some(Origin {
        uris: words("uris"),
        suites: words("suites"),
        components: words("components"),
        signed_by: value("signed-by").to_owned(),
        trusted: value("trusted").eq_ignore_ascii_case("yes"),
    })
}

/// The host's Debian entries with `suite` in the place of the host's own: its updates and its security too.
fn translate(origins: &[Origin], suite: &str, components: &[String]) -> Vec<Origin> {
    let translated = |own: &String| {
        let (base, part) = match own.split_once('-') {
            Some((base, part)) => (base, format!("-{part}")),
            None => (own.as_str(), String::new()),
        };
        let wanted = matches!(part.as_str(), "" | "-updates" | "-security");
        (SUITES.contains(&base) && wanted).then(|| format!("{suite}{part}"))
    };
    let origin = |origin: &Origin| {
        let mut suites: Vec<String> = origin.suites.iter().filter_map(translated).collect();
        suites.dedup();
        let components: Vec<String> =
            components.iter().filter(|part| origin.components.contains(part)).cloned().collect();
        (!suites.is_empty() && !components.is_empty()).then(|| Origin { suites, components, ..origin.clone() })
    };
    let mut chosen: Vec<Origin> = Vec::new();
    for origin in origins.iter().filter_map(origin) {
        if !chosen.contains(&origin) {
            chosen.push(origin);
        }
    }
    chosen
}

fn render(origins: &[Origin]) -> String {
    let paragraph = |origin: &Origin| {
        let mut text = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: {}\n",
            origin.uris.join(" "),
            origin.suites.join(" "),
            origin.components.join(" ")
        );
        if !origin.signed_by.is_empty() {
            text.push_str(&format!("Signed-By: {}\n", origin.signed_by));
        }
        if origin.trusted {
            text.push_str("Trusted: yes\n");
        }
        text
    };
    origins.iter().map(paragraph).collect::<Vec<_>>().join("\n")
}

/// Refuses what mmdebstrap would take for options or lists.
pub fn check(recipe: &Recipe<'_>) -> Result<()> {
    let plain = |word: &str| {
        !word.is_empty()
            && word.chars().all(|c| c.is_ascii_alphanumeric() || "+-.:".contains(c))
            && !word.starts_with('-')
    };
    let words = recipe.components.iter().chain(recipe.packages).map(String::as_str).chain([recipe.suite]);
    match words.into_iter().find(|word| !plain(word)) {
        Some(word) => bail!("'{word}' is no name of a suite, component or package"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAIN: &str = "https://mirror.example/debian";

    fn main_only() -> Vec<String> {
        vec!["main".into()]
    }

    #[test]
    fn paragraphs_become_another_suites() {
        let text = "# comment\nTypes: deb deb-src\nURIs: https://mirror.example/debian\nSuites: bookworm bookworm-updates bookworm-backports\n\
                    Components: main contrib\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
                    Types: deb\nURIs: https://mirror.example/debian-security\nSuites: bookworm-security\nComponents: main\nSigned-By:\n -----BEGIN\n .\n ABC\n\n\
                    Types: deb\nEnabled: no\nURIs: https://off.example\nSuites: bookworm\nComponents: main\n\n\
                    Types: deb\nURIs: https://else.example\nSuites: nodistro\nComponents: main\n";
        let rendered = render(&translate(&parse_deb822(text), "trixie", &main_only()));
        assert_eq!(
            rendered,
            "Types: deb\nURIs: https://mirror.example/debian\nSuites: trixie trixie-updates\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
             Types: deb\nURIs: https://mirror.example/debian-security\nSuites: trixie-security\nComponents: main\nSigned-By: \n -----BEGIN\n .\n ABC\n"
        );
    }

    #[test]
    fn lines_become_another_suites() {
        let text = "deb [signed-by=/k.gpg arch=amd64] https://mirror.example/debian stable main contrib # all\n\
                    deb-src https://mirror.example/debian stable main\n\
                    deb https://mirror.example/debian stable main\ndebian\n#deb x y z\n";
        let chosen = translate(&parse_lines(text), "bookworm", &main_only());
        assert_eq!(chosen.len(), 2);
        assert_eq!(chosen[0].signed_by, "/k.gpg");
        assert_eq!((&chosen[1].uris[0][..], &chosen[1].suites[0][..]), (MAIN, "bookworm"));
    }

    #[test]
    fn a_mirror_that_is_no_uri_is_refused() {
        let recipe = |mirror| Recipe { suite: "trixie", components: &[], packages: &[], mirror: Some(mirror) };
        assert!(sources_for(&recipe("mirror.example")).is_err());
        assert!(sources_for(&recipe("https://a b")).is_err());
        assert!(sources_for(&recipe(MAIN)).unwrap().contains("Suites: trixie trixie-updates"));
    }

    #[test]
    fn options_in_names_are_refused() {
        let packages = ["--hook".to_owned()];
        assert!(check(&Recipe { suite: "trixie", components: &[], packages: &packages, mirror: None }).is_err());
    }

    #[test]
    fn a_full_disk_is_told_from_a_bad_mirror() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let full = failed("trixie", &lines("dpkg: error: No space left on device\nE: apt-get failed"));
        assert_eq!(crate::failure::exit_of(&full), Exit::NoSpace);
        let key = failed("trixie", &lines("W: GPG error: NO_PUBKEY 1\nE: apt-get update failed"));
        assert!(crate::failure::hint_of(&key).unwrap().contains("keyring"));
    }
}
