//! csrc/attention.cu and attention_backward.cu, and the same for Hopper: attention_sm90.cu and attention_sm90_backward.cu.

use half::bf16;

use super::{Status, Stream};

#[repr(C)]
pub struct AttentionForward {
    pub o: *mut bf16,
    pub lse: *mut f32,
    pub qkv: *const bf16,
    pub cu_seqlens: *const i32,
    pub t: i32,
    pub b: i32,
    pub h: i32,
    pub g: i32,
    pub d: i32,
    /// In 1..=t: query i sees keys j with i - window < j <= i; t where there is no window.
    pub window: i32,
    pub scale: f32,
}

#[repr(C)]
pub struct AttentionBackward {
    pub dqkv: *mut bf16,
    pub delta: *mut f32,
    pub d_o: *const bf16,
    pub o: *const bf16,
    pub lse: *const f32,
    pub qkv: *const bf16,
    pub cu_seqlens: *const i32,
    pub t: i32,
    pub b: i32,
    pub h: i32,
    pub g: i32,
    pub d: i32,
    /// As in [`AttentionForward`].
    pub window: i32,
    pub scale: f32,
}

// The same numbers stand in static_asserts of csrc/attention.cuh.
const _: () = assert!(size_of::<AttentionForward>() == 64);
const _: () = assert!(size_of::<AttentionBackward>() == 88);

unsafe extern "C" {
    pub fn attention_forward(args: *const AttentionForward, stream: Stream) -> Status;
    pub fn attention_backward(args: *const AttentionBackward, stream: Stream) -> Status;
    pub fn attention_forward_sm90(args: *const AttentionForward, stream: Stream) -> Status;
    pub fn attention_backward_sm90(args: *const AttentionBackward, stream: Stream) -> Status;
}
