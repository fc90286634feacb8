//! csrc/grad_norm.cu behind checks.

use super::{at_least, ffi};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::Result;

/// Elements of [`GradNorm::partial`].
pub const GRAD_NORM_PARTIALS: usize = 1024;

/// norm = sqrt(sum of squares of all of grads), in an order that the length alone decides.
pub struct GradNorm<'a> {
    /// (1) =
    pub norm: ViewMut<'a, f32>,
    /// (P)
    pub grads: View<'a, f32>,
    /// (GRAD_NORM_PARTIALS) scratch
    pub partial: ViewMut<'a, f64>,
}

pub fn grad_norm(cuda: &Cuda, a: GradNorm) -> Result<()> {
    const OP: &str = "grad_norm";
    at_least(OP, "norm", a.norm.len(), 1)?;
    at_least(OP, "partial", a.partial.len(), GRAD_NORM_PARTIALS)?;
    let args = ffi::grad_norm::GradNorm {
        norm: cuda.ptr_mut(&a.norm)?,
        grads: cuda.ptr(&a.grads)?,
        partial: cuda.ptr_mut(&a.partial)?,
        n: a.grads.len() as u64,
    };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above) and outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { ffi::grad_norm::grad_norm(&args, cuda.stream_for_launch()?) }.check(OP)
}
