//! What the oracles of sums over many rows share.

use crate::bench::kernels::case::{Element, Expected};
use crate::bench::kernels::values::Column;

/// Elements `start .. start + n` of an argument.
pub fn row(column: &Column, start: usize, n: usize) -> Vec<f64> {
    let period = column.period();
    let from = &period[start % period.len()..];
    from.iter().chain(period.iter().cycle()).take(n).map(|&v| f64::from(v)).collect()
}

/// The sum of the products, and of their absolute values.
pub fn dot(a: &[f64], b: &[f64]) -> (f64, f64) {
    a.iter().zip(b).map(|(a, b)| a * b).fold((0.0, 0.0), |(sum, all), term| (sum + term, all + term.abs()))
}

/// A sum of terms, and how large they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms {
    pub sum: f64,
    /// Of the absolute values.
    pub magnitude: f64,
    /// Of the squares.
    pub squares: f64,
}

impl Terms {
    pub fn add(&mut self, term: f64) {
        self.sum += term;
        self.magnitude += term.abs();
        self.squares += term * term;
    }

    /// Of exact operands, summed in f32.
    pub fn expected(self, element: Element) -> Expected {
        Expected::rounded(self.sum, element, self.magnitude)
    }

    /// What so many roundings of each term come to. One is at most 2^-8 of the term and 0.43 of that in the mean; up or down
    /// is as good as chance, so of many terms hardly more is left than the root of the sum of squares. Four times that is
    /// nine standard deviations, and far less than what a term too many, or one too few, would make.
    pub fn error(&self, roundings: f64) -> f64 {
        roundings / 256.0 * self.magnitude.min(4.0 * self.squares.sqrt())
    }
}

impl FromIterator<f64> for Terms {
    fn from_iter<I: IntoIterator<Item = f64>>(terms: I) -> Self {
        let mut all = Self::default();
        terms.into_iter().for_each(|term| all.add(term));
        all
    }
}
