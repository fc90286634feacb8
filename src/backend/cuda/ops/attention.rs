//! csrc/attention*.cu behind checks: the kernels for any card, and on Hopper, for heads of 64 and 128, those of
//! attention_sm90*.cu.
//!
//! Sequences lie end to end: `cu_seqlens` (B+1) holds where each starts, begins with 0, never falls, and ends with T. It is
//! in device memory and not looked at here; it may end in repeats of T, which are empty sequences.

use half::bf16;

use super::{at_least, ffi};
use crate::backend::Heads;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::backend::cuda::{Cuda, Kernels};
use crate::error::{Error, Result};

/// o = softmax(scale * q kᵀ + mask) v, causal inside each sequence; query head n reads KV head n / (H/G).
pub struct AttentionForward<'a> {
    /// (T, H*D) =
    pub o: ViewMut<'a, bf16>,
    /// (H, T) = log-sum-exp of each row of scores
    pub lse: ViewMut<'a, f32>,
    /// (T, (H+2G)*D)
    pub qkv: View<'a, bf16>,
    /// (B+1)
    pub cu_seqlens: View<'a, i32>,
    pub t: usize,
    pub b: usize,
    pub heads: Heads,
}

pub struct AttentionBackward<'a> {
    /// (T, (H+2G)*D) =
    pub dqkv: ViewMut<'a, bf16>,
    /// (H, T) scratch: sum_d(d_o * o) of each row
    pub delta: ViewMut<'a, f32>,
    /// (T, H*D)
    pub d_o: View<'a, bf16>,
    /// (T, H*D)
    pub o: View<'a, bf16>,
    /// (H, T)
    pub lse: View<'a, f32>,
    /// (T, (H+2G)*D)
    pub qkv: View<'a, bf16>,
    /// (B+1)
    pub cu_seqlens: View<'a, i32>,
    pub t: usize,
    pub b: usize,
    pub heads: Heads,
}

pub fn attention_forward(cuda: &Cuda, a: AttentionForward) -> Result<()> {
    const OP: &str = "attention_forward";
    let (t, b, heads) = (a.t, a.b, a.heads);
    check_sizes(OP, t, b, heads)?;
    at_least(OP, "o", a.o.len(), t * heads.h * heads.d)?;
    at_least(OP, "lse", a.lse.len(), heads.h * t)?;
    at_least(OP, "qkv", a.qkv.len(), t * heads.qkv())?;
    at_least(OP, "cu_seqlens", a.cu_seqlens.len(), b + 1)?;
    let args = ffi::attention::AttentionForward {
        o: cuda.ptr_mut(&a.o)?,
        lse: cuda.ptr_mut(&a.lse)?,
        qkv: cuda.ptr(&a.qkv)?,
        cu_seqlens: cuda.ptr(&a.cu_seqlens)?,
        t: t as i32,
        b: b as i32,
        h: heads.h as i32,
        g: heads.g as i32,
        d: heads.d as i32,
        window: window(t, heads),
        scale: heads.scale(),
    };
    let launch =
        if on_hopper(cuda, heads) { ffi::attention::attention_forward_sm90 } else { ffi::attention::attention_forward };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above) and outlive the kernel: freeing is ordered behind it on the stream. The launcher refuses addresses that are
    // not aligned.
    unsafe { launch(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn attention_backward(cuda: &Cuda, a: AttentionBackward) -> Result<()> {
    const OP: &str = "attention_backward";
    let (t, b, heads) = (a.t, a.b, a.heads);
    check_sizes(OP, t, b, heads)?;
    at_least(OP, "dqkv", a.dqkv.len(), t * heads.qkv())?;
    at_least(OP, "delta", a.delta.len(), heads.h * t)?;
    at_least(OP, "d_o", a.d_o.len(), t * heads.h * heads.d)?;
    at_least(OP, "o", a.o.len(), t * heads.h * heads.d)?;
    at_least(OP, "lse", a.lse.len(), heads.h * t)?;
    at_least(OP, "qkv", a.qkv.len(), t * heads.qkv())?;
    at_least(OP, "cu_seqlens", a.cu_seqlens.len(), b + 1)?;
    let args = ffi::attention::AttentionBackward {
        dqkv: cuda.ptr_mut(&a.dqkv)?,
        delta: cuda.ptr_mut(&a.delta)?,
        d_o: cuda.ptr(&a.d_o)?,
        o: cuda.ptr(&a.o)?,
        lse: cuda.ptr(&a.lse)?,
        qkv: cuda.ptr(&a.qkv)?,
        cu_seqlens: cuda.ptr(&a.cu_seqlens)?,
        t: t as i32,
        b: b as i32,
        h: heads.h as i32,
        g: heads.g as i32,
        d: heads.d as i32,
        window: window(t, heads),
        scale: heads.scale(),
    };
    let launch = if on_hopper(cuda, heads) {
        ffi::attention::attention_backward_sm90
    } else {
        ffi::attention::attention_backward
    };
    // SAFETY: as in attention_forward.
    unsafe { launch(&args, cuda.stream_for_launch()?) }.check(OP)
}

/// Whether the wgmma kernels serve.
fn on_hopper(cuda: &Cuda, heads: Heads) -> bool {
    cuda.kernels() == Kernels::Sm90 && matches!(heads.d, 64 | 128)
}

/// What the kernels can do, and count in 32 bits.
fn check_sizes(op: &'static str, t: usize, b: usize, heads: Heads) -> Result<()> {
    let Heads { h, g, d, window } = heads;
    let shape = |argument, found, expected| Err(Error::Shape { op, argument, found, expected });
    if h == 0 || g == 0 || !h.is_multiple_of(g) {
        return shape("heads", h, g.max(1));
    }
    if window == Some(0) {
        return shape("window", 0, 1);
    }
    if !(16..=256).contains(&d) || !d.is_multiple_of(8) {
        return shape("heads.d (16 to 256, in steps of 8)", d, d.next_multiple_of(8).clamp(16, 256));
    }
    at_least(op, "b", b, t.min(1))?;
    let most = i32::MAX as usize / (h + 2 * g) - 64;
    let rows = b.saturating_mul(64).saturating_add(t);
    if rows > most { shape("t + 64 * b (at most)", rows, most) } else { Ok(()) }
}

/// How many keys a query sees at most, as a number in 1..=T.
fn window(t: usize, heads: Heads) -> i32 {
    heads.window.unwrap_or(t).min(t).max(1) as i32
}
