//! csrc/nf4.cu behind checks.

use std::ffi::c_void;
use std::ptr::null;

use half::{bf16, f16};

use super::{at_least, exactly, ffi};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::{Error, Result};
use crate::nf4::{BLOCK, NESTED_BLOCK, QuantType};

/// Elements that [`nf4_double_quantize`] needs as scratch.
pub const DOUBLE_QUANTIZE_SCRATCH: usize = 256;

/// An input that an op takes in any of the three dense types.
pub enum Source<'a> {
    F32(View<'a, f32>),
    Bf16(View<'a, bf16>),
    F16(View<'a, f16>),
}

/// An output that an op writes in f32 or in the activation type.
pub enum Output<'a> {
    F32(ViewMut<'a, f32>),
    Bf16(ViewMut<'a, bf16>),
}

/// Absmax of each block of 64: f32, or quantised again.
#[derive(Clone, Copy)]
pub enum Absmax<'a> {
    /// (ceil(n / 64))
    Plain(View<'a, f32>),
    Double {
        /// (ceil(n / 64))
        codes: View<'a, u8>,
        /// (ceil(n / 64 / 256))
        nested_absmax: View<'a, f32>,
        /// (1)
        offset: View<'a, f32>,
    },
}

/// A matrix (n, k) in 4 bits: blocks of 64 along the flattened row-major matrix, so that they straddle rows where k is no
/// multiple of 64.
#[derive(Clone, Copy)]
pub struct Nf4Weight<'a> {
    /// (ceil(n * k / 2))
    pub packed: View<'a, u8>,
    pub absmax: Absmax<'a>,
    pub quant_type: QuantType,
    pub n: usize,
    pub k: usize,
}

/// Packs n elements into 4 bits.
pub struct Nf4Quantize<'a> {
    /// (ceil(n / 2)) =
    pub packed: ViewMut<'a, u8>,
    /// (ceil(n / 64)) =
    pub absmax: ViewMut<'a, f32>,
    /// (n) finite
    pub x: Source<'a>,
    pub quant_type: QuantType,
}

/// Packs the absmax of `blocks` blocks into 8 bits.
pub struct Nf4DoubleQuantize<'a> {
    /// (blocks) =
    pub codes: ViewMut<'a, u8>,
    /// (ceil(blocks / 256)) =
    pub nested_absmax: ViewMut<'a, f32>,
    /// (1) = mean of absmax
    pub offset: ViewMut<'a, f32>,
    /// (DOUBLE_QUANTIZE_SCRATCH)
    pub scratch: ViewMut<'a, f64>,
    /// (blocks)
    pub absmax: View<'a, f32>,
}

/// Unpacks n elements.
pub struct Nf4Dequantize<'a> {
    /// (n) =
    pub out: Output<'a>,
    /// (ceil(n / 2))
    pub packed: View<'a, u8>,
    pub absmax: Absmax<'a>,
    pub quant_type: QuantType,
}

/// Unpacks rows `first_row..first_row + rows` of a 4-bit matrix.
pub struct Nf4DequantizeRows<'a> {
    /// (rows, k) = ; may be longer
    pub out: ViewMut<'a, bf16>,
    pub w: Nf4Weight<'a>,
    pub first_row: usize,
    pub rows: usize,
}

