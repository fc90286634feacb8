//! csrc/cross_entropy.cu.

use half::bf16;

use super::{Status, Stream};

#[repr(C)]
pub struct CrossEntropy {
    pub logits: *mut f32,
    pub row_loss: *mut f32,
    pub ids: *const i32,
    pub scale: *const f32,
    pub m: u64,
    pub v: u64,
    /// 0 or 1.
    pub gradient: u32,
    pub unused: u32,
}

/// Of gather_rows and scatter_rows.
#[repr(C)]
pub struct MoveRows {
    pub to: *mut bf16,
    pub from: *const bf16,
    pub rows: *const i32,
    pub m: u64,
    pub c: u64,
    pub t: u64,
}

#[repr(C)]
pub struct AddLoss {
    pub loss: *mut f32,
    pub row_loss: *const f32,
    pub scale: *const f32,
    pub m: u64,
}

// The same numbers stand in static_asserts of csrc/cross_entropy.cu.
const _: () = assert!(size_of::<CrossEntropy>() == 56);
const _: () = assert!(size_of::<MoveRows>() == 48);
const _: () = assert!(size_of::<AddLoss>() == 32);

unsafe extern "C" {
    pub fn cross_entropy(args: *const CrossEntropy, stream: Stream) -> Status;
    pub fn gather_rows(args: *const MoveRows, stream: Stream) -> Status;
    pub fn scatter_rows(args: *const MoveRows, stream: Stream) -> Status;
    pub fn add_loss(args: *const AddLoss, stream: Stream) -> Status;
}
