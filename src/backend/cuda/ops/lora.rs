//! csrc/lora.cu behind checks.
//!
//! `h` is `scale * dropout(x) Aᵀ`: the scale is folded in, so that `y += h Bᵀ` and `dB += dyᵀ h` need none.

use std::ptr::null;

use half::bf16;

use super::{at_least, exactly, ffi};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::{Error, Result};

pub use crate::backend::workspace::lora_scratch;

/// The highest rank of a part.
pub const MAX_RANK: usize = 256;
/// The most parts of a group.
pub const MAX_PARTS: usize = ffi::lora::MAX_PARTS;

/// LoRA of one projection of a group that reads one x and writes one y.
#[derive(Clone, Copy, Debug)]
pub struct LoraPart {
    /// Offset of A (r, K) in the flat vector.
    pub a: usize,
    /// Offset of B (n, r) in the flat vector.
    pub b: usize,
    pub r: usize,
    pub scale: f32,
    /// The projection's stream of dropout masks.
    pub site: u32,
    /// First column in y and dy.
    pub y: usize,
    pub n: usize,
    /// First column in h and dh. [`lora_forward`] and [`lora_backward`] want the parts side by side from column 0.
    pub h: usize,
}

/// Dropout of x, as [`crate::backend::Dropout`].
#[derive(Clone, Copy)]
pub struct DropoutMask<'a> {
    /// 0 <= p < 1
    pub p: f32,
    pub seed: u64,
    /// (1) on the device, so that a recorded launch draws new masks when it is replayed.
    pub step: View<'a, u32>,
}

/// `h_p = scale_p * dropout_p(x) A_pᵀ`
pub struct LoraForward<'a> {
    /// (t, r) =
    pub h: ViewMut<'a, bf16>,
    /// (t, k)
    pub x: View<'a, bf16>,
    /// (P)
    pub lora: View<'a, bf16>,
    /// 1..=3
    pub parts: &'a [LoraPart],
    pub t: usize,
    pub k: usize,
    /// Width of h: the sum of the parts' ranks.
    pub r: usize,
    pub dropout: Option<DropoutMask<'a>>,
    /// ([`lora_scratch`])
    pub scratch: ViewMut<'a, f32>,
}

/// `y_p += h_p B_pᵀ`. The parts may be some of those that h holds.
pub struct LoraExpand<'a> {
    /// (t, n) +=
    pub y: ViewMut<'a, bf16>,
    /// (t, r)
    pub h: View<'a, bf16>,
    /// (P)
    pub lora: View<'a, bf16>,
    pub parts: &'a [LoraPart],
    pub t: usize,
    pub n: usize,
    pub r: usize,
}

/// `dh_p = scale_p * dy_p B_p; dB_p += dy_pᵀ h_p; dA_p += dh_pᵀ dropout_p(x)`
pub struct LoraBackward<'a> {
    /// (t, r) =
    pub dh: ViewMut<'a, bf16>,
    /// (P) += where A and B lie in `lora`
    pub d_lora: ViewMut<'a, f32>,
    /// (t, n)
    pub dy: View<'a, bf16>,
    /// (t, k)
    pub x: View<'a, bf16>,
    /// (t, r) of the forward
    pub h: View<'a, bf16>,
    /// (P)
    pub lora: View<'a, bf16>,
    pub parts: &'a [LoraPart],
    pub t: usize,
    pub k: usize,
    pub n: usize,
    pub r: usize,
    pub dropout: Option<DropoutMask<'a>>,
    /// ([`lora_scratch`])
    pub scratch: ViewMut<'a, f32>,
}

/// `dx += sum_p dropout'_p(dh_p A_p)`. The parts may be some of those that dh holds.
pub struct LoraBackwardX<'a> {
    /// (t, k) +=
    pub dx: ViewMut<'a, bf16>,
    /// (t, r)
    pub dh: View<'a, bf16>,
    /// (P)
    pub lora: View<'a, bf16>,
    pub parts: &'a [LoraPart],
    pub t: usize,
    pub k: usize,
    pub r: usize,
    pub dropout: Option<DropoutMask<'a>>,
}

