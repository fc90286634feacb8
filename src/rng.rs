//! Philox4x32-10, a counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
//!
//! A random number is a function of (seed, stream, index) alone. Dropout masks, adapter init, shuffles and sampling
//! therefore come out the same whether a step is recomputed, resumed, or run on another backend: the CUDA kernels
//! compute the same function.

/// What a stream of numbers is for. It is part of the counter, so that streams of one seed never overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    Init = 1,
    Shuffle = 2,
    Dropout = 3,
    Sampling = 4,
    Split = 5,
}

/// Four 32-bit words for `counter` under `key`. Inlined, so that loops over counters become vector code.
#[inline(always)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key[0] = key[0].wrapping_add(0x9E37_79B9);
            key[1] = key[1].wrapping_add(0xBB67_AE85);
        }
        let p0 = u64::from(counter[0]) * 0xD251_1F53;
        let p1 = u64::from(counter[2]) * 0xCD9E_8D57;
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
    }
    counter
}

/// One 32-bit word: number `index` of the sequence (`stream`, `sub`) of `seed`.
pub fn word(seed: u64, stream: Stream, sub: u32, index: u64) -> u32 {
    let block = index / 4;
    let counter = [block as u32, (block >> 32) as u32, sub, stream as u32];
    philox(counter, [seed as u32, (seed >> 32) as u32])[(index % 4) as usize]
}

/// Uniform in [0, 1): the top 24 bits of a word, so exact in f32.
pub fn uniform(seed: u64, stream: Stream, sub: u32, index: u64) -> f32 {
    (word(seed, stream, sub, index) >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

/// A permutation of 0..n (Fisher-Yates), the same for the same (seed, stream, sub).
pub fn permutation(seed: u64, stream: Stream, sub: u32, n: usize) -> Vec<usize> {
    let mut p: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        // Two words a draw: 64 bits against at most 2^32 items leaves no bias worth naming.
        let hi = u64::from(word(seed, stream, sub, 2 * i as u64));
        let lo = u64::from(word(seed, stream, sub, 2 * i as u64 + 1));
        let j = ((u128::from(hi << 32 | lo) * (i as u128 + 1)) >> 64) as usize;
        p.swap(i, j);
    }
    p
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_gives_the_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_stays_below_one_and_has_the_right_mean() {
        let n = 100_000;
        let xs: Vec<f32> = (0..n).map(|i| uniform(7, Stream::Init, 3, i)).collect();
        assert!(xs.iter().all(|x| (0.0..1.0).contains(x)));
        let mean = xs.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 5e-3, "mean {mean}");
    }

    #[test]
    fn permutation_holds_every_item_once() {
        let mut p = permutation(1, Stream::Shuffle, 0, 1000);
        assert_ne!(p, (0..1000).collect::<Vec<_>>());
        p.sort_unstable();
        assert_eq!(p, (0..1000).collect::<Vec<_>>());
    }
}
