//! `vsctl edit`

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{print_error, set};
use crate::edit;
use crate::failure::{Exit, Failure};
use crate::name::Name;
use crate::site::Site;
use crate::store;

/// Open a server's spec in $VISUAL, $EDITOR or vi; what is saved there is checked and applied as by `set`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The server.
    name: Name,
    /// Edit, print what would be done, and change nothing.
    #[arg(long)]
    plan: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A copy for the editor, in a directory of its own: editors leave files beside what they edit.
struct Draft {
    directory: PathBuf,
}

impl Draft {
    fn of(site: &Site, name: &Name, text: &str) -> Result<Self> {
        let directory = site.run().join("edit").join(format!("{name}.{}", std::process::id()));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .with_context(|| format!("make {}", directory.display()))?;
        let draft = Self { directory };
        fs::write(draft.file(), text).with_context(|| format!("write {}", draft.file().display()))?;
        Ok(draft)
    }

    fn file(&self) -> PathBuf {
        self.directory.join("server.toml")
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // What stays is in /run and harms nobody.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Runs the command.
///
/// # Errors
/// When the editor fails, or the text cannot be used and nobody is there to mend it; then nothing has changed.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let name = &args.name;
    if !store::record_file(site, name).exists() {
        store::load(site, name)?;
    }
    let from = edit::text(site, name)?;
    let draft = Draft::of(site, name, &from)?;
    loop {
        open_editor(&draft.file())?;
        let to = fs::read_to_string(draft.file()).with_context(|| format!("read {}", draft.file().display()))?;
        if to == from {
            super::output::line(format_args!("{name}: unchanged"))?;
            return Ok(0);
        }
        match apply(&args, site, &from, &to) {
            Ok(()) => return Ok(0),
            Err(error) if io::stdin().is_terminal() && io::stderr().is_terminal() => {
                print_error(&error);
                if !ask("edit again? [Y/n] ")? {
                    eprintln!("{name}: unchanged");
                    return Ok(crate::failure::exit_of(&error) as i32);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn apply(args: &Args, site: &Site, from: &str, to: &str) -> Result<()> {
    if args.plan {
        let server = store::load(site, &args.name)?;
        return super::output::plan(&edit::plan(site, &server, from, to)?.steps, args.json);
    }
    set::tell(&args.name, &edit::replace(site, &args.name, from, to)?, args.json)
}

/// By the shell, as git and sudoedit do: the variable may hold arguments.
fn open_editor(file: &Path) -> Result<()> {
    let named = |variable| std::env::var_os(variable).filter(|value| !value.is_empty());
    let editor = named("VISUAL").or_else(|| named("EDITOR")).unwrap_or_else(|| "vi".into());
    let mut script = editor.clone();
    script.push(" \"$1\"");
    let status = Command::new("/bin/sh")
        .arg("-c")
        .arg(&script)
        .arg("sh")
        .arg(file)
        .status()
        .with_context(|| format!("run the editor {}", editor.to_string_lossy()))?;
    if status.success() {
        return Ok(());
    }
    let message = format!("the editor {} failed ({status})", editor.to_string_lossy());
    Err(Failure::new(Exit::Failed, message).hint("set VISUAL or EDITOR").into())
}

fn ask(question: &str) -> Result<bool> {
    eprint!("{question}");
    io::stderr().flush().context("ask")?;
    let mut answer = String::new();
    let length = io::stdin().read_line(&mut answer).context("read the answer")?;
    Ok(length > 0 && !answer.trim_start().starts_with(['n', 'N']))
}