pub fn lora_forward(cuda: &Cuda, a: LoraForward) -> Result<()> {
    const OP: &str = "lora_forward";
    let group = group(cuda, OP, &a.lora, a.parts, a.r, Uses { k: Some(a.k), n: None, whole: true })?;
    let dropout = dropout(cuda, OP, a.dropout.as_ref())?;
    at_least(OP, "h", a.h.len(), a.t * a.r)?;
    at_least(OP, "x", a.x.len(), a.t * a.k)?;
    at_least(OP, "scratch", a.scratch.len(), lora_scratch(a.t, a.k, 0, a.r))?;
    let args = ffi::lora::LoraForward {
        group,
        dropout,
        h: cuda.ptr_mut(&a.h)?,
        x: cuda.ptr(&a.x)?,
        scratch: cuda.ptr_mut(&a.scratch)?,
        scratch_len: a.scratch.len() as u64,
        t: int(OP, "t", a.t)?,
        k: int(OP, "k", a.k)?,
    };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above; every part lies inside `lora`), and outlive the kernels: freeing is ordered behind them on the stream.
    unsafe { ffi::lora::lora_forward(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn lora_expand(cuda: &Cuda, a: LoraExpand) -> Result<()> {
    const OP: &str = "lora_expand";
    let group = group(cuda, OP, &a.lora, a.parts, a.r, Uses { k: None, n: Some(a.n), whole: false })?;
    at_least(OP, "y", a.y.len(), a.t * a.n)?;
    at_least(OP, "h", a.h.len(), a.t * a.r)?;
    let args = ffi::lora::LoraExpand {
        group,
        y: cuda.ptr_mut(&a.y)?,
        h: cuda.ptr(&a.h)?,
        t: int(OP, "t", a.t)?,
        n: int(OP, "n", a.n)?,
    };
    // SAFETY: as in lora_forward; every part's columns lie inside y.
    unsafe { ffi::lora::lora_expand(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn lora_backward(cuda: &Cuda, a: LoraBackward) -> Result<()> {
    const OP: &str = "lora_backward";
    let group = group(cuda, OP, &a.lora, a.parts, a.r, Uses { k: Some(a.k), n: Some(a.n), whole: true })?;
    let dropout = dropout(cuda, OP, a.dropout.as_ref())?;
    at_least(OP, "dh", a.dh.len(), a.t * a.r)?;
    at_least(OP, "d_lora", a.d_lora.len(), end(a.parts, Some(a.k), true))?;
    at_least(OP, "dy", a.dy.len(), a.t * a.n)?;
    at_least(OP, "x", a.x.len(), a.t * a.k)?;
    at_least(OP, "h", a.h.len(), a.t * a.r)?;
    at_least(OP, "scratch", a.scratch.len(), lora_scratch(a.t, a.k, a.n, a.r))?;
    let args = ffi::lora::LoraBackward {
        group,
        dropout,
        dh: cuda.ptr_mut(&a.dh)?,
        d_lora: cuda.ptr_mut(&a.d_lora)?,
        dy: cuda.ptr(&a.dy)?,
        x: cuda.ptr(&a.x)?,
        h: cuda.ptr(&a.h)?,
        scratch: cuda.ptr_mut(&a.scratch)?,
        scratch_len: a.scratch.len() as u64,
        t: int(OP, "t", a.t)?,
        k: int(OP, "k", a.k)?,
        n: int(OP, "n", a.n)?,
        pad: 0,
    };
    // SAFETY: as in lora_forward; every part lies inside `d_lora` too, and its columns inside dy.
    unsafe { ffi::lora::lora_backward(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn lora_backward_x(cuda: &Cuda, a: LoraBackwardX) -> Result<()> {
    const OP: &str = "lora_backward_x";
    let group = group(cuda, OP, &a.lora, a.parts, a.r, Uses { k: Some(a.k), n: None, whole: false })?;
    let dropout = dropout(cuda, OP, a.dropout.as_ref())?;
    at_least(OP, "dx", a.dx.len(), a.t * a.k)?;
    at_least(OP, "dh", a.dh.len(), a.t * a.r)?;
    let args = ffi::lora::LoraBackwardX {
        group,
        dropout,
        dx: cuda.ptr_mut(&a.dx)?,
        dh: cuda.ptr(&a.dh)?,
        t: int(OP, "t", a.t)?,
        k: int(OP, "k", a.k)?,
    };
    // SAFETY: as in lora_forward.
    unsafe { ffi::lora::lora_backward_x(&args, cuda.stream_for_launch()?) }.check(OP)
}

/// Where the last A (where `k` is given) or B (where `b`) of the parts ends.
fn end(parts: &[LoraPart], k: Option<usize>, b: bool) -> usize {
    let ends = |p: &LoraPart| {
        let a = k.map_or(0, |k| p.a + p.r * k);
        a.max(if b { p.b + p.n * p.r } else { 0 })
    };
    parts.iter().map(ends).max().unwrap_or(0)
}

/// What an op uses of its parts.
struct Uses {
    /// The A matrices, of this width.
    k: Option<usize>,
    /// The B matrices, and columns of y, which has this width.
    n: Option<usize>,
    /// The parts must fill the columns of h in order.
    whole: bool,
}

/// Checks the parts.
fn group(
    cuda: &Cuda,
    op: &'static str,
    lora: &View<bf16>,
    parts: &[LoraPart],
    r: usize,
    uses: Uses,
) -> Result<ffi::lora::LoraGroup> {
    let Uses { k, n, whole } = uses;
    if parts.is_empty() || parts.len() > MAX_PARTS {
        return Err(Error::Shape { op, argument: "parts", found: parts.len(), expected: MAX_PARTS });
    }
    if let Some(k) = k {
        at_least(op, "k", k, 1)?;
    }
    at_least(op, "lora", lora.len(), end(parts, k, n.is_some()))?;
    let mut out = ffi::lora::LoraGroup {
        parts: Default::default(),
        lora: cuda.ptr(lora)?,
        count: parts.len() as i32,
        r: int(op, "r", r)?,
    };
    let mut h = 0;
    for (part, out) in parts.iter().zip(&mut out.parts) {
        at_least(op, "parts (r)", part.r, 1)?;
        at_least(op, "parts (highest r)", MAX_RANK, part.r)?;
        if whole {
            exactly(op, "parts (h)", part.h, h)?;
        }
        at_least(op, "r", r, part.h.saturating_add(part.r))?;
        h += part.r;
        if let Some(n) = n {
            at_least(op, "parts (n)", part.n, 1)?;
            at_least(op, "n", n, part.y + part.n)?;
        }
        *out = ffi::lora::LoraPart {
            a: part.a as u64,
            b: part.b as u64,
            r: part.r as i32,
            scale: part.scale,
            site: part.site,
            y: int(op, "parts (y)", part.y)?,
            n: int(op, "parts (n)", part.n)?,
            h: part.h as i32,
        };
    }
    if whole {
        exactly(op, "r", r, h)?;
    }
    Ok(out)
}

fn dropout(cuda: &Cuda, op: &'static str, mask: Option<&DropoutMask>) -> Result<ffi::lora::LoraDropout> {
    let Some(mask) = mask.filter(|m| m.p > 0.0) else {
        return Ok(ffi::lora::LoraDropout { step: null(), seed: 0, threshold: 0, inverse: 1.0 });
    };
    at_least(op, "step", mask.step.len(), 1)?;
    if mask.p >= 1.0 {
        return Err(Error::Shape { op, argument: "p (below 1)", found: 1, expected: 0 });
    }
    // A uniform number is the top 24 bits of a word, so it is >= p where the word is >= this. Exact: p < 1 has a
    // mantissa of 24 bits.
    let threshold = ((mask.p * (1 << 24) as f32).ceil() as u32) << 8;
    let step = cuda.ptr(&mask.step)?;
    Ok(ffi::lora::LoraDropout { step, seed: mask.seed, threshold, inverse: 1.0 / (1.0 - mask.p) })
}

fn int(op: &'static str, argument: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::Shape { op, argument, found: value, expected: i32::MAX as usize })
}
