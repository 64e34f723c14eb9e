//! How long work is shown while it goes on: a bar on a terminal, else a line for each phase.

use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::name::Name;
use crate::size::show_bytes;
use crate::template::progress::Progress;

/// Does work about `name` with its progress shown on standard error.
pub fn shown<T>(name: &Name, work: impl FnOnce(&mut dyn Progress) -> T) -> T {
    let mut shown: Box<dyn Shown> = match io::stderr().is_terminal() {
        true => Box::new(Bar::new(name)),
        false => Box::new(Lines { name: name.clone() }),
    };
    let made = work(shown.as_progress());
    shown.end();
    made
}

/// A progress that can be taken off the screen.
trait Shown: Progress {
    fn as_progress(&mut self) -> &mut dyn Progress;
    fn end(&mut self);
}

/// A line for each phase, where no terminal is.
struct Lines {
    name: Name,
}

impl Lines {
    /// Whoever listened may be gone: no reason to end work that is half done.
    fn say(&self, what: &str) {
        let _ = writeln!(io::stderr(), "{}: {what}", self.name);
    }
}

impl Progress for Lines {
    fn phase(&mut self, what: &str, total_bytes: Option<u64>) {
        match total_bytes {
            Some(total) => self.say(&format!("{what}: {}", show_bytes(total))),
            None => self.say(what),
        }
    }
    fn advance(&mut self, _done_bytes: u64) {}
    fn note(&mut self, what: &str) {
        self.say(what);
    }
    fn warn(&mut self, what: &str) {
        self.say(&format!("warning: {what}"));
    }
}

impl Shown for Lines {
    fn as_progress(&mut self) -> &mut dyn Progress {
        self
    }
    fn end(&mut self) {}
}

/// A bar on a terminal. It moves when the work says so; no thread ticks, since builds fork.
struct Bar {
    name: Name,
    bar: ProgressBar,
}

impl Bar {
    fn new(name: &Name) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        Self { name: name.clone(), bar }
    }

    fn style(total: Option<u64>) -> ProgressStyle {
        let template = match total {
            Some(_) => "{prefix}: {msg} [{bar:30}] {bytes}/{total_bytes} {eta}",
            None => "{prefix}: {msg} {bytes} {elapsed}",
        };
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
    }
}

impl Progress for Bar {
    fn phase(&mut self, what: &str, total_bytes: Option<u64>) {
        self.bar.reset();
        self.bar.set_style(Self::style(total_bytes));
        match total_bytes {
            Some(total) => self.bar.set_length(total),
            None => self.bar.unset_length(),
        }
        self.bar.set_prefix(self.name.to_string());
        self.bar.set_message(what.to_owned());
        self.bar.tick();
    }
    fn advance(&mut self, done_bytes: u64) {
        self.bar.set_position(done_bytes);
    }
    fn note(&mut self, what: &str) {
        self.bar.println(format!("{}: {what}", self.name));
    }
    fn warn(&mut self, what: &str) {
        self.bar.println(format!("{}: warning: {what}", self.name));
    }
}

impl Shown for Bar {
    fn as_progress(&mut self) -> &mut dyn Progress {
        self
    }
    fn end(&mut self) {
        self.bar.finish_and_clear();
    }
}
