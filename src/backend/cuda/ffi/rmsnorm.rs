//! csrc/rmsnorm.cu.

use half::bf16;

use super::{Status, Stream};

/// `delta` and `s` are null together.
#[repr(C)]
pub struct RmsNormForward {
    pub y: *mut bf16,
    pub rstd: *mut f32,
    pub x: *const bf16,
    pub delta: *const bf16,
    pub s: *mut bf16,
    pub w: *const bf16,
    pub t: u64,
    pub c: u64,
    pub eps: f32,
}

#[repr(C)]
pub struct RmsNormBackward {
    pub dx: *mut bf16,
    pub dy: *const bf16,
    pub x: *const bf16,
    pub w: *const bf16,
    pub rstd: *const f32,
    pub t: u64,
    pub c: u64,
}

#[repr(C)]
pub struct HeadNormForward {
    pub y: *mut bf16,
    pub rstd: *mut f32,
    pub x: *const bf16,
    pub q_w: *const bf16,
    pub k_w: *const bf16,
    pub t: u64,
    pub h: u32,
    pub g: u32,
    pub d: u32,
    pub eps: f32,
}

#[repr(C)]
pub struct HeadNormBackward {
    pub dqkv: *mut bf16,
    pub x: *const bf16,
    pub rstd: *const f32,
    pub q_w: *const bf16,
    pub k_w: *const bf16,
    pub t: u64,
    pub h: u32,
    pub g: u32,
    pub d: u32,
    pub unused: u32,
}

// The same numbers stand in static_asserts of csrc/rmsnorm.cu.
const _: () = assert!(size_of::<RmsNormForward>() == 72);
const _: () = assert!(size_of::<RmsNormBackward>() == 56);
const _: () = assert!(size_of::<HeadNormForward>() == 64);
const _: () = assert!(size_of::<HeadNormBackward>() == 64);

unsafe extern "C" {
    pub fn rmsnorm_forward(args: *const RmsNormForward, stream: Stream) -> Status;
    pub fn rmsnorm_backward(args: *const RmsNormBackward, stream: Stream) -> Status;
    pub fn head_norm_forward(args: *const HeadNormForward, stream: Stream) -> Status;
    pub fn head_norm_backward(args: *const HeadNormBackward, stream: Stream) -> Status;
}
