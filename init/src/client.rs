//! The command `vsinit`: asks the supervising vsinit of this server.
//!
//! Called as `poweroff`, `reboot`, `halt` or `shutdown` (a link to the program) it is that command.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use init::control::{self, Reply, Request, Service};

use crate::failure::chain;
use crate::power::{self, Power};

const HELP: &str = "\
Usage: vsinit COMMAND

Commands:
  list                   all services and their states
  start NAME...          start services and what they require
  stop NAME...           stop services and what requires them
  restart NAME...        stop services, then start them
  log [-n LINES] NAME    the last lines of a service's log (20)
  poweroff | reboot | halt [-f]
                         stop everything and end the server; -f: at once

Options:
  -h, --help             this text
  -V, --version          the version

Called as poweroff, reboot, halt or shutdown it is that command. As process 1 it
boots a virtual server that vsctl(8) hands over to it. See vsinit(8).
";

/// Exit statuses, as in vsinit(8).
mod exit {
    /// vsinit said no.
    pub const FAILED: u8 = 1;
    /// The command line makes no sense.
    pub const USAGE: u8 = 2;
    /// No vsinit answers.
    pub const NO_VSINIT: u8 = 3;
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    Help,
    Version,
    /// Without asking vsinit.
    AtOnce(Power),
    Ask(Vec<Request>),
}

/// Runs the command line and tells how it went.
#[inline(never)]
pub fn run() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let command = match parse(&arguments) {
        Ok(command) => command,
        Err(message) => {
            eprintln!("vsinit: {message}\nTry 'vsinit --help'.");
            return exit::USAGE.into();
        }
    };
    match command {
        Command::Help => print(HELP),
        Command::Version => print(concat!("vsinit ", env!("CARGO_PKG_VERSION"), "\n")),
        Command::AtOnce(power) => {
            power::sync_root();
            power::now(power)
        }
        Command::Ask(requests) => return ask_all(&requests),
    }
    ExitCode::SUCCESS
}

/// All are asked, also after a failure; the worst exit status counts.
fn ask_all(requests: &[Request]) -> ExitCode {
    let mut status = 0;
    for request in requests {
        let (message, code) = match control::call(Path::new(control::SOCKET), request) {
            Ok(Reply::Failed { message }) => (message, exit::FAILED),
            Ok(reply) => {
                print(&render(&reply));
                continue;
            }
            Err(error) => (chain(&error), exit::NO_VSINIT),
        };
        eprintln!("vsinit: {message}");
        status = status.max(code);
    }
    status.into()
}

/// A reader that has gone away is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn parse(arguments: &[String]) -> Result<Command, String> {
    let called_as = arguments.first().and_then(|name| name.rsplit('/').next()).unwrap_or("");
    let rest = arguments.get(1..).unwrap_or_default();
    if rest.iter().any(|argument| argument == "--help" || argument == "-h") && called_as != "shutdown" {
        return Ok(Command::Help);
    }
    match called_as {
        "shutdown" => return shutdown(rest),
        "poweroff" | "reboot" | "halt" => return end(called_as, rest),
        _ => {}
    }
    let Some((verb, rest)) = rest.split_first() else {
        return Err("no command given".into());
    };
    let named = |request: fn(String) -> Request| match rest {
        [] => Err(format!("'{verb}' needs the name of a service")),
        names => Ok(Command::Ask(names.iter().cloned().map(request).collect())),
    };
    match verb.as_str() {
        "-V" | "--version" => Ok(Command::Version),
        "list" if rest.is_empty() => Ok(Command::Ask(vec![Request::List])),
        "list" => Err("'list' takes no arguments".into()),
        "start" => named(|name| Request::Start { name }),
        "stop" => named(|name| Request::Stop { name }),
        "restart" => named(|name| Request::Restart { name }),
        "log" => log(rest),
        "poweroff" | "reboot" | "halt" => end(verb, rest),
        _ => Err(format!("unknown command '{verb}'")),
    }
}

fn log(arguments: &[String]) -> Result<Command, String> {
    let (lines, name) = match arguments {
        [name] => ("20", name),
        [n, lines, name] | [name, n, lines] if n == "-n" => (lines.as_str(), name),
        _ => return Err("'log' needs the name of one service".into()),
    };
    let lines = lines.parse().map_err(|_| format!("'{lines}' is not a number of lines"))?;
    Ok(Command::Ask(vec![Request::Log { name: name.clone(), lines }]))
}

/// poweroff, reboot and halt with the options that scripts give them.
fn end(verb: &str, arguments: &[String]) -> Result<Command, String> {
    let mut power = power_of(verb);
    let mut at_once = false;
    for argument in arguments {
        match argument.as_str() {
            "-f" | "--force" => at_once = true,
            "-p" | "--poweroff" => power = Power::Poweroff,
            "--reboot" => power = Power::Reboot,
            "--halt" => power = Power::Halt,
            // What they turn off (wtmp, wall messages, sync, delays) is not done here anyway.
            "-d" | "-h" | "-i" | "-n" | "-w" | "--no-wall" => {}
            _ => return Err(format!("'{verb}' does not know '{argument}'")),
        }
    }
    Ok(finish(power, at_once))
}

