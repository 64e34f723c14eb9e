//! What is executed: candidates for its path, arguments, and an environment that owes nothing to the host's.

use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use anyhow::{Context, Result};

use super::account::Account;
use super::{Program, Wish};

/// Where programs are looked for inside, unless `-e PATH=…` says otherwise.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program ready to be executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prepared {
    /// Paths to try, the first that is there counts.
    pub candidates: Vec<CString>,
    pub arguments: Vec<CString>,
    pub environment: Vec<CString>,
    /// For messages.
    pub shown: String,
}

/// Makes a wish ready.
pub(super) fn prepare(account: &Account, wish: &Wish, is_terminal: bool) -> Result<Prepared> {
    let term = if is_terminal { std::env::var_os("TERM") } else { None };
    let environment = environment(account, term.as_deref(), &wish.environment);
    let path = environment.iter().find_map(|text| text.as_bytes().strip_prefix(b"PATH=")).unwrap_or_default();
    let (candidates, arguments) = match &wish.program {
        Program::LoginShell => login_shell(&account.shell)?,
        Program::Command(words) => {
            let program = words.first().map(OsString::as_os_str).unwrap_or_default();
            (candidates(program, path)?, words.iter().map(|word| c_string(word)).collect::<Result<_>>()?)
        }
    };
    let shown = match &wish.program {
        Program::LoginShell => account.shell.clone(),
        Program::Command(words) => words.first().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default(),
    };
    Ok(Prepared { candidates, arguments, environment, shown })
}

/// The shell, and `/bin/sh` for an account whose shell is not installed; the leading dash makes it a login shell.
fn login_shell(shell: &str) -> Result<(Vec<CString>, Vec<CString>)> {
    let base = shell.rsplit('/').next().unwrap_or(shell);
    Ok((vec![CString::new(shell)?, c"/bin/sh".to_owned()], vec![CString::new(format!("-{base}"))?]))
}

/// What execvp(3) would try.
fn candidates(program: &OsStr, path: &[u8]) -> Result<Vec<CString>> {
    if program.as_bytes().contains(&b'/') || program.is_empty() {
        return Ok(vec![c_string(program)?]);
    }
    let joined = path.split(|byte| *byte == b':').map(|directory| {
        let mut bytes = directory.to_vec();
        // An empty part is the working directory.
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend(program.as_bytes());
        CString::new(bytes).context("the program's name has NUL")
    });
    joined.collect()
}

/// The usual variables, then the caller's own, which win.
fn environment(account: &Account, term: Option<&OsStr>, extra: &[(String, String)]) -> Vec<CString> {
    let usual = [
        ("PATH", PATH),
        ("HOME", &account.home),
        ("USER", &account.name),
        ("LOGNAME", &account.name),
        ("SHELL", &account.shell),
    ];
    let is_given = |key: &str| extra.iter().any(|(given, _)| given == key);
    let usual =
        usual.iter().filter(|(key, _)| !is_given(key)).map(|(key, value)| format!("{key}={value}").into_bytes());
    let term = term.filter(|_| !is_given("TERM")).map(|term| [b"TERM=", term.as_bytes()].concat());
    // The last of several with one name wins.
    let last = |index: usize, key: &str| !extra[index + 1..].iter().any(|(later, _)| later == key);
    let extra = extra.iter().enumerate().filter(|(index, (key, _))| last(*index, key));
    let extra = extra.map(|(_, (key, value))| format!("{key}={value}").into_bytes());
    // None has NUL: neither the host's variables and arguments nor a line of passwd that was parsed as text can.
    usual.chain(term).chain(extra).filter_map(|bytes| CString::new(bytes).ok()).collect()
}

fn c_string(text: &OsStr) -> Result<CString> {
    CString::new(text.to_owned().into_vec()).context("an argument with NUL")
}

/// Reads `KEY=VALUE` of the command line.
///
/// # Errors
/// What is wrong with it.
pub fn variable(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err(format!("'{text}' is no variable (an example: LANG=C.UTF-8)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enter::Terminal;

    fn anna() -> Account {
        let (name, home, shell) = ("anna".into(), "/home/anna".into(), "/bin/zsh".into());
        Account { name, uid: 1000, gid: 1000, groups: vec![1000], home, shell }
    }

    fn wish(program: Program, environment: &[(&str, &str)]) -> Wish {
        let environment = environment.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        Wish { user: "anna".into(), program, environment, directory: None, terminal: Terminal::Never }
    }

    fn texts(list: &[CString]) -> Vec<&str> {
        list.iter().map(|text| text.to_str().unwrap()).collect()
    }

    #[test]
    fn a_login_shell_knows_what_it_is() {
        let prepared = prepare(&anna(), &wish(Program::LoginShell, &[]), false).unwrap();
        assert_eq!(texts(&prepared.candidates), ["/bin/zsh", "/bin/sh"]);
        assert_eq!(texts(&prepared.arguments), ["-zsh"]);
    }

    #[test]
    fn nothing_of_the_hosts_environment_goes_in() {
        let prepared = prepare(&anna(), &wish(Program::LoginShell, &[("A", "1"), ("HOME", "/x"), ("A", "2=3")]), false);
        let environment = prepared.unwrap().environment;
        let path = format!("PATH={PATH}");
        assert_eq!(texts(&environment), [&path, "USER=anna", "LOGNAME=anna", "SHELL=/bin/zsh", "HOME=/x", "A=2=3"]);
    }

    #[test]
    fn programs_are_looked_for_in_the_guests_path() {
        let words = |words: &[&str]| Program::Command(words.iter().map(Into::into).collect());
        let prepared = prepare(&anna(), &wish(words(&["ls", "-l"]), &[("PATH", "/a::/b")]), false).unwrap();
        assert_eq!(texts(&prepared.candidates), ["/a/ls", "ls", "/b/ls"]);
        assert_eq!(texts(&prepared.arguments), ["ls", "-l"]);
        let prepared = prepare(&anna(), &wish(words(&["./x/y"]), &[]), false).unwrap();
        assert_eq!(texts(&prepared.candidates), ["./x/y"]);
    }

    #[test]
    fn variables_have_a_name() {
        assert_eq!(variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(variable("A="), Ok(("A".into(), String::new())));
        assert!(variable("=b").is_err() && variable("A").is_err());
    }
}
