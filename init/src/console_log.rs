//! The program's own messages: one short line each on standard error, which is the console.
//!
//! Bounded and without memory: a line that the console does not take is lost.

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Longer messages are cut.
const MAX_BYTES: usize = 1000;

struct ConsoleLog;

/// From here on `log` prints; debug messages only in debug builds.
pub fn set_up() {
    let level = if cfg!(debug_assertions) { LevelFilter::Debug } else { LevelFilter::Info };
    // An error says that there is one already, and that is as good.
    if log::set_logger(&ConsoleLog).is_ok() {
        log::set_max_level(level);
    }
}

impl Log for ConsoleLog {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        let line = render(record.level(), &record.args().to_string());
        // Nobody is left to be told when this fails.
        let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
    }

    fn flush(&self) {}
}

fn render(level: Level, message: &str) -> String {
    let word = match level {
        Level::Error => "error: ",
        Level::Warn => "warning: ",
        Level::Info => "",
        Level::Debug | Level::Trace => "debug: ",
    };
    let mut end = message.len().min(MAX_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    // What a guest's file or program put into a message must not steer the terminal.
    let printable = |c: char| if c.is_control() { '?' } else { c };
    let message: String = message[..end].chars().map(printable).collect();
    format!("vsinit: {word}{message}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_short_line() {
        assert_eq!(render(Level::Info, "up"), "vsinit: up\n");
        assert_eq!(render(Level::Warn, "a\nb\u{1b}[2J"), "vsinit: warning: a?b?[2J\n");
        assert!(render(Level::Error, &"é".repeat(900)).len() < MAX_BYTES + 30);
    }
}
