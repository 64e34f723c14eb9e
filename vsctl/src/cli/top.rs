//! `vsctl top`

use std::cmp::Ordering;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table};
use ratatui::{DefaultTerminal, Frame};

use super::output::{self, Column};
use crate::failure::{Exit, Failure};
use crate::lifecycle::state::State;
use crate::lifecycle::world::World;
use crate::observe::{Load, Sample};
use crate::site::Site;
use crate::size::show_bytes;

/// Show what all servers do, on one screen.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Keys: c CPU, m memory, t tasks, i disk, n network, u uptime, a name: sort by it, again: the other way round; q quits."
)]
pub struct Args {
    /// Print instead of showing a screen.
    #[arg(short, long)]
    batch: bool,
    /// How often to print.
    #[arg(short = 'n', long, value_name = "N", default_value = "1", requires = "batch")]
    count: u32,
    /// Seconds between two looks.
    #[arg(short, long, value_name = "S", default_value = "1", value_parser = seconds)]
    delay: Duration,
    /// Print JSON.
    #[arg(long, requires = "batch")]
    json: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("from 0.1 to 3600".into()),
    }
}

const COLUMNS: &[Column] = &[
    Column::left("name"),
    Column::left("state"),
    Column::right("cpu%"),
    Column::right("mem"),
    Column::right("limit"),
    Column::right("tasks"),
    Column::right("read/s"),
    Column::right("write/s"),
    Column::right("rx/s"),
    Column::right("tx/s"),
    Column::right("uptime"),
];

/// By what the servers are sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Name,
    Cpu,
    Memory,
    Tasks,
    Disk,
    Network,
    Uptime,
}

impl Key {
    /// Each with the key to press, its word in the help line, and the column that it marks.
    const ALL: &[(Key, char, &str, usize)] = &[
        (Key::Cpu, 'c', "CPU", 2),
        (Key::Memory, 'm', "memory", 3),
        (Key::Tasks, 't', "tasks", 5),
        (Key::Disk, 'i', "disk", 6),
        (Key::Network, 'n', "network", 8),
        (Key::Uptime, 'u', "uptime", 10),
        (Key::Name, 'a', "name", 0),
    ];

    fn order(self, one: &Load, two: &Load) -> Ordering {
        let by = |value: fn(&Load) -> f64| value(two).total_cmp(&value(one));
        let first = match self {
            Self::Name => Ordering::Equal,
            Self::Cpu => by(|load| load.cpu_percent),
            Self::Memory => by(|load| load.memory_bytes as f64),
            Self::Tasks => by(|load| load.tasks as f64),
            Self::Disk => by(|load| load.read_bytes_s + load.write_bytes_s),
            Self::Network => by(|load| load.received_bytes_s + load.sent_bytes_s),
            Self::Uptime => by(|load| load.uptime_s as f64),
        };
        // Those that are alike stay where they are from one look to the next.
        first.then_with(|| one.name.cmp(&two.name))
    }
}

fn cells(load: &Load) -> Vec<String> {
    let rate = |bytes: f64| show_bytes(bytes as u64);
    vec![
        load.name.to_string(),
        load.state.to_string(),
        format!("{:.1}", load.cpu_percent),
        show_bytes(load.memory_bytes),
        load.memory_limit_bytes.map_or_else(|| "-".into(), show_bytes),
        load.tasks.to_string(),
        rate(load.read_bytes_s),
        rate(load.write_bytes_s),
        rate(load.received_bytes_s),
        rate(load.sent_bytes_s),
        output::span(load.uptime_s),
    ]
}

/// Runs the command.
///
/// # Errors
/// When the counters cannot be read, or there is no terminal.
pub fn run(args: Args, site: &Site) -> Result<i32> {
    let world = World::new(site);
    if args.batch {
        return batch(&args, &world);
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(Failure::new(Exit::BadParameter, "top needs a terminal").hint("use --batch").into());
    }
    // Signals come by a descriptor, so that whatever ends us leaves a usable terminal.
    let mut ends = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT].into_iter().for_each(|signal| ends.add(signal));
    ends.thread_block().context("hold signals back")?;
    let ends =
        SignalFd::with_flags(&ends, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).context("wait for signals")?;
    let mut screen = Screen::new(&world, args.delay)?;
    // Also restores the terminal when we panic.
    let terminal = ratatui::try_init().context("set up the terminal")?;
    let outcome = screen.show(terminal, &ends);
    ratatui::restore();
    outcome.map(|()| 0)
}

