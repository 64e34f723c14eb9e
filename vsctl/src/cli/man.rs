//! `vsctl man`: the manual pages, made from the same definitions as the help.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::failure::Exit;

/// The page that no definition can give.
pub const SERVER_TOML: &str = include_str!("../../man/server.toml.5");

/// Write the manual pages into a directory: vsctl.8, one for each command, and server.toml.5.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The directory.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// When a page cannot be written.
pub fn run(args: &Args) -> Result<i32> {
    for (name, text) in pages()? {
        let path = args.directory.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(0)
}

/// All pages: file name and text.
///
/// # Errors
/// When a page cannot be rendered.
pub fn pages() -> Result<Vec<(String, String)>> {
    let mut command = super::Cli::command();
    command.build();
    let mut pages = vec![("server.toml.5".to_owned(), SERVER_TOML.to_owned())];
    collect(&command, "vsctl", &mut pages)?;
    Ok(pages)
}

fn collect(command: &clap::Command, name: &str, pages: &mut Vec<(String, String)>) -> Result<()> {
    pages.push((format!("{name}.8"), page(command, name)?));
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set()) {
        collect(sub, &format!("{name}-{}", sub.get_name()), pages)?;
    }
    Ok(())
}

fn page(command: &clap::Command, name: &str) -> Result<String> {
    // The name that the heading of the page shows; `help` has no page.
    let command = command.clone().display_name(name.to_owned()).version(env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone().disable_help_subcommand(true))
        .title(name.to_uppercase())
        .section("8")
        .source("vsos")
        .manual("Virtual servers");
    let mut text = Vec::new();
    let mut render = |part: fn(&Man, &mut dyn std::io::Write) -> std::io::Result<()>| part(&man, &mut text);
    render(Man::render_title)
        .and_then(|()| render(Man::render_name_section))
        .and_then(|()| render(Man::render_synopsis_section))
        .and_then(|()| render(Man::render_description_section))
        .and_then(|()| render(Man::render_options_section))
        .context("render a manual page")?;
    let mut text = String::from_utf8(text).context("render a manual page")?;
    let mut rest = Roff::new();
    list_commands(&command, name, &mut rest);
    if let Some(help) = command.get_after_help() {
        let help = help.to_string();
        let (title, body) = help.split_once(":\n").unwrap_or(("NOTES", &help));
        rest.control("SH", [title.to_uppercase().as_str()]);
        rest.control("nf", []);
        rest.text([roman(body)]);
        rest.control("fi", []);
    }
    if name == "vsctl" {
        examples(&mut rest);
        list_exit_codes(&mut rest);
        environment_and_files(&mut rest);
    } else {
        rest.control("SH", ["EXIT STATUS"]);
        rest.text([roman("0, or a code from the table in "), bold("vsctl"), roman("(8).")]);
    }
    see_also(name, &mut rest);
    text.push_str(&rest.render());
    Ok(text)
}

fn list_commands(command: &clap::Command, name: &str, page: &mut Roff) {
    let shown = |sub: &&clap::Command| sub.get_name() != "help" && !sub.is_hide_set();
    let mut commands = command.get_subcommands().filter(shown).peekable();
    if commands.peek().is_none() {
        return;
    }
    page.control("SH", ["COMMANDS"]);
    for sub in commands {
        page.control("TP", []);
        page.text([bold(format!("{name}-{}", sub.get_name())), roman("(8)")]);
        page.text([roman(sub.get_about().map(ToString::to_string).unwrap_or_default())]);
    }
}

/// From nothing to a server and back.
const EXAMPLES: &[(&str, &str)] = &[
    ("vsctl template build busybox", "Make the smallest template, from the host's own busybox."),
    (
        "vsctl create web1 --template busybox --memory 256M --cpus 1 --start",
        "Create a server with limits and start it.",
    ),
    ("vsctl enter web1", "Work in it."),
    ("vsctl set web1 memory=512M", "Give it more memory, now and for good."),
    ("vsctl list -a -o name,state,memory,limit -s -memory", "See who uses most."),
    (
        "vsctl create db1 --template debian-13 --migratable --start",
        "Create one whose programs can be put on the disk and moved with all that they have in memory.",
    ),
    ("vsctl checkpoint create db1 before-upgrade --leave-running", "Keep its disk and its memory of now."),
    ("vsctl suspend db1; vsctl resume db1", "Put it on the disk, and let it go on where it was."),
    ("vsctl migrate db1 host2 --live --fallback", "Move it to another host while it runs, or with a short pause."),
    ("vsctl destroy --force web1", "Stop it and remove all of it."),
    ("vsctl doctor --fix", "See what this host lacks, and mend what a crash left behind."),
];

