//! csrc/nf4.cu behind checks.

use std::ffi::c_void;
use std::ptr::null;

use half::{bf16, f16};

use super::{check, ffi};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::Result;
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

pub fn nf4_quantize(cuda: &Cuda, a: Nf4Quantize) -> Result<()> {
    const OP: &str = "nf4_quantize";
    let (x, n, x_dtype) = match a.x {
        Source::F32(x) => (cuda.ptr(&x)?.cast::<c_void>(), x.len(), ffi::Dtype::F32),
        Source::Bf16(x) => (cuda.ptr(&x)?.cast(), x.len(), ffi::Dtype::Bf16),
        Source::F16(x) => (cuda.ptr(&x)?.cast(), x.len(), ffi::Dtype::F16),
    };
    check(OP, "packed", a.packed.len(), n.div_ceil(2))?;
    check(OP, "absmax", a.absmax.len(), n.div_ceil(BLOCK))?;
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
    check(OP, "codes", a.codes.len(), blocks)?;
    check(OP, "nested_absmax", a.nested_absmax.len(), blocks.div_ceil(NESTED_BLOCK))?;
    check(OP, "offset", a.offset.len(), 1)?;
    check(OP, "scratch", a.scratch.len(), DOUBLE_QUANTIZE_SCRATCH)?;
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
    let blocks = n.div_ceil(BLOCK);
    check(OP, "packed", a.packed.len(), n.div_ceil(2))?;
    let absmax = match a.absmax {
        Absmax::Plain(absmax) => {
            check(OP, "absmax", absmax.len(), blocks)?;
            ffi::nf4::Nf4Absmax { absmax: cuda.ptr(&absmax)?, codes: null(), nested_absmax: null(), offset: null() }
        }
        Absmax::Double { codes, nested_absmax, offset } => {
            check(OP, "codes", codes.len(), blocks)?;
            check(OP, "nested_absmax", nested_absmax.len(), blocks.div_ceil(NESTED_BLOCK))?;
            check(OP, "offset", offset.len(), 1)?;
            ffi::nf4::Nf4Absmax {
                absmax: null(),
                codes: cuda.ptr(&codes)?,
                nested_absmax: cuda.ptr(&nested_absmax)?,
                offset: cuda.ptr(&offset)?,
            }
        }
    };
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

fn quant_type(t: QuantType) -> ffi::nf4::QuantType {
    match t {
        QuantType::Nf4 => ffi::nf4::QuantType::Nf4,
        QuantType::Fp4 => ffi::nf4::QuantType::Fp4,
    }
}