fn batch(args: &Args, world: &World<'_>) -> Result<i32> {
    let mut before = Sample::take(world)?;
    for turn in 0..args.count {
        std::thread::sleep(args.delay);
        let now = Sample::take(world)?;
        let mut loads = now.since(&before);
        loads.sort_by(|one, two| Key::Name.order(one, two));
        if args.json {
            output::json(&loads)?;
        } else {
            if turn > 0 {
                output::text("\n")?;
            }
            output::table(COLUMNS, loads.iter().map(cells).collect(), true)?;
        }
        before = now;
    }
    Ok(0)
}

/// What is on the screen.
struct Screen<'a> {
    world: &'a World<'a>,
    delay: Duration,
    before: Sample,
    loads: Vec<Load>,
    key: Key,
    reverse: bool,
    /// The first server that is shown.
    top: usize,
}

impl<'a> Screen<'a> {
    fn new(world: &'a World<'a>, delay: Duration) -> Result<Self> {
        let before = Sample::take(world)?;
        // Rates since the start of each server would be no news of now: what was first seen did nothing yet.
        let loads = before.since(&before);
        Ok(Self { world, delay, before, loads, key: Key::Cpu, reverse: false, top: 0 })
    }

    fn show(&mut self, mut terminal: DefaultTerminal, ends: &SignalFd) -> Result<()> {
        let mut next = Instant::now() + self.delay;
        loop {
            self.sort();
            terminal.draw(|frame| self.draw(frame)).context("draw the screen")?;
            // Short waits: a signal shall not have to wait for a key.
            let wait = next.saturating_duration_since(Instant::now()).min(Duration::from_millis(200));
            if event::poll(wait).context("wait for a key")? {
                match event::read().context("read a key")? {
                    Event::Key(key) if key.kind == KeyEventKind::Press && !self.press(key) => return Ok(()),
                    _ => {}
                }
            }
            if ends.read_signal().context("read signals")?.is_some() {
                return Ok(());
            }
            if Instant::now() >= next {
                let now = Sample::take(self.world)?;
                self.loads = now.since(&self.before);
                self.before = now;
                next = Instant::now() + self.delay;
            }
        }
    }

