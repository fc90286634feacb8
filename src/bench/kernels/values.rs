//! The inputs of a case as functions of an element's number: the host never holds them whole.

use std::sync::Arc;

use half::bf16;
use rayon::prelude::*;

use super::case::{Arg, Element, Fill, Scalar};

/// Elements of the random block that an input repeats: 2^20 + 7, which no row length divides.
pub const BLOCK: usize = 1_048_583;

/// The values that one argument repeats: `value(i) = values[i % values.len()]`.
#[derive(Clone, Debug)]
pub struct Column {
    /// Empty for what is poisoned.
    values: Arc<[f32]>,
}

impl Column {
    /// Of argument number `index` of a case.
    pub fn new(arg: &Arg, index: usize) -> Self {
        let count = match arg.fill {
            Fill::Periodic(_, period) => arg.len().clamp(1, period.max(1)),
            _ => arg.len().clamp(1, BLOCK),
        };
        let values: Arc<[f32]> = match &arg.fill {
            // Uniform in ±√3 of the deviation.
            Fill::Random(deviation) | Fill::Periodic(deviation, _) => (0..count)
                .into_par_iter()
                .map(|i| round(arg.element, 12f32.sqrt() * deviation * (unit(index, i) - 0.5)))
                .collect(),
            Fill::Bytes => (0..count).into_par_iter().map(|i| (unit(index, i) * 256.0).floor()).collect(),
            Fill::Const(value) => [round(arg.element, *value)].into(),
            Fill::List(list) => list.iter().map(|&v| round(arg.element, v)).collect(),
            Fill::Poison => [].into(),
        };
        Self { values }
    }

    /// Element i; NaN where it is poisoned.
    pub fn at(&self, i: usize) -> f64 {
        if self.values.is_empty() { f64::NAN } else { f64::from(self.values[i % self.values.len()]) }
    }

    /// What is repeated.
    pub fn period(&self) -> &[f32] {
        &self.values
    }
}

/// What the oracle may read: the arguments as they are before the op runs, and the numbers.
pub struct Inputs {
    columns: Vec<(&'static str, Column)>,
    scalars: Vec<(&'static str, Scalar)>,
}

impl Inputs {
    pub fn new(args: &[Arg], scalars: &[(&'static str, Scalar)]) -> Self {
        let columns = args.iter().enumerate().map(|(i, arg)| (arg.name, Column::new(arg, i))).collect();
        Self { columns, scalars: scalars.to_vec() }
    }

    /// The argument of this name. Panics if the case has none: a mistake in the op's file, which its test finds.
    pub fn of(&self, name: &str) -> &Column {
        let found = self.columns.iter().find(|(n, _)| *n == name);
        &found.unwrap_or_else(|| panic!("no argument {name:?}")).1
    }

    /// The number of this name. Panics as [`Inputs::of`].
    pub fn scalar(&self, name: &str) -> f64 {
        let found = self.scalars.iter().find(|(n, _)| *n == name);
        match found.unwrap_or_else(|| panic!("no number {name:?}")).1 {
            Scalar::U64(value) => value as f64,
            Scalar::F32(value) => f64::from(value),
        }
    }

    /// Columns in the order of the arguments.
    pub fn columns(&self) -> impl Iterator<Item = &Column> {
        self.columns.iter().map(|(_, column)| column)
    }
}

fn round(element: Element, value: f32) -> f32 {
    match element {
        Element::Bf16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Element i of stream `index`, in [0, 1): a multiplicative hash.
fn unit(index: usize, i: usize) -> f32 {
    let mut x = (i as u32).wrapping_add((index as u32 + 1).wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
    x = (x ^ x >> 13).wrapping_mul(0xc2b2_ae35);
    x = (x ^ x >> 16).wrapping_mul(0x27d4_eb2f);
    ((x ^ x >> 15) >> 8) as f32 / (1 << 24) as f32
}
