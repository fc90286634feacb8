//! The checks of sizes that every backend makes: each names the op and the argument.

use super::{Backend, Linear};
use crate::error::{Error, Result};

/// A buffer that may be longer than this call needs: buffers are made for the largest micro-batch.
pub(super) fn at_least(op: &'static str, argument: &'static str, found: usize, expected: usize) -> Result<()> {
    if found >= expected { Ok(()) } else { Err(Error::Shape { op, argument, found, expected }) }
}

/// A size that must fit exactly.
pub(super) fn exactly(op: &'static str, argument: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Shape { op, argument, found, expected }) }
}

/// The parts of a linear against their sums, and the adapter's offsets against the flat vector's length. `dims`: (n, k) of a
/// matrix, `len`: elements of a buffer.
pub(super) fn check_linear<B: Backend>(
    op: &'static str,
    w: &Linear<B>,
    lora: Option<usize>,
    dims: impl Fn(&B::Matrix) -> (usize, usize),
    len: impl Fn(&B::Act) -> usize,
) -> Result<()> {
    at_least(op, "k", w.k, 1)?;
    exactly(op, "parts (n)", w.parts.iter().map(|p| p.n).sum(), w.n)?;
    exactly(op, "parts (r)", w.parts.iter().filter_map(|p| p.lora.as_ref()).map(|l| l.r).sum(), w.r)?;
    for part in &w.parts {
        let (n, k) = dims(&part.w);
        exactly(op, "w (n)", n, part.n)?;
        exactly(op, "w (k)", k, w.k)?;
        if let Some(bias) = &part.bias {
            at_least(op, "bias", len(bias), part.n)?;
        }
        if let (Some(l), Some(len)) = (&part.lora, lora) {
            at_least(op, "lora (A)", len, l.a + l.r * w.k)?;
            at_least(op, "lora (B)", len, l.b + part.n * l.r)?;
        }
    }
    Ok(())
}