pub fn nf4_quantize(cuda: &Cuda, a: Nf4Quantize) -> Result<()> {
    const OP: &str = "nf4_quantize";
    let (x, n, x_dtype) = match a.x {
        Source::F32(x) => (cuda.ptr(&x)?.cast::<c_void>(), x.len(), ffi::Dtype::F32),
        Source::Bf16(x) => (cuda.ptr(&x)?.cast(), x.len(), ffi::Dtype::Bf16),
        Source::F16(x) => (cuda.ptr(&x)?.cast(), x.len(), ffi::Dtype::F16),
    };
    exactly(OP, "packed", a.packed.len(), n.div_ceil(2))?;
    exactly(OP, "absmax", a.absmax.len(), n.div_ceil(BLOCK))?;
    let args = ffi::nf4::Nf4Quantize {
        packed: cuda.ptr_mut(&a.packed)?,
        absmax: cuda.ptr_mut(&a.absmax)?,
        x,
        n: n as u64,
        x_dtype,
        quant_type: quant_type(a.quant_type),
    };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above), start at the alignment of an allocation, and outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { ffi::nf4::nf4_quantize(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn nf4_double_quantize(cuda: &Cuda, a: Nf4DoubleQuantize) -> Result<()> {
    const OP: &str = "nf4_double_quantize";
    let blocks = a.absmax.len();
    exactly(OP, "codes", a.codes.len(), blocks)?;
    exactly(OP, "nested_absmax", a.nested_absmax.len(), blocks.div_ceil(NESTED_BLOCK))?;
    exactly(OP, "offset", a.offset.len(), 1)?;
    exactly(OP, "scratch", a.scratch.len(), DOUBLE_QUANTIZE_SCRATCH)?;
    let args = ffi::nf4::Nf4DoubleQuantize {
        codes: cuda.ptr_mut(&a.codes)?,
        nested_absmax: cuda.ptr_mut(&a.nested_absmax)?,
        offset: cuda.ptr_mut(&a.offset)?,
        partial: cuda.ptr_mut(&a.scratch)?,
        absmax: cuda.ptr(&a.absmax)?,
        blocks: blocks as u64,
    };
    // SAFETY: as in nf4_quantize; the scratch holds one f64 for each CTA of the sum.
    unsafe { ffi::nf4::nf4_double_quantize(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn nf4_dequantize(cuda: &Cuda, a: Nf4Dequantize) -> Result<()> {
    const OP: &str = "nf4_dequantize";
    let (out, n, out_dtype) = match a.out {
        Output::F32(out) => (cuda.ptr_mut(&out)?.cast::<c_void>(), out.len(), ffi::Dtype::F32),
        Output::Bf16(out) => (cuda.ptr_mut(&out)?.cast(), out.len(), ffi::Dtype::Bf16),
    };
    exactly(OP, "packed", a.packed.len(), n.div_ceil(2))?;
    let absmax = absmax_args(cuda, OP, &a.absmax, n.div_ceil(BLOCK))?;
    let args = ffi::nf4::Nf4Dequantize {
        out,
        packed: cuda.ptr(&a.packed)?,
        absmax,
        n: n as u64,
        out_dtype,
        quant_type: quant_type(a.quant_type),
    };
    // SAFETY: as in nf4_quantize; either `absmax` or all three of double quantisation are there, of the sizes checked.
    unsafe { ffi::nf4::nf4_dequantize(&args, cuda.stream_for_launch()?) }.check(OP)
}

/// Unpacks some rows of a matrix: the bits that [`nf4_dequantize`] gives.
pub fn nf4_dequantize_rows(cuda: &Cuda, a: Nf4DequantizeRows) -> Result<()> {
    const OP: &str = "nf4_dequantize_rows";
    let absmax = check_weight(cuda, OP, &a.w)?;
    if a.first_row > a.w.n || a.rows > a.w.n - a.first_row {
        return Err(Error::Shape {
            op: OP,
            argument: "first_row + rows",
            found: a.first_row.saturating_add(a.rows),
            expected: a.w.n,
        });
    }
    at_least(OP, "out", a.out.len(), a.rows * a.w.k)?;
    let args = ffi::nf4::Nf4DequantizeRange {
        out: cuda.ptr_mut(&a.out)?,
        packed: cuda.ptr(&a.w.packed)?,
        absmax,
        first: (a.first_row * a.w.k) as u64,
        n: (a.rows * a.w.k) as u64,
        quant_type: quant_type(a.w.quant_type),
    };
    // SAFETY: as in nf4_quantize; the rows lie inside the weight, whose parts have the sizes checked.
    unsafe { ffi::nf4::nf4_dequantize_range(&args, cuda.stream_for_launch()?) }.check(OP)
}

/// The absmax of a 4-bit matrix whose parts all have the sizes that its shape asks for.
pub(super) fn check_weight(cuda: &Cuda, op: &'static str, w: &Nf4Weight) -> Result<ffi::nf4::Nf4Absmax> {
    let len = w.n.checked_mul(w.k);
    let len = len.ok_or(Error::Shape { op, argument: "w.n * w.k", found: usize::MAX, expected: 2 * w.packed.len() })?;
    exactly(op, "w.packed", w.packed.len(), len.div_ceil(2))?;
    absmax_args(cuda, op, &w.absmax, len.div_ceil(BLOCK))
}

/// The absmax of `blocks` blocks.
fn absmax_args(cuda: &Cuda, op: &'static str, absmax: &Absmax, blocks: usize) -> Result<ffi::nf4::Nf4Absmax> {
    match absmax {
        Absmax::Plain(absmax) => {
            exactly(op, "absmax", absmax.len(), blocks)?;
            Ok(ffi::nf4::Nf4Absmax { absmax: cuda.ptr(absmax)?, codes: null(), nested_absmax: null(), offset: null() })
        }
        Absmax::Double { codes, nested_absmax, offset } => {
            exactly(op, "codes", codes.len(), blocks)?;
            exactly(op, "nested_absmax", nested_absmax.len(), blocks.div_ceil(NESTED_BLOCK))?;
            exactly(op, "offset", offset.len(), 1)?;
            Ok(ffi::nf4::Nf4Absmax {
                absmax: null(),
                codes: cuda.ptr(codes)?,
                nested_absmax: cuda.ptr(nested_absmax)?,
                offset: cuda.ptr(offset)?,
            })
        }
    }
}

pub(super) fn quant_type(t: QuantType) -> ffi::nf4::QuantType {
    match t {
        QuantType::Nf4 => ffi::nf4::QuantType::Nf4,
        QuantType::Fp4 => ffi::nf4::QuantType::Fp4,
    }
}