fn examples(page: &mut Roff) {
    page.control("SH", ["EXAMPLES"]);
    for (line, text) in EXAMPLES {
        page.control("TP", []);
        page.text([bold(*line)]);
        page.text([roman(*text)]);
    }
}

fn list_exit_codes(page: &mut Roff) {
    page.control("SH", ["EXIT STATUS"]);
    page.text([roman(
        "The numbers are those of vzctl(8) where the condition is the same. A command for several servers goes \
                      on past failures and gives the code of the first one.",
    )]);
    let entries = [(0, "success")].into_iter().chain(Exit::TABLE.iter().map(|(exit, meaning)| (*exit as u8, *meaning)));
    for (code, meaning) in entries {
        page.control("TP", []);
        page.text([bold(code.to_string())]);
        page.text([roman(meaning)]);
    }
    page.control("PP", []);
    page.text([roman("exec and enter give the status of what they ran; 128+N when signal N ended it.")]);
}

fn environment_and_files(page: &mut Roff) {
    let entry = |page: &mut Roff, term: &str, text: &str| {
        page.control("TP", []);
        page.text([bold(term)]);
        page.text([roman(text)]);
    };
    page.control("SH", ["ENVIRONMENT"]);
    for (variable, text) in [
        (
            "VSOS_ROOT",
            "A directory before all paths below. What is global to the host (cgroup, bridge, links, nft tables) gets a \
             suffix that depends on it: installations live side by side.",
        ),
        ("VISUAL, EDITOR", "The editor of vsctl edit."),
        ("NO_COLOR", "When set, nothing is coloured."),
        ("RUST_LOG", "What is logged on standard error, beside -v: error, warn, info, debug."),
    ] {
        entry(page, variable, text);
    }
    page.control("SH", ["FILES"]);
    for (path, text) in [
        ("/etc/vsos/vsos.toml", "Settings of the host."),
        ("/var/lib/vsos/servers/NAME/server.toml", "The spec of a server, see server.toml(5); may be edited by hand."),
        ("/var/lib/vsos/servers/NAME/volume/", "Its root."),
        ("/var/lib/vsos/servers/NAME/checkpoints/LABEL/", "A checkpoint that is kept."),
        ("/var/lib/vsos/trees/LABEL/", "A checkpoint of processes outside any server."),
        ("/var/lib/vsos/servers/NAME/console.log", "What its console said."),
        ("/var/lib/vsos/templates/NAME/", "A template."),
        ("/var/lib/vsos/events.log", "What vsctl events shows."),
        ("/run/vsos/servers/NAME/", "Files of a server that is up."),
    ] {
        entry(page, path, text);
    }
}

fn see_also(name: &str, page: &mut Roff) {
    page.control("SH", ["SEE ALSO"]);
    let pages: &[(&str, &str)] = match name {
        "vsctl" => &[("server.toml", "5"), ("vsinit", "8"), ("cgroups", "7"), ("namespaces", "7")],
        _ => &[("vsctl", "8"), ("server.toml", "5")],
    };
    let mut line = Vec::new();
    for (index, (name, section)) in pages.iter().enumerate() {
        let end = if index + 1 < pages.len() { ", " } else { "" };
        line.extend([bold(*name), roman(format!("({section}){end}"))]);
    }
    page.text(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_of_a_spec_has_its_entry() {
        for (key, ..) in crate::spec::KEYS {
            assert!(
                SERVER_TOML.contains(&format!(".BR {key} ")) || SERVER_TOML.contains(&format!(".B {key}\n")),
                "{key}"
            );
        }
    }

    #[test]
    fn every_command_has_a_page_and_is_in_the_main_one() {
        let pages = pages().unwrap();
        let main = &pages.iter().find(|(name, _)| name == "vsctl.8").unwrap().1;
        let mut command = super::super::Cli::command();
        command.build();
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set()) {
            let name = format!("vsctl-{}", sub.get_name());
            assert!(main.contains(&name.replace('-', "\\-")), "{name} is not in vsctl.8");
            assert!(pages.iter().any(|(file, _)| *file == format!("{name}.8")), "{name}");
        }
        for (exit, meaning) in Exit::TABLE {
            assert!(main.contains(meaning), "{exit:?}");
        }
    }
}
