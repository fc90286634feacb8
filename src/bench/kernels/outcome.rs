//! What a race finds out, and the row of the table that it becomes.

use super::case::Case;
use super::check::Difference;
use crate::backend::Work;
#[cfg(feature = "cuda")]
use crate::backend::cuda::launched::Launched;
use crate::bench::environment::Environment;
use crate::bench::results::{KernelRow, figure};

/// What the samples of one launch tell, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    pub median_us: f64,
    pub least_us: f64,
    pub most_us: f64,
    pub samples: usize,
}

impl Times {
    /// Of samples in seconds; None of none.
    pub fn of(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_by(f64::total_cmp);
        let (&least, &most) = (seconds.first()?, seconds.last()?);
        let median = seconds[seconds.len() / 2];
        Some(Self { median_us: median * 1e6, least_us: least * 1e6, most_us: most * 1e6, samples: seconds.len() })
    }
}

/// What the card does at best, per second.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes, read and write counted.
    pub copy: f64,
    /// Operations of matrix products.
    pub product: f64,
}

impl Ceilings {
    /// Seconds that this takes at least: whichever of moving and multiplying takes longer.
    pub fn floor(&self, work: Work) -> f64 {
        (work.bytes / self.copy).max(work.flops / self.product)
    }
}

/// How one way of a case came out.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The row of the table; its times are zero if the way was refused.
    pub row: KernelRow,
    /// The first element that is not what it must be.
    pub refused: Option<Difference>,
    /// The kernels that one run launches; empty on the CPU.
    #[cfg(feature = "cuda")]
    pub launched: Vec<Launched>,
}

/// A row of the table.
pub fn row(
    case: &Case,
    implementation: &str,
    times: Option<Times>,
    ceilings: Ceilings,
    Environment { date, commit, driver, sm_mhz, memory_mhz }: Environment,
    card: &str,
    checked: usize,
) -> KernelRow {
    let floor_us = 1e6 * ceilings.floor(case.work);
    let Times { median_us, least_us, most_us, samples } =
        times.unwrap_or(Times { median_us: 0.0, least_us: 0.0, most_us: 0.0, samples: 0 });
    let per = |what: f64| if median_us > 0.0 { what / median_us } else { 0.0 };
    KernelRow {
        date,
        tool: "halfbyte".into(),
        commit,
        card: card.into(),
        driver,
        sm_mhz,
        memory_mhz,
        model: case.model.into(),
        op: case.op.into(),
        shape: case.shape.clone(),
        tokens: case.tokens,
        implementation: implementation.into(),
        samples,
        median_us: figure(median_us),
        least_us: figure(least_us),
        most_us: figure(most_us),
        bytes: case.work.bytes,
        flops: case.work.flops,
        gb_per_s: figure(per(case.work.bytes) / 1e3),
        tflop_per_s: figure(per(case.work.flops) / 1e6),
        copy_gb_per_s: figure(ceilings.copy / 1e9),
        product_tflop_per_s: figure(ceilings.product / 1e12),
        floor_us: figure(floor_us),
        percent_of_floor: figure(100.0 * per(floor_us)),
        checked,
        ..KernelRow::default()
    }
}

/// The columns that tell of the kernels launched.
#[cfg(feature = "cuda")]
pub fn with_launched(row: KernelRow, launched: &[Launched]) -> KernelRow {
    let most = |of: fn(&Launched) -> u32| launched.iter().map(of).max();
    KernelRow {
        launches: Some(launched.len()).filter(|n| *n > 0),
        registers: most(|l| l.attributes.registers),
        local_bytes: most(|l| l.attributes.local_bytes),
        shared_bytes: most(|l| l.attributes.static_shared_bytes + l.dynamic_shared_bytes),
        occupancy: launched.iter().map(|l| l.occupancy).min_by(f64::total_cmp),
        ..row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(feature = "cuda")]
    use crate::backend::cuda::module::Attributes;

    #[cfg(feature = "cuda")]
    #[test]
    fn of_several_kernels_the_row_has_the_worst() {
        let kernel = |registers, static_shared_bytes, dynamic_shared_bytes, occupancy| Launched {
            kernel: "k".into(),
            grid: [1; 3],
            block: [32, 1, 1],
            dynamic_shared_bytes,
            attributes: Attributes { registers, local_bytes: 0, static_shared_bytes, most_threads: 1024 },
            blocks_per_multiprocessor: 1,
            occupancy,
        };
        let row = with_launched(KernelRow::default(), &[kernel(168, 0, 9000, 0.25), kernel(32, 64, 9000, 1.0)]);
        assert_eq!((row.launches, row.registers, row.local_bytes), (Some(2), Some(168), Some(0)));
        assert_eq!((row.shared_bytes, row.occupancy), (Some(9064), Some(0.25)));
        let none = with_launched(KernelRow::default(), &[]);
        assert_eq!(none, KernelRow::default());
    }

    #[test]
    fn the_slower_of_moving_and_multiplying_is_the_floor() {
        let ceilings = Ceilings { copy: 2e12, product: 5e14 };
        assert_eq!(ceilings.floor(Work { bytes: 4e12, flops: 5e14 }), 2.0);
        assert_eq!(ceilings.floor(Work { bytes: 4e12, flops: 15e14 }), 3.0);
        assert_eq!(ceilings.floor(Work::default()), 0.0);
    }
}
