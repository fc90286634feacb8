//! csrc/lora.cu.

use half::bf16;

use super::{Status, Stream};

/// As LORA_MAX_PARTS of csrc/lora.cuh.
pub const MAX_PARTS: usize = 3;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct LoraPart {
    pub a: u64,
    pub b: u64,
    pub r: i32,
    pub scale: f32,
    pub site: u32,
    pub y: i32,
    pub n: i32,
    pub h: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct LoraGroup {
    pub parts: [LoraPart; MAX_PARTS],
    pub lora: *const bf16,
    pub count: i32,
    pub r: i32,
}

/// `step` null: none.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LoraDropout {
    pub step: *const u32,
    pub seed: u64,
    pub threshold: u32,
    pub inverse: f32,
}

#[repr(C)]
pub struct LoraForward {
    pub group: LoraGroup,
    pub dropout: LoraDropout,
    pub h: *mut bf16,
    pub x: *const bf16,
    pub scratch: *mut f32,
    pub scratch_len: u64,
    pub t: i32,
    pub k: i32,
}

#[repr(C)]
pub struct LoraExpand {
    pub group: LoraGroup,
    pub y: *mut bf16,
    pub h: *const bf16,
    pub t: i32,
    pub n: i32,
}

#[repr(C)]
pub struct LoraBackward {
    pub group: LoraGroup,
    pub dropout: LoraDropout,
    pub dh: *mut bf16,
    pub d_lora: *mut f32,
    pub dy: *const bf16,
    pub x: *const bf16,
    pub h: *const bf16,
    pub scratch: *mut f32,
    pub scratch_len: u64,
    pub t: i32,
    pub k: i32,
    pub n: i32,
    pub pad: i32,
}

#[repr(C)]
pub struct LoraBackwardX {
    pub group: LoraGroup,
    pub dropout: LoraDropout,
    pub dx: *mut bf16,
    pub dh: *const bf16,
    pub t: i32,
    pub k: i32,
}

// The same numbers stand in static_asserts of csrc/lora.cu, lora.cuh and philox.cuh.
const _: () = assert!(size_of::<LoraPart>() == 40);
const _: () = assert!(size_of::<LoraGroup>() == 136);
const _: () = assert!(size_of::<LoraDropout>() == 24);
const _: () = assert!(size_of::<LoraForward>() == 200);
const _: () = assert!(size_of::<LoraExpand>() == 160);
const _: () = assert!(size_of::<LoraBackward>() == 232);
const _: () = assert!(size_of::<LoraBackwardX>() == 184);

unsafe extern "C" {
    pub fn lora_forward(args: *const LoraForward, stream: Stream) -> Status;
    pub fn lora_expand(args: *const LoraExpand, stream: Stream) -> Status;
    pub fn lora_backward(args: *const LoraBackward, stream: Stream) -> Status;
    pub fn lora_backward_x(args: *const LoraBackwardX, stream: Stream) -> Status;
}
