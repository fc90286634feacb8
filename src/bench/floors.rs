//! What a device does at best, and the least time that an op can take on it.

use crate::backend::Work;

/// Rates measured in the same run as what is held against them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Bytes a second of a copy, read and write counted.
    pub copy: f64,
    /// FLOP/s of the best product.
    pub product: f64,
}

impl Ceilings {
    /// Seconds that this takes at least: whichever of moving and multiplying takes longer.
    pub fn floor(&self, work: Work) -> f64 {
        (work.bytes / self.copy).max(work.flops / self.product)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_moving_and_multiplying_is_the_floor() {
        let ceilings = Ceilings { copy: 2e12, product: 5e14 };
        assert_eq!(ceilings.floor(Work { bytes: 4e12, flops: 5e14 }), 2.0);
        assert_eq!(ceilings.floor(Work { bytes: 4e12, flops: 15e14 }), 3.0);
        assert_eq!(ceilings.floor(Work::default()), 0.0);
    }
}
