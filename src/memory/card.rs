//! Cards that a plan can be made for without having them, and what their ops take: public data sheets, and the share of
//! them that kernels reach.

/// A GPU as the prediction of step times sees it. Rates are those of the data sheet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Card {
    /// As `--gpu` takes it.
    pub name: &'static str,
    /// Bytes of device memory.
    pub memory: usize,
    /// Dense bf16 products with f32 accumulation, TFLOP/s.
    pub tflops: f64,
    /// Device memory, GB/s.
    pub bandwidth: f64,
    /// Pinned copies to or from the host, GB/s in one direction, as measured rather than as specified.
    pub pcie: f64,
    /// Bytes of the last-level cache.
    pub cache: usize,
    pub reached: Reached,
}

/// Which share of the data sheet our ops reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reached {
    /// Large products.
    pub matrix: f64,
    /// Attention, of the matrix rate: forward, backward.
    pub attention: [f64; 2],
    /// Ops that stream through memory.
    pub bandwidth: f64,
}

/// mma.sync kernels: GeForce cards cap f32 accumulation at half the rate, which leaves little to lose.
const CONSUMER: Reached = Reached { matrix: 0.85, attention: [0.70, 0.55], bandwidth: 0.88 };
const AMPERE: Reached = Reached { matrix: 0.78, attention: [0.55, 0.40], bandwidth: 0.85 };
/// Measured on an H100: cuBLAS 740 of 989 TFLOP/s on the shapes of a 7B model; our attention 382 and 356 at rows of 2,048
/// tokens, 455 and 426 at 8,192.
const HOPPER: Reached = Reached { matrix: 0.72, attention: [0.42, 0.39], bandwidth: 0.85 };

const GIB: usize = 1 << 30;
const MIB: usize = 1 << 20;

/// All cards by name.
pub const CARDS: [Card; 8] = [
    Card {
        name: "rtx3090",
        memory: 24 * GIB,
        tflops: 71.0,
        bandwidth: 936.0,
        pcie: 25.0,
        cache: 6 * MIB,
        reached: CONSUMER,
    },
    Card {
        name: "rtx4090",
        memory: 24 * GIB,
        tflops: 165.0,
        bandwidth: 1008.0,
        pcie: 25.0,
        cache: 72 * MIB,
        reached: CONSUMER,
    },
    Card {
        name: "rtx5090",
        memory: 32 * GIB,
        tflops: 209.5,
        bandwidth: 1792.0,
        pcie: 50.0,
        cache: 96 * MIB,
        reached: CONSUMER,
    },
    Card {
        name: "l40s",
        memory: 48 * GIB,
        tflops: 362.0,
        bandwidth: 864.0,
        pcie: 25.0,
        cache: 96 * MIB,
        reached: Reached { matrix: 0.70, ..CONSUMER },
    },
    Card {
        name: "a100-40gb",
        memory: 40 * GIB,
        tflops: 312.0,
        bandwidth: 1555.0,
        pcie: 25.0,
        cache: 40 * MIB,
        reached: AMPERE,
    },
    Card {
        name: "a100-80gb",
        memory: 80 * GIB,
        tflops: 312.0,
        bandwidth: 2039.0,
        pcie: 25.0,
        cache: 40 * MIB,
        reached: AMPERE,
    },
    Card {
        name: "h100",
        memory: 80 * GIB,
        tflops: 989.0,
        bandwidth: 3350.0,
        pcie: 50.0,
        cache: 50 * MIB,
        reached: HOPPER,
    },
    Card {
        name: "h200",
        memory: 141 * 1_000_000_000,
        tflops: 989.0,
        bandwidth: 4800.0,
        pcie: 50.0,
        cache: 50 * MIB,
        reached: HOPPER,
    },
];

impl Card {
    /// By the name of `--gpu`.
    pub fn named(name: &str) -> Option<&'static Self> {
        CARDS.iter().find(|c| c.name.eq_ignore_ascii_case(name))
    }

    /// By what the driver calls it ("NVIDIA H100 80GB HBM3"). For an unknown card the one nearest in memory: choices need
    /// the ratio of its rates more than the rates.
    pub fn of_device(name: &str, memory: usize) -> &'static Self {
        let letters: String = name.to_lowercase().chars().filter(|c| c.is_ascii_alphanumeric()).collect();
        let alike = |c: &&Card| letters.contains(c.name.split('-').next().unwrap_or(c.name));
        let far = |c: &&Card| c.memory.abs_diff(memory);
        CARDS.iter().filter(alike).min_by_key(far).or(CARDS.iter().min_by_key(far)).unwrap_or(&CARDS[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_found_by_flag_and_by_the_name_of_the_driver() {
        assert_eq!(Card::named("RTX4090").unwrap().name, "rtx4090");
        assert!(Card::named("voodoo2").is_none());
        for (driver, gib, name) in [
            ("NVIDIA H100 80GB HBM3", 80, "h100"),
            ("NVIDIA GeForce RTX 3090", 24, "rtx3090"),
            ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
            ("NVIDIA A100 80GB PCIe", 80, "a100-80gb"),
            ("NVIDIA L40S", 45, "l40s"),
            ("NVIDIA Something New", 30, "rtx5090"),
        ] {
            assert_eq!(Card::of_device(driver, gib * GIB).name, name, "{driver}");
        }
    }
}
