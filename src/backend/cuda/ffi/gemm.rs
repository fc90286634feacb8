//! csrc/gemm.cu and csrc/gemm_sm90.cu: two kernels behind the same arguments.

use std::ffi::c_void;

use half::bf16;

use super::{Dtype, Status, Stream};

#[repr(C)]
pub struct Gemm {
    pub c: *mut c_void,
    pub a: *const bf16,
    pub b: *const bf16,
    pub a2: *const bf16,
    pub b2: *const bf16,
    pub bias: *const bf16,
    pub ldc: i64,
    pub lda: i64,
    pub ldb: i64,
    pub lda2: i64,
    pub ldb2: i64,
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub k2: i32,
    pub alpha: f32,
    pub accumulate: i32,
    pub b_transposed: i32,
    pub c_dtype: Dtype,
}

// The same number stands in a static_assert of csrc/gemm_args.cuh.
const _: () = assert!(size_of::<Gemm>() == 120);

unsafe extern "C" {
    pub fn gemm(args: *const Gemm, stream: Stream) -> Status;
    pub fn gemm_sm90(args: *const Gemm, stream: Stream) -> Status;
}