    /// Does what a key asks for; `false` when it is enough.
    fn press(&mut self, key: KeyEvent) -> bool {
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
            KeyCode::Down | KeyCode::Char('j') => self.top += 1,
            KeyCode::Up | KeyCode::Char('k') => self.top = self.top.saturating_sub(1),
            KeyCode::PageDown => self.top += 10,
            KeyCode::PageUp => self.top = self.top.saturating_sub(10),
            KeyCode::Home => self.top = 0,
            KeyCode::Char(letter) => {
                if let Some((key, ..)) = Key::ALL.iter().find(|(_, known, ..)| *known == letter) {
                    self.reverse = *key == self.key && !self.reverse;
                    self.key = *key;
                }
            }
            _ => {}
        }
        self.top = self.top.min(self.loads.len().saturating_sub(1));
        true
    }

    fn sort(&mut self) {
        let (key, reverse) = (self.key, self.reverse);
        self.loads.sort_by(|one, two| if reverse { key.order(two, one) } else { key.order(one, two) });
        self.top = self.top.min(self.loads.len().saturating_sub(1));
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let [head, body, foot] =
            Layout::vertical([Constraint::Length(2), Constraint::Fill(1), Constraint::Length(1)]).areas(frame.area());
        frame.render_widget(Paragraph::new(self.summary()), head);
        self.draw_table(frame, body);
        frame.render_widget(self.help(), foot);
    }

    fn summary(&self) -> String {
        let sum = |value: fn(&Load) -> f64| self.loads.iter().map(value).sum::<f64>();
        let frozen = self.loads.iter().filter(|load| load.state == State::Frozen).count();
        let frozen = if frozen > 0 { format!(" ({frozen} frozen)") } else { String::new() };
        format!(
            "{} servers up{frozen}, {} tasks, CPU {:.1}% of {}00%, memory {}",
            self.loads.len(),
            sum(|load| load.tasks as f64),
            sum(|load| load.cpu_percent),
            std::thread::available_parallelism().map_or(1, usize::from),
            show_bytes(sum(|load| load.memory_bytes as f64) as u64),
        )
    }

    fn draw_table(&self, frame: &mut Frame<'_>, area: Rect) {
        let marked = Key::ALL.iter().find(|(key, ..)| *key == self.key).map_or(0, |(.., column)| *column);
        let rows: Vec<Vec<String>> = self.loads.iter().skip(self.top).map(cells).collect();
        let width = |index: usize| {
            let cells = rows.iter().map(|row| row[index].len());
            cells.chain([COLUMNS[index].title.len()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..COLUMNS.len()).map(width).collect();
        let align = |index: usize, text: &str| match COLUMNS[index].right {
            true => format!("{text:>0$}", widths[index]),
            false => text.to_owned(),
        };
        let header = COLUMNS.iter().enumerate().map(|(index, column)| {
            let style =
                Style::new().add_modifier(if index == marked { Modifier::UNDERLINED } else { Modifier::empty() });
            Cell::new(align(index, &column.title.to_uppercase())).style(style)
        });
        let header = Row::new(header).style(Style::new().add_modifier(Modifier::REVERSED));
        let body =
            rows.iter().map(|row| Row::new(row.iter().enumerate().map(|(index, text)| Cell::new(align(index, text)))));
        let constraints = widths.iter().map(|width| Constraint::Length(u16::try_from(*width).unwrap_or(u16::MAX)));
        frame.render_widget(Table::new(body, constraints).header(header).column_spacing(2), area);
    }

    fn help(&self) -> Line<'static> {
        let mut spans = vec![Span::raw("sort: ")];
        for (key, letter, word, _) in Key::ALL {
            let style = if *key == self.key { Style::new().add_modifier(Modifier::BOLD) } else { Style::new() };
            spans.push(Span::styled(format!("{letter} {word}"), style));
            spans.push(Span::raw("  "));
        }
        spans.push(Span::raw("| q quit"));
        Line::from(spans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(name: &str, cpu_percent: f64, tasks: u64) -> Load {
        Load {
            name: name.parse().unwrap(),
            state: State::Running,
            cpu_percent,
            memory_bytes: 1 << 20,
            memory_limit_bytes: Some(64 << 20),
            tasks,
            read_bytes_s: 0.0,
            write_bytes_s: 4096.0,
            received_bytes_s: 0.0,
            sent_bytes_s: 0.0,
            uptime_s: 61,
        }
    }

    #[test]
    fn the_busiest_comes_first_and_names_decide_among_the_rest() {
        let mut loads = vec![load("b", 0.0, 3), load("c", 50.0, 1), load("a", 0.0, 2)];
        let names = |loads: &[Load]| loads.iter().map(|load| load.name.to_string()).collect::<String>();
        loads.sort_by(|one, two| Key::Cpu.order(one, two));
        assert_eq!(names(&loads), "cab");
        loads.sort_by(|one, two| Key::Tasks.order(one, two));
        assert_eq!(names(&loads), "bac");
    }

    #[test]
    fn the_screen_fits_an_old_terminal() {
        let root = tempfile::tempdir().unwrap();
        let site = Site::at(root.path()).unwrap();
        let world = World::new(&site);
        let mut screen = Screen::new(&world, Duration::from_secs(1)).unwrap();
        screen.loads = vec![load("web1", 12.34, 5)];
        let backend = ratatui::backend::TestBackend::new(80, 6);
        let mut terminal = ratatui::Terminal::new(backend).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let text: Vec<String> = (0..6)
            .map(|y| (0..80).map(|x| buffer.cell((x, y)).unwrap().symbol()).collect::<String>().trim_end().to_owned())
            .collect();
        assert!(text[0].starts_with("1 servers up, 5 tasks, CPU 12.3%"), "{text:?}");
        assert_eq!(text[2], "NAME  STATE    CPU%  MEM  LIMIT  TASKS  READ/S  WRITE/S  RX/S  TX/S  UPTIME");
        assert_eq!(text[3], "web1  running  12.3   1M    64M      5      0B       4K    0B    0B   1m01s");
        assert!(text[5].starts_with("sort: c CPU") && text[5].ends_with("q quit"), "{text:?}");
    }
}
