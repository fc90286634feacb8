//! csrc/nf4_gemm.cu.

use half::bf16;

use super::nf4::{Nf4Absmax, QuantType};
use super::{Status, Stream};

#[repr(C)]
pub struct Nf4Gemm {
    pub c: *mut bf16,
    pub a: *const bf16,
    pub packed: *const u8,
    pub absmax: Nf4Absmax,
    pub a2: *const bf16,
    pub b2: *const bf16,
    pub bias: *const bf16,
    pub ldc: i64,
    pub lda: i64,
    pub lda2: i64,
    pub ldb2: i64,
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub k2: i32,
    pub accumulate: i32,
    pub backward: i32,
    pub quant_type: QuantType,
    pub unused: i32,
}

// The same number stands in a static_assert of csrc/nf4_gemm.cu.
const _: () = assert!(size_of::<Nf4Gemm>() == 144);

unsafe extern "C" {
    pub fn nf4_gemm(args: *const Nf4Gemm, stream: Stream) -> Status;
}
