//! What a training run shows on a terminal: a bar with loss, tokens/s and time left, log lines above it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use halfbyte::train::metrics::{EvalRow, TrainRow};
use halfbyte::train::ui::{StepReport, Ui, duration, eval_line, train_line};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::note;
use super::progress::{Progress, Unit};

pub struct TermUi {
    bar: Option<ProgressBar>,
    work: Option<(String, Progress)>,
    stop: Arc<AtomicBool>,
}

impl TermUi {
    /// `stop` is the flag of `train::interrupt::install`.
    pub fn new(stop: Arc<AtomicBool>) -> Self {
        Self { bar: None, work: None, stop }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(format_args!("{text}"))),
            None => note(format_args!("{text}")),
        }
    }
}

impl Ui for TermUi {
    fn note(&mut self, text: &str) {
        self.line(text);
    }

    fn work(&mut self, label: &str, unit: &'static str, done: u64, total: u64) {
        if self.work.as_ref().is_none_or(|w| w.0 != label) {
            let unit = if unit == "bytes" { Unit::Bytes } else { Unit::Count(unit) };
            self.work = Some((label.into(), Progress::new(label, unit)));
        }
        if let Some((_, progress)) = &mut self.work {
            progress.set(done, total);
        }
        if done >= total
            && let Some((_, progress)) = self.work.take()
        {
            match &self.bar {
                // An evaluation between two steps: its row says what it found.
                Some(_) => drop(progress),
                None => progress.finish(),
            }
        }
    }

    fn step(&mut self, r: &StepReport) {
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len}  {msg}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
            ProgressBar::with_draw_target(Some(r.total), ProgressDrawTarget::stderr()).with_style(style)
        });
        let (speed, left) = (r.tokens_per_second, duration(r.seconds_left));
        bar.set_message(format!("epoch {:.2}  loss {:.4}  {speed:.0} tok/s  {left} left", r.epoch, r.loss));
        bar.set_position(r.step);
    }

    fn train_row(&mut self, row: &TrainRow, report: &StepReport) {
        self.line(&train_line(row, report));
    }

    fn eval_row(&mut self, row: &EvalRow) {
        self.line(&eval_line(row));
    }

    fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl Drop for TermUi {
    /// An error message must not land behind a half-drawn bar.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
