//! What a run shows. The loop knows only this trait; the command line has a progress bar behind it.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::metrics::{EvalRow, TrainRow};

/// How far training has come after an optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, of `total`.
    pub step: u64,
    pub total: u64,
    pub epoch: f64,
    pub loss: f32,
    /// Over the last steps.
    pub tokens_per_second: f64,
    pub seconds_left: f64,
}

/// Sink of everything a run shows.
pub trait Ui {
    /// A line (or several) to read.
    fn note(&mut self, text: &str);

    /// A piece of work before or beside training: loading, tokenising, evaluating. `done == total` ends it.
    fn work(&mut self, label: &str, unit: &'static str, done: u64, total: u64);

    /// After every optimizer step.
    fn step(&mut self, report: &StepReport);

    /// After a line went to metrics.jsonl.
    fn train_row(&mut self, row: &TrainRow, report: &StepReport);

    /// After an evaluation.
    fn eval_row(&mut self, row: &EvalRow);

    /// Whether to finish the step, save and leave ([`super::interrupt`]).
    fn stop_requested(&self) -> bool {
        false
    }
}

/// Plain lines, for logs and pipes.
pub struct PlainUi<W: Write> {
    out: W,
    stop: Option<Arc<AtomicBool>>,
    /// Labels of work that ended: a line each is enough.
    ended: BTreeSet<String>,
}

impl<W: Write> PlainUi<W> {
    /// Lines go to `out`; `stop` is the flag of [`super::interrupt::install`], if any.
    pub fn new(out: W, stop: Option<Arc<AtomicBool>>) -> Self {
        Self { out, stop, ended: BTreeSet::new() }
    }

    fn line(&mut self, text: &str) {
        // A reader that went away must not end a training run.
        let _ = writeln!(self.out, "{text}").and_then(|()| self.out.flush());
    }
}

impl<W: Write> Ui for PlainUi<W> {
    fn note(&mut self, text: &str) {
        self.line(text);
    }

    fn work(&mut self, label: &str, unit: &'static str, done: u64, total: u64) {
        if done == total && self.ended.insert(label.to_string()) {
            self.line(&format!("{label}: {total} {unit}"));
        }
    }

    fn step(&mut self, _report: &StepReport) {}

    fn train_row(&mut self, row: &TrainRow, report: &StepReport) {
        self.line(&train_line(row, report));
    }

    fn eval_row(&mut self, row: &EvalRow) {
        self.line(&eval_line(row));
    }

    fn stop_requested(&self) -> bool {
        self.stop.as_ref().is_some_and(|s| s.load(Ordering::Relaxed))
    }
}

/// One line of text for a row of metrics.
pub fn train_line(row: &TrainRow, report: &StepReport) -> String {
    format!(
        "step {}/{}  epoch {:.2}  loss {:.4}  grad_norm {:.4}  lr {:.2e}  {:.0} tok/s  {} left",
        row.step,
        report.total,
        row.epoch,
        row.loss,
        row.grad_norm,
        row.learning_rate,
        row.tokens_per_second,
        duration(report.seconds_left)
    )
}

/// One line of text for an evaluation.
pub fn eval_line(row: &EvalRow) -> String {
    format!(
        "step {}  epoch {:.2}  eval_loss {:.4}  perplexity {:.2}  ({} target tokens)",
        row.step, row.epoch, row.eval_loss, row.eval_perplexity, row.eval_tokens
    )
}

/// "1 h 05 min", "3 min 20 s" or "12 s".
pub fn duration(seconds: f64) -> String {
    let s = if seconds.is_finite() { seconds.round().max(0.0) as u64 } else { 0 };
    match (s / 3600, s / 60 % 60, s % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(duration(11.6), "12 s");
        assert_eq!(duration(200.0), "3 min 20 s");
        assert_eq!(duration(3900.0), "1 h 05 min");
        assert_eq!(duration(f64::INFINITY), "0 s");
    }
}
