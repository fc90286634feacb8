//! Outputs against the oracle: all elements where that is little work, else spans spread over the output, its first and
//! last elements among them.

use std::ops::Range;

use rayon::prelude::*;

use super::case::{Arg, Case, Expected};
use super::values::Inputs;

/// Multiply-adds that the oracle may spend on one output.
const BUDGET: usize = 8_000_000;
/// Elements of a span where not all are compared: at least, whatever they cost.
const SPAN: usize = 32;
/// Spans at least, whatever they cost, and at most: each is a read of its own.
const LEAST: usize = 8;
const MOST: usize = 256;

/// The spans of an output that are compared, in order, each inside one row. `budget`: multiply-adds to spend.
pub fn spans(arg: &Arg, budget: usize) -> Vec<Range<usize>> {
    let (len, width, cost) = (arg.len(), arg.width(), arg.cost.max(1));
    if len == 0 {
        return vec![];
    }
    if len.saturating_mul(cost) <= budget {
        return (0..len).step_by(width).map(|start| start..(start + width).min(len)).collect();
    }
    let span = (budget / (MOST * cost)).max(SPAN).min(width);
    let count = (budget / (span * cost)).clamp(LEAST, MOST).min(len / span);
    // Evenly spread over the rows, at columns that change: no tile's edge is always missed.
    let mut all: Vec<Range<usize>> = (0..count)
        .map(|i| {
            let start = ((len - span) as u128 * i as u128 / (count - 1).max(1) as u128) as usize;
            let row = start / width * width;
            let column = if i == 0 {
                0
            } else if i + 1 == count {
                width - span
            } else {
                (start - row).min(width - span)
            };
            row + column..row + column + span
        })
        .collect();
    all.dedup();
    all
}

/// An element that is not what it must be.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// "y[0, 777]"
    pub place: String,
    pub found: f64,
    pub expected: Expected,
    /// Of how many compared elements how many are wrong.
    pub wrong: usize,
    pub compared: usize,
}

impl Difference {
    /// What was expected, and how much else is wrong.
    pub fn expectation(&self) -> String {
        let Self { expected: Expected { value, tolerance }, wrong, compared, .. } = self;
        format!("{value:?} within {tolerance:.3e} ({wrong} of {compared} elements compared are wrong)")
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is {:?}, expected {}", self.place, self.found, self.expectation())
    }
}

/// What an output must hold at the spans that are compared.
pub struct Answers {
    /// Index of the argument.
    pub arg: usize,
    pub spans: Vec<Range<usize>>,
    expected: Vec<Vec<Expected>>,
}

impl Answers {
    /// Of every checked argument of a case, by its oracle.
    pub fn of(case: &Case, inputs: &Inputs) -> Vec<Self> {
        Self::within(case, inputs, BUDGET)
    }

    /// The same with another budget of multiply-adds for each output.
    pub fn within(case: &Case, inputs: &Inputs, budget: usize) -> Vec<Self> {
        let checked = case.args.iter().enumerate().filter(|(_, arg)| arg.is_checked() && !arg.is_empty());
        checked
            .map(|(index, arg)| {
                let spans = spans(arg, budget);
                let expected =
                    spans.par_iter().map(|span| (case.oracle)(inputs, arg.name, span.clone())).collect::<Vec<_>>();
                Self { arg: index, spans, expected }
            })
            .collect()
    }

    /// Elements compared.
    pub fn len(&self) -> usize {
        self.spans.iter().map(ExactSizeIterator::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Compares what was found at the spans, one behind the other. None: all right.
    pub fn difference(&self, case: &Case, found: &[f64]) -> Option<Difference> {
        let compared = self.len();
        assert_eq!(found.len(), compared, "elements found and compared of {}", case.args[self.arg].name);
        let places = self.spans.iter().cloned().flatten();
        let mut all = places.zip(found).zip(self.expected.iter().flatten());
        let mut wrong = all.by_ref().filter(|((_, found), expected)| !expected.holds(**found));
        let ((i, &found), &expected) = wrong.next()?;
        let wrong = 1 + wrong.count();
        Some(Difference { place: case.args[self.arg].place(i), found, expected, wrong, compared })
    }
}
