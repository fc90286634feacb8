//! csrc/nf4_gemm.cu behind checks.

use std::ptr::null;

use half::bf16;

pub use super::nf4::Nf4Weight;

use super::gemm::{Pair, PairArgs, check_matrix, check_pair, check_size};
use super::{at_least, ffi, nf4};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::Result;

/// Which way the weight W (n, k) is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// c (m, n) = a (m, k) · Wᵀ; the pair's b is (n, r)
    Forward,
    /// c (m, k) = a (m, n) · W; the pair's b is (r, k)
    Backward,
}

/// `c = a·op(W) + pair + bias`, and `+ c` where `accumulate`: the bits of [`super::gemm::gemm`] on the dequantised weight.
pub struct Nf4Gemm<'a> {
    /// (m, n) or (m, k), rows `ldc` elements apart
    pub c: ViewMut<'a, bf16>,
    pub ldc: usize,
    /// (m, k) or (m, n), rows `lda` apart
    pub a: View<'a, bf16>,
    pub lda: usize,
    pub w: Nf4Weight<'a>,
    pub direction: Direction,
    pub pair: Option<Pair<'a>>,
    /// (columns of c)
    pub bias: Option<View<'a, bf16>>,
    pub accumulate: bool,
    pub m: usize,
}

pub fn nf4_gemm(cuda: &Cuda, g: Nf4Gemm) -> Result<()> {
    const OP: &str = "nf4_gemm";
    if g.m == 0 {
        return Ok(());
    }
    let Nf4Weight { n, k, .. } = g.w;
    for (argument, size) in [("m", g.m), ("w.n", n), ("w.k", k)] {
        check_size(OP, argument, size)?;
    }
    let absmax = nf4::check_weight(cuda, OP, &g.w)?;
    let (cols, depth) = match g.direction {
        Direction::Forward => (n, k),
        Direction::Backward => (k, n),
    };
    check_matrix(OP, ["c", "ldc"], g.c.len(), (g.m, cols), g.ldc)?;
    check_matrix(OP, ["a", "lda"], g.a.len(), (g.m, depth), g.lda)?;
    if let Some(pair) = &g.pair {
        let b = match g.direction {
            Direction::Forward => (n, pair.k),
            Direction::Backward => (pair.k, k),
        };
        check_pair(OP, pair, g.m, b)?;
    }
    if let Some(bias) = &g.bias {
        at_least(OP, "bias", bias.len(), cols)?;
    }
    let pair = PairArgs::new(cuda, g.pair.as_ref())?;
    let args = ffi::nf4_gemm::Nf4Gemm {
        c: cuda.ptr_mut(&g.c)?,
        a: cuda.ptr(&g.a)?,
        packed: cuda.ptr(&g.w.packed)?,
        absmax,
        a2: pair.a,
        b2: pair.b,
        bias: g.bias.as_ref().map_or(Ok(null()), |bias| cuda.ptr(bias))?,
        ldc: g.ldc as i64,
        lda: g.lda as i64,
        lda2: pair.lda,
        ldb2: pair.ldb,
        m: g.m as i32,
        n: n as i32,
        k: k as i32,
        k2: pair.k,
        accumulate: g.accumulate.into(),
        backward: (g.direction == Direction::Backward).into(),
        quant_type: nf4::quant_type(g.w.quant_type),
        unused: 0,
    };
    // SAFETY: `args` lives through the call. Every element that the sizes and strides name lies inside its view, and the
    // parts of the weight have the sizes that n and k ask for (checked above); c's elements are borrowed exclusively, and
    // the buffers outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { ffi::nf4_gemm::nf4_gemm(&args, cuda.stream_for_launch()?) }.check(OP)
}
