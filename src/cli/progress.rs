//! A bar on a terminal; elsewhere a plain line when a piece of work is done.

use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::note;

/// How far one piece of work has come: loading, tokenising, quantising, merging.
pub struct Progress {
    label: String,
    unit: Unit,
    /// From the first [`Progress::set`] on: a bar of unknown length would flicker.
    bar: Option<ProgressBar>,
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
        Self { label: label.into(), unit, bar: None, start: Instant::now(), total: 0 }
    }

    pub fn set(&mut self, done: u64, total: u64) {
        self.total = total;
        let bar = self.bar.get_or_insert_with(|| {
            let counts = match self.unit {
                Unit::Bytes => "{bytes}/{total_bytes}",
                Unit::Count(_) => "{pos}/{len}",
            };
            let style = ProgressStyle::with_template(&format!("{{prefix}} [{{bar:30}}] {counts}  {{eta}} left"));
            // The template is ours: it parses, or the default style serves.
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
            ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
                .with_style(style)
                .with_prefix(self.label.clone())
        });
        bar.set_length(total);
        bar.set_position(done.min(total));
    }

    /// The bar goes; a line with the amount and the time stays.
    pub fn finish(mut self) {
        self.clear();
        let amount = match self.unit {
            Unit::Bytes => super::output::bytes(self.total),
            Unit::Count(what) => format!("{} {what}", super::output::grouped(self.total)),
        };
        note(format_args!("{}: {amount} in {:.1} s", self.label, self.start.elapsed().as_secs_f64()));
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    /// An error message must not land behind a half-drawn bar.
    fn drop(&mut self) {
        self.clear();
    }
}
