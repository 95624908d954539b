//! What the demo tells while it works: a spinner with the current step on a terminal, plain lines
//! otherwise, nothing with `--json`.

use std::{io::IsTerminal as _, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};

/// Where progress goes.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    plain: bool,
}

impl Progress {
    /// `quiet`: say nothing.
    #[must_use]
    pub fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (!quiet && terminal).then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_style(ProgressStyle::default_spinner());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self {
            bar,
            plain: !quiet && !terminal,
        }
    }

    /// The step that is under way now.
    pub fn step(&self, text: impl Into<String>) {
        match &self.bar {
            Some(bar) => bar.set_message(text.into()),
            None if self.plain => eprintln!("  {}", text.into()),
            None => {}
        }
    }

    /// A line that stays.
    pub fn line(&self, text: impl Into<String>) {
        match &self.bar {
            Some(bar) => bar.println(text.into()),
            None if self.plain => eprintln!("{}", text.into()),
            None => {}
        }
    }

    /// Nothing more comes.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
