//! csrc/swiglu.cu.

use half::bf16;

use super::{Status, Stream};

#[repr(C)]
pub struct SwigluForward {
    pub y: *mut bf16,
    pub gate_up: *const bf16,
    pub t: u64,
    pub f: u64,
}

#[repr(C)]
pub struct SwigluBackward {
    pub gate_up: *mut bf16,
    pub dy: *const bf16,
    pub t: u64,
    pub f: u64,
}

// The same numbers stand in static_asserts of csrc/swiglu.cu.
const _: () = assert!(size_of::<SwigluForward>() == 32);
const _: () = assert!(size_of::<SwigluBackward>() == 32);

unsafe extern "C" {
    pub fn swiglu_forward(args: *const SwigluForward, stream: Stream) -> Status;
    pub fn swiglu_backward(args: *const SwigluBackward, stream: Stream) -> Status;
}
