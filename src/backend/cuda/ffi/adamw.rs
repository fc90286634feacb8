//! csrc/adamw.cu.

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::{Status, Stream};

/// A parameter group: weights from `start` up to the start of the next.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Group {
    pub start: u64,
    /// 1 - lr * weight_decay
    pub decay: f32,
    /// lr / (1 - beta1^step)
    pub rate: f32,
}

/// A tensor of the adapter: weights from `start` on, blocks of 256 from `block` on.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Tensor {
    pub start: u64,
    pub block: u64,
}

#[repr(C)]
pub struct Factors {
    pub norm: *const f32,
    pub groups: *const Group,
    pub group_count: u32,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub bias2_root: f32,
    pub max_grad_norm: f32,
}

#[repr(C)]
pub struct Adamw32bit {
    pub master: *mut f32,
    pub m: *mut f32,
    pub v: *mut f32,
    pub lora: *mut bf16,
    pub grads: *const f32,
    pub factors: Factors,
    pub begin: u64,
    pub end: u64,
}

#[repr(C)]
pub struct Adamw8bit {
    pub master: *mut f32,
    pub m: *mut u8,
    pub v: *mut u8,
    pub m_absmax: *mut f32,
    pub v_absmax: *mut f32,
    pub lora: *mut bf16,
    pub grads: *const f32,
    pub factors: Factors,
    pub tensors: *const Tensor,
    pub p: u64,
    pub block_begin: u64,
    pub block_end: u64,
    pub tensor_count: u32,
}

// The same numbers stand in static_asserts of csrc/adamw.cu.
const _: () = assert!(size_of::<Group>() == 16);
const _: () = assert!(size_of::<Tensor>() == 16);
const _: () = assert!(size_of::<Factors>() == 40);
const _: () = assert!(size_of::<Adamw32bit>() == 96);
const _: () = assert!(size_of::<Adamw8bit>() == 136);

unsafe extern "C" {
    pub fn adamw_32bit(args: *const Adamw32bit, stream: Stream) -> Status;
    pub fn adamw_8bit(args: *const Adamw8bit, stream: Stream) -> Status;
}
