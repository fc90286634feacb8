//! csrc/grad_norm.cu.

use super::{Status, Stream};

#[repr(C)]
pub struct GradNorm {
    pub norm: *mut f32,
    pub grads: *const f32,
    pub partial: *mut f64,
    pub n: u64,
}

// The same number stands in a static_assert of csrc/grad_norm.cu.
const _: () = assert!(size_of::<GradNorm>() == 32);

unsafe extern "C" {
    pub fn grad_norm(args: *const GradNorm, stream: Stream) -> Status;
}
