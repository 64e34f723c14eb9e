//! A promise to a user, and how a list of them is kept: one after the other, each on an installation of its own,
//! with the host compared before and after.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Result, anyhow};
use libtest_mimic::{Arguments, Completion, Trial};

use crate::{
    host::HostState,
    site::{self, Site},
};

/// What keeps a promise.
pub type Keep = fn(&Site) -> Result<()>;
/// What keeps a promise on servers made from any of several templates.
pub type KeepOn = fn(&Site, &str) -> Result<()>;

/// One promise: a sentence, and the function that keeps it.
pub struct Promise {
    name: String,
    keep: Box<Body>,
}

type Body = dyn Fn(&Site) -> Result<()> + Send;

/// Why a promise was not kept, for the end of the run: whoever sees only the last lines of it sees what to mend.
type Broken = Arc<Mutex<Vec<String>>>;

struct Failure {
    reason: String,
    transcript: String,
}

/// Says that a promise cannot be kept on this machine; it is then counted as skipped, never as passed.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "skipped: {}", self.0)
    }
}

impl std::error::Error for Skip {}

/// The error that skips a promise, with the reason.
pub fn skip(reason: impl Into<String>) -> anyhow::Error {
    Skip(reason.into()).into()
}

impl Promise {
    /// The promise `name` of an `area`.
    pub fn new(area: &str, name: &str, keep: Keep) -> Self {
        Self { name: format!("{}::{name}", last(area)), keep: Box::new(keep) }
    }

    /// The same, for servers made from `template`.
    pub fn on(area: &str, name: &str, template: &'static str, keep: KeepOn) -> Self {
        let keep = move |site: &Site| keep(site, template);
        Self { name: format!("{}::{name}@{template}", last(area)), keep: Box::new(keep) }
    }

    fn into_trial(self, broken: Broken) -> Trial {
        let Self { name, keep: body } = self;
        Trial::ignorable_test(name.clone(), move || {
            keep(&*body).map_err(|failure| {
                broken.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{name}: {}", failure.reason));
                format!("{}--- what was run ---\n{}", failure.reason, failure.transcript).into()
            })
        })
    }
}

fn last(module: &str) -> &str {
    module.rsplit("::").next().unwrap_or(module)
}

/// Defines `promises()`, the list of an area. The compiler reports a promise that is in no list as dead code.
///
/// `each of ["a", "b"]: name` stands for one promise per template.
#[macro_export]
macro_rules! promises {
    ($($name:ident),* $(,)?) => { $crate::promises!($($name),*; each of []:); };
    ($($name:ident),* $(,)?; each of [$($template:literal),*]: $($both:ident),* $(,)?) => {
        /// The promises of this area.
        pub fn promises() -> Vec<$crate::promise::Promise> {
            #[allow(unused_mut)]
            let mut list = vec![$($crate::promise::Promise::new(module_path!(), stringify!($name), $name)),*];
            $crate::promises!(@each list, [$($template),*], [$($both),*]);
            list
        }
    };
    (@each $list:ident, [$($template:literal),*], $both:tt) => {
        $($crate::promises!(@one $list, $template, $both);)*
    };
    (@one $list:ident, $template:literal, [$($both:ident),*]) => {
        $($list.push($crate::promise::Promise::on(module_path!(), stringify!($both), $template, $both));)*
    };
}

/// Keeps the promises that the command line chooses, one after the other, and prints the closing line.
pub fn run(promises: Vec<Promise>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They share one kernel, and each compares all of the host before and after.
    arguments.test_threads = Some(1);
    if let Err(error) = site::programs() {
        // Not a skip: with nothing to test, a run that looks sound would be a lie.
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let turn = if arguments.list { Ok(None) } else { site::take_turn().map(Some) };
    if let Err(error) = &turn {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    if !arguments.list {
        site::sweep();
    }
    let broken = Broken::default();
    let chosen = promises.into_iter().filter(|promise| is_chosen(&promise.name));
    let trials = chosen.map(|promise| promise.into_trial(broken.clone())).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    site::remove_shared_templates();
    if !arguments.list {
        println!(
            "{} passed, {} failed, {} skipped",
            conclusion.num_passed, conclusion.num_failed, conclusion.num_ignored
        );
        for failure in broken.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            print!("failed: {failure}");
        }
    }
    conclusion.exit_code()
}

/// Whether `VSOS_TEST_ONLY`, whole names of promises with blanks between, has `name`; without it, all are chosen.
fn is_chosen(name: &str) -> bool {
    std::env::var("VSOS_TEST_ONLY").map_or(true, |names| names.split_whitespace().any(|chosen| chosen == name))
}

/// Keeps one promise: site, promise, comparison, and whatever happened, nothing of it stays.
fn keep(promise: &Body) -> Result<Completion, Failure> {
    if let Some(reason) = cannot_run() {
        return Ok(Completion::ignored_with(reason));
    }
    let site = Site::new()
        .map_err(|error| Failure { reason: format!("make a site: {error:#}\n"), transcript: String::new() })?;
    let scope = site.scope();
    let before = HostState::capture(&scope);
    let kept = catch_unwind(AssertUnwindSafe(|| promise(&site))).unwrap_or_else(|panic| Err(panicked(&*panic)));
    let compared = before.compare_when_settled(&scope);
    let transcript = site.transcript();
    site.scrub();
    match (kept, compared) {
        (Err(error), Ok(())) if error.is::<Skip>() => Ok(Completion::ignored_with(&error)),
        (Ok(()), Ok(())) => Ok(Completion::Completed),
        (kept, compared) => {
            let kept = kept.err().map(|error| format!("{error:#}\n")).unwrap_or_default();
            let compared = compared.err().map(|difference| difference.to_string()).unwrap_or_default();
            Err(Failure { reason: kept + &compared, transcript })
        }
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> anyhow::Error {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    anyhow!("panicked: {}", text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message"))
}

/// Why no promise at all can be kept here.
fn cannot_run() -> Option<String> {
    (!nix::unistd::geteuid().is_root()).then(|| "needs root".into())
}
