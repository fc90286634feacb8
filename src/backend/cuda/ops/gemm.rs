//! csrc/gemm.cu behind checks, and csrc/gemm_sm90.cu where it serves: on Hopper, for matrices of some size.

use std::ptr::null;

use half::bf16;

use super::ffi;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::backend::cuda::{Cuda, Kernels};
use crate::error::{Error, Result};

/// The output of a product, bf16 or f32.
pub enum Out<'a> {
    Bf16(ViewMut<'a, bf16>),
    F32(ViewMut<'a, f32>),
}

/// A second product that continues the sum over k of the first: LoRA's `h` and `B`.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    /// (m, k)
    pub a: View<'a, bf16>,
    pub lda: usize,
    /// Oriented as the main product's b.
    pub b: View<'a, bf16>,
    pub ldb: usize,
    pub k: usize,
}

/// `c = alpha * (a·op(b) + pair) + bias`, and `+ c` where `accumulate`. One rounding; the sum over k has one order.
pub struct Gemm<'a> {
    /// (m, n), rows `ldc` elements apart
    pub c: Out<'a>,
    pub ldc: usize,
    /// (m, k), rows `lda` apart
    pub a: View<'a, bf16>,
    pub lda: usize,
    /// (n, k) where `b_transposed`, else (k, n); rows `ldb` apart
    pub b: View<'a, bf16>,
    pub ldb: usize,
    pub b_transposed: bool,
    pub pair: Option<Pair<'a>>,
    /// (n)
    pub bias: Option<View<'a, bf16>>,
    /// Scales the sum of both products.
    pub alpha: f32,
    pub accumulate: bool,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

pub fn gemm(cuda: &Cuda, g: Gemm) -> Result<()> {
    const OP: &str = "gemm";
    if g.m == 0 {
        return Ok(());
    }
    for (argument, size) in [("m", g.m), ("n", g.n), ("k", g.k)] {
        check_size(OP, argument, size)?;
    }
    let c_len = match &g.c {
        Out::Bf16(c) => c.len(),
        Out::F32(c) => c.len(),
    };
    check_matrix(OP, ["c", "ldc"], c_len, (g.m, g.n), g.ldc)?;
    check_matrix(OP, ["a", "lda"], g.a.len(), (g.m, g.k), g.lda)?;
    let b_shape = |k| if g.b_transposed { (g.n, k) } else { (k, g.n) };
    check_matrix(OP, ["b", "ldb"], g.b.len(), b_shape(g.k), g.ldb)?;
    if let Some(pair) = &g.pair {
        check_pair(OP, pair, g.m, b_shape(pair.k))?;
    }
    if let Some(bias) = &g.bias {
        super::at_least(OP, "bias", bias.len(), g.n)?;
    }
    let (c, c_dtype) = match &g.c {
        Out::Bf16(c) => (cuda.ptr_mut(c)?.cast(), ffi::Dtype::Bf16),
        Out::F32(c) => (cuda.ptr_mut(c)?.cast(), ffi::Dtype::F32),
    };
    let pair = PairArgs::new(cuda, g.pair.as_ref())?;
    let args = ffi::gemm::Gemm {
        c,
        a: cuda.ptr(&g.a)?,
        b: cuda.ptr(&g.b)?,
        a2: pair.a,
        b2: pair.b,
        bias: g.bias.as_ref().map_or(Ok(null()), |bias| cuda.ptr(bias))?,
        ldc: g.ldc as i64,
        lda: g.lda as i64,
        ldb: g.ldb as i64,
        lda2: pair.lda,
        ldb2: pair.ldb,
        m: g.m as i32,
        n: g.n as i32,
        k: g.k as i32,
        k2: pair.k,
        alpha: g.alpha,
        accumulate: g.accumulate.into(),
        b_transposed: g.b_transposed.into(),
        c_dtype,
    };
    let launch = if on_hopper(cuda, &args) { ffi::gemm::gemm_sm90 } else { ffi::gemm::gemm };
    // SAFETY: `args` lives through the call. Every element that the sizes and strides name lies inside its view (checked
    // above), c's are borrowed exclusively, and the buffers outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { launch(&args, cuda.stream_for_launch()?) }.check(OP)
}

/// Whether the wgmma kernel serves: rows enough for a tile, and rows of all matrices that start at 16 bytes.
fn on_hopper(cuda: &Cuda, g: &ffi::gemm::Gemm) -> bool {
    let aligned = |base: *const bf16, ld: i64| base.addr().is_multiple_of(16) && ld % 8 == 0;
    cuda.kernels() == Kernels::Sm90
        && g.m >= 128
        && g.n % 8 == 0
        && [(g.a, g.lda), (g.b, g.ldb), (g.c.cast_const().cast(), g.ldc)].into_iter().all(|(p, ld)| aligned(p, ld))
        && (g.k2 == 0 || aligned(g.a2, g.lda2) && aligned(g.b2, g.ldb2))
        && g.bias.addr().is_multiple_of(4)
}

/// [`Pair`] as the launchers take it; k = 0: there is none.
pub(super) struct PairArgs {
    pub a: *const bf16,
    pub b: *const bf16,
    pub lda: i64,
    pub ldb: i64,
    pub k: i32,
}

impl PairArgs {
    /// Of a pair that `check_pair` let pass.
    pub fn new(cuda: &Cuda, pair: Option<&Pair>) -> Result<Self> {
        let Some(p) = pair else { return Ok(Self { a: null(), b: null(), lda: 0, ldb: 0, k: 0 }) };
        let (a, b) = (cuda.ptr(&p.a)?, cuda.ptr(&p.b)?);
        Ok(Self { a, b, lda: p.lda as i64, ldb: p.ldb as i64, k: p.k as i32 })
    }
}

/// The pair's a is (m, k), its b has the shape `b`.
pub(super) fn check_pair(op: &'static str, pair: &Pair, m: usize, b: (usize, usize)) -> Result<()> {
    check_size(op, "pair.k", pair.k)?;
    check_matrix(op, ["pair.a", "pair.lda"], pair.a.len(), (m, pair.k), pair.lda)?;
    check_matrix(op, ["pair.b", "pair.ldb"], pair.b.len(), b, pair.ldb)
}

/// A number of rows or columns: at least 1, and an i32 with room for a tile more.
pub(super) fn check_size(op: &'static str, argument: &'static str, found: usize) -> Result<()> {
    const MOST: usize = i32::MAX as usize - 1024;
    if found == 0 || found > MOST {
        return Err(Error::Shape { op, argument, found, expected: found.clamp(1, MOST) });
    }
    Ok(())
}

/// `len` elements must hold a matrix of this shape whose rows are `ld` apart. Names: of the matrix, of its stride.
pub(super) fn check_matrix(
    op: &'static str,
    [name, stride]: [&'static str; 2],
    len: usize,
    (rows, cols): (usize, usize),
    ld: usize,
) -> Result<()> {
    // Beyond this no matrix fits memory, and the address of an element fits an i64.
    if ld < cols || ld > u32::MAX as usize {
        return Err(Error::Shape { op, argument: stride, found: ld, expected: ld.clamp(cols, u32::MAX as usize) });
    }
    super::at_least(op, name, len, (rows - 1) * ld + cols)
}
