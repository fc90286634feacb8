//! The table of kernels: every op at the shapes of 1B, 7B and 13B models, each way it can run, checked against the host,
//! timed, and set beside what the card does at best. [`case`] is the vocabulary, [`ops`] has the ops, the rest is machinery
//! that knows none of them.

pub mod case;
pub mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod models;
pub mod ops;
pub mod outcome;
#[cfg(feature = "cuda")]
pub mod set;
pub mod values;

use case::Case;
use models::{MODELS, Model, SMALL, TOKENS};
use ops::Op;

use crate::error::{Error, Result};
use crate::names::nearest;

/// Which rows of the table are wanted; an empty list means all.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub ops: Vec<String>,
    pub models: Vec<String>,
    pub tokens: Vec<usize>,
    /// Parts of a shape's name.
    pub shapes: Vec<String>,
    pub implementations: Vec<String>,
}

impl Filter {
    /// The cases of each op that is wanted, in the order of the table. On the CPU (`small`) the model is SmolLM2's shape
    /// at up to 512 tokens unless others are named. [`Error::Flag`] for a name that nothing has, or if nothing is left.
    pub fn cases(&self, small: bool) -> Result<Vec<(Op, Vec<Case>)>> {
        let known: Vec<Op> = ops::all();
        for name in &self.ops {
            if !known.iter().any(|op| op.name == name) {
                return Err(unknown_op("--op", name));
            }
        }
        let mut models: Vec<Model> = if small { vec![SMALL] } else { MODELS.to_vec() };
        if !self.models.is_empty() {
            models = self.models.iter().map(|name| Model::named(name)).collect::<Result<_>>()?;
        }
        let mut tokens: Vec<usize> = TOKENS.into_iter().filter(|&t| !small || t <= 512).collect();
        if !self.tokens.is_empty() {
            tokens = self.tokens.clone();
            tokens.sort_unstable();
            tokens.dedup();
        }
        let mut all = vec![];
        for op in known.into_iter().filter(|op| self.ops.is_empty() || self.ops.iter().any(|name| op.name == name)) {
            let mut cases = vec![];
            for model in &models {
                for &t in if op.has_tokens { &tokens[..] } else { &tokens[..1] } {
                    cases.extend((op.cases)(model, t));
                }
            }
            cases
                .retain(|case| self.shapes.is_empty() || self.shapes.iter().any(|part| case.shape.contains(&part[..])));
            if !cases.is_empty() {
                all.push((op, cases));
            }
        }
        if all.is_empty() {
            let expected = "a selection that leaves a row (halfbyte bench kernels --list)";
            return Err(Error::flag("--op, --model, --tokens, --shape", "no case", expected));
        }
        Ok(all)
    }

    /// Whether an implementation of this name is wanted.
    pub fn takes(&self, implementation: &str) -> bool {
        self.implementations.is_empty() || self.implementations.iter().any(|name| name == implementation)
    }
}

/// No op is called that: names the nearest.
pub fn unknown_op(flag: &str, name: &str) -> Error {
    let near = nearest(name, ops::all().iter().map(|op| op.name));
    let perhaps = near.first().map(|n| format!(", perhaps {n:?}")).unwrap_or_default();
    Error::flag(flag, format!("{name:?}"), format!("an op of `halfbyte bench kernels --list`{perhaps}"))
}
