//! csrc/embedding.cu.

use half::bf16;

use super::{Status, Stream};

#[repr(C)]
pub struct Embedding {
    pub x: *mut bf16,
    pub tokens: *const i32,
    pub table: *const bf16,
    pub t: u64,
    pub c: u64,
    pub v: u64,
}

// The same number stands in a static_assert of csrc/embedding.cu.
const _: () = assert!(size_of::<Embedding>() == 48);

unsafe extern "C" {
    pub fn embedding(args: *const Embedding, stream: Stream) -> Status;
}
