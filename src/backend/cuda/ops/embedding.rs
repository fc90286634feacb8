//! csrc/embedding.cu behind checks.

use half::bf16;

use super::{at_least, ffi};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::Result;

/// `x[t,:] = table[tokens[t],:]`; zeros for a token outside 0..V.
pub struct Embedding<'a> {
    /// (T, C) =
    pub x: ViewMut<'a, bf16>,
    /// (T)
    pub tokens: View<'a, i32>,
    /// (V, C)
    pub table: View<'a, bf16>,
    pub t: usize,
    pub c: usize,
    pub v: usize,
}

pub fn embedding(cuda: &Cuda, a: Embedding) -> Result<()> {
    const OP: &str = "embedding";
    at_least(OP, "c", a.c, 1)?;
    at_least(OP, "x", a.x.len(), a.t * a.c)?;
    at_least(OP, "tokens", a.tokens.len(), a.t)?;
    at_least(OP, "table", a.table.len(), a.v * a.c)?;
    let args = ffi::embedding::Embedding {
        x: cuda.ptr_mut(&a.x)?,
        tokens: cuda.ptr(&a.tokens)?,
        table: cuda.ptr(&a.table)?,
        t: a.t as u64,
        c: a.c as u64,
        v: a.v as u64,
    };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above) and outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { ffi::embedding::embedding(&args, cuda.stream_for_launch()?) }.check(OP)
}
