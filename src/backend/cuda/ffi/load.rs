//! csrc/load.cu.

use std::ffi::c_void;

use half::bf16;

use super::{Dtype, Status, Stream};

#[repr(C)]
pub struct LoadDense {
    pub out: *mut bf16,
    pub x: *const c_void,
    pub bad: *mut u32,
    pub n: u64,
    pub x_dtype: Dtype,
}

// The same number stands in a static_assert of csrc/load.cu.
const _: () = assert!(size_of::<LoadDense>() == 40);

unsafe extern "C" {
    pub fn load_dense(args: *const LoadDense, stream: Stream) -> Status;
}
