//! What happened in a run, for people: a column per node, a line per event.

use std::{cell::RefCell, collections::VecDeque, fmt::Write as _, rc::Rc};

use relevo_types::Time;

/// Lines kept when a run fails; the last ones tell the story, the seed tells the rest.
const LINES_KEPT: usize = 250;

/// Width of a node's column.
const COLUMN: usize = 46;

/// Where a run tells what it does. Cheap to clone; silent unless told otherwise.
#[derive(Clone, Debug, Default)]
pub struct Trace(Option<Rc<RefCell<Lines>>>);

#[derive(Debug)]
struct Lines {
    columns: usize,
    print: bool,
    kept: VecDeque<String>,
}

impl Trace {
    /// Says nothing, costs nothing.
    #[must_use]
    pub const fn silent() -> Self {
        Self(None)
    }

    /// Keeps the last lines.
    #[must_use]
    pub fn keeping() -> Self {
        Self::new(false)
    }

    /// Prints every line at once.
    #[must_use]
    pub fn printing() -> Self {
        Self::new(true)
    }

    fn new(print: bool) -> Self {
        Self(Some(Rc::new(RefCell::new(Lines {
            columns: 0,
            print,
            kept: VecDeque::new(),
        }))))
    }

    /// Whether anybody listens: ask before making a text that costs.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Says how many columns there are.
    pub fn begin(&self, columns: usize) {
        if let Some(lines) = &self.0 {
            lines.borrow_mut().columns = columns;
            let head: String =
                (1..=columns).fold(format!("{:>12} ", "seconds"), |mut head, node| {
                    let _ = write!(head, "| {:<COLUMN$}", format!("n{node}"));
                    head
                });
            lines.borrow_mut().push(head);
        }
    }

    /// Something that happened at a node.
    pub fn node(&self, now: Time, node: usize, what: impl FnOnce() -> String) {
        if let Some(lines) = &self.0 {
            let mut lines = lines.borrow_mut();
            let mut line = stamp(now);
            for _ in 0..node {
                let _ = write!(line, "| {:<COLUMN$}", "");
            }
            let text = what();
            let text: String = text.chars().take(2 * COLUMN).collect();
            let _ = write!(line, "| {text:<COLUMN$}");
            for _ in node + 1..lines.columns {
                let _ = write!(line, "| {:<COLUMN$}", "");
            }
            let line = line.trim_end().to_owned();
            lines.push(line);
        }
    }

    /// Something that happened to all.
    pub fn all(&self, now: Time, what: impl FnOnce() -> String) {
        if let Some(lines) = &self.0 {
            let line = format!("{}* {}", stamp(now), what());
            lines.borrow_mut().push(line);
        }
    }

    /// The last lines.
    #[must_use]
    pub fn last_lines(&self) -> String {
        match &self.0 {
            None => String::new(),
            Some(lines) => lines
                .borrow()
                .kept
                .iter()
                .fold(String::new(), |mut text, line| {
                    text.push_str(line);
                    text.push('\n');
                    text
                }),
        }
    }
}

impl Lines {
    fn push(&mut self, line: String) {
        if self.print {
            println!("{line}");
            return;
        }
        if self.kept.len() == LINES_KEPT {
            self.kept.remove(1);
        }
        self.kept.push_back(line);
    }
}

fn stamp(now: Time) -> String {
    format!(
        "{:>5}.{:06} ",
        now.0 / 1_000_000_000,
        now.0 % 1_000_000_000 / 1000
    )
}
