//! csrc/bias.cu behind checks.

use half::bf16;

use super::{at_least, ffi};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::Result;

/// `y[t,:] = bias`
pub struct BiasRows<'a> {
    /// (T, N) = rows `ld` elements apart
    pub y: ViewMut<'a, bf16>,
    pub ld: usize,
    /// (N)
    pub bias: View<'a, bf16>,
    pub t: usize,
    pub n: usize,
}

pub fn bias_rows(cuda: &Cuda, a: BiasRows) -> Result<()> {
    const OP: &str = "bias_rows";
    if a.t == 0 {
        return Ok(());
    }
    at_least(OP, "ld", a.ld, a.n)?;
    at_least(OP, "y", a.y.len(), (a.t - 1) * a.ld + a.n)?;
    at_least(OP, "bias", a.bias.len(), a.n)?;
    let args = ffi::bias::BiasRows {
        y: cuda.ptr_mut(&a.y)?,
        bias: cuda.ptr(&a.bias)?,
        t: a.t as u64,
        n: a.n as u64,
        ld: a.ld as u64,
    };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above) and outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { ffi::bias::bias_rows(&args, cuda.stream_for_launch()?) }.check(OP)
}
