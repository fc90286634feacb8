//! csrc/swiglu.cu behind checks.

use half::bf16;

use super::{at_least, ffi};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::Result;

/// y = silu(gate) * up
pub struct SwigluForward<'a> {
    /// (T, F) =
    pub y: ViewMut<'a, bf16>,
    /// (T, 2F): gate, then up
    pub gate_up: View<'a, bf16>,
    pub t: usize,
    pub f: usize,
}

pub struct SwigluBackward<'a> {
    /// (T, 2F) in: gate, then up; out: their gradients
    pub gate_up: ViewMut<'a, bf16>,
    /// (T, F)
    pub dy: View<'a, bf16>,
    pub t: usize,
    pub f: usize,
}

pub fn swiglu_forward(cuda: &Cuda, a: SwigluForward) -> Result<()> {
    const OP: &str = "swiglu_forward";
    at_least(OP, "f", a.f, 1)?;
    at_least(OP, "y", a.y.len(), a.t * a.f)?;
    at_least(OP, "gate_up", a.gate_up.len(), 2 * a.t * a.f)?;
    let args = ffi::swiglu::SwigluForward {
        y: cuda.ptr_mut(&a.y)?,
        gate_up: cuda.ptr(&a.gate_up)?,
        t: a.t as u64,
        f: a.f as u64,
    };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above) and outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { ffi::swiglu::swiglu_forward(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn swiglu_backward(cuda: &Cuda, a: SwigluBackward) -> Result<()> {
    const OP: &str = "swiglu_backward";
    at_least(OP, "f", a.f, 1)?;
    at_least(OP, "gate_up", a.gate_up.len(), 2 * a.t * a.f)?;
    at_least(OP, "dy", a.dy.len(), a.t * a.f)?;
    let args = ffi::swiglu::SwigluBackward {
        gate_up: cuda.ptr_mut(&a.gate_up)?,
        dy: cuda.ptr(&a.dy)?,
        t: a.t as u64,
        f: a.f as u64,
    };
    // SAFETY: as in swiglu_forward.
    unsafe { ffi::swiglu::swiglu_backward(&args, cuda.stream_for_launch()?) }.check(OP)
}
