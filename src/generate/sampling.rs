//! Choosing the next token: temperature, then top-k, then top-p, as transformers orders them.

use crate::error::{Error, Result};
use crate::rng::{self, Stream};

/// How tokens are chosen. Names are those of transformers' `GenerationConfig`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0: always the most likely token.
    pub temperature: f64,
    /// Keep the k most likely tokens; 0: all.
    pub top_k: usize,
    /// Keep the fewest most likely tokens whose probabilities sum to at least this; 1: all.
    pub top_p: f64,
    /// Same seed, same prompt, same machine: same text.
    pub seed: u64,
    /// Tokens to make at most.
    pub max_new_tokens: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 42, max_new_tokens: 256 }
    }
}

impl Sampling {
    /// Checks ranges; errors name the flag.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::flag("temperature", self.temperature.to_string(), "a number of at least 0"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::flag("top_p", self.top_p.to_string(), "a number above 0, at most 1"));
        }
        if self.max_new_tokens == 0 {
            return Err(Error::flag("max_new_tokens", "0", "a whole number of at least 1"));
        }
        Ok(())
    }

    /// The token chosen from `logits` (V, at least one of them finite) as new token number `index`.
    /// Of equal logits the lower id counts as more likely.
    pub fn choose(&self, logits: &[f32], index: u64) -> usize {
        if self.temperature == 0.0 {
            return argmax(logits);
        }
        let mut order: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] > f32::NEG_INFINITY).collect();
        let likelier = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        if (1..order.len()).contains(&self.top_k) {
            // Only the k first need sorting.
            order.select_nth_unstable_by(self.top_k - 1, likelier);
            order.truncate(self.top_k);
        }
        order.sort_unstable_by(likelier);
        let Some(&first) = order.first() else { return argmax(logits) };
        let max = f64::from(logits[first]);
        let mut weights: Vec<f64> =
            order.iter().map(|&i| ((f64::from(logits[i]) - max) / self.temperature).exp()).collect();
        if self.top_p < 1.0 {
            let enough = self.top_p * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let kept = weights.iter().position(|w| {
                sum += w;
                sum >= enough
            });
            weights.truncate(kept.map_or(weights.len(), |k| k + 1));
        }
        let mut left = uniform(self.seed, index) * weights.iter().sum::<f64>();
        for (&i, w) in order.iter().zip(&weights) {
            left -= w;
            if left < 0.0 {
                return i;
            }
        }
        // Rounding may leave a sliver behind the last one.
        order[weights.len() - 1]
    }
}

/// Uniform in [0, 1) with 53 bits: a vocabulary of 150,000 needs more than 24.
fn uniform(seed: u64, index: u64) -> f64 {
    let word = |i| u64::from(rng::word(seed, Stream::Sampling, 0, 2 * index + i));
    ((word(0) << 32 | word(1)) >> 11) as f64 / (1u64 << 53) as f64
}

/// The lowest index of the greatest value; NaN never wins.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, &z) in logits.iter().enumerate() {
        if z > logits[best] || logits[best].is_nan() {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, f32::NEG_INFINITY];

    fn counts(s: Sampling) -> [u32; 5] {
        let mut n = [0; 5];
        for i in 0..20_000 {
            n[s.choose(&LOGITS, i)] += 1;
        }
        n
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_maxima() {
        assert_eq!(Sampling::default().choose(&LOGITS, 0), 1);
        assert_eq!(Sampling::default().choose(&[f32::NAN, 1.0], 0), 1);
    }

    #[test]
    fn samples_follow_the_softmax() {
        let found = counts(Sampling { temperature: 1.0, ..Default::default() });
        let z: f64 = LOGITS.iter().map(|&l| f64::from(l).exp()).sum();
        for (i, &n) in found.iter().enumerate() {
            let p = f64::from(LOGITS[i]).exp() / z;
            assert!((f64::from(n) / 20_000.0 - p).abs() < 0.015, "token {i}: {n} of 20000, expected {p}");
        }
    }

    #[test]
    fn a_low_temperature_sharpens() {
        let found = counts(Sampling { temperature: 0.01, ..Default::default() });
        assert_eq!((found[0], found[2], found[4]), (0, 0, 0));
        assert!(found[1] > 9_000 && found[3] > 9_000);
    }

    #[test]
    fn top_k_keeps_k_with_ties_to_the_lower_id() {
        let s = Sampling { temperature: 1.0, top_k: 1, ..Default::default() };
        assert_eq!(counts(s), [0, 20_000, 0, 0, 0]);
        let found = counts(Sampling { top_k: 3, ..s });
        assert!(found[0] == 0 && found[1] > 0 && found[2] > 0 && found[3] > 0);
        assert_eq!(counts(Sampling { top_k: 99, ..s }), counts(Sampling { top_k: 0, ..s }));
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it() {
        // Probabilities: 1 and 3: 0.399 each, 2: 0.147, 0: 0.054.
        let kept = |top_p| counts(Sampling { temperature: 1.0, top_p, ..Default::default() }).map(|n| n > 0);
        assert_eq!(kept(0.1), [false, true, false, false, false]);
        assert_eq!(kept(0.7), [false, true, false, true, false]);
        assert_eq!(kept(0.9), [false, true, true, true, false]);
        assert_eq!(kept(1.0), [true, true, true, true, false]);
    }

    #[test]
    fn the_seed_and_the_index_decide() {
        let s = Sampling { temperature: 1.0, ..Default::default() };
        let text = |s: Sampling| (0..50).map(|i| s.choose(&LOGITS, i)).collect::<Vec<_>>();
        assert_eq!(text(s), text(s));
        assert_ne!(text(s), text(Sampling { seed: 43, ..s }));
    }

    #[test]
    fn ranges_are_checked() {
        let bad = |s: Sampling| s.validate().unwrap_err().to_string();
        assert!(bad(Sampling { temperature: -1.0, ..Default::default() }).contains("temperature"));
        assert!(bad(Sampling { temperature: f64::NAN, ..Default::default() }).contains("temperature"));
        assert!(bad(Sampling { top_p: 0.0, ..Default::default() }).contains("top_p"));
        assert!(bad(Sampling { max_new_tokens: 0, ..Default::default() }).contains("max_new_tokens"));
        Sampling::default().validate().unwrap();
    }
}
