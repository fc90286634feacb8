//! Which rows make up which micro-batch. The position is a pure function of the step, so a resumed run needs no more
//! than the step's number.
//!
//! An epoch is a seeded permutation of the rows, cut into micro-batches of `per_device_train_batch_size` rows (the last
//! may be shorter), and those into optimizer steps of `gradient_accumulation_steps` micro-batches (again the last may be
//! shorter), as transformers' Trainer does.

use std::ops::Range;

use super::config::TrainConfig;
use crate::data;

/// The order of a run over `rows` rows.
#[derive(Debug)]
pub struct DataOrder {
    rows: usize,
    batch: usize,
    accumulate: u64,
    seed: u64,
    total: u64,
    /// The epoch whose permutation is at hand, and that.
    current: (u32, Vec<usize>),
}

/// The rows of one optimizer step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRows {
    /// Row numbers of each micro-batch.
    pub micro_batches: Vec<Vec<usize>>,
    /// Number of the first micro-batch since the start of the run: the counter of dropout.
    pub first: u64,
    /// Epochs done after the step, as a fraction.
    pub epoch: f64,
    /// Whether this is the last step of its epoch.
    pub epoch_end: bool,
}

impl DataOrder {
    /// `rows` is at least 1.
    pub fn new(rows: usize, config: &TrainConfig) -> Self {
        let mut order = Self {
            rows,
            batch: config.per_device_train_batch_size,
            accumulate: config.gradient_accumulation_steps as u64,
            seed: config.seed,
            total: 0,
            current: (0, data::epoch_order(rows, config.seed, 0)),
        };
        order.total = match config.max_steps {
            n if n > 0 => n as u64,
            _ => (config.num_train_epochs * order.steps_per_epoch() as f64).ceil() as u64,
        };
        order
    }

    /// Optimizer steps of the run.
    pub fn total(&self) -> u64 {
        self.total
    }

    fn micro_batches_per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.batch) as u64
    }

    /// Optimizer steps of an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.micro_batches_per_epoch().div_ceil(self.accumulate)
    }

    /// Rows of the step that `done` steps came before.
    pub fn step(&mut self, done: u64) -> StepRows {
        let (per_epoch, steps) = (self.micro_batches_per_epoch(), self.steps_per_epoch());
        let (epoch, index) = (done / steps, done % steps);
        // The stream of an epoch is a 32-bit number; beyond, shuffles repeat.
        let epoch_stream = epoch as u32;
        if self.current.0 != epoch_stream {
            self.current = (epoch_stream, data::epoch_order(self.rows, self.seed, epoch_stream));
        }
        let range: Range<u64> = index * self.accumulate..((index + 1) * self.accumulate).min(per_epoch);
        let rows = |micro: u64| {
            let start = micro as usize * self.batch;
            self.current.1[start..(start + self.batch).min(self.rows)].to_vec()
        };
        StepRows {
            micro_batches: range.clone().map(rows).collect(),
            first: epoch * per_epoch + range.start,
            epoch: epoch as f64 + range.end as f64 / per_epoch as f64,
            epoch_end: range.end == per_epoch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(rows: usize, batch: usize, accumulate: usize) -> DataOrder {
        let config = TrainConfig {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulate,
            num_train_epochs: 2.5,
            ..Default::default()
        };
        DataOrder::new(rows, &config)
    }

    #[test]
    fn every_row_comes_once_an_epoch_and_the_last_step_is_shorter() {
        // 11 rows: micro-batches of 2 2 2 2 2 1, steps of 4 and 2 micro-batches.
        let mut o = order(11, 2, 4);
        assert_eq!((o.steps_per_epoch(), o.total()), (2, 5));
        let (a, b) = (o.step(0), o.step(1));
        let sizes = |s: &StepRows| s.micro_batches.iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!((sizes(&a), sizes(&b)), (vec![2, 2, 2, 2], vec![2, 1]));
        assert_eq!((a.epoch_end, b.epoch_end), (false, true));
        assert_eq!((a.first, b.first, o.step(2).first, o.step(3).first), (0, 4, 6, 10));
        assert_eq!((a.epoch, b.epoch), (4.0 / 6.0, 1.0));
        let mut rows: Vec<usize> = [a, b].iter().flat_map(|s| s.micro_batches.concat()).collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..11).collect::<Vec<_>>());
    }

    #[test]
    fn a_step_depends_on_its_number_alone() {
        let mut forward = order(7, 2, 2);
        let all: Vec<_> = (0..6).map(|s| forward.step(s)).collect();
        for s in (0..6).rev() {
            assert_eq!(order(7, 2, 2).step(s), all[s as usize]);
            assert_eq!(forward.step(s), all[s as usize]);
        }
        assert_ne!(all[0].micro_batches, all[2].micro_batches, "epochs are shuffled apart");
    }

    #[test]
    fn max_steps_overrides_epochs_and_fewer_rows_than_a_batch_are_one_batch() {
        let config = TrainConfig { max_steps: 7, ..Default::default() };
        let mut o = DataOrder::new(3, &config);
        assert_eq!((o.total(), o.steps_per_epoch()), (7, 1));
        assert_eq!(o.step(6).micro_batches[0].len(), 3);
    }
}
