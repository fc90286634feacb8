//! A bar on a terminal; elsewhere a plain line when a piece of work is done.

use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::note;

/// How far one piece of work has come: loading, tokenising, quantising, merging.
pub struct Progress {
    label: String,
    unit: Unit,
    bar: ProgressBar,
    start: Instant,
    total: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Count(&'static str),
    Bytes,
}

impl Progress {
    pub fn new(label: impl Into<String>, unit: Unit) -> Self {
        let label = label.into();
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let counts = match unit {
            Unit::Bytes => "{bytes}/{total_bytes}",
            Unit::Count(_) => "{pos}/{len}",
        };
        let style = ProgressStyle::with_template(&format!("{{prefix}} [{{bar:30}}] {counts} {{eta}} left"));
        // The template is ours: it parses, or the default style serves.
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
        bar.set_prefix(label.clone());
        Self { label, unit, bar, start: Instant::now(), total: 0 }
    }

    pub fn set(&mut self, done: u64, total: u64) {
        if total != self.total {
            self.total = total;
            self.bar.set_length(total);
        }
        self.bar.set_position(done.min(total));
    }

    /// The bar goes; a line with the amount and the time stays.
    pub fn finish(self) {
        self.bar.finish_and_clear();
        let amount = match self.unit {
            Unit::Bytes => super::output::bytes(self.total),
            Unit::Count(what) => format!("{} {what}", super::output::grouped(self.total)),
        };
        note(format_args!("{}: {amount} in {:.1} s", self.label, self.start.elapsed().as_secs_f64()));
    }
}

impl Drop for Progress {
    /// An error message must not land behind a half-drawn bar.
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