/// shutdown(8): only at once, because a server has no users to warn.
fn shutdown(arguments: &[String]) -> Result<Command, String> {
    let mut power = Power::Poweroff;
    for argument in arguments {
        match argument.as_str() {
            "--help" => return Ok(Command::Help),
            "-r" | "--reboot" => power = Power::Reboot,
            "-H" | "--halt" => power = Power::Halt,
            "-h" | "-P" | "--poweroff" => power = Power::Poweroff,
            "now" | "+0" | "-t0" | "--no-wall" => {}
            _ => return Err(format!("'shutdown' knows only 'now', not '{argument}'")),
        }
    }
    Ok(finish(power, false))
}

fn power_of(verb: &str) -> Power {
    match verb {
        "reboot" => Power::Reboot,
        "halt" => Power::Halt,
        _ => Power::Poweroff,
    }
}

fn finish(power: Power, at_once: bool) -> Command {
    let request = match power {
        Power::Poweroff => Request::Poweroff,
        Power::Reboot => Request::Reboot,
        Power::Halt => Request::Halt,
    };
    if at_once { Command::AtOnce(power) } else { Command::Ask(vec![request]) }
}

fn render(reply: &Reply) -> String {
    match reply {
        Reply::Services { services } => table(services),
        Reply::Log { text } if text.is_empty() => String::new(),
        Reply::Log { text } => format!("{text}\n"),
        Reply::Done | Reply::Consoles { .. } | Reply::Failed { .. } => String::new(),
    }
}

fn table(services: &[Service]) -> String {
    let width = services.iter().map(|service| service.name.len()).max().unwrap_or(0).max(7);
    let mut text =
        format!("{:width$}  {:10}  {:>7}  {:>6}  {:>8}  LAST\n", "SERVICE", "STATE", "PID", "SINCE", "RESTARTS");
    for Service { name, state, pid, since_s, restarts, last } in services {
        let pid = pid.map_or("-".into(), |pid| pid.to_string());
        let since = since(*since_s);
        let last = last.as_deref().unwrap_or("-");
        text += &format!("{name:width$}  {state:10}  {pid:>7}  {since:>6}  {restarts:>8}  {last}\n");
    }
    text
}

/// A time in at most five letters.
fn since(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(&line.split_whitespace().map(String::from).collect::<Vec<_>>())
    }

    fn ask(request: Request) -> Result<Command, String> {
        Ok(Command::Ask(vec![request]))
    }

    #[test]
    fn command_lines() {
        let name = || "a".to_string();
        let two = [Request::Start { name: name() }, Request::Start { name: "b".into() }];
        let cases = [
            ("vsinit list", ask(Request::List)),
            ("/sbin/vsinit start a b", Ok(Command::Ask(two.into()))),
            ("vsinit stop a", ask(Request::Stop { name: name() })),
            ("vsinit log a", ask(Request::Log { name: name(), lines: 20 })),
            ("vsinit log -n 5 a", ask(Request::Log { name: name(), lines: 5 })),
            ("vsinit poweroff", ask(Request::Poweroff)),
            ("poweroff", ask(Request::Poweroff)),
            ("/sbin/reboot -d -n", ask(Request::Reboot)),
            ("reboot -f", Ok(Command::AtOnce(Power::Reboot))),
            ("halt -p", ask(Request::Poweroff)),
            ("halt", ask(Request::Halt)),
            ("shutdown -h now", ask(Request::Poweroff)),
            ("shutdown -r now", ask(Request::Reboot)),
            ("vsinit --help", Ok(Command::Help)),
            ("vsinit -V", Ok(Command::Version)),
        ];
        for (line, expected) in cases {
            assert_eq!(parsed(line), expected, "{line}");
        }
        for bad in [
            "vsinit",
            "vsinit start",
            "vsinit lst",
            "vsinit list x",
            "vsinit log",
            "vsinit log -n x a",
            "shutdown +5",
            "reboot --fast",
        ] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_table() {
        let services = [
            Service {
                name: "syslogd".into(),
                state: "running".into(),
                pid: Some(12),
                since_s: 7300,
                restarts: 0,
                last: None,
            },
            Service {
                name: "a-long-name".into(),
                state: "failed".into(),
                pid: None,
                since_s: 3,
                restarts: 2,
                last: Some("exit 1".into()),
            },
        ];
        let expected = "\
SERVICE      STATE           PID   SINCE  RESTARTS  LAST
syslogd      running          12      2h         0  -
a-long-name  failed            -      3s         2  exit 1
";
        assert_eq!(table(&services), expected);
    }
}
