//! csrc/rope.cu.

use half::bf16;

use super::{Status, Stream};

#[repr(C)]
pub struct Rope {
    pub qkv: *mut bf16,
    pub positions: *const i32,
    pub inv_freq: *const f32,
    pub t: u64,
    pub h: u32,
    pub g: u32,
    pub d: u32,
    pub unused: u32,
}

// The same number stands in a static_assert of csrc/rope.cu.
const _: () = assert!(size_of::<Rope>() == 48);

unsafe extern "C" {
    pub fn rope_forward(args: *const Rope, stream: Stream) -> Status;
    pub fn rope_backward(args: *const Rope, stream: Stream) -> Status;
}
