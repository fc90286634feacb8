//! csrc/rope.cu behind checks.

use half::bf16;

use super::{at_least, check_heads, ffi};
use crate::backend::Heads;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::Result;

/// For i < D/2: angle = `positions[t] * inv_freq[i]` in f32; (x_i, x_{i+D/2}) turned by it, in each query and key head.
pub struct Rope<'a> {
    /// (T, (H+2G)*D) in place; v is left alone
    pub qkv: ViewMut<'a, bf16>,
    /// (T)
    pub positions: View<'a, i32>,
    /// (D/2)
    pub inv_freq: View<'a, f32>,
    pub t: usize,
    pub heads: Heads,
}

pub fn rope_forward(cuda: &Cuda, a: Rope) -> Result<()> {
    const OP: &str = "rope_forward";
    let args = checked(OP, cuda, a)?;
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above) and outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { ffi::rope::rope_forward(&args, cuda.stream_for_launch()?) }.check(OP)
}

/// Turns by the negative angles: what the forward turned comes back.
pub fn rope_backward(cuda: &Cuda, a: Rope) -> Result<()> {
    const OP: &str = "rope_backward";
    let args = checked(OP, cuda, a)?;
    // SAFETY: as in rope_forward.
    unsafe { ffi::rope::rope_backward(&args, cuda.stream_for_launch()?) }.check(OP)
}

fn checked(op: &'static str, cuda: &Cuda, a: Rope) -> Result<ffi::rope::Rope> {
    check_heads(op, a.heads)?;
    at_least(op, "qkv", a.qkv.len(), a.t * a.heads.qkv())?;
    at_least(op, "positions", a.positions.len(), a.t)?;
    at_least(op, "inv_freq", a.inv_freq.len(), a.heads.d / 2)?;
    Ok(ffi::rope::Rope {
        qkv: cuda.ptr_mut(&a.qkv)?,
        positions: cuda.ptr(&a.positions)?,
        inv_freq: cuda.ptr(&a.inv_freq)?,
        t: a.t as u64,
        h: a.heads.h as u32,
        g: a.heads.g as u32,
        d: a.heads.d as u32,
        unused: 0,
    })
}
