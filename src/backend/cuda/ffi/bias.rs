//! csrc/bias.cu.

use half::bf16;

use super::{Status, Stream};

#[repr(C)]
pub struct BiasRows {
    pub y: *mut bf16,
    pub bias: *const bf16,
    pub t: u64,
    pub n: u64,
    pub ld: u64,
}

// The same number stands in a static_assert of csrc/bias.cu.
const _: () = assert!(size_of::<BiasRows>() == 40);

unsafe extern "C" {
    pub fn bias_rows(args: *const BiasRows, stream: Stream) -> Status;
}
