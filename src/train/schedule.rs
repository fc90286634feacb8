//! Learning-rate schedules, with transformers' formulas (`optimization.py`).

use std::f64::consts::PI;

use super::config::TrainConfig;
use crate::error::Result;

/// `lr_scheduler_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SchedulerType {
    Linear,
    Cosine,
    Constant,
    ConstantWithWarmup,
}

/// A schedule over a run of `total` steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub kind: SchedulerType,
    /// Peak learning rate.
    pub base: f64,
    /// Steps over which it rises from 0.
    pub warmup: u64,
    pub total: u64,
}

impl Schedule {
    /// The schedule of a run file: `warmup_steps` if above 0 (below 1: a share), else `warmup_ratio`, rounded up.
    pub fn new(config: &TrainConfig, total: u64) -> Result<Self> {
        let share = |f: f64| (f * total as f64).ceil() as u64;
        let warmup = match config.warmup_steps {
            n if n >= 1.0 => n as u64,
            n if n > 0.0 => share(n),
            _ => share(config.warmup_ratio),
        };
        Ok(Self { kind: config.scheduler_type()?, base: config.learning_rate, warmup, total })
    }

    /// Learning rate of the optimizer step that `done` steps came before (0 for the first).
    pub fn rate(&self, done: u64) -> f64 {
        self.base * self.factor(done)
    }

    fn factor(&self, done: u64) -> f64 {
        let rising = done as f64 / self.warmup.max(1) as f64;
        let left = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.kind {
            SchedulerType::Constant => 1.0,
            _ if done < self.warmup => rising,
            SchedulerType::ConstantWithWarmup => 1.0,
            SchedulerType::Linear => (self.total.saturating_sub(done) as f64 / left).max(0.0),
            SchedulerType::Cosine => {
                let progress = (done - self.warmup) as f64 / left;
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
        }
    }

    /// Whether two schedules agree in the first `done` steps: a resumed run may only change what comes after.
    pub fn agrees(&self, other: &Self, done: u64) -> bool {
        (0..done).all(|s| self.rate(s) == other.rate(s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: SchedulerType, warmup: u64) -> Vec<f64> {
        let s = Schedule { kind, base: 1.0, warmup, total: 10 };
        (0..10).map(|i| s.rate(i)).collect()
    }

    fn near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-9, "found {found:?}, expected {expected:?}");
        }
    }

    /// transformers.get_linear_schedule_with_warmup(warmup 2, total 10), by hand.
    #[test]
    fn linear_rises_then_falls_to_one_step_above_zero() {
        near(&rates(SchedulerType::Linear, 2), &[0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]);
        near(&rates(SchedulerType::Linear, 0), &[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]);
    }

    /// 0.5 * (1 + cos(pi * (s - 2) / 8)).
    #[test]
    fn cosine_follows_half_a_wave() {
        let e = [
            0.0,
            0.5,
            1.0,
            0.961_939_766,
            0.853_553_391,
            0.691_341_716,
            0.5,
            0.308_658_284,
            0.146_446_609,
            0.038_060_234,
        ];
        near(&rates(SchedulerType::Cosine, 2), &e);
    }

    #[test]
    fn constant_ignores_warmup_unless_its_name_has_it() {
        near(&rates(SchedulerType::Constant, 4), &[1.0; 10]);
        near(&rates(SchedulerType::ConstantWithWarmup, 4), &[0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn a_ratio_rounds_up_and_steps_go_first() {
        let with = |warmup_ratio, warmup_steps| {
            Schedule::new(&TrainConfig { warmup_ratio, warmup_steps, ..Default::default() }, 33).unwrap().warmup
        };
        assert_eq!(with(0.1, 0.0), 4);
        assert_eq!(with(0.1, 7.0), 7);
        assert_eq!(with(0.0, 0.25), 9);
        assert_eq!(with(0.0, 0.0), 0);
    }

    #[test]
    fn a_warmup_longer_than_the_run_never_divides_by_zero() {
        let s = Schedule { kind: SchedulerType::Cosine, base: 1.0, warmup: 20, total: 10 };
        assert!((0..10).all(|i| s.rate(i).is_finite()));
    }
}
