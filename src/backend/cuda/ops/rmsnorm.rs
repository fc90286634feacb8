//! csrc/rmsnorm.cu behind checks.

use std::ptr::{null, null_mut};

use half::bf16;

use super::{at_least, check_heads, ffi};
use crate::backend::Heads;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::Result;

/// s = x + delta (where there is one), r = 1 / sqrt(mean_c(s^2) + eps), y = r * s * w. The norm reads s as it is stored.
pub struct RmsNormForward<'a> {
    /// (T, C) =
    pub y: ViewMut<'a, bf16>,
    /// (T) = r
    pub rstd: ViewMut<'a, f32>,
    /// (T, C)
    pub x: View<'a, bf16>,
    /// delta (T, C), and where s goes (T, C) =
    pub residual: Option<(View<'a, bf16>, ViewMut<'a, bf16>)>,
    /// (C)
    pub w: View<'a, bf16>,
    pub t: usize,
    pub c: usize,
    pub eps: f32,
}

/// `dx[t,c] += r*dy*w - r^3 * x[t,c] * mean_c(dy*w*x)`. `x` is what was normed (s of the forward).
pub struct RmsNormBackward<'a> {
    /// (T, C) +=
    pub dx: ViewMut<'a, bf16>,
    /// (T, C)
    pub dy: View<'a, bf16>,
    /// (T, C)
    pub x: View<'a, bf16>,
    /// (C)
    pub w: View<'a, bf16>,
    /// (T)
    pub rstd: View<'a, f32>,
    pub t: usize,
    pub c: usize,
}

/// y = x, but each query head normed and scaled by q_w (D), each key head by k_w (D).
pub struct HeadNormForward<'a> {
    /// (T, (H+2G)*D) =
    pub y: ViewMut<'a, bf16>,
    /// (T, H+G) = r of each head
    pub rstd: ViewMut<'a, f32>,
    /// (T, (H+2G)*D)
    pub x: View<'a, bf16>,
    pub q_w: View<'a, bf16>,
    pub k_w: View<'a, bf16>,
    pub t: usize,
    pub heads: Heads,
    pub eps: f32,
}

pub struct HeadNormBackward<'a> {
    /// (T, (H+2G)*D) in: gradient of y; out: gradient of x
    pub dqkv: ViewMut<'a, bf16>,
    /// (T, (H+2G)*D) input of the forward
    pub x: View<'a, bf16>,
    /// (T, H+G)
    pub rstd: View<'a, f32>,
    pub q_w: View<'a, bf16>,
    pub k_w: View<'a, bf16>,
    pub t: usize,
    pub heads: Heads,
}

pub fn rmsnorm_forward(cuda: &Cuda, a: RmsNormForward) -> Result<()> {
    const OP: &str = "rmsnorm_forward";
    let n = a.t * a.c;
    at_least(OP, "c", a.c, 1)?;
    at_least(OP, "y", a.y.len(), n)?;
    at_least(OP, "rstd", a.rstd.len(), a.t)?;
    at_least(OP, "x", a.x.len(), n)?;
    at_least(OP, "w", a.w.len(), a.c)?;
    let (delta, s) = match &a.residual {
        Some((delta, s)) => {
            at_least(OP, "delta", delta.len(), n)?;
            at_least(OP, "s", s.len(), n)?;
            (cuda.ptr(delta)?, cuda.ptr_mut(s)?)
        }
        None => (null(), null_mut()),
    };
    let args = ffi::rmsnorm::RmsNormForward {
        y: cuda.ptr_mut(&a.y)?,
        rstd: cuda.ptr_mut(&a.rstd)?,
        x: cuda.ptr(&a.x)?,
        delta,
        s,
        w: cuda.ptr(&a.w)?,
        t: a.t as u64,
        c: a.c as u64,
        eps: a.eps,
    };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above) and outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { ffi::rmsnorm::rmsnorm_forward(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn rmsnorm_backward(cuda: &Cuda, a: RmsNormBackward) -> Result<()> {
    const OP: &str = "rmsnorm_backward";
    let n = a.t * a.c;
    at_least(OP, "c", a.c, 1)?;
    at_least(OP, "dx", a.dx.len(), n)?;
    at_least(OP, "dy", a.dy.len(), n)?;
    at_least(OP, "x", a.x.len(), n)?;
    at_least(OP, "w", a.w.len(), a.c)?;
    at_least(OP, "rstd", a.rstd.len(), a.t)?;
    let args = ffi::rmsnorm::RmsNormBackward {
        dx: cuda.ptr_mut(&a.dx)?,
        dy: cuda.ptr(&a.dy)?,
        x: cuda.ptr(&a.x)?,
        w: cuda.ptr(&a.w)?,
        rstd: cuda.ptr(&a.rstd)?,
        t: a.t as u64,
        c: a.c as u64,
    };
    // SAFETY: as in rmsnorm_forward.
    unsafe { ffi::rmsnorm::rmsnorm_backward(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn head_norm_forward(cuda: &Cuda, a: HeadNormForward) -> Result<()> {
    const OP: &str = "head_norm_forward";
    check_heads(OP, a.heads)?;
    let (n, d) = (a.t * a.heads.qkv(), a.heads.d);
    at_least(OP, "y", a.y.len(), n)?;
    at_least(OP, "rstd", a.rstd.len(), a.t * (a.heads.h + a.heads.g))?;
    at_least(OP, "x", a.x.len(), n)?;
    at_least(OP, "q_w", a.q_w.len(), d)?;
    at_least(OP, "k_w", a.k_w.len(), d)?;
    let args = ffi::rmsnorm::HeadNormForward {
        y: cuda.ptr_mut(&a.y)?,
        rstd: cuda.ptr_mut(&a.rstd)?,
        x: cuda.ptr(&a.x)?,
        q_w: cuda.ptr(&a.q_w)?,
        k_w: cuda.ptr(&a.k_w)?,
        t: a.t as u64,
        h: a.heads.h as u32,
        g: a.heads.g as u32,
        d: d as u32,
        eps: a.eps,
    };
    // SAFETY: as in rmsnorm_forward.
    unsafe { ffi::rmsnorm::head_norm_forward(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn head_norm_backward(cuda: &Cuda, a: HeadNormBackward) -> Result<()> {
    const OP: &str = "head_norm_backward";
    check_heads(OP, a.heads)?;
    let (n, d) = (a.t * a.heads.qkv(), a.heads.d);
    at_least(OP, "dqkv", a.dqkv.len(), n)?;
    at_least(OP, "x", a.x.len(), n)?;
    at_least(OP, "rstd", a.rstd.len(), a.t * (a.heads.h + a.heads.g))?;
    at_least(OP, "q_w", a.q_w.len(), d)?;
    at_least(OP, "k_w", a.k_w.len(), d)?;
    let args = ffi::rmsnorm::HeadNormBackward {
        dqkv: cuda.ptr_mut(&a.dqkv)?,
        x: cuda.ptr(&a.x)?,
        rstd: cuda.ptr(&a.rstd)?,
        q_w: cuda.ptr(&a.q_w)?,
        k_w: cuda.ptr(&a.k_w)?,
        t: a.t as u64,
        h: a.heads.h as u32,
        g: a.heads.g as u32,
        d: d as u32,
        unused: 0,
    };
    // SAFETY: as in rmsnorm_forward.
    unsafe { ffi::rmsnorm::head_norm_backward(&args, cuda.stream_for_launch()?) }.check(OP)
}
