//! csrc/load.cu behind checks.

use std::ffi::c_void;
use std::ptr::null_mut;

use half::bf16;

use super::nf4::Source;
use super::{at_least, exactly, ffi};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::ViewMut;
use crate::error::Result;

/// Rounds n weights to bf16, and says whether one of them is NaN or infinite.
pub struct LoadDense<'a> {
    /// (n) =; None: look at x alone
    pub out: Option<ViewMut<'a, bf16>>,
    /// (n)
    pub x: Source<'a>,
    /// (1) = 1 if one is not finite, else as it was
    pub bad: ViewMut<'a, u32>,
}

pub fn load_dense(cuda: &Cuda, a: LoadDense) -> Result<()> {
    const OP: &str = "load_dense";
    let (x, n, x_dtype) = match a.x {
        Source::F32(x) => (cuda.ptr(&x)?.cast::<c_void>(), x.len(), ffi::Dtype::F32),
        Source::Bf16(x) => (cuda.ptr(&x)?.cast(), x.len(), ffi::Dtype::Bf16),
        Source::F16(x) => (cuda.ptr(&x)?.cast(), x.len(), ffi::Dtype::F16),
    };
    at_least(OP, "bad", a.bad.len(), 1)?;
    let out = match a.out {
        Some(out) => {
            exactly(OP, "out", out.len(), n)?;
            cuda.ptr_mut(&out)?
        }
        None => null_mut(),
    };
    let args = ffi::load::LoadDense { out, x, bad: cuda.ptr_mut(&a.bad)?, n: n as u64, x_dtype };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above) and outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { ffi::load::load_dense(&args, cuda.stream_for_launch()?) }.check(OP)
}
